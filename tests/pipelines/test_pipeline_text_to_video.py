"""Text to video: inputs, outputs, guidance, per-sample noise, saving, start image, and the bundled checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DDIMScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    WanTransformer3DModel,
)

from dit_suite.call_options import TextToVideoOptions
from dit_suite.pipelines.pipeline_text_to_video import TextToVideoPipeline
from dit_suite.registry import technique
from dit_suite.schedulers.generators import sample_generators
from dit_suite.step_plan import current_step

ROOT = Path(__file__).parents[2]
SIZE = {"num_frames": 4, "height": 8, "width": 12}


def _transformer(seed=0, **changes):
    torch.manual_seed(seed)
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 3,
        "out_channels": 3,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**(config | changes)).eval()


@pytest.fixture(scope="module")
def pipe():
    pipe = TextToVideoPipeline(_transformer(), FlowMatchEulerDiscreteScheduler(shift=3.0), sample_size=(4, 8, 12))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _embeds(count=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(count, 5, 8, generator=generator)
    return {"prompt_embeds": given, "negative_prompt_embeds": torch.zeros_like(given)}


def _run(pipe, count=1, **changes):
    call = {
        **_embeds(count),
        "num_inference_steps": 2,
        "output_type": "np",
        "generator": sample_generators(7, range(count)),
        "return_dict": False,
    }
    return pipe(**(call | changes))[0]


def test_one_euler_step_is_the_formula(pipe):
    """x0 = x1 - v: one step of the flow from noise, with guidance u + g (c - u)."""
    embeds = _embeds()
    noise = torch.randn(1, 3, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    out = _run(pipe, latents=noise, num_inference_steps=1, guidance_scale=4.0, output_type="latent")
    timestep = torch.tensor([1000.0])
    with torch.no_grad():
        cond, uncond = (
            pipe.transformer(hidden_states=noise, timestep=timestep, encoder_hidden_states=states).sample
            for states in embeds.values()
        )
    assert (out - (noise - (uncond + 4.0 * (cond - uncond)))).abs().max() < 1e-5


def test_output_types_agree(pipe):
    latent = _run(pipe, output_type="latent")
    array = _run(pipe)
    tensor = _run(pipe, output_type="pt")
    frames = _run(pipe, output_type="pil")
    assert array.shape == (1, 4, 8, 12, 3)
    assert np.abs(array[0] - (latent[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).numpy()).max() < 1e-6
    assert np.abs(tensor[0].permute(0, 2, 3, 1).numpy() - array[0]).max() < 1e-6
    assert np.abs(np.stack(frames[0]) / 255.0 - array[0]).max() < 1 / 255
    assert pipe(**_embeds(), num_inference_steps=1, output_type="latent").frames.shape == latent.shape


def test_guidance_off_ignores_the_negative_and_batched_equals_separate(pipe):
    other = torch.ones(1, 5, 8)
    assert np.array_equal(_run(pipe, guidance_scale=1.0), _run(pipe, guidance_scale=1.0, negative_prompt_embeds=other))
    assert np.abs(_run(pipe) - _run(pipe, negative_prompt_embeds=other)).max() > 1e-3
    assert np.abs(_run(pipe) - _run(pipe, batched_guidance=True)).max() < 1e-5


def test_a_clip_does_not_depend_on_its_batch(pipe):
    together = _run(pipe, count=3)
    embeds = _embeds(3)
    for i in range(3):
        alone = _run(
            pipe,
            prompt_embeds=embeds["prompt_embeds"][i : i + 1],
            generator=sample_generators(7, [i]),
        )
        assert np.abs(together[i] - alone[0]).max() < 1e-5
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_steps_are_published(pipe):
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(current_step()))
    _run(pipe, num_inference_steps=3)
    handle.remove()
    assert [(s.step_index, s.num_steps, s.branch) for s in seen] == [
        (i, 3, branch) for i in range(3) for branch in ("uncond", "cond")
    ]
    assert len({id(s.run) for s in seen}) == 1


def test_callback_can_replace_and_interrupt(pipe):
    calls = []

    def stop(pipe, index, timestep, tensors):
        calls.append(index)
        pipe._interrupt = index == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    evaluations = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: evaluations.append(1))
    out = _run(pipe, num_inference_steps=5, callback_on_step_end=stop, output_type="latent")
    handle.remove()
    assert calls == [0, 1]
    assert len(evaluations) == 4
    assert out.abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "a"}, "either prompt or prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": None}, "no text encoder"),
        ({"height": 7}, "height must be a positive multiple of 2, got 7"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"generator": [torch.Generator()] * 2}, "2 generators were given for 1 samples"),
        ({"latents": torch.zeros(1, 3, 4, 8, 8)}, "latents must have the shape"),
        ({"output_type": "gif"}, "output_type must be one of"),
        ({"fps": 0}, "fps must be at least 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callbacks can have"),
        ({"image": PIL.Image.new("RGB", (8, 8))}, "takes no start image"),
        ({"negative_prompt_embeds": torch.zeros(1, 6, 8)}, "must have one shape"),
    ],
)
def test_bad_input_is_one_sentence(pipe, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        _run(pipe, **changes)


def test_wrong_scheduler_is_refused():
    with pytest.raises(ValueError, match="flow velocity"):
        _run(TextToVideoPipeline(_transformer(), DDIMScheduler(), sample_size=(4, 8, 12)))


def test_start_image_reaches_the_network():
    pipe = TextToVideoPipeline(
        _transformer(in_channels=7), FlowMatchEulerDiscreteScheduler(shift=3.0), sample_size=(4, 8, 12)
    )
    pipe.set_progress_bar_config(disable=True)
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    red = _run(pipe, image=PIL.Image.new("RGB", (12, 8), (255, 0, 0)))
    handle.remove()
    blue = _run(pipe, image=PIL.Image.new("RGB", (12, 8), (0, 0, 255)))
    mask, clip = seen[0][:, 3:4], seen[0][:, 4:]
    assert mask[:, :, 0].min() == 1
    assert mask[:, :, 1:].abs().max() == 0
    assert clip[0, :, 0, 0, 0].tolist() == [1, -1, -1]
    assert clip[:, :, 1:].abs().max() == 0
    assert np.abs(red - blue).max() > 1e-3
    with pytest.raises(ValueError, match="needs a start image"):
        _run(pipe)


def test_second_network_takes_the_late_steps():
    first, second = _transformer(0), _transformer(1)
    pipe = TextToVideoPipeline(
        first, FlowMatchEulerDiscreteScheduler(), transformer_2=second, boundary_ratio=0.6, sample_size=(4, 8, 12)
    )
    pipe.set_progress_bar_config(disable=True)
    calls = []
    for name, network in (("first", first), ("second", second)):
        network.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    _run(pipe, num_inference_steps=4, guidance_scale=1.0)
    assert calls == ["first", "first", "second", "second"]
    with pytest.raises(ValueError, match="belong together"):
        TextToVideoPipeline(first, FlowMatchEulerDiscreteScheduler(), boundary_ratio=0.6)


def test_vae_space_decodes_to_pixels():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = TextToVideoPipeline(
        _transformer(in_channels=16, out_channels=16), FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae.eval()
    )
    pipe.set_progress_bar_config(disable=True)
    out = _run(pipe, num_frames=5, height=16, width=32)
    assert out.shape == (1, 5, 16, 32, 3)
    assert np.isfinite(out).all()
    with pytest.raises(ValueError, match="1 more than a multiple of 4"):
        _run(pipe, num_frames=6, height=16, width=32)
    latent = _run(pipe, num_frames=5, height=16, width=32, output_type="latent")
    mean, std = (torch.tensor(vae.config[n]).view(1, -1, 1, 1, 1) for n in ("latents_mean", "latents_std"))
    with torch.no_grad():
        expected = (vae.decode(latent * std + mean).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
    assert np.abs(out[0] - expected.numpy()).max() < 1e-5


_LOAD = """
import sys, torch
from dit_suite import load_pipeline, sample_generators
pipe = load_pipeline(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
states = torch.load(sys.argv[2], weights_only=True)
out = pipe(**states, num_inference_steps=2, output_type="latent", generator=sample_generators(7, [0])).frames
torch.save(out, sys.argv[3])
"""


def test_saved_pipeline_opens_in_a_new_process_with_the_same_result(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    torch.save(_embeds(), tmp_path / "states.pt")
    command = [sys.executable, "-c", _LOAD, tmp_path / "saved", tmp_path / "states.pt", tmp_path / "out.pt"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    there = torch.load(tmp_path / "out.pt", weights_only=True)
    here = TextToVideoPipeline.from_pretrained(tmp_path / "saved")
    here.set_progress_bar_config(disable=True)
    assert torch.equal(there, _run(here, output_type="latent"))
    # Weights that lie elsewhere in memory may take another matrix kernel: equal to rounding, not to the bit.
    assert (there - _run(pipe, output_type="latent")).abs().max() < 1e-4


def test_options_match_the_call(pipe):
    import inspect

    parameters = inspect.signature(TextToVideoPipeline.__call__).parameters
    options = TextToVideoOptions()
    assert set(options.to_kwargs()) <= set(parameters)
    assert TextToVideoOptions.condition in parameters
    for name in ("num_inference_steps", "guidance_scale", "fps", "batched_guidance"):
        assert parameters[name].default == getattr(options, name)
    assert technique("wan").bundled == "emoji-wan-16x64"


@pytest.mark.parametrize("batched", [True, False])
def test_diffusers_block_cache_keeps_the_guidance_branches_apart(batched):
    pipe = TextToVideoPipeline(_transformer(), FlowMatchEulerDiscreteScheduler(shift=3.0), sample_size=(4, 8, 12))
    pipe.set_progress_bar_config(disable=True)
    plain = _run(pipe, num_inference_steps=3, batched_guidance=batched)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    assert np.abs(_run(pipe, num_inference_steps=3, batched_guidance=batched) - plain).max() < 1e-5
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    first, second = (_run(pipe, num_inference_steps=3, batched_guidance=batched) for _ in range(2))
    assert np.array_equal(first, second) and np.abs(first - plain).max() > 1e-3


def test_bundle_holds_the_trained_weights_in_small_shards():
    folder = ROOT / "checkpoints" / "emoji-wan-16x64"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["sample_size"] == [16, 64, 64]
    assert index["text_encoder"] == [None, None]
    shards = list((folder / "transformer").glob("*.safetensors"))
    assert shards
    assert max(p.stat().st_size for p in shards) < 10_000_000


def test_bundle_denoises_towards_its_prompt():
    """One pass of the trained network on a half-noised red frame predicts a velocity that points back to it."""
    transformer = WanTransformer3DModel.from_pretrained(ROOT / "checkpoints/emoji-wan-16x64/transformer")
    clean = torch.full((1, 3, 4, 64, 64), 1.0)
    clean[:, 1:, :, 20:44, 20:44] = -0.8
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = transformer(
            hidden_states=0.5 * clean + 0.5 * noise,
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.zeros(1, 24, 384),
        ).sample
    error = (0.5 * clean + 0.5 * noise - 0.5 * velocity - clean).pow(2).mean()
    assert error < 0.1 * (0.5 * (noise - clean)).pow(2).mean()


def test_start_image_in_the_latent_space_of_a_vae():
    """The mask has one channel per frame of a latent frame; the clip is the encoded frame, grey after, normalised."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    pipe = TextToVideoPipeline(
        _transformer(in_channels=36, out_channels=16), FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae
    )
    image = PIL.Image.new("RGB", (32, 16), (255, 0, 0))
    with torch.no_grad():
        condition = pipe.prepare_image_condition(image, 2, 5, 16, 32, torch.device("cpu"))
        clip = torch.zeros(2, 3, 5, 16, 32)
        clip[:, :, 0] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
        latent = vae.encode(clip).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[n]).view(1, -1, 1, 1, 1) for n in ("latents_mean", "latents_std"))
    assert condition.shape == (2, 4 + 16, 2, 2, 4)
    assert condition[:, :4, 0].min() == 1 and condition[:, :4, 1].abs().max() == 0
    assert torch.allclose(condition[:, 4:], (latent - mean) / std, atol=1e-5)

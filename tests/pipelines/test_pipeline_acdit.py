"""ACDiT pipeline: the recorded sampling loop, per-sample generators, prefixes, callbacks, work, saving."""

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import dit_suite
from dit_suite.converters.acdit import make_scheduler
from dit_suite.golden import acdit as golden
from dit_suite.golden import read_fixture, section
from dit_suite.models.acdit import ACDiTTransformer3DModel
from dit_suite.pipelines.pipeline_acdit import ACDiTPipeline
from dit_suite.schedulers.generators import sample_generators
from dit_suite.step_plan import current_step
from tests.tiny import tiny_vae

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def make_pipe(**changes) -> ACDiTPipeline:
    torch.manual_seed(0)
    config = {"in_channels": 3, "sample_height": 8, "sample_width": 8, "patch_size": 2, "block_size": 4}
    config |= {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 16, "num_classes": 3}
    model = ACDiTTransformer3DModel(**{**config, **changes}).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    pipe = ACDiTPipeline(model, make_scheduler(), id2label={"0": "cat", "1": "dog", "2": "owl"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> ACDiTPipeline:
    return make_pipe()


def run(pipe: ACDiTPipeline, labels=("cat", 1), steps: int = 3, **options) -> torch.Tensor:
    options = {"generator": sample_generators(0, range(len(labels))), "output_type": "latent", **options}
    return pipe(list(labels), num_inference_steps=steps, return_dict=False, **options)[0]


@pytest.mark.parametrize("name", ["acdit_image", "acdit_video"])
def test_the_recorded_samples_come_out(name: str):
    tensors, config = read_fixture(GOLDEN / f"{name}.safetensors")
    model, inputs = golden.build(tensors, config), section(tensors, "input")
    pipe = ACDiTPipeline(model, make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    for scale, key in ((config["cfg_scale"], "sample_cfg"), (1.0, "sample_nocfg")):
        out = pipe(
            [int(label) for label in inputs["y"]], config["sample_steps"], scale, output_type="latent",
            latents=model.from_blocks(inputs["sample_noise"]), return_dict=False,
        )[0]  # fmt: skip
        expected = tensors[f"output.{key}"].reshape(inputs["sample_noise"].shape)
        torch.testing.assert_close(model.to_blocks(out), expected, rtol=1e-3, atol=0.05)


def test_samples_do_not_depend_on_the_batch(pipe):
    together = run(pipe, ("cat", "dog", "owl"))
    alone = [run(pipe, (label,), generator=sample_generators(0, [i])) for i, label in enumerate(("cat", "dog", "owl"))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[1])


def test_a_given_prefix_stays_and_equals_forcing_those_blocks(pipe):
    """A13: the blocks after the prefix are what sampling gives when those blocks came out so."""
    whole = run(pipe)
    noise = torch.stack([torch.randn(3, 1, 8, 8, generator=g) for g in sample_generators(0, range(2))])
    continued = run(pipe, prefix=whole, num_prefix_blocks=2, latents=noise, generator=None)
    torch.testing.assert_close(continued, whole, atol=1e-4, rtol=0)
    other = whole.clone()
    other[:, :, :, :4] += 0.5
    changed = run(pipe, prefix=other, num_prefix_blocks=2, latents=noise, generator=None)
    torch.testing.assert_close(changed[..., :4, :], other[..., :4, :], atol=1e-6, rtol=0)
    assert not torch.allclose(changed[..., 4:, :], whole[..., 4:, :], atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_work_per_block(pipe, block_size: int):
    """A7: S passes a block, one of them with the block before; nothing older is encoded again."""
    seen = []

    def record(module, args, kwargs):
        clean = kwargs["clean_hidden_states"]
        step = current_step()
        seen.append((kwargs["block_index"], step.step_index, 0 if clean is None else clean.shape[1], step.branch))

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    run(pipe, guidance_scale=2.0, block_size=block_size)
    handle.remove()
    blocks = 16 // block_size
    assert seen == [(i, s, int(i > 0 and s == 0), "batched") for i in range(blocks) for s in range(3)]


def test_callbacks_and_interruption(pipe):
    calls = []

    def stop_at_four(pipe, step, timestep, tensors):
        calls.append(step)
        pipe._interrupt = step == 4
        return {}

    run(pipe, callback_on_step_end=stop_at_four)
    assert calls == [0, 1, 2, 3, 4]
    assert pipe.num_timesteps == 12

    def zeros_at_the_end(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    assert not run(pipe, callback_on_step_end=zeros_at_the_end).any()


def test_outputs_and_clips(pipe):
    pictures = pipe(["cat"], num_inference_steps=2, generator=sample_generators(0, [0])).images
    assert pictures[0].size == (8, 8)
    clip = make_pipe(num_frames=2, attention_head_dim=16, block_size=16)
    frames = clip([1], num_inference_steps=2, output_type="np").frames
    assert frames.shape == (1, 2, 8, 8, 3)


def test_a_scheduler_that_draws_noise_draws_it_from_the_samples_own_generator():
    pipe = make_pipe()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    together = run(pipe, ("cat", "dog"))
    alone = run(pipe, ("dog",), generator=sample_generators(0, [1]))
    torch.testing.assert_close(alone[0], together[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together, run(make_pipe(), ("cat", "dog")), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2])
def test_a_vae_decodes_every_frame_by_itself(frames: int):
    """Latents divided by the scaling factor, each frame a picture of its own, twice the size of the latent."""
    pipe = make_pipe(in_channels=4, num_frames=frames, block_size=16)
    pipe.register_modules(vae=tiny_vae())
    sampled = run(pipe, guidance_scale=1.0)
    latents = sampled / 100  # an untrained network's are far outside what a VAE decodes
    images = pipe.decode(latents, output_type="np")
    for frame in range(frames):
        expected = pipe.vae.decode(latents[:, :, frame] / pipe.vae.config.scaling_factor).sample
        expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        found = torch.from_numpy(images if frames == 1 else images[:, frame])
        assert found.shape == (2, 16, 16, 3)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert images.std() > 0.01
    whole = run(pipe, output_type="np", guidance_scale=1.0)
    assert whole.shape == images.shape
    assert (whole == pipe.decode(sampled, output_type="np")).all()


def test_guidance_without_a_null_class_is_refused():
    pipe = make_pipe(class_dropout_prob=0.0)
    assert pipe.null_class is None
    with pytest.raises(ValueError, match="no null class, so it can't be guided: set guidance_scale to 1"):
        run(pipe, guidance_scale=1.5)
    assert run(pipe, guidance_scale=1.0).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ("bird",)}, "there is no class .bird."),
        ({"steps": 0}, "num_inference_steps"),
        ({"block_size": 3}, "do not divide"),
        ({"output_type": "gif"}, "output_type"),
        ({"num_prefix_blocks": 1}, "go together"),
        ({"generator": [torch.Generator()]}, "1 generators were given for 2"),
        ({"latents": torch.zeros(1)}, "latents must have the shape"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callbacks can have latents"),
    ],
)
def test_bad_calls_are_refused(pipe, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run(pipe, **options)


def test_a_saved_pipeline_loads_by_its_folder_and_gives_the_same_pixels(pipe, tmp_path: Path):
    pipe.save_pretrained(tmp_path)
    again = dit_suite.load_pipeline(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    assert not any(p.is_meta for p in again.transformer.parameters())
    assert torch.equal(run(again), run(pipe))

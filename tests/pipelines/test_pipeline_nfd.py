"""NFD pipeline: actions in, clip out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dit_suite
from dit_suite.models.nfd import NFDTransformer3DModel
from dit_suite.pipelines.pipeline_nfd import START_FRAMES, NFDPipeline, write_start_frames
from dit_suite.schedulers.generators import sample_generators
from dit_suite.schedulers.trigflow import TrigFlowScheduler
from tests.tiny import tiny_vae

NAMES = ("stay", "left", "right")
ACTIONS = [[0, 1, 1, 1, 2], [2, 2, 2, 0, 0]]


@pytest.fixture(scope="module")
def pipe() -> NFDPipeline:
    torch.manual_seed(0)
    model = NFDTransformer3DModel(
        3, 8, 8, 4, num_layers=2, num_attention_heads=1, attention_head_dim=16, num_actions=3, window=4
    ).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    pipe = NFDPipeline(model, TrigFlowScheduler(), action_names=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: NFDPipeline, actions=ACTIONS, first: int = 0, **options) -> torch.Tensor:
    generators = sample_generators(0, range(first, first + len(actions)))
    options = {"generator": generators, "output_type": "latent", **options}
    return pipe(actions, return_dict=False, **options)[0]


def test_a_clip_has_a_first_frame_and_one_frame_per_action_and_actions_matter(pipe):
    clip = run(pipe)
    assert clip.shape == (2, 3, 6, 8, 8)
    other = run(pipe, [[0, 1, 1, 2, 2], ACTIONS[1]])
    torch.testing.assert_close(other[:, :, :4], clip[:, :, :4], atol=1e-5, rtol=0)
    assert not torch.allclose(other[0, :, 4], clip[0, :, 4], atol=1e-3)
    assert torch.equal(run(pipe, [[NAMES[a] for a in row] for row in ACTIONS]), clip)


def test_clips_do_not_depend_on_the_batch_and_speculation_of_one_changes_nothing(pipe):
    together = run(pipe)
    alone = torch.cat([run(pipe, ACTIONS[i : i + 1], first=i) for i in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert torch.equal(run(pipe, speculation="run_ahead"), alone)
    assert torch.equal(run(pipe, speculation="joint", draft_length=1), alone)
    drafted = run(pipe, speculation="joint", draft_length=3)
    assert not torch.equal(drafted, alone)


def test_given_first_frames_are_kept(pipe, tmp_path: Path):
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clip = run(pipe, image=image)
    assert torch.equal(clip[:, :, 0], image)
    assert clip.shape[2] == 6
    assert not torch.allclose(clip[:, :, 1:], run(pipe)[:, :, 1:], atol=1e-3)
    given = (np.arange(3 * 8 * 8 * 3) % 251).astype(np.uint8).reshape(3, 8, 8, 3)
    assert write_start_frames(given, tmp_path) == tmp_path / START_FRAMES
    pipe.register_to_config(_name_or_path=str(tmp_path))
    frames = pipe.start_frames()
    assert frames.shape == (3, 3, 8, 8)
    picture = Image.fromarray(given[2])
    assert torch.equal(run(pipe, start_frame=2), run(pipe, image=[picture, picture]))
    with pytest.raises(ValueError, match="between 0 and 2"):
        run(pipe, start_frame=3)
    pipe.register_to_config(_name_or_path="")


def test_given_noise_is_used(pipe):
    noise = torch.randn(2, 3, 6, 8, 8, generator=torch.Generator().manual_seed(9))
    clip = run(pipe, latents=noise, num_inference_steps=1)
    later = noise.clone()
    later[:, :, 3] += 1
    other = run(pipe, latents=later, num_inference_steps=1)
    assert torch.equal(other[:, :, :3], clip[:, :, :3])
    assert not torch.equal(other[:, :, 3], clip[:, :, 3])


def test_callbacks_and_interruption(pipe):
    calls = []

    def stop(pipe, index, timestep, tensors):
        calls.append((index, tensors["latents"].shape[2]))
        pipe._interrupt = index == 2
        return {}

    clip = run(pipe, callback_on_step_end=stop)
    assert calls == [(0, 1), (1, 2), (2, 3)]
    assert clip.shape[2] == 3
    assert pipe.num_timesteps == 6

    def zeros(pipe, index, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 5 else {}

    assert not run(pipe, callback_on_step_end=zeros).any()

    def grey(pipe, index, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 2 else {}

    assert not torch.allclose(run(pipe, callback_on_step_end=grey)[:, :, 3], run(pipe)[:, :, 3], atol=1e-3)


@pytest.fixture
def latent_pipe(tmp_path: Path) -> NFDPipeline:
    """Frames of 16x16 pixels as latents of 4x8x8, with start frames in its folder."""
    torch.manual_seed(0)
    model = NFDTransformer3DModel(
        4, 8, 8, 4, num_layers=1, num_attention_heads=1, attention_head_dim=16, num_actions=3, window=4
    ).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    NFDPipeline(model, TrigFlowScheduler(), tiny_vae(), action_names=NAMES).save_pretrained(tmp_path)
    write_start_frames((np.arange(2 * 16 * 16 * 3) % 251).astype(np.uint8).reshape(2, 16, 16, 3), tmp_path)
    pipe = NFDPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_a_vae_codes_the_start_and_decodes_every_frame_by_itself(latent_pipe):
    """The latents' scale goes in and out again, and what is played from a start frame starts at its code."""
    pipe, vae = latent_pipe, latent_pipe.vae
    scale = vae.config.scaling_factor
    start = pipe.start_frames()
    assert pipe.frame_size == (16, 16)
    assert start.shape == (2, 3, 16, 16)
    latents = run(pipe, start_frame=1)
    assert latents.shape == (2, 4, 6, 8, 8)
    coded = vae.encode(start[1:2]).latent_dist.mode() * scale
    for clip in latents:
        torch.testing.assert_close(clip[:, 0], coded[0], atol=1e-5, rtol=0)
    frames = run(pipe, start_frame=1, output_type="np")
    assert frames.shape == (2, 6, 16, 16, 3)
    for index in (0, 3, 5):
        expected = (vae.decode(latents[:, :, index] / scale).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        torch.testing.assert_close(torch.from_numpy(frames[:, index]), expected, atol=1e-5, rtol=0)
    assert frames.std() > 0.01
    other = run(pipe, start_frame=0)
    assert not torch.allclose(other[:, :, 1:], latents[:, :, 1:], atol=1e-3)


def test_output_types(pipe):
    frames = pipe([[1, 2]], output_type="np", generator=sample_generators(0, [0])).frames
    assert frames.shape == (1, 3, 8, 8, 3)
    assert frames.min() >= 0
    assert frames.max() <= 1
    pictures = pipe([1, 2], generator=sample_generators(0, [0])).frames[0]
    assert len(pictures) == 3
    assert np.abs(np.asarray(pictures[2]) / 255 - frames[0, 2]).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("actions", "options", "message"),
    [
        ([[0, 3]], {}, "there is no action 3"),
        ([["jump"]], {}, "there is no action 'jump'"),
        ([[0], [0, 1]], {}, "non-empty lists of one length"),
        (ACTIONS, {"num_inference_steps": 0}, "num_inference_steps"),
        (ACTIONS, {"output_type": "gif"}, "output_type"),
        (ACTIONS, {"generator": [torch.Generator()]}, "1 generators were given for 2"),
        (ACTIONS, {"speculation": "psychic"}, "speculation must be one of"),
        (ACTIONS, {"start_frame": 0}, "no start frames"),
        (ACTIONS, {"latents": torch.zeros(1)}, "latents must have the shape"),
        (ACTIONS, {"image": Image.new("RGB", (8, 12))}, r"start images must be 3x8x8 .* got \(1, 3, 1, 12, 8\)"),
        (ACTIONS, {"image": torch.zeros(3, 8, 8)}, "start images must be 3x8x8"),
        (ACTIONS, {"callback_on_step_end_tensor_inputs": ["noise"]}, "callbacks can have latents"),
    ],
)
def test_bad_calls_are_refused(pipe, actions, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run(pipe, actions, **options)


def test_a_saved_pipeline_loads_by_its_folder_and_gives_the_same_pixels(pipe, tmp_path: Path):
    pipe.save_pretrained(tmp_path)
    again = dit_suite.load_pipeline(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    assert not any(p.is_meta for p in again.transformer.parameters())
    assert torch.equal(run(again), run(pipe))
    assert again.config.action_names == list(NAMES)

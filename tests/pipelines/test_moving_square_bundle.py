"""The bundled moving-square model: facts N14 and N15 of the trained network, against the real game."""

import numpy as np
import pytest
import torch

import dit_suite
from dit_suite.data.moving_square import MOVES, MovingSquareClips, MovingSquareGame, one_hot, play, to_samples
from dit_suite.evaluation.rollout import RolloutOptions, evaluate_rollout
from dit_suite.pipelines.pipeline_nfd import NFDPipeline
from dit_suite.schedulers.frame_sampler import FrameSamplerOptions
from dit_suite.schedulers.trigflow import FrameFlowScheduler

BUNDLE = "moving-square-nfd"


@pytest.fixture(scope="module")
def pipe():
    pipe = dit_suite.load_pipeline(BUNDLE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def centre(frame: torch.Tensor) -> np.ndarray:
    """Brightness-weighted centre of what stands out of the ground, (row, column) in pixels."""
    ground = to_samples(np.full((1, 1, 3), (24, 26, 40), dtype=np.uint8))
    weight = (frame - ground).abs().sum(0).clamp(min=0.5) - 0.5
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in weight.shape), indexing="ij")
    return np.array([float((weight * axis).sum() / weight.sum()) for axis in (rows, columns)])


def moving_clips(count: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Three real frames at rest, then one action that is not blocked by a wall."""
    videos, actions, commanded, seed = [], [], [], 5000
    while len(videos) < count:
        action = 1 + seed % 4
        frames = play(MovingSquareGame(), seed, [0, 0, action])
        seed += 1
        if np.array_equal(frames[2], frames[3]):
            continue
        videos.append(to_samples(frames))
        actions.append(one_hot([0, 0, action], 5))
        commanded.append(action)
    return torch.stack(videos), torch.stack(actions), commanded


def next_frames(pipe, video: torch.Tensor, actions: torch.Tensor, steps: int) -> torch.Tensor:
    """The frame after all but the last one."""
    options = FrameSamplerOptions(num_inference_steps=steps, context_noise=pipe.config.context_noise)
    sampler = pipe.sampler(range(len(video)), options)
    sampler.extend(video[:, :, :-1], actions[:, :-1])
    return sampler.draft(actions[:, -1:])[:, :, 0]


def test_the_square_obeys_at_the_very_next_frame(pipe):
    """N14: more than 95 % of 100 moves go the commanded way."""
    video, actions, commanded = moving_clips(100)
    frames = next_frames(pipe, video, actions, pipe.config.default_steps)
    right = 0
    for before, after, action in zip(video[:, :, 2], frames, commanded, strict=True):
        moved = centre(after) - centre(before)
        direction = np.array(MOVES[action])
        along, across = float(moved @ direction), float(abs(moved @ direction[::-1]))
        right += along > 0.7 and across < along
    assert right > 95


def test_four_passes_keep_up_with_eighteen(pipe):
    """N15 for the same weights: four TrigFlow passes are within 1 dB of eighteen Euler steps of the flow."""
    data = MovingSquareClips(40, 4, seed=4242)
    video, actions = (torch.stack([data[i][key] for i in range(40)]) for key in ("video", "actions"))
    flow = NFDPipeline(pipe.transformer, FrameFlowScheduler(), action_names=pipe.config.action_names)
    psnr = []
    for sampled, steps in ((pipe, 4), (flow, 18)):
        error = (next_frames(sampled, video, actions, steps) - video[:, :, -1]).square().mean((1, 2, 3)) / 4
        psnr.append(float((-10 * error.clamp(min=1e-5).log10()).mean()))
    assert psnr[0] > psnr[1] - 1.0
    assert psnr[1] > 33


def test_a_rollout_stays_closer_to_the_game_than_a_still_picture(pipe):
    data = MovingSquareClips(16, 10, seed=99)
    video, actions = (torch.stack([data[i][key] for i in range(16)]) for key in ("video", "actions"))
    rows = evaluate_rollout(pipe, video, actions, RolloutOptions(steps=(1, 8), batch_size=16))
    assert rows[0]["psnr"] > rows[0]["psnr_of_still"]
    assert rows[1]["psnr"] > rows[1]["psnr_of_still"]

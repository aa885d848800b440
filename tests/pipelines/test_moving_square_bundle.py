"""The bundled moving-square model: facts N14 and N15 of the trained network, against the real game."""

import numpy as np
import pytest
import torch

import dit_suite
from dit_suite.checkpoints import find_checkpoint
from dit_suite.data.moving_square import MOVES, MovingSquareClips, MovingSquareGame, one_hot, play, to_samples
from dit_suite.evaluation.rollout import RolloutOptions, closeness, roll_out
from dit_suite.models.nfd import NFDTransformer3DModel
from dit_suite.pipelines.pipeline_nfd import NFDPipeline
from dit_suite.schedulers.frame_sampler import FrameSamplerOptions
from dit_suite.schedulers.trigflow import FrameFlowScheduler, TrigFlowScheduler

BUNDLE = "moving-square-nfd"


@pytest.fixture(scope="module")
def pipe():
    pipe = dit_suite.load_pipeline(BUNDLE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_at_most_sixteen_megabytes_with_its_teacher():
    folder = find_checkpoint(BUNDLE).folder
    assert 1e6 < sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 16e6


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


@pytest.fixture(scope="module")
def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    data = MovingSquareClips(40, 4, seed=4242)
    return tuple(torch.stack([data[i][key] for i in range(40)]) for key in ("video", "actions"))


def psnr(pipe, held_out, steps: int) -> float:
    """Mean decibels of the next frame after three real ones."""
    video, actions = held_out
    error = (next_frames(pipe, video, actions, steps) - video[:, :, -1]).square().mean((1, 2, 3)) / 4
    return float((-10 * error.clamp(min=1e-5).log10()).mean())


@pytest.fixture(scope="module")
def teacher() -> NFDTransformer3DModel:
    return NFDTransformer3DModel.from_pretrained(find_checkpoint(BUNDLE).folder / "teacher")


def with_teacher(pipe, teacher, scheduler) -> NFDPipeline:
    return NFDPipeline(teacher, scheduler, action_names=pipe.config.action_names)


def test_four_passes_keep_up_with_eighteen_of_the_teacher(pipe, teacher, held_out):
    """N15: the student in four passes is within 1 dB of the teacher in eighteen (it is ahead)."""
    reference = psnr(with_teacher(pipe, teacher, FrameFlowScheduler()), held_out, 18)
    assert reference > 33
    assert psnr(pipe, held_out, 4) > reference - 1.0


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_student_is_better_than_its_teacher_at_equal_passes(pipe, teacher, held_out, steps: int):
    """Whatever sampler the teacher takes: Euler, TrigFlow, or TrigFlow at the student's times."""
    schedulers = FrameFlowScheduler(), TrigFlowScheduler(), TrigFlowScheduler.from_config(pipe.scheduler.config)
    best = max(psnr(with_teacher(pipe, teacher, scheduler), held_out, steps) for scheduler in schedulers)
    assert psnr(pipe, held_out, steps) > best + 0.5


def test_a_rollout_stays_closer_to_the_game_than_a_still_picture(pipe):
    data = MovingSquareClips(16, 10, seed=99)
    video, actions = (torch.stack([data[i][key] for i in range(16)]) for key in ("video", "actions"))
    real, options = video[:, :, 1:], RolloutOptions(steps=(1, 8), batch_size=16)
    rows = closeness(roll_out(pipe, video, actions, options), real, options.steps)
    still = closeness(video[:, :, :1].expand_as(real), real, options.steps)
    assert all(row["psnr"] > floor["psnr"] for row, floor in zip(rows, still, strict=True))

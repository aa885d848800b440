"""Consistency at the times of a few-step student: targets, context, and a student that learns the exact map."""

import math

import pytest
import torch

from dit_suite.checkpoints import load_pipeline
from dit_suite.data.draws import Draws
from dit_suite.schedulers.trigflow import TrigFlowScheduler, flow_level
from dit_suite.training.consistency import checkpoint_teacher
from dit_suite.training.grid_consistency import GridConsistency
from dit_suite.training.objectives import TrainingBatch

TIMES = (1.5707, 0.9, 0.3)


def batch(count: int = 4, step: int = 0, frames: int = 3) -> TrainingBatch:
    samples = torch.randn(count, 2, frames, 2, 2, generator=torch.Generator().manual_seed(1 + step)) * 0.5
    return TrainingBatch(samples, {}, Draws(0, step, torch.arange(count)))


def wide(level: torch.Tensor) -> torch.Tensor:
    return level[:, None, :, None, None]


@pytest.mark.parametrize("path", ["data", "teacher"])
def test_a_network_that_knows_the_frame_is_consistent(path: str):
    """v = (x_s - x0) / s answers x0 at every time, so every target is met, on either path; a wrong one is not."""
    data = batch()
    objective = GridConsistency(times=TIMES, path=path, first_share=1.0)

    def exact(sample, timestep):
        return (sample - data.samples) / wide(timestep)

    def wrong(sample, timestep):
        return exact(sample, timestep) + 0.3 * wide(timestep)

    assert float(objective.loss(exact, data, teacher=exact).loss.max()) < 1e-5
    assert float(objective.loss(wrong, data, teacher=exact).loss.min()) > 1e-4


def test_the_last_time_aims_at_the_recorded_frame_whatever_the_network_answers():
    """With one time the data path is flow matching at that time: the loss is that of F against cos t n - sin t x0."""
    data = batch(64)
    objective = GridConsistency(times=(0.7,), context_share=0.0, first_share=1.0)
    result = objective.loss(lambda x, timestep: 0 * x, data)
    t, seen = torch.tensor(0.7), {}

    def network(sample, timestep):
        seen.update(sample=sample, level=timestep)
        return 0 * sample

    objective.loss(network, data)
    level = flow_level(t)
    scale = (level.square() + (1 - level).square()).sqrt()
    noise = (seen["sample"] / scale - t.cos() * data.samples) / t.sin()
    target = t.cos() * noise - t.sin() * data.samples
    answer = (1 - 2 * level) * seen["sample"] / scale
    torch.testing.assert_close(result.loss, (answer - target).square().mean((1, 2, 3, 4)), atol=1e-4, rtol=1e-4)


def test_context_keeps_its_level_and_does_not_count():
    objective = GridConsistency(times=TIMES, context_share=0.5, first_share=0.0)
    levels = {}

    def network(sample, timestep):
        levels.setdefault("first", timestep)
        return 0 * sample

    data = batch(200)
    result = objective.loss(network, data)
    _, is_context = objective.sample_places(3, data.draws)
    assert is_context[:, 0].all()
    assert float(is_context[:, 1:].float().mean()) == pytest.approx(0.5, abs=0.08)
    torch.testing.assert_close(flow_level(result.timestep)[is_context], torch.full((int(is_context.sum()),), 0.05))
    torch.testing.assert_close(levels["first"][is_context], torch.full((int(is_context.sum()),), 0.05))
    assert set(result.timestep[~is_context].tolist()) == set(torch.tensor(TIMES).tolist())
    assert torch.equal(result.loss == 0, is_context.all(1))


class _Scaled(torch.nn.Module):
    """v(x, s) = a x with an own number a for every time of the student."""

    def __init__(self, times: tuple[float, ...]):
        super().__init__()
        self.levels = flow_level(torch.tensor(times))
        self.factors = torch.nn.Parameter(torch.zeros(len(times)))

    def forward(self, sample, timestep):
        index = (timestep[..., None] - self.levels).abs().argmin(-1)
        return wide(self.factors[index]) * sample


def test_the_teacher_path_keeps_the_spread_that_an_average_would_lose():
    """Data N(0, 0.5^2): the mean given pure noise is 0; the teacher's ODE, in six steps, scales the noise instead."""
    spread = 0.5
    times = tuple(math.pi / 2 * (1 - i / 6) for i in range(6))

    def teacher(sample, timestep):
        level = wide(timestep)
        return sample * (level - (1 - level) * spread**2) / ((1 - level) ** 2 * spread**2 + level**2)

    expected = 1.0
    for t, later in zip(times, (*times[1:], 0.0), strict=True):
        slope = math.cos(t) * math.sin(t) * (1 - spread**2) / (math.cos(t) ** 2 * spread**2 + math.sin(t) ** 2)
        expected *= math.cos(t - later) - math.sin(t - later) * slope
    assert expected > 0.3
    student = _Scaled(times)
    objective = GridConsistency(times=times, path="teacher", context_share=0.0, first_share=1.0)
    optimizer = torch.optim.Adam(student.parameters(), 5e-2)
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 5e-2 * (1 - step / 100)
        loss = objective.loss(student, batch(16, step), teacher=teacher).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler = TrigFlowScheduler(clip_sample=False, times=times)
    scheduler.set_timesteps(1)
    noise = torch.ones(1, 1, 1, 2, 2)
    with torch.no_grad():
        velocity = student(noise, torch.ones(1, 1))
    frame = scheduler.step(velocity, scheduler.timesteps[0], noise).prev_sample
    assert float(frame.mean()) == pytest.approx(expected, abs=0.05)


def test_a_checkpoint_is_a_teacher():
    teacher = checkpoint_teacher("moving-square-nfd", torch.device("cpu"))
    network = load_pipeline("moving-square-nfd").transformer
    frames = torch.randn(2, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    level, actions = torch.full((2, 2), 0.5), torch.zeros(2, 2, network.config.num_actions)
    told = teacher(frames, timestep=level, actions=actions)
    assert not told.requires_grad
    with torch.no_grad():
        assert torch.equal(told, network(frames, level, actions, return_dict=False)[0])
    with pytest.raises(ValueError, match="there is no checkpoint 'nowhere'"):
        checkpoint_teacher("nowhere", torch.device("cpu"))


def test_bad_times_and_a_missing_teacher_are_named():
    for times in ((), (0.3, 0.9), (2.0, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="times must fall"):
            GridConsistency(times=times)
    with pytest.raises(ValueError, match="teacher's checkpoint"):
        GridConsistency(path="teacher").loss(lambda x, timestep: x, batch())

"""Consistency distillation: the tangent, the JVP, and a step that moves the student."""

import math

import pytest
import torch

from dit_suite.data.draws import Draws
from dit_suite.models.nfd import NFDTransformer3DModel
from dit_suite.training.consistency import (
    ConsistencyDistillation,
    as_trigflow,
    consistency_tangent,
    jvp_of,
    normalise_tangent,
)
from dit_suite.training.objectives import TrainingBatch


@pytest.fixture(scope="module")
def network() -> NFDTransformer3DModel:
    torch.manual_seed(0)
    model = NFDTransformer3DModel(
        3, 4, 4, 2, num_layers=1, num_attention_heads=1, attention_head_dim=16, num_actions=2, window=3
    ).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def call(model):
    return lambda sample, timestep, **condition: model(sample, timestep, **condition, return_dict=False)[0]


def batch(step: int = 0) -> TrainingBatch:
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(2, 3, 3, 4, 4, generator=generator)
    return TrainingBatch(
        samples, {"actions": torch.eye(2)[[0, 1, 0, 1, 1, 0]].reshape(2, 3, 2)}, Draws(0, step, torch.arange(2))
    )


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_exact_consistency_function_of_a_gaussian_has_no_tangent(sigma: float):
    """N8: data N(0, s^2) has f(x, t) = x s / std(t) in closed form; g vanishes at r = 1, and not for a wrong f."""
    spread = 0.3
    t = torch.linspace(0.05, 1.5, 40, dtype=torch.float64)
    sample = torch.linspace(-2, 2, 40, dtype=torch.float64)

    def variance(time: torch.Tensor) -> torch.Tensor:
        return time.cos().square() * spread**2 + time.sin().square() * sigma**2

    def trig(scaled: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x = scaled * sigma
        return (time.cos() * x - x * spread / variance(time).sqrt()) / (time.sin() * sigma)

    slope = sample * t.cos() * t.sin() * (sigma**2 - spread**2) / variance(t)
    speed = t.cos() * t.sin()
    frozen, tangent = torch.func.jvp(trig, (sample / sigma, t), (speed * slope / sigma, speed))
    g = consistency_tangent(sample, frozen, tangent, slope, t, sigma, 1.0)
    assert float(g.abs().max()) < 1e-5
    wrong = consistency_tangent(sample, frozen * 1.1, tangent * 1.1, slope, t, sigma, 1.0)
    assert float(wrong.abs().max()) > 1e-2


def test_jvp_equals_central_differences(network):
    """N8: through the whole network, all frames moving at once."""
    trig = as_trigflow(call(network.double()), dict(batch().condition))
    scaled = batch().samples.double()
    t = torch.tensor([[0.4, 0.9, 1.3], [1.1, 0.2, 0.7]], dtype=torch.float64)
    tangents = (
        torch.randn(scaled.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
        t.cos() * t.sin(),
    )
    value, derivative = jvp_of(trig, scaled, t, tangents)
    step = 1e-3
    with torch.no_grad():
        forward, backward = (trig(scaled + s * tangents[0], t + s * tangents[1]) for s in (step, -step))
        torch.testing.assert_close(value, trig(scaled, t), atol=1e-6, rtol=0)
    network.float()
    torch.testing.assert_close(derivative, (forward - backward) / (2 * step), atol=2e-4, rtol=2e-4)


def test_gradient_is_minus_twice_the_tangent(network):
    """loss = mean g^2 and d loss / dF = -2 g / size, so |d loss / dF|^2 = 4 loss / size; dF / dv = D."""
    objective = ConsistencyDistillation(warmup_steps=1, context_share=0.0, weighting="uniform")
    seen = {}

    def student(sample, timestep, **condition):
        out = network(sample, timestep, **condition, return_dict=False)[0]
        if out.requires_grad:
            out.retain_grad()
            seen["out"] = out
        return out

    result = objective.loss(student, batch(), teacher=call(network))
    result.loss.sum().backward()
    level = result.timestep[:, None, :, None, None]
    inner = (1 - 2 * level + 2 * level.square()).sqrt()
    gradient = (seen["out"].grad / inner).square().sum((1, 2, 3, 4))
    size = seen["out"][0].numel()
    torch.testing.assert_close(gradient, 4 * result.loss.detach() / size, atol=0, rtol=1e-3)


def test_context_frames_neither_move_nor_count(network):
    objective = ConsistencyDistillation(context_share=1.0, warmup_steps=1)
    result = objective.loss(call(network), batch(), teacher=call(network))
    assert torch.equal(result.loss, torch.zeros(2))
    torch.testing.assert_close(result.timestep, torch.full((2, 3), objective.context_level), atol=1e-5, rtol=0)


def test_warmup_turns_the_second_part_on_and_norms_are_bounded(network):
    values = {}
    for step in (0, 99):
        objective = ConsistencyDistillation(warmup_steps=100, context_share=0.0)
        values[step] = objective.loss(call(network), batch(step), teacher=call(network)).loss
    assert not torch.allclose(values[0], values[99])
    tangent = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 100
    per_clip, per_frame = normalise_tangent(tangent, "clip", 0.1), normalise_tangent(tangent, "frame", 0.1)
    torch.testing.assert_close(per_clip.square().mean((1, 2, 3, 4)), torch.ones(2), atol=1e-2, rtol=0)
    torch.testing.assert_close(per_frame.square().mean((1, 3, 4)), torch.ones(2, 4), atol=1e-2, rtol=0)


def test_times_follow_the_prior_and_a_missing_teacher_is_named():
    objective = ConsistencyDistillation(context_share=0.0, std=1.0)
    times, _ = objective.sample_times(4, Draws(0, 0, torch.arange(4000)))
    assert float(times.min()) > 0
    assert float(times.max()) < math.pi / 2
    assert float(times.tan().log().mean()) == pytest.approx(0.0, abs=0.05)
    assert float(times.tan().log().std()) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="teacher's checkpoint"):
        objective.loss(lambda x, timestep, **c: x, batch())


class _Linear(torch.nn.Module):
    """v(x, s) = a(s) x, with a small network for a: can express the exact answers for Gaussian data."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1))

    def forward(self, sample, timestep, **condition):
        features = torch.stack([timestep, timestep.square()], dim=-1)
        return self.body(features)[..., 0][:, None, :, None, None] * sample


def test_distillation_finds_the_consistency_function_of_a_gaussian():
    """Data N(0, 0.5^2): the teacher's one-step estimate from pure noise is 0, the exact consistency map is 0.5 z."""
    spread, student = 0.5, _Linear()

    def teacher(sample, timestep, **condition):
        level = timestep[:, None, :, None, None]
        return sample * (level - (1 - level) * spread**2) / ((1 - level) ** 2 * spread**2 + level**2)

    def train(steps: int, loss_of, lr: float) -> None:
        optimizer = torch.optim.Adam(student.parameters(), lr)
        for step in range(steps):
            draws = Draws(0, step, torch.arange(16))
            samples = spread * torch.randn(16, 1, 4, 2, 2, generator=torch.Generator().manual_seed(step))
            loss = loss_of(TrainingBatch(samples, {}, draws))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def imitate(data: TrainingBatch) -> torch.Tensor:
        level = torch.rand(16, 4, generator=torch.Generator().manual_seed(data.draws.step))
        return (student(data.samples, level) - teacher(data.samples, level)).square().mean()

    train(60, imitate, 1e-2)
    t = torch.full((1, 1), 1.5)
    one = torch.ones(1, 1, 1, 1, 1)

    def estimate() -> float:
        with torch.no_grad():
            return float(t.cos() * 1.0 - t.sin() * as_trigflow(student, {})(one, t))

    before = estimate()
    objective = ConsistencyDistillation(context_share=0.0, warmup_steps=30, weighting="uniform", mean=0.5, std=1.0)
    train(150, lambda data: objective.loss(student, data, teacher=teacher).loss.mean(), 8e-3)
    assert before < 0.25
    assert estimate() == pytest.approx(spread, abs=0.1)

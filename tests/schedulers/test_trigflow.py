"""The change of variables between rectified flow and TrigFlow, and both samplers."""

import math

import pytest
import torch

from dit_suite.schedulers.trigflow import (
    FrameFlowScheduler,
    TrigFlowScheduler,
    consistency_sample,
    flow_input,
    flow_level,
    trig_time,
    trig_velocity,
)


def _pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, dtype=dtype, generator=generator), torch.randn(50, dtype=dtype, generator=generator)


def test_flow_velocity_becomes_the_trigonometric_one():
    """N7: for v = z - x0, F = cos t z - sin t x0 to 1e-12."""
    x0, z = _pair()
    t = torch.linspace(0.001, math.pi / 2 - 0.001, 50, dtype=torch.float64)
    level = flow_level(t)
    sample = flow_input(t.cos() * x0 + t.sin() * z, level)
    torch.testing.assert_close(sample, (1 - level) * x0 + level * z, atol=1e-12, rtol=0)
    trig = trig_velocity(sample, z - x0, level)
    torch.testing.assert_close(trig, t.cos() * z - t.sin() * x0, atol=1e-12, rtol=0)
    torch.testing.assert_close(trig_time(level), t, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_exact_velocity_gives_x0_in_one_consistency_step(sigma_data: float):
    x0, z = _pair()
    x0, t = x0 * sigma_data, torch.tensor(1.1, dtype=torch.float64)
    sample, level = t.cos() * x0 + t.sin() * sigma_data * z, flow_level(t)
    trig = trig_velocity(flow_input(sample / sigma_data, level), z - x0 / sigma_data, level)
    torch.testing.assert_close(consistency_sample(sample, trig, t, sigma_data), x0, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [1, 3, 18])
def test_euler_is_exact_on_a_constant_velocity(steps: int):
    """N6: one step of the exact velocity reaches x0, and so does any number of steps."""
    x0, z = _pair(torch.float32)
    scheduler = FrameFlowScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    sample = z.clone()
    for t in scheduler.timesteps:
        assert scheduler.noise_level(t) == pytest.approx(float(t))
        sample = scheduler.step(z - x0, t, sample).prev_sample
    torch.testing.assert_close(sample, x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_multistep_consistency_with_an_exact_network_returns_x0(steps: int):
    x0, z = _pair(torch.float32)
    scheduler = TrigFlowScheduler(sigma_data=0.5, clip_sample=False)
    scheduler.set_timesteps(steps)
    x0, sample = x0 * 0.5, 0.5 * z
    for index, t in enumerate(scheduler.timesteps):
        hidden, level = scheduler.scale_model_input(sample, t), scheduler.noise_level(t)
        noise_part = (hidden - (1 - level) * x0 / 0.5) / level
        renoise = torch.randn(50, generator=torch.Generator().manual_seed(index))
        out = scheduler.step(noise_part - x0 / 0.5, t, sample, noise=renoise)
        torch.testing.assert_close(out.pred_original_sample, x0, atol=1e-4, rtol=0)
        sample = out.prev_sample
    torch.testing.assert_close(sample, x0, atol=1e-4, rtol=0)


def test_timesteps():
    scheduler = TrigFlowScheduler()
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1.5708, 1.1781, 0.7854, 0.3927]), atol=1e-4, rtol=0)
    scheduler.set_timesteps(2)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([math.pi / 2, 1.3]))
    scheduler.set_timesteps(timesteps=[1.5, 0.4])
    assert scheduler.timesteps.tolist() == pytest.approx([1.5, 0.4])


def test_a_distilled_network_keeps_to_its_times():
    learned = TrigFlowScheduler(times=(1.5708, 0.9, 0.5, 0.2))
    expected = {1: [math.pi / 2], 2: [math.pi / 2, 0.2], 3: [math.pi / 2, 0.5, 0.2], 4: [math.pi / 2, 0.9, 0.5, 0.2]}
    for steps, times in expected.items():
        learned.set_timesteps(steps)
        assert learned.timesteps.tolist() == pytest.approx(times)
    learned.set_timesteps(5)
    assert learned.timesteps.tolist() == pytest.approx([math.pi / 2 * (1 - i / 5) for i in range(5)])
    again = TrigFlowScheduler.from_config(learned.config)
    again.set_timesteps(2)
    assert again.timesteps.tolist() == pytest.approx(expected[2])


def test_bad_schedules_are_refused():
    scheduler = TrigFlowScheduler()
    for times in ([], [0.5, 0.9], [1.0, 0.0], [2.0]):
        with pytest.raises(ValueError, match="fall from at most"):
            scheduler.set_timesteps(timesteps=times)
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="needs noise"):
        scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
    with pytest.raises(ValueError, match="not a timestep"):
        scheduler.step(torch.zeros(1), 0.123, torch.zeros(1))
    with pytest.raises(ValueError, match="sigma_data"):
        TrigFlowScheduler(sigma_data=0.0)


def test_finished_pixels_are_clipped_and_config_round_trips(tmp_path):
    scheduler = FrameFlowScheduler()
    scheduler.set_timesteps(1)
    assert float(scheduler.step(torch.tensor([-9.0]), 1.0, torch.zeros(1)).prev_sample) == 1.0
    TrigFlowScheduler(sigma_data=0.7, clip_sample=False).save_pretrained(tmp_path)
    assert TrigFlowScheduler.from_pretrained(tmp_path).config.sigma_data == 0.7

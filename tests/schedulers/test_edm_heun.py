"""EDM-Heun against a direct transcription of algorithm 2 and against closed forms."""

import math

import pytest
import torch

from dit_suite.schedulers.edm_heun import EDMHeunScheduler, edm_scalings
from dit_suite.schedulers.generators import sample_generators


def network(scaled: torch.Tensor, level: float) -> torch.Tensor:
    """A smooth stand-in for a network that depends on its noise level."""
    return torch.tanh(1.3 * scaled + 0.2 * float(level)) * 0.7


def reference(noise: torch.Tensor, steps: int, s_churn: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Karras et al. 2022, algorithm 2, with sigma_data 0.5, one generator per row."""
    generators = sample_generators(seed, range(len(noise)))
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]

    def denoise(x, s):
        skip, out, scale, level = edm_scalings(s, 0.5)
        return skip * x + out * network(scale * x, level)

    x = noise * sigma[0]
    for i in range(steps):
        raised = sigma[i] * (1 + (min(s_churn / steps, math.sqrt(2) - 1) if 0.05 <= sigma[i] <= 50 else 0))
        if raised > sigma[i]:
            fresh = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).double()
            x = x + math.sqrt(raised**2 - sigma[i] ** 2) * 1.003 * fresh
        slope = (x - denoise(x, raised)) / raised
        following = x + (sigma[i + 1] - raised) * slope
        if sigma[i + 1] > 0:
            second = (following - denoise(following, sigma[i + 1])) / sigma[i + 1]
            following = x + (sigma[i + 1] - raised) * (slope + second) / 2
        x = following
    return x


def run(scheduler: EDMHeunScheduler, noise: torch.Tensor, steps: int, generators=None) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    state = noise * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        state = scheduler.churn(state, generators)
        output = network(scheduler.scale_model_input(state, time), scheduler.model_timestep(time))
        state = scheduler.step(output, time, state).prev_sample
    return state


def test_scalings_of_a_number_and_of_a_tensor():
    """Table 1 written out for sigma 2 and sigma_data 0.5."""
    root = math.sqrt(2**2 + 0.5**2)
    expected = (0.5**2 / root**2, 2 * 0.5 / root, 1 / root, math.log(2) / 4)
    assert edm_scalings(2.0, 0.5) == pytest.approx(expected, rel=1e-14)
    both = torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    for found, first, second in zip(edm_scalings(both, 0.5), expected, edm_scalings(1.0, 0.5), strict=True):
        assert found.flatten().tolist() == pytest.approx([first, second], rel=1e-14) and found.shape == (2, 1)


@pytest.mark.parametrize("s_churn", [0.0, 3.0])
def test_equals_the_algorithm(s_churn):
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scheduler = EDMHeunScheduler(s_churn=s_churn, s_min=0.05, s_max=50, s_noise=1.003)
    ours = run(scheduler, noise, 7, sample_generators(0, range(2)))
    torch.testing.assert_close(ours, reference(noise, 7, s_churn), atol=1e-12, rtol=0)
    if s_churn:
        assert (ours - reference(noise, 7)).abs().max() > 1e-3


def test_noise_is_drawn_per_sample():
    noise = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    scheduler = EDMHeunScheduler(s_churn=3.0)
    together = run(scheduler, noise, 5, sample_generators(4, range(3)))
    alone = run(scheduler, noise[2:], 5, sample_generators(4, [2]))
    assert torch.equal(together[2:], alone)


def test_levels_and_timesteps():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(18)
    assert scheduler.sigmas[0] == pytest.approx(80) and scheduler.sigmas[17] == pytest.approx(0.002)
    assert scheduler.sigmas[-1] == 0 and len(scheduler.timesteps) == 35
    assert (scheduler.timesteps.diff() <= 0).all()
    assert scheduler.timesteps[0].item() == pytest.approx(math.log(80) / 4)
    assert torch.equal(scheduler.timesteps[1::2], scheduler.timesteps[2::2])
    scheduler.set_timesteps(1)
    assert len(scheduler.timesteps) == 1


def test_a_perfect_denoiser_ends_at_its_picture():
    target = torch.full((1, 1, 2, 2), 0.3, dtype=torch.float64)
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(10)
    state = torch.randn(1, 1, 2, 2, dtype=torch.float64) * 80
    for time in scheduler.timesteps:
        skip, out, _, _ = edm_scalings(scheduler.current_sigma, 0.5)
        result = scheduler.step((target - skip * state) / out, time, state)
        torch.testing.assert_close(result.pred_original_sample, target, atol=1e-9, rtol=0)
        state = result.prev_sample
    torch.testing.assert_close(state, target, atol=1e-9, rtol=0)


def test_a_new_run_starts_afresh_and_a_finished_one_says_so():
    scheduler = EDMHeunScheduler()
    noise = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    first = run(scheduler, noise, 4)
    with pytest.raises(ValueError, match="the run is over"):
        scheduler.step(first, 0.0, first)
    scheduler.set_timesteps(4)
    scheduler.step(noise, 0.0, noise)
    assert torch.equal(run(scheduler, noise, 4), first)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="sigma_min must lie"):
        EDMHeunScheduler(sigma_min=90.0)


def test_config_round_trip(tmp_path):
    EDMHeunScheduler(s_churn=2.0, s_max=10.0, sigma_data=0.7).save_pretrained(tmp_path)
    again = EDMHeunScheduler.from_pretrained(tmp_path)
    assert (again.config.s_churn, again.config.s_max, again.config.sigma_data) == (2.0, 10.0, 0.7)
    EDMHeunScheduler().save_pretrained(tmp_path / "default")
    assert EDMHeunScheduler.from_pretrained(tmp_path / "default").config.s_max == math.inf

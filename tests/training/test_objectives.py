"""Objectives against golden values, closed forms and each other."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dit_suite.data.draws import Draws, Stream
from dit_suite.schedulers.edm_heun import edm_scalings
from dit_suite.training.objectives import (
    EDM,
    Diffusion,
    FlowNLL,
    RectifiedFlow,
    TrainingBatch,
    add_noise,
    interpolate,
    logit_normal,
    named_tables,
    objective_class,
    predicted_x0,
    shift_level,
    v_target,
    velocity,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def _batch(shape=(6, 3, 4, 4), **condition):
    samples = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return TrainingBatch(samples, condition, Draws(3, 11, torch.arange(shape[0])))


def test_diffusion_losses_match_the_golden_file():
    data = load_file(GOLDEN / "dit_diffusion.safetensors")
    x0, noise, t = (data[f"input.train.{key}"] for key in ("x0", "noise", "t"))
    x_t = add_noise(named_tables("linear", 1000), x0, noise, t)
    assert torch.allclose(x_t, data["output.train.x_t"], atol=1e-6)
    tau = (t.float() / 1000).reshape(-1, 1, 1, 1)

    def mix(weight):
        return torch.einsum("oc,bchw->bohw", data[f"input.{weight}"], x_t)

    def row(name):
        return data[f"input.{name}"].reshape(1, -1, 1, 1)

    eps = torch.tanh(3.5 * tau) * mix("W_eps") + row("b_eps") * tau
    raw = torch.tanh(mix("W_var") + row("b_var") * tau)
    output = torch.cat([eps, raw], dim=1).requires_grad_()
    parts = Diffusion().terms(output, x0, noise, x_t, t)
    assert torch.allclose(parts["mse"], data["output.train.mse"], rtol=1e-4, atol=1e-6)
    assert torch.allclose(parts["vb"], data["output.train.vb"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(sum(parts.values()), data["output.train.loss"], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(parts["vb"].sum(), output)
    assert gradient[:, :4].abs().max() == 0 and gradient[:, 4:].abs().max() > 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_min_snr_matches_the_golden_file(schedule):
    data = load_file(GOLDEN / "switch_dit_losses.safetensors")
    x0, noise, t = (data[f"input.{key}"] for key in ("x0", "noise", "t"))
    tau = (t.float() / 1000).reshape(-1, 1, 1, 1)
    x_t = add_noise(named_tables(schedule, 1000), x0, noise, t)
    mixed = torch.einsum("oc,bchw->bohw", data["input.W_eps"], x_t)
    eps = torch.tanh(3.5 * tau) * mixed + data["input.b_eps"].reshape(1, -1, 1, 1) * tau
    raw = torch.tanh(
        torch.einsum("oc,bchw->bohw", data["input.W_var"], x_t) + data["input.b_var"].reshape(1, -1, 1, 1) * tau
    )
    objective = Diffusion(schedule=schedule, min_snr_gamma=5.0)
    parts = objective.terms(torch.cat([eps, raw], 1), x0, noise, x_t, t)
    assert torch.allclose(parts["mse"], data[f"output.{schedule}.min_snr_5.mse"], rtol=1e-3, atol=1e-6)


def test_perfect_predictions_have_zero_loss():
    batch = _batch()
    x0, noise = batch.samples, batch.draws.normal(Stream.NOISE, batch.samples.shape[1:])
    for objective in (RectifiedFlow(), RectifiedFlow(levels="logit_normal", mean=0.4, shift=3.0)):
        result = objective.loss(lambda x, timestep: velocity(x0, noise), batch)
        assert result.loss.shape == (6,) and result.loss.max() < 1e-10
        assert result.timestep.min() > 0 and result.timestep.max() < 1000

    def exact_v(x_t, timestep):
        return v_target(named_tables("cosine", 1000), x0, noise, timestep)

    assert Diffusion(prediction="v", schedule="cosine").loss(exact_v, batch).loss.max() < 1e-10

    def exact_edm(scaled, timestep):
        sigma = torch.exp(4 * timestep)
        skip, out, scale, _ = (c.reshape(-1, 1, 1, 1) for c in edm_scalings(sigma, 0.5))
        return (x0 - skip * scaled / scale) / out

    assert EDM().loss(exact_edm, batch).loss.max() < 1e-8


def test_levels_follow_their_distribution():
    draws = Draws(0, 0, torch.arange(20000))
    level = RectifiedFlow(levels="logit_normal", mean=0.4, std=1.0).sample_levels(torch.zeros(1, 3, 2, 2), draws)
    logit = torch.log(level / (1 - level))
    assert abs(logit.mean() - 0.4) < 0.03 and abs(logit.std() - 1) < 0.03
    assert torch.allclose(shift_level(torch.tensor([0.5]), 3.0), torch.tensor([0.75]))
    assert torch.allclose(logit_normal(torch.zeros(1)), torch.tensor([0.5]))


def test_frame_levels_touch_only_their_frame():
    batch = _batch((2, 3, 5, 4, 4))
    seen = {}

    def record(x, timestep):
        seen["x"], seen["t"] = x, timestep
        return torch.zeros_like(x)

    RectifiedFlow(per="frame").loss(record, batch)
    noise = batch.draws.normal(Stream.NOISE, batch.samples.shape[1:])
    assert seen["t"].shape == (2, 5)
    one = interpolate(batch.samples[1:, :, 2], noise[1:, :, 2], seen["t"][1:, 2] / 1000)
    assert torch.allclose(seen["x"][1, :, 2], one[0], atol=1e-6)


def test_v_and_epsilon_recover_the_same_sample():
    batch, t = _batch(), torch.tensor([0, 10, 200, 500, 800, 999])
    tables, x0 = named_tables("linear", 1000), batch.samples
    noise = batch.draws.normal(Stream.NOISE, x0.shape[1:])
    x_t = add_noise(tables, x0, noise, t)
    assert torch.allclose(predicted_x0(tables, x_t, v_target(tables, x0, noise, t), t, "v"), x0, atol=1e-5)
    assert torch.allclose(predicted_x0(tables, x_t, noise, t, "epsilon"), x0, atol=1e-3)


def test_edm_averages_the_outputs_of_bricks():
    batch = _batch()

    def network(x, timestep):
        return [torch.zeros_like(x), torch.ones_like(x)]

    both, last = EDM().loss(network, batch), EDM(outputs="last").loss(network, batch)
    single = EDM().loss(lambda x, timestep: torch.ones_like(x), batch)
    assert torch.allclose(last.loss, single.loss)
    assert torch.allclose(both.loss, (both.parts["output_0"] + both.parts["output_1"]) / 2)
    assert not torch.allclose(both.loss, last.loss)


def test_flow_likelihood_of_a_scaling_map():
    batch = _batch()
    result = FlowNLL(noise_std=0.0).loss(lambda x: (2 * x, torch.full((6,), 0.6931472)), batch)
    expected = 2 * batch.samples.square().flatten(1).mean(1) - 0.6931472
    assert torch.allclose(result.loss, expected, atol=1e-6)
    uniform = FlowNLL(noise="uniform").loss(lambda x: (x, torch.zeros(6)), batch).parts["latent_mean_square"]
    assert torch.allclose(uniform, batch.samples.square().flatten(1).mean(1), atol=0.02)


def test_flow_likelihood_adds_the_gaussian_that_was_drawn():
    batch, seen = _batch(), []

    def network(x):
        seen.append(x)
        return x, torch.zeros(6)

    FlowNLL(noise_std=0.25).loss(network, batch)
    noise = batch.draws.normal(Stream.NOISE, batch.samples.shape[1:])
    assert torch.allclose((seen[0] - batch.samples) / 0.25, noise, atol=1e-5)
    assert 0.8 < float(noise.std()) < 1.2


def test_uniform_noise_is_computed_in_float32():
    """Within autocast, and from samples in half precision: grey levels stay apart."""
    grey = torch.arange(256.0).reshape(1, 1, 16, 16)
    batch = TrainingBatch((grey / 127.5 - 1).bfloat16(), {}, Draws(3, 11, torch.arange(1)))
    layer, seen = torch.nn.Linear(16, 16), []

    def network(x):
        seen.append((x, layer(x)))
        return x, torch.zeros(1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        FlowNLL(noise="uniform").loss(network, batch)
    noisy, output = seen[0]
    assert noisy.dtype == output.dtype == torch.float32
    assert torch.equal(output, layer(noisy))
    noise = batch.draws.uniform(Stream.NOISE, (1, 16, 16))
    kept = ((batch.samples.float() + 1) * 127.5).round()
    assert torch.allclose((noisy + 1) * 128 - kept, noise, atol=1e-4)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="rectified_flow"):
        objective_class("flow")
    with pytest.raises(ValueError, match="no option 'sigma'"):
        objective_class("edm").from_dict({"sigma": 1})
    with pytest.raises(ValueError, match="levels must be one of"):
        RectifiedFlow(levels="cosine")

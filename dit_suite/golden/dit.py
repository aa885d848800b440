"""DiT fixtures: a forward pass with every intermediate value, and the diffusion process (tables, losses, samplers)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dit_suite.converters.dit import build_model, make_scheduler
from dit_suite.golden import Result, Tensors, compare, section
from dit_suite.models.dit import DiTModel
from dit_suite.schedulers.guidance import guide
from dit_suite.schedulers.respacing import respaced_betas, respaced_scheduler, space_timesteps
from dit_suite.training.objectives import (
    Diffusion,
    add_noise,
    diffusion_tables,
    learned_log_variance,
    named_tables,
    predicted_x0,
)

FAMILY = "dit"
PREFIXES = ("dit_",)
# The goal was 1e-5 for a forward pass; it is missed. The angle of timestep 999 has a float32 spacing of 6e-5, and CPUs
# round the exponential of its frequency differently: one feature of 256 is off by 2.9e-5 on AVX-512,
# what follows by 3.4e-5; with MKL held to AVX2, by 5.6e-5 and 7.6e-5.
FORWARD_TOLERANCE = 1e-4
TABLE_TOLERANCE = 1e-5
TRAJECTORY_TOLERANCE = 1e-4
_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine", "cosine": "cosine"}


def check(tensors: Tensors, config: dict[str, Any]) -> list[Result]:
    """Chooses by content: a fixture with weights is a forward pass, one without is the diffusion process."""
    return check_forward(tensors, config) if section(tensors, "state_dict") else check_diffusion(tensors, config)


def build(tensors: Tensors, config: dict[str, Any]) -> DiTModel:
    """The network of a forward fixture, converted strictly from the official names."""
    return build_model(
        section(tensors, "state_dict"),
        num_heads=config["num_heads"],
        sample_size=config["input_size"],
        class_dropout_prob=config["class_dropout_prob"],
        learn_sigma=config["learn_sigma"],
    )


@torch.no_grad()
def trace(model: DiTModel, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """One forward pass, with its intermediate values under the fixture's names."""
    values: dict[str, torch.Tensor] = {}

    def keep_inputs(*names: str):
        return lambda module, args: values.update(zip(names, args, strict=False))

    def keep_output(name: str):
        return lambda module, args, output: values.__setitem__(name, output)

    blocks = model.transformer_blocks
    handles = [
        model.time_embed.linear_1.register_forward_pre_hook(keep_inputs("timestep_embedding")),
        model.time_embed.register_forward_hook(keep_output("t_emb")),
        blocks[0].register_forward_pre_hook(keep_inputs("tokens_in", "c")),
        model.final_layer.register_forward_hook(keep_output("final_tokens")),
        *(block.register_forward_hook(keep_output(f"block_{i}")) for i, block in enumerate(blocks)),
    ]
    values["sample"] = model(x, t, y).sample
    for handle in handles:
        handle.remove()
    return values


@torch.no_grad()
def guided_halves(
    model: DiTModel, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, scale: float, channels: int
) -> torch.Tensor:
    """The official layout of guidance: a batch [z; z] with labels [y; null]; the guided channels fill both halves and
    every other channel keeps the value of its own half. Only the first half of `x` is read."""
    half = x[: len(x) // 2]
    cond, uncond = model(torch.cat([half, half]), t, y).sample.chunk(2)
    guided = guide(uncond, cond, scale, channels)
    return torch.cat([guided, torch.cat([guided[:, :channels], uncond[:, channels:]], dim=1)])


def check_forward(tensors: Tensors, config: dict[str, Any]) -> list[Result]:
    """Every recorded intermediate, the output, and guidance over the first three and over all channels."""
    model = build(tensors, config)
    given, expected = section(tensors, "input"), section(tensors, "output")
    actual = trace(model, given["x"], given["t"], given["y"])
    if "cfg_x" in given:
        call = (model, given["cfg_x"], given["cfg_t"], given["cfg_y"])
        scale = float(given["cfg_scale"])
        with torch.no_grad():
            actual["cfg_raw"] = model(*call[1:]).sample
        actual["cfg_first3"] = guided_halves(*call, scale, 3)
        actual["cfg_allC"] = guided_halves(*call, scale, config["in_channels"])
    return [compare(name, actual[name], value, FORWARD_TOLERANCE) for name, value in sorted(expected.items())]


class _GivenNoise(TorchFunctionMode):
    """Inside this block `torch.randn` returns a recorded tensor: schedulers step with the noise of the fixture."""

    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.noise if func is torch.randn else func(*args, **(kwargs or {}))


def toy_network(given: Tensors, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The closed-form network of the fixture: `(batch, C, H, W)` and original timesteps `(batch,)` to 2C channels."""
    tau = (timestep.float() / 1000.0).reshape(-1, 1, 1, 1)

    def mix(weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oc,bchw->bohw", weight, x)

    eps = torch.tanh(3.5 * tau) * mix(given["W_eps"]) + given["b_eps"].reshape(1, -1, 1, 1) * tau
    variance = torch.tanh(mix(given["W_var"]) + given["b_var"].reshape(1, -1, 1, 1) * tau)
    return torch.cat([eps, variance], dim=1)


def run_sampler(
    given: Tensors, case: dict[str, Any], scheduler: Any, originals: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples with a diffusers scheduler and the recorded noise.

    Args:
        scheduler: after `set_timesteps`; its k-th timestep means `originals[k]` for the network.
        originals: original timesteps in sampling order.

    Returns:
        Samples and predicted x0 after every step, `(steps, batch, C, H, W)`.
    """
    x, noises = given["z"], given[f"{case['name']}.noise"]
    channels = x.shape[1]
    samples, estimates = [], []
    for timestep, original, noise in zip(scheduler.timesteps, originals, noises, strict=True):
        output = toy_network(given, x, torch.full((len(x),), original))
        if case["kind"] == "ddim":
            eta = case["eta"]
            extra = {"eta": eta, "variance_noise": noise} if eta > 0 else {}
            step = scheduler.step(output[:, :channels], timestep, x, **extra)
        else:
            with _GivenNoise(noise):
                step = scheduler.step(output, timestep, x)
        x = step.prev_sample
        samples.append(x)
        estimates.append(step.pred_original_sample)
    return torch.stack(samples), torch.stack(estimates)


def _stock_scheduler(case: dict[str, Any], timesteps: list[int]) -> Any | None:
    """The diffusers scheduler as `convert.py` saves it, where it visits the same timesteps."""
    scheduler = make_scheduler(case["kind"], case["schedule"], learn_sigma=True)
    scheduler.set_timesteps(len(timesteps))
    return scheduler if scheduler.timesteps.tolist() == timesteps[::-1] else None


def _check_case(given: Tensors, expected: Tensors, case: dict[str, Any]) -> Iterator[Result]:
    name = case["name"]
    full = named_tables(_SCHEDULES[case["schedule"]], 1000)
    timesteps = space_timesteps(1000, case["respacing"])
    betas = respaced_betas(full.alphas_cumprod, timesteps)
    tables = diffusion_tables(betas)
    yield compare(f"{name}.timestep_map", torch.tensor(timesteps), expected[f"{name}.timestep_map"], 0.0)
    for key, table in (
        ("betas", tables.betas),
        ("alphas_cumprod", tables.alphas_cumprod),
        ("posterior_log_variance_clipped", tables.posterior_log_variance),
    ):
        yield compare(f"{name}.{key}", table, expected[f"{name}.{key}"], TABLE_TOLERANCE)
    routes = {
        "respaced": respaced_scheduler(case["kind"], full.alphas_cumprod, timesteps),
        "stock": _stock_scheduler(case, timesteps),
    }
    for route, scheduler in routes.items():
        if scheduler is None:
            continue
        for key, value in zip(
            ("samples", "pred_xstart"), run_sampler(given, case, scheduler, timesteps[::-1]), strict=True
        ):
            label = f"{name}.{key} ({route} scheduler)"
            yield compare(label, value, expected[f"{name}.{key}"], TRAJECTORY_TOLERANCE, relative=True)


def _check_training(given: Tensors, expected: Tensors) -> Iterator[Result]:
    tables = named_tables("linear", 1000)
    t, x0, noise = given["train.t"], given["train.x0"], given["train.noise"]
    x_t = add_noise(tables, x0, noise, t)
    output = toy_network(given, x_t, t)
    terms = Diffusion().terms(output, x0, noise, x_t, t)
    terms["loss"] = terms["mse"] + terms["vb"]
    yield compare("train.x_t", x_t, expected["train.x_t"], TABLE_TOLERANCE)
    for key in ("mse", "vb", "loss"):
        yield compare(f"train.{key}", terms[key], expected[f"train.{key}"], TRAJECTORY_TOLERANCE, relative=True)

    eps, raw = output.chunk(2, dim=1)
    estimate = predicted_x0(tables, x_t, eps, t, "epsilon")
    log_variance = learned_log_variance(tables, raw, t)
    at = (-1, 1, 1, 1)
    mean = tables.posterior_x0_weight[t].reshape(at) * estimate + tables.posterior_xt_weight[t].reshape(at) * x_t
    for key, value in (
        ("mean", mean),
        ("variance", log_variance.exp()),
        ("log_variance", log_variance),
        ("pred_xstart", estimate),
    ):
        yield compare(f"pmv.{key}", value, expected[f"pmv.{key}"], TRAJECTORY_TOLERANCE, relative=True)


def check_diffusion(tensors: Tensors, config: dict[str, Any]) -> list[Result]:
    """Timestep maps, tables, losses, and every sampler case through diffusers' schedulers."""
    given, expected = section(tensors, "input"), section(tensors, "output")
    results = [
        compare(f"space_timesteps.{spec}", torch.tensor(space_timesteps(1000, spec)), value, 0.0)
        for spec, value in section(expected, "space_timesteps").items()
    ]
    for case in config["cases"]:
        results += _check_case(given, expected, case)
    if "train.t" in given:
        results += _check_training(given, expected)
    return results

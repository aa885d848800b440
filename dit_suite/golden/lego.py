"""LEGO fixtures: denoised outputs of every stop and canvas, guidance, the loss, Heun sampling with skipped bricks."""

from typing import Any

import torch

from dit_suite.converters import build_strict
from dit_suite.converters.lego import config_from, convert_keys
from dit_suite.golden import Result, Tensors, compare, section
from dit_suite.models.lego import LegoTransformer2DModel
from dit_suite.schedulers.edm_heun import EDMHeunScheduler, edm_scalings
from dit_suite.schedulers.guidance import guide
from dit_suite.training.objectives import edm_weight, expand_to, mean_per_sample

FAMILY = "lego"
PREFIXES = ("lego_",)
FORWARD_TOLERANCE = 1e-4
SAMPLE_TOLERANCE = 1e-3


def build(tensors: Tensors, config: dict[str, Any]) -> LegoTransformer2DModel:
    """The network of a fixture, loaded strictly."""
    weights = section(tensors, "state_dict")
    side = tensors["input.x"].shape[-1]
    return build_strict(
        LegoTransformer2DModel, config_from(weights, config["num_heads"][0], side), convert_keys(weights)
    )


def denoised(
    model: LegoTransformer2DModel, x: torch.Tensor, sigma: torch.Tensor, sigma_data: float, labels=None, **choice
) -> torch.Tensor:
    """D(x; sigma) with one noise level per sample."""
    skip, out, scale, level = edm_scalings(sigma, sigma_data)
    raw = model(expand_to(scale, x) * x, level, labels, **choice).sample
    return expand_to(skip, x) * x + expand_to(out, x) * raw


def sample(
    model: LegoTransformer2DModel,
    tensors: Tensors,
    config: dict[str, Any],
    skipped: range = range(0),
    guidance_scale: float | None = None,
) -> torch.Tensor:
    """States after each step `(steps, batch, ...)`, float64; the last brick is left out in the steps of `skipped`."""
    settings = config["sampler"]
    scheduler = EDMHeunScheduler(
        sigma_min=settings["sigma_min"],
        sigma_max=settings["sigma_max"],
        rho=settings["rho"],
        sigma_data=config["sigma_data"],
    )
    scheduler.set_timesteps(settings["num_steps"])
    state = tensors["input.latents"].double() * scheduler.init_noise_sigma
    labels = tensors.get("input.class_labels")
    stop = len(model.bricks) - 2
    states = []
    for index, time in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(state, time).float()
        choice = {"stop_after": stop} if index // 2 in skipped else {}
        raw = model(scaled, time, labels, **choice).sample
        if guidance_scale is not None:
            raw = guide(model(scaled, time, None, **choice).sample, raw, guidance_scale)
        state = scheduler.step(raw, time, state).prev_sample
        if index % 2 or index == len(scheduler.timesteps) - 1:
            states.append(state)
    return torch.stack(states).float()


def loss_map_mean(model: LegoTransformer2DModel, tensors: Tensors, sigma_data: float) -> torch.Tensor:
    """Mean over pixels and bricks of the weighted squared error, `(batch,)`."""
    clean, sigma = tensors["input.loss_y"], tensors["input.loss_sigma"]
    noisy = clean + expand_to(sigma, clean) * tensors["input.loss_noise"]
    skip, out, scale, level = edm_scalings(sigma, sigma_data)
    labels = tensors.get("input.class_labels")
    bricks = model(expand_to(scale, clean) * noisy, level, labels, output_bricks=True).bricks
    errors = [expand_to(skip, clean) * noisy + expand_to(out, clean) * raw - clean for raw in bricks]
    return torch.stack([mean_per_sample(e.square()) * edm_weight(sigma, sigma_data) for e in errors]).mean(dim=0)


@torch.no_grad()
def check(tensors: Tensors, config: dict[str, Any]) -> list[Result]:
    """Compares every output of a fixture."""
    model = build(tensors, config)
    sigma_data = config["sigma_data"]
    x, sigma = tensors["input.x"], tensors["input.sigma"]
    labels = tensors.get("input.class_labels")
    steps = config["sampler"]["num_steps"]
    count = round(steps * config["sampler"]["skip_t_break"])
    expected = section(tensors, "output")

    def run(image: torch.Tensor, given=labels, **choice) -> torch.Tensor:
        return denoised(model, image, sigma, sigma_data, given, **choice)

    _, _, scale, level = edm_scalings(sigma, sigma_data)
    values = {
        "raw_full": model(expand_to(scale, x) * x, level, labels).sample,
        "denoised_full": run(x),
        "denoised_large": run(tensors["input.x_large"]),
        "denoised_wide": run(tensors["input.x_wide"]),
        "loss_map_mean": loss_map_mean(model, tensors, sigma_data),
        "sample_full": sample(model, tensors, config)[-1],
        "sample_skip_last_early": sample(model, tensors, config, range(count))[-1],
        "traj_skip_last_late": sample(model, tensors, config, range(steps - count, steps)),
    }
    values["sample_skip_last_late"] = values["traj_skip_last_late"][-1]
    for stop in range(len(model.bricks) - 1):
        values[f"denoised_stop_after_{stop}"] = run(x, stop_after=stop)
    if "input.active_skip_middle" in tensors:
        values["denoised_skip_middle"] = run(x, active_bricks=tensors["input.active_skip_middle"].bool().tolist())
    if labels is not None:
        weight = config["cfg_scale"]
        values["denoised_nolabel"] = run(x, None)
        values["denoised_cfg"] = guide(values["denoised_nolabel"], values["denoised_full"], weight)
        values["sample_cfg"] = sample(model, tensors, config, guidance_scale=weight)[-1]
    results = []
    for name, wanted in expected.items():
        tolerance = SAMPLE_TOLERANCE if name.startswith(("sample", "traj")) else FORWARD_TOLERANCE
        results.append(compare(name, values[name].to(wanted.dtype), wanted, tolerance))
    return results

"""TarFlow fixtures: the data-to-noise pass, likelihood, denoising, sequential sampling with every guidance variant."""

from typing import Any

import torch

from dit_suite.converters.tarflow import build_model, from_original_config
from dit_suite.golden import Result, Tensors, compare, section
from dit_suite.models.tarflow import TarFlowModel, dequantize
from dit_suite.schedulers.gs_jacobi import FlowGuidance, GSJacobiScheduler, solve

FAMILY = "tarflow"
PREFIXES = ("tarflow_",)

FORWARD_TOLERANCE = 1e-5
REVERSE_TOLERANCE = 1e-4
GUIDED_TOLERANCE = 5e-4


def load_model(tensors: Tensors, config: dict[str, Any]) -> TarFlowModel:
    """The fixture's network in float32."""
    return build_model(section(tensors, "state_dict"), from_original_config(config)).float()


def sample_images(
    model: TarFlowModel, noise: torch.Tensor, labels: torch.Tensor | None, guidance: FlowGuidance
) -> torch.Tensor:
    """Sequential samples `(batch, channels, side, side)` of one noise tensor."""
    solution = solve(model, noise, labels, GSJacobiScheduler(), guidance)
    return model.unpatchify(solution.tokens)


def _guidance_of(name: str, config: dict[str, Any]) -> FlowGuidance:
    """`reverse_ab_annealed_temp` -> letters, annealing and temperature of that case."""
    words = name.split("_")[1:]
    if words[0] in ("g0", "none"):
        return FlowGuidance()
    parameters = next((word for word in words if set(word) <= set("ab")), "ab")
    temperature = config["attn_temp"] if "temp" in words else 1.0
    return FlowGuidance(config["guidance"], parameters, temperature, "annealed" in words)


def _check_forward(model: TarFlowModel, inputs: Tensors, outputs: Tensors, config: dict[str, Any]) -> list[Result]:
    labels = inputs.get("y")
    result = model(inputs["x"], labels)
    computed = {
        "patches": model.patchify(inputs["x"]),
        "z": result.latents,
        "logdets": result.logdet,
        "bpd": model.bits_per_dim(inputs["x"], labels),
        "loss": model.nll_loss(inputs["x"], labels),
    }
    for index, (tokens, logdet) in enumerate(zip(result.block_outputs, result.block_logdets, strict=True)):
        computed[f"block_out.{index}"] = tokens
        computed[f"block_logdet.{index}"] = logdet
    if "z_y" in outputs:
        computed["z_y"] = model(inputs["x"], inputs["y_full"]).latents
    if "z_none" in outputs:
        unlabelled = model(inputs["x"])
        computed["z_none"], computed["logdets_none"] = unlabelled.latents, unlabelled.logdet
    if "var_after_update" in outputs:
        before = model.var.clone()
        model.update_prior(outputs["z"].square().mean(dim=0))
        computed["var_after_update"] = model.var.clone()
        model.var.copy_(before)
    return [compare(name, computed[name], outputs[name], FORWARD_TOLERANCE) for name in computed if name in outputs]


def _check_score(model: TarFlowModel, inputs: Tensors, outputs: Tensors) -> list[Result]:
    with torch.enable_grad():
        image = inputs["x"].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(model.nll_loss(image, inputs.get("y")), image)
    denoised = model.denoise(inputs["x"], inputs.get("y"))
    return [
        compare("grad_loss_x", gradient, outputs["grad_loss_x"], FORWARD_TOLERANCE),
        compare("denoised", denoised, outputs["denoised"], REVERSE_TOLERANCE),
    ]


def check(tensors: Tensors, config: dict[str, Any]) -> list[Result]:
    """Every output of a `tarflow_*` fixture."""
    inputs, outputs = section(tensors, "input"), section(tensors, "output")
    model = load_model(tensors, config)
    results = []
    with torch.no_grad():
        if "pixels_uint8_as_float" in inputs:
            pixels = dequantize(inputs["pixels_uint8_as_float"], inputs["u"])
            results.append(compare("input.x", pixels, inputs["x"], FORWARD_TOLERANCE))
        results += _check_forward(model, inputs, outputs, config)
        results += _check_score(model, inputs, outputs)
        for name in outputs:
            if not name.startswith("reverse_") or ".seq." in name:
                continue
            labels = None if name == "reverse_none" else inputs.get("y_sample")
            guidance = _guidance_of(name, config)
            tolerance = GUIDED_TOLERANCE if guidance.active else REVERSE_TOLERANCE
            images = sample_images(model, inputs["noise"], labels, guidance)
            results.append(compare(name, images, outputs[name], tolerance))
        results += _check_sequence(model, inputs, outputs)
    return results


def _check_sequence(model: TarFlowModel, inputs: Tensors, outputs: Tensors) -> list[Result]:
    """The pictures after 0, 1, ... sampled blocks."""
    names = [name for name in outputs if name.startswith("reverse_g0.seq.")]
    if not names:
        return []
    solution = solve(model, inputs["noise"], inputs.get("y_sample"), GSJacobiScheduler())
    states = [inputs["noise"], *(trace.tokens for trace in solution.blocks)]
    return [
        compare(name, model.unpatchify(states[int(name.rsplit(".", 1)[1])]), outputs[name], REVERSE_TOLERANCE)
        for name in names
    ]

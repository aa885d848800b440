"""Switch-DiT fixtures: the forward pass with its routing and prior loss, DTR with window tables, weighted losses."""

from typing import Any

import torch

from dit_suite.converters import build_strict
from dit_suite.converters.switch_dit import config_from, convert_keys
from dit_suite.golden import Result, Tensors, compare, section
from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel, sliding_window
from dit_suite.schedulers.guidance import guide
from dit_suite.training.auxiliary import (
    diffusion_prior,
    jensen_shannon,
    match_units,
)
from dit_suite.training.objectives import Diffusion, add_noise, mean_per_sample, named_tables
from dit_suite.training.uncertainty import timestep_clusters, uncertainty_weighted

FAMILY = "switch_dit"
PREFIXES = ("switch_dit_",)
FORWARD_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3
# Several assignments are equally good: their cost and the loss count.
AMBIGUOUS = {"prior.match_idx", "prior.gate_to_prior"}


def build(tensors: Tensors, config: dict[str, Any]) -> SwitchDiTTransformer2DModel:
    """The network of a forward fixture, loaded strictly."""
    weights = section(tensors, "state_dict")
    active = config.get("k", config.get("num_experts_per_tok", 2))
    ours = config_from(weights, config["num_heads"], config["input_size"], active)
    return build_strict(SwitchDiTTransformer2DModel, ours, convert_keys(weights))


def forward_values(model: SwitchDiTTransformer2DModel, inputs: Tensors) -> dict[str, torch.Tensor]:
    """Every recorded value of the plain forward pass and of guidance, on the inference path."""
    values: dict[str, torch.Tensor] = {}
    timestep = inputs["t"]
    original = model.mixture

    def keep_block(layer, hidden_states, conditioning, time_embedding, steps, plan):
        out = type(model).run_block(model, layer, hidden_states, conditioning, time_embedding, steps, plan)
        if model.routers:
            mask = 1 + original(layer, hidden_states, time_embedding, plan)
            values.setdefault(f"router_{layer}.mask", mask)
        values.setdefault(f"block_{layer}", out)
        return out

    model.run_block = keep_block
    try:
        with torch.no_grad():
            values["sample"] = model(inputs["x"], timestep, inputs["y"]).sample
            if "cfg_x" in inputs:
                values["cfg"] = guided_halves(model, inputs)
    finally:
        del model.run_block
    embedding = model.time_embed(timestep)
    values["c"] = embedding + model.label_embed(inputs["y"])
    for layer, router in enumerate(model.routers):
        probabilities = router(embedding, output="probabilities")
        gates, order = probabilities.sort(dim=-1, descending=True, stable=True)
        values[f"router_{layer}.probs"] = probabilities
        values[f"router_{layer}.topk_gates"] = gates[:, : router.num_active]
        values[f"router_{layer}.topk_indices"] = order[:, : router.num_active]
        values[f"router_{layer}.full_quantized"] = model.routing_table()[:, layer]
    if model.config.routing == "channels":
        values["active_mask"] = model.channel_table[timestep][:, None]
    return values


def guided_halves(model: SwitchDiTTransformer2DModel, inputs: Tensors) -> torch.Tensor:
    """The reference's guided forward: the first half of the batch twice, guidance of all C channels in both halves."""
    half = inputs["cfg_x"].chunk(2)[0]
    out = model(torch.cat([half, half]), inputs["cfg_t"], inputs["cfg_y"]).sample
    cond, uncond = out.chunk(2)
    channels = model.config.in_channels
    guided = guide(uncond, cond, float(inputs["cfg_scale"]), channels)
    return torch.cat([guided, torch.cat([guided[:, :channels], uncond[:, channels:]], dim=1)])


def prior_results(model: SwitchDiTTransformer2DModel, tensors: Tensors) -> list[Result]:
    """The prior loss, its parts and its gradients. A matching is unique only up to equal units, so its cost counts."""
    outputs = section(tensors, "output")
    config = model.config
    timestep = tensors["input.t"]
    prior = diffusion_prior(config.num_timesteps, config.num_layers, config.num_experts, config.experts_per_timestep)
    assignment, cost = match_units(model.routing_table().flatten(1), prior)
    probabilities = model.routing_probabilities(timestep)
    p = probabilities.flatten(1) / config.num_layers
    q = prior[timestep][:, assignment] / prior[timestep].sum(1, keepdim=True)
    divergence = jensen_shannon(p, q)
    found = {
        "prior.p": p,
        "prior.q": q,
        "prior.active_mask": prior[timestep],
        "prior.match_cost": torch.tensor([cost]),
        "jsd_per_sample": divergence,
        "aux_loss": divergence.mean().reshape(1),
    }
    results = []
    for name, value in found.items():
        key = name if name in outputs else f"prior.{name}"
        results.append(compare(key, value, outputs[key], LOSS_TOLERANCE))
    results += gradient_results(model, divergence.mean(), outputs, "grad_aux")
    if "input.loss_weight" in tensors:
        sample = model(tensors["input.x"], timestep, tensors["input.y"]).sample
        results += gradient_results(model, (tensors["input.loss_weight"] * sample).sum(), outputs, "grad_out")
    return results


def gradient_results(
    model: SwitchDiTTransformer2DModel, scalar: torch.Tensor, outputs: Tensors, prefix: str
) -> list[Result]:
    """Gradients of `scalar` by the original keys, compared relative to their largest entry."""
    expected = section(outputs, prefix)
    named = dict(model.named_parameters())
    ours = {key: next(iter(convert_keys({key: value}))) for key, value in expected.items()}
    gradients = torch.autograd.grad(scalar, [named[name] for name in ours.values()])
    pairs = zip(expected.items(), gradients, strict=True)
    return [compare(f"{prefix}.{key}", grad, value, GRADIENT_TOLERANCE, relative=True) for (key, value), grad in pairs]


def window_results(tensors: Tensors) -> list[Result]:
    """Window tables of DTR (by width) and of the prior (by depth, experts and active experts)."""
    results = []
    for name, value in section(tensors, "output").items():
        kind, _, case = name.partition(".")
        if kind not in ("dtr_start", "dtr_width", "prior_start", "prior_width"):
            continue
        if kind.startswith("dtr"):
            units = int(case)
            width = int(units * 0.8)
        else:
            depth, experts, active = (int(part.lstrip("dEk")) for part in case.split("_"))
            units, width = depth * experts, depth * active
        start = tensors[f"output.{kind.split('_')[0]}_start.{case}"]
        table = sliding_window(len(start), units, width)
        found = table.argmax(dim=1) if kind.endswith("start") else table.sum(dim=1)[:1]
        results.append(compare(name, found.reshape(value.shape), value, 0))
    return results


def loss_results(tensors: Tensors, config: dict[str, Any]) -> list[Result]:
    """Constant, min-SNR and uncertainty weighting on the fixture's closed-form network."""
    x0, noise, timestep = (tensors[f"input.{name}"] for name in ("x0", "noise", "t"))
    results = [compare("clusters", timestep_clusters(1000, config["tasks"]), tensors["output.clusters"], 0)]
    for schedule in ("linear", "cosine"):
        tables = named_tables(schedule, 1000)
        snr = tables.alphas_cumprod / (1 - tables.alphas_cumprod)
        results.append(
            compare(f"{schedule}.snr", snr, tensors[f"output.{schedule}.snr"], LOSS_TOLERANCE, relative=True)
        )
        x_t = add_noise(tables, x0, noise, timestep)
        output = closed_form(tensors, x_t, timestep)
        for name in ("constant", "min_snr_1", "min_snr_5"):
            gamma = 0.0 if name == "constant" else float(name.rpartition("_")[2])
            terms = Diffusion(schedule=schedule, min_snr_gamma=gamma).terms(output, x0, noise, x_t, timestep)
            terms["loss"] = terms["mse"] + terms["vb"]
            for part, value in terms.items():
                key = f"{schedule}.{name}.{part}"
                results.append(compare(key, value, tensors[f"output.{key}"], LOSS_TOLERANCE, relative=True))
        results += uncertainty_results(tensors, schedule, output, x0, noise, x_t, timestep)
    return results


def closed_form(tensors: Tensors, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """`[tanh(3.5 tau) W_eps x + b_eps tau, tanh(W_var x + b_var tau)]` with tau = t / 1000."""
    tau = (timestep.float() / 1000)[:, None, None, None]

    def mix(name: str) -> torch.Tensor:
        return torch.einsum("oc,bchw->bohw", tensors[f"input.W_{name}"], x_t)

    eps = torch.tanh(3.5 * tau) * mix("eps") + tensors["input.b_eps"][None, :, None, None] * tau
    variance = torch.tanh(mix("var") + tensors["input.b_var"][None, :, None, None] * tau)
    return torch.cat([eps, variance], dim=1)


def uncertainty_results(tensors: Tensors, schedule: str, output, x0, noise, x_t, timestep) -> list[Result]:
    """Loss, weights and gradient of the uncertainty weighting."""
    terms = Diffusion(schedule=schedule).terms(output, x0, noise, x_t, timestep)
    scale = tensors[f"input.{schedule}.uw_loss_scale"].clone().requires_grad_(True)
    loss = uncertainty_weighted(terms["mse"] + terms["vb"], timestep, scale, 1000)
    (gradient,) = torch.autograd.grad(loss, scale)
    found = {
        "loss": loss.reshape(1),
        "mse": mean_per_sample((noise - output[:, : x0.shape[1]]).square()),
        "weight": 0.5 * (-scale).exp(),
        "grad_loss_scale": gradient,
    }
    prefix = f"{schedule}.uw"
    expected = section(tensors, f"output.{prefix}")
    return [compare(f"{prefix}.{n}", v, expected[n], LOSS_TOLERANCE, relative=True) for n, v in found.items()]


def check(tensors: Tensors, config: dict[str, Any]) -> list[Result]:
    """Compares the outputs of a fixture of any of the three kinds."""
    outputs = section(tensors, "output")
    if "input.W_eps" in tensors:
        results = loss_results(tensors, config)
        check_complete(outputs, results)
        return results
    model = build(tensors, config)
    results = window_results(tensors)
    for name, value in forward_values(model, section(tensors, "input")).items():
        if name in outputs:
            exact = not outputs[name].is_floating_point()
            results.append(compare(name, value, outputs[name], 0 if exact else FORWARD_TOLERANCE))
    if model.config.routing == "experts":
        results += prior_results(model, tensors)
    check_complete(outputs, results)
    return results


def check_complete(outputs: Tensors, results: list[Result]) -> None:
    """Raises `ValueError` where a fixture's output is compared with nothing."""
    skipped = set(outputs) - {result.name for result in results} - AMBIGUOUS
    if skipped:
        raise ValueError(f"nothing is compared with {', '.join(sorted(skipped))}")

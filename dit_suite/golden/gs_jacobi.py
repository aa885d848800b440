"""GS-Jacobi fixtures: tokens and residuals of every strategy, the sequential references, and the planning metrics."""

from typing import Any

import torch

from dit_suite.golden import Result, Tensors, compare, section
from dit_suite.golden.tarflow import load_model
from dit_suite.models.tarflow import TarFlowModel
from dit_suite.schedulers.gs_jacobi import BlockStrategy, FlowGuidance, GSJacobiScheduler, solve
from dit_suite.schedulers.tarflow_metrics import flow_metrics
from dit_suite.schedulers.tarflow_strategy import GUESSES

FAMILY = "gs_jacobi"
PREFIXES = ("gs_jacobi_",)

TOKEN_TOLERANCE = 1e-4
RESIDUAL_TOLERANCE = 1e-6
REFERENCE_CLAMP = 3.0


def reference_guidance(config: dict[str, Any], tag: str) -> FlowGuidance:
    """Guidance of a case; the reference calls the shift "c"."""
    if tag == "g0":
        return FlowGuidance()
    letters = config["guide_what"].replace("c", "b")
    return FlowGuidance(config["guidance"], letters, config["attn_temp"], config["annealed_guidance"])


def reference_scheduler(strategy: dict[str, Any]) -> GSJacobiScheduler:
    """The published lists as a scheduler: pooled stopping and the clamp at 3."""
    return GSJacobiScheduler(
        modules=[max(0, count) for count in strategy["num_GS_list"]],
        sweeps=[max(1, count) for count in strategy["max_jacobi_list"]],
        guesses=[GUESSES[guess] for guess in strategy["guess_list"]],
        tolerance=strategy["ebound"],
        stopping="batch",
        clamp=REFERENCE_CLAMP,
    )


def _check_case(
    name: str, model: TarFlowModel, inputs: Tensors, wanted: Tensors, scheduler: GSJacobiScheduler, **case: Any
) -> list[Result]:
    noise = inputs["noise"] * case["noise_scale"]
    solution = solve(model, noise, inputs.get("y"), scheduler, case["guidance"])
    results = []
    for index, trace in enumerate(solution.blocks):
        computed = {f"tokens.{index}": (trace.tokens, TOKEN_TOLERANCE)}
        computed[f"residuals.{index}"] = (trace.residual_norms(), RESIDUAL_TOLERANCE)
        computed[f"module_of_iter.{index}"] = (torch.tensor(trace.modules, dtype=torch.int64), 0)
        results += [
            compare(f"{name}.{key}", value, wanted[key], limit)
            for key, (value, limit) in computed.items()
            if key in wanted
        ]
    images = {"image": solution.tokens}
    if "sequential_image" in wanted:
        images["sequential_image"] = solve(model, noise, inputs.get("y"), GSJacobiScheduler(), case["guidance"]).tokens
    return results + [
        compare(f"{name}.{key}", model.unpatchify(tokens), wanted[key], TOKEN_TOLERANCE)
        for key, tokens in images.items()
    ]


def _check_first_block(model: TarFlowModel, inputs: Tensors, wanted: torch.Tensor) -> Result:
    """True error of pure Jacobi on the first sampled block after 1, 2, ... sweeps, both guesses, no guidance."""
    block, noise, labels = model.blocks[-1], inputs["noise"], inputs.get("y")
    count, scheduler = wanted.shape[1], GSJacobiScheduler()
    exact = scheduler.step(block, 0, noise, labels).tokens
    errors = torch.zeros(2, count)
    for row, guess in enumerate(GUESSES[:2]):
        for sweeps in range(1, count + 1):
            strategy = BlockStrategy(1, sweeps, guess)
            clamped = GSJacobiScheduler(clamp=REFERENCE_CLAMP)
            errors[row, sweeps - 1] = (clamped.step(block, 0, noise, labels, strategy=strategy).tokens - exact).norm()
    return compare("jacobi_error_first_block", errors, wanted, TOKEN_TOLERANCE)


def _check_metrics(model: TarFlowModel, inputs: Tensors, outputs: Tensors) -> list[Result]:
    results = []
    for key, wanted in outputs.items():
        kind, *rest = key.split(".")
        labels = inputs.get("y") if rest[-1] == "y" else None
        if kind in ("z", "logdets"):
            result = model(inputs["x"], labels)
            computed = result.latents if kind == "z" else result.logdet
        else:
            metrics = flow_metrics(model, inputs["x"], labels, norm=rest[0])
            computed = {"igm": metrics.igm, "crm_parts": metrics.crm_parts, "crm_percent": metrics.crm_share}[kind]
        results.append(compare(key, computed, wanted, TOKEN_TOLERANCE))
    return results


def check(tensors: Tensors, config: dict[str, Any]) -> list[Result]:
    """Every output of a `gs_jacobi_*` fixture."""
    inputs, outputs = section(tensors, "input"), section(tensors, "output")
    model = load_model(tensors, config)
    with torch.no_grad():
        if "x" in inputs:
            return _check_metrics(model, inputs, outputs)
        results = []
        for tag in ("g0", "cfg"):
            name = f"sequential_{tag}"
            wanted = section(outputs, name)
            if wanted:
                case = {"noise_scale": 1.0, "guidance": reference_guidance(config, tag)}
                results += _check_case(name, model, inputs, wanted, GSJacobiScheduler(), **case)
        for name, strategy in config["strategies"].items():
            guidance = reference_guidance(config, strategy["tag"])
            case = {"noise_scale": strategy["noise_scale"], "guidance": guidance}
            results += _check_case(name, model, inputs, section(outputs, name), reference_scheduler(strategy), **case)
        if "jacobi_error_first_block" in outputs:
            results.append(_check_first_block(model, inputs, outputs["jacobi_error_first_block"]))
    return results

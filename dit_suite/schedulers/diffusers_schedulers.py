"""diffusers' schedulers that our pipelines run, and the check that scheduler and network speak of the same thing."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers

_FLOW_NATIVE = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_FLOW_CAPABLE = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
_DIFFUSION = ("DDIMScheduler", "DDPMScheduler", *_FLOW_CAPABLE)

SCHEDULERS = {
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm-solver": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def check_scheduler(scheduler: Any, prediction_type: str) -> None:
    """Raises `ValueError` if `scheduler` can't integrate a network that predicts `prediction_type`.

    Args:
        scheduler: a diffusers scheduler.
        prediction_type: "flow_prediction" (velocity eps - x0), "epsilon" or "v_prediction".
    """
    name = type(scheduler).__name__
    own = scheduler.config.get("prediction_type", "flow_prediction" if name in _FLOW_NATIVE else "epsilon")
    if name not in _FLOW_NATIVE and name not in _DIFFUSION:
        raise ValueError(f"{name} is not supported; use one of {', '.join(SCHEDULERS.values())}")
    if prediction_type == "flow_prediction":
        if name in _FLOW_NATIVE or (own == "flow_prediction" and scheduler.config.get("use_flow_sigmas")):
            return
        if name in _FLOW_CAPABLE:
            raise ValueError(
                f"this network predicts a flow velocity: make the {name} with prediction_type='flow_prediction' and "
                "use_flow_sigmas=True"
            )
        raise ValueError(f"this network predicts a flow velocity, which {name} can't integrate; use FlowMatchEuler")
    if name in _FLOW_NATIVE or own == "flow_prediction":
        raise ValueError(f"this network predicts {prediction_type}, but {name} integrates a flow velocity")
    if own != prediction_type:
        raise ValueError(f"this network predicts {prediction_type}, but the {name} is set to {own}")


def check_levels(scheduler: Any, sigmas: Sequence[float] | None, shift: float | None) -> None:
    """Raises `ValueError` if `scheduler` can't take these noise levels or this shift, or if they make no schedule."""
    if sigmas is None and shift is None:
        return
    name = type(scheduler).__name__
    if not hasattr(scheduler, "set_shift") or "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"noise levels and their shift are chosen per call with FlowMatchEuler only, not with {name}")
    if shift is not None and shift <= 0:
        raise ValueError(f"shift must be above 0, got {shift}")
    levels = list(sigmas) if sigmas is not None else [1.0]
    if not levels or not 0 < levels[-1] <= levels[0] <= 1 or levels != sorted(set(levels), reverse=True):
        raise ValueError(f"sigmas must fall from at most 1 and stay above 0, got {levels}")


@contextlib.contextmanager
def temporary_shift(scheduler: Any, shift: float | None) -> Iterator[None]:
    """Lets the scheduler make its timesteps with this shift inside the `with` block; None leaves its own."""
    if shift is None:
        yield
        return
    before = scheduler.shift
    scheduler.set_shift(shift)
    try:
        yield
    finally:
        scheduler.set_shift(before)


def build_scheduler(name: str, current: Any, prediction_type: str) -> Any:
    """The scheduler called `name` (a key of `SCHEDULERS`) with the settings of the `current` one.

    Raises:
        ValueError: the name is unknown, or that scheduler can't integrate this network.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}")
    cls = getattr(diffusers, SCHEDULERS[name])
    changes: dict[str, Any] = {}
    if SCHEDULERS[name] in _FLOW_CAPABLE and prediction_type == "flow_prediction":
        shift = current.config.get("shift", current.config.get("flow_shift", 1.0))
        changes = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler = cls.from_config(current.config, **changes)
    check_scheduler(scheduler, prediction_type)
    return scheduler


def step_arguments(scheduler: Any, generator: Any) -> dict[str, Any]:
    """Extra keyword arguments for `scheduler.step`: the generator, where the scheduler may draw noise."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}

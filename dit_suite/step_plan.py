"""The step context: which network evaluation of which sampling step is under way.

A pipeline is a loop over a plan of steps. Around every network evaluation it publishes a `StepContext`; plug-ins
(caching, sparse attention) read it with `current_step()` and keep no step counters of their own. The context lives in a
`contextvars.ContextVar`, so two pipelines on two threads, or one that fails half-way, never see each other's steps.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

BRANCHES = ("none", "batched", "cond", "uncond")

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_current: contextvars.ContextVar["StepContext | None"] = contextvars.ContextVar("dit_suite_step", default=None)


class Run:
    """Identity of one pipeline call. State that belongs to a call is keyed by this object and dies with it."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True)
class StepContext:
    """One network evaluation.

    Attributes:
        step_index: position in the plan, from 0.
        num_steps: length of the plan, or 0 where a foreign pipeline does not tell.
        timestep: the scheduler's value for this step (its own units).
        branch: "none" (no guidance), "batched" (both guidance halves in one batch, the unconditional half first in
            diffusers' order), or "cond" / "uncond" (one pass each).
        evaluation: 0 for the first evaluation of the step, 1 for the second of a two-stage solver, and so on.
        run: identity of the pipeline call.
        extras: what a technique planned for this step (bricks to skip, for example).
    """

    step_index: int
    num_steps: int
    timestep: float
    branch: str = "none"
    evaluation: int = 0
    run: Run = field(default_factory=Run)
    extras: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)

    def __post_init__(self) -> None:
        if self.branch not in BRANCHES:
            raise ValueError(f"branch must be one of {', '.join(BRANCHES)}, got {self.branch!r}")


def current_step() -> StepContext | None:
    """The evaluation under way on this thread, or None outside a sampling loop."""
    return _current.get()


@contextlib.contextmanager
def publish_step(context: StepContext) -> Iterator[StepContext]:
    """Makes `context` the current step inside the `with` block and restores what was there, exception or not."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class PlannedStep:
    """One entry of a plan: a scheduler timestep and the guidance branches that are evaluated there."""

    step_index: int
    timestep: float
    evaluation: int
    branches: tuple[str, ...]
    extras: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)


@dataclass(frozen=True)
class StepPlan:
    """The network evaluations of one pipeline call, in order.

    `steps` has one entry per scheduler call. A second-order scheduler lists the inner point of a step as an entry of
    its own (diffusers' Heun repeats timesteps); it shares `step_index` with the entry before and has `evaluation` 1.
    """

    steps: tuple[PlannedStep, ...]
    run: Run = field(default_factory=Run)

    @property
    def num_steps(self) -> int:
        return self.steps[-1].step_index + 1 if self.steps else 0

    @property
    def num_evaluations(self) -> int:
        """Network passes in all, two-pass guidance counted twice."""
        return sum(len(step.branches) for step in self.steps)

    def context(self, step: PlannedStep, branch: str) -> StepContext:
        """The context to publish around one evaluation of `step`."""
        return StepContext(
            step.step_index, self.num_steps, step.timestep, branch, step.evaluation, self.run, step.extras
        )

    def with_extras(self, extras: "Mapping[int, Mapping[str, Any]]") -> "StepPlan":
        """The same plan with technique data attached to some steps, by step index."""
        steps = tuple(
            replace(s, extras=MappingProxyType({**s.extras, **extras.get(s.step_index, _NOTHING)})) for s in self.steps
        )
        return replace(self, steps=steps)


def plan_steps(
    timesteps: "Any", *, order: int = 1, guidance: bool = False, batched: bool = True, run: Run | None = None
) -> StepPlan:
    """A plan for a diffusers scheduler's `timesteps`.

    Args:
        timesteps: the scheduler's sequence (tensor or list) after `set_timesteps`.
        order: the scheduler's `order`; with order k, entries after the first are grouped so that `len(timesteps) =
            k * num_inference_steps - (k - 1)`, as in diffusers' Heun schedulers, the last step having one evaluation.
        guidance: classifier-free guidance on or off.
        batched: both halves of guidance in one pass, or one pass each.
    """
    values = [float(t) for t in timesteps]
    branches = ("none",) if not guidance else (("batched",) if batched else ("uncond", "cond"))
    steps = tuple(PlannedStep(i // order, value, i % order, branches) for i, value in enumerate(values))
    return StepPlan(steps, run or Run())

"""The cached forward of BAC (arXiv 2506.13456): hooks that compute, store and recall by a fixed schedule.

Nothing is decided by looking at tensors, so there is no synchronisation with the GPU.

A cached sub-block is the module's output before gate and residual addition; a cached block or stack is what it added to
the residual stream. State belongs to one pipeline call (the `run` of the step context) and one guidance branch of it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from diffusers.hooks import ModelHook

from dit_suite.caching.block_probe import StreamLayout
from dit_suite.caching.plan import BACConfig, BACSchedule
from dit_suite.caching.streams import added_streams, flat_tensors, join_streams, read_streams, split_streams
from dit_suite.step_plan import StepContext, current_step

_DTYPES = {"same": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class _Entry:
    """A computed output: its evaluation index, the shape of the input it belongs to, and its tensors."""

    index: int
    fits: tuple
    tensors: list[torch.Tensor | None]


@dataclass
class _RunState:
    """What one pipeline call has cached so far. It dies with the run, so nothing in it may hold on to the run."""

    schedule: BACSchedule
    index_of: dict[tuple[int, int], int]
    entries: dict[tuple[str, int], list[_Entry]] = field(default_factory=dict)
    last_seen: dict[int, "ReferenceType[StepContext]"] = field(default_factory=dict)


class Engine:
    """Decides, stores and recalls for every hook of one `apply_bac`.

    Args:
        schedules: by step count.
        config: how tensors are stored.
        guess: makes the schedule of a step count that has none; None refuses such runs.
    """

    def __init__(
        self,
        schedules: dict[int, BACSchedule],
        config: BACConfig,
        guess: Callable[[int], BACSchedule] | None = None,
    ) -> None:
        self.schedules = schedules
        self.guess = guess
        self.config = config
        self.dtype = _DTYPES[config.cache_dtype]
        self.states: WeakKeyDictionary[Any, _RunState] = WeakKeyDictionary()
        self.counts: Counter = Counter()
        self.peak_bytes = 0
        self.runs = 0

    def _state(self, context: StepContext) -> _RunState:
        state = self.states.get(context.run)
        if state is None:
            schedule = self._schedule(context.num_steps)
            state = _RunState(schedule, {position: k for k, position in enumerate(schedule.positions)})
            self.states[context.run] = state
            self.runs += 1
        return state

    def _schedule(self, num_steps: int) -> BACSchedule:
        made_for = ", ".join(str(count) for count in sorted(self.schedules))
        if num_steps == 0:
            if len(self.schedules) > 1:
                raise ValueError(
                    "this pipeline does not tell its number of steps, so BAC can't choose among its schedules for "
                    f"{made_for} steps; apply one of them"
                )
            return next(iter(self.schedules.values()))
        if num_steps not in self.schedules:
            if self.guess is None:
                raise ValueError(
                    f"the BAC schedule was made for {made_for} steps and this run has {num_steps}; calibrate for "
                    f"{num_steps} steps (scripts/calibrate_bac.py) or let a BACConfig guess (interpolate=True)"
                )
            self.schedules[num_steps] = self.guess(num_steps)
        return self.schedules[num_steps]

    def locate(self, context: StepContext) -> tuple[_RunState, int]:
        """The run's state and the index of this evaluation in its schedule; refuses steps the schedule can't know."""
        state = self._state(context)
        schedule = state.schedule
        index = state.index_of.get((context.step_index, context.evaluation))
        if index is None:
            raise ValueError(
                f"the BAC schedule has {schedule.num_inference_steps} steps of the scheduler it was calibrated with; "
                f"this run reached step {context.step_index}, evaluation {context.evaluation}"
            )
        expected, scale = schedule.timesteps[index], max(abs(t) for t in schedule.timesteps)
        if abs(context.timestep - expected) > 5e-3 * scale:
            raise ValueError(
                f"the BAC schedule was made for another scheduler or noise schedule: step {context.step_index} was at "
                f"timestep {expected:g} in calibration and is at {context.timestep:g} here"
            )
        return state, index

    def recall(
        self, state: _RunState, branch: str, unit: int, index: int, fits: tuple
    ) -> tuple[list[torch.Tensor | None] | None, bool]:
        """(cached or forecast tensors, False), or (None, store): compute, and keep the result where `store` says so.

        The last evaluation of a run takes what is cached out and keeps nothing.
        """
        plan = state.schedule.plan(branch)
        entries = state.entries.get((branch, unit), [])
        more = index + 1 < len(state.schedule.timesteps)
        if not more:
            state.entries.pop((branch, unit), None)
        weights = plan.weights[unit].get(index)
        if weights is None:
            return None, more
        if not entries:
            return None, False
        if not _fits(entries[0].fits, fits):
            return None, more
        anchors = [c for c in reversed(plan.steps[unit]) if c < index][: len(weights)]
        matched = [e for e in entries if _fits(e.fits, fits)][: len(weights)]
        if [e.index for e in matched] != anchors:
            weights, matched = (1.0,), entries[:1]
        return [self._blend(parts, weights) for parts in zip(*(e.tensors for e in matched), strict=True)], False

    def _blend(self, parts: tuple[torch.Tensor | None, ...], weights: Sequence[float]) -> torch.Tensor | None:
        if any(part is None for part in parts):
            return None
        if weights[0] == 1.0 and not any(weights[1:]):
            return parts[0]
        total = parts[0] * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(part, alpha=weight)
        return total

    def keep(
        self, state: _RunState, branch: str, unit: int, index: int, fits: tuple, tensors: list[torch.Tensor | None]
    ) -> None:
        """Stores a computed output, the newest first, as many as the forecast draws on."""
        kept = [None if t is None else self._store(t.detach()) for t in tensors]
        entries = [e for e in state.entries.get((branch, unit), []) if _fits(e.fits, fits)]
        limit = 1 if self.config.predictor == "reuse" else self.config.order
        state.entries[(branch, unit)] = [_Entry(index, fits, kept), *entries][:limit]
        self.peak_bytes = max(self.peak_bytes, self.cached_bytes())

    def _store(self, tensor: torch.Tensor) -> torch.Tensor:
        device = torch.device("cpu") if self.config.cache_device == "cpu" else tensor.device
        return tensor.to(device=device, dtype=self.dtype or tensor.dtype)

    def cached_bytes(self) -> int:
        """Bytes of all cached tensors of all live runs."""
        entries = [e for state in list(self.states.values()) for group in state.entries.values() for e in group]
        return sum(t.numel() * t.element_size() for e in entries for t in e.tensors if t is not None)

    def count(self, kind: str, what: str) -> None:
        """Books one unit of a kind as "computed" or "reused"."""
        self.counts[(kind, what)] += 1


def _input_key(tensors: Sequence[torch.Tensor | None]) -> tuple:
    return tuple(None if t is None else (tuple(t.shape), t.dtype) for t in tensors)


def _fits(one: tuple, other: tuple) -> bool:
    """Whether a cached output belongs to inputs of these shapes; a stream that one of them lacks does not matter."""
    return all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


def _first_tensors(args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)][:1]


def _restore(tensors: list[torch.Tensor | None], streams: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    like = next(stream for stream in streams if stream is not None)
    return [None if t is None else t.to(device=like.device, dtype=like.dtype) for t in tensors]


class _Hook(ModelHook):
    """Common part: one hooked module of one unit."""

    def __init__(self, engine: Engine, unit: int, kind: str, name: str) -> None:
        super().__init__()
        self._engine, self._unit, self._kind, self._name = engine, unit, kind, name

    def _compute(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs)

    @torch.compiler.disable
    def _open(self, module: torch.nn.Module) -> tuple[StepContext, _RunState, int] | None:
        """Where this call stands, or None where nothing is cached: outside a sampling loop, and in a pass that only
        writes a key-value cache."""
        context = current_step()
        if context is None or context.extras.get("write"):
            return None
        if module.training and torch.is_grad_enabled():
            raise ValueError("BAC is for sampling; remove it (handle.remove()) before training the model")
        state, index = self._engine.locate(context)
        return context, state, index

    def _once(self, state: _RunState, context: StepContext) -> None:
        seen = state.last_seen.get(self._unit)
        if seen is not None and seen() is context:
            raise ValueError(
                f"{self._name} runs more than once per evaluation, so it can't be cached by itself; "
                "use another granularity"
            )
        state.last_seen[self._unit] = ref(context)


class SubBlockHook(_Hook):
    """Attention or feed-forward: the module's whole output is cached, tuples included."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._form: Callable[[list], Any] = lambda tensors: tensors[0]

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self._open(module)
        if call is None:
            return self._compute(args, kwargs)
        context, state, index = call
        self._once(state, context)
        entering = _first_tensors(args, kwargs)
        fits = _input_key(entering)
        found, store = self._engine.recall(state, context.branch, self._unit, index, fits)
        if found is not None:
            self._engine.count(self._kind, "reused")
            return self._form(_restore(found, entering))
        output = self._compute(args, kwargs)
        self._engine.count(self._kind, "computed")
        if store:
            if not isinstance(output, torch.Tensor):
                pattern = [item is not None for item in output]
                kind = type(output) if type(output) in (tuple, list) else tuple
                self._form = lambda tensors: kind(_fill(pattern, tensors))
            self._engine.keep(state, context.branch, self._unit, index, fits, flat_tensors(output))
        return output


def _fill(pattern: list[bool], tensors: list) -> list:
    rest = iter(tensors)
    return [next(rest) if present else None for present in pattern]


class BlockHook(_Hook):
    """A whole block: what it adds to each stream is cached."""

    def __init__(self, engine: Engine, unit: int, kind: str, name: str, layout: StreamLayout) -> None:
        super().__init__(engine, unit, kind, name)
        self._layout = layout

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self._open(module)
        if call is None:
            return self._compute(args, kwargs)
        context, state, index = call
        self._once(state, context)
        entering = read_streams(self._layout, args, kwargs)
        fits = _input_key(entering)
        found, store = self._engine.recall(state, context.branch, self._unit, index, fits)
        if found is not None:
            self._engine.count(self._kind, "reused")
            return join_streams(self._layout, _add(entering, _restore(found, entering)))
        output = self._compute(args, kwargs)
        self._engine.count(self._kind, "computed")
        if store:
            added = added_streams(entering, split_streams(self._layout, output))
            self._engine.keep(state, context.branch, self._unit, index, fits, added)
        return output


def _add(streams: list[torch.Tensor | None], increments: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if a is None or b is None else a + b for a, b in zip(streams, increments, strict=False)]


@dataclass
class _StackPass:
    """One evaluation's way through a stack."""

    context: "ReferenceType[StepContext]"
    entering: list[torch.Tensor | None]
    fits: tuple
    found: list[torch.Tensor | None] | None
    store: bool
    expected: list[torch.Tensor | None] | None = None


class Stack:
    """The pass that the hooks of one stack's blocks share; keyed by run, so that threads don't meet."""

    def __init__(self) -> None:
        self.passes: WeakKeyDictionary[Any, _StackPass] = WeakKeyDictionary()


class StackHook(_Hook):
    """One block of a stack: the first opens the pass, all but the last hand the streams on, the last adds the cache."""

    def __init__(
        self, engine: Engine, unit: int, name: str, layout: StreamLayout, stack: Stack, first: bool, last: bool
    ) -> None:
        super().__init__(engine, unit, "stack", name)
        self._layout, self._stack, self._first, self._last = layout, stack, first, last

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self._open(module)
        if call is None:
            return self._compute(args, kwargs)
        context, state, index = call
        entering = read_streams(self._layout, args, kwargs)
        if self._first:
            self._once(state, context)
            fits = _input_key(entering)
            found, store = self._engine.recall(state, context.branch, self._unit, index, fits)
            self._stack.passes[context.run] = _StackPass(ref(context), entering, fits, found, store)
        current = self._stack.passes.get(context.run)
        if current is None or current.context() is not context:
            raise ValueError(f"{self._name} ran before the first block of its stack; use granularity='block'")
        if self._last:
            del self._stack.passes[context.run]
        if current.found is not None:
            return self._hand_on(current, entering)
        return self._run_block(state, index, context, current, entering, args, kwargs)

    def _hand_on(self, current: _StackPass, entering: list[torch.Tensor | None]) -> Any:
        if not self._last:
            return join_streams(self._layout, entering[: len(current.found)])
        self._engine.count(self._kind, "reused")
        return join_streams(self._layout, _add(entering, _restore(current.found, entering)))

    def _run_block(
        self,
        state: _RunState,
        index: int,
        context: StepContext,
        current: _StackPass,
        entering: list,
        args: tuple,
        kwargs: dict,
    ) -> Any:
        if current.expected is not None and any(
            a is not b for a, b in zip(entering, current.expected, strict=False) if b is not None
        ):
            raise ValueError(
                f"something is added to the streams before {self._name}, so its stack can't be cached as one; "
                "use granularity='block'"
            )
        output = self._compute(args, kwargs)
        leaving = current.expected = split_streams(self._layout, output)
        if self._last:
            self._engine.count(self._kind, "computed")
            if current.store:
                increments = added_streams(current.entering, leaving)
                self._engine.keep(state, context.branch, self._unit, index, current.fits, increments)
        return output

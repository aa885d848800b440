"""GS-Jacobi: solvers for the triangular system of a TarFlow block.

"Accelerate TarFlow Sampling with GS-Jacobi Iteration" (arXiv 2505.12849). Sampling inverts one block after the other,
the last block first. In the block's own token order the unknowns x obey

    x_0 = z_0,    x_t = exp(a_t(x_<t)) * z_t + b_t(x_<t)

`GSJacobiScheduler.step` solves one block in one of two ways:

- sequential: forward substitution with a preallocated KV cache, T - 1 network calls of one token;
- Jacobi / Gauss-Seidel-Jacobi: the sequence is cut into modules; all tokens of a module are updated at once, `sweeps`
  times, while the modules before it stay fixed with their keys and values cached.

After k sweeps the first k tokens of a module are exact whatever the initial guess, so `sweeps` >= module length gives
the sequential solution.

The first sweeps of a module may run the network in bfloat16 (`BlockStrategy.bfloat16_sweeps`, not in the paper): an
iterate that is far from the solution needs no more digits, and every later sweep shrinks their rounding like any error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from dit_suite.models.tarflow import LayerCache, TarFlowBlock, TarFlowModel
from dit_suite.schedulers.flow_graphs import FlowGraphs, SolverState
from dit_suite.schedulers.flow_system import (
    DIVERGED,
    BlockTrace,
    FlowOverflow,
    FlowSystem,
    Watch,
    estimated_error,
    first_iterate,
    ignore,
    never,
    why_not_bfloat16,
)
from dit_suite.schedulers.tarflow_strategy import BlockStrategy, FlowGuidance
from dit_suite.step_plan import Run, StepContext, publish_step

STOPPING = ("sample", "batch")


def solve_sequential(system: FlowSystem, trace: BlockTrace, watch: Watch) -> torch.Tensor:
    """Forward substitution; returns the tokens in the block's order."""
    found = system.latents.clone()
    caches = system.new_caches()
    for position in range(system.length - 1):
        if watch.should_stop():
            trace.interrupted = True
            break
        found[:, position + 1 : position + 2] = system.update(found[:, position : position + 1], position, caches)
        trace.calls += 1
        watch.progress(1)
    return found


def _substitute(system: FlowSystem, state: SolverState) -> None:
    """`solve_sequential` unwatched, to be recorded."""
    state.found.copy_(solve_sequential(system, BlockTrace(system.latents), Watch()))


def _renew(
    system: FlowSystem,
    rows: torch.Tensor,
    start: int,
    end: int,
    caches: list | None,
    active: torch.Tensor | None,
    bfloat16: bool,
    clamp: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New values of the tokens `start + 1 .. end` of `rows`, the sums of their squared changes, and which went wild."""
    new, old = system.update(rows[:, start:end], start, caches, active, bfloat16), rows[:, start + 1 : end + 1]
    if clamp is not None:
        new = new.clamp(-clamp, clamp)
    # A wild iterate falls back to its latent, so that it can't spread through masked attention as NaN.
    sane = new.abs() < DIVERGED
    latents = system.latents if active is None else system.latents.index_select(0, active)
    new = torch.where(sane, new, latents[:, start + 1 : end + 1])
    return new, (new - old).square().sum(dim=(1, 2)), ~sane.flatten(1).all(dim=1)


def _clamp_first_token(found: torch.Tensor, clamp: float) -> torch.Tensor:
    """Pure Jacobi of the reference clamps token 0 as well; only the first sweep can change it."""
    first = found[:, :1]
    clamped = first.clamp(-clamp, clamp)
    change = (clamped - first).square().sum(dim=(1, 2))
    found[:, :1] = clamped
    return change


def _unfinished(
    system: FlowSystem,
    change: torch.Tensor,
    previous: torch.Tensor | None,
    length: int,
    tolerance: float | torch.Tensor,
    stopping: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Who is not within `tolerance` after a sweep over `length` tokens, and the root mean square changes."""
    token_dim = system.latents.shape[2]
    rms = (change / (length * token_dim)).sqrt()
    if stopping == "batch":
        going = change.sum().sqrt() / (system.batch * token_dim) > tolerance
        return going.expand(system.batch), rms
    return estimated_error(rms, previous) > tolerance, rms


def _sweep_held(system: FlowSystem, state: SolverState, bfloat16: bool, clamp: float | None, stopping: str) -> None:
    """One sweep over the whole sequence and batch, to be recorded; who has finished keeps what it has."""
    last, going = system.length - 1, state.going
    new, change, wild = _renew(system, state.found, 0, last, None, None, bfloat16, clamp)
    state.found[:, 1:] = torch.where(going[:, None, None], new, state.found[:, 1:])
    # No `where` with a number: it would be copied from the host, which can't be recorded.
    state.change.copy_(change.masked_fill(~going, 0.0))
    if clamp is not None:
        state.change.add_(_clamp_first_token(state.found, clamp))
    state.diverged.copy_(torch.where(going, wild, state.diverged))
    state.sweeps.add_(going)
    unfinished, rms = _unfinished(system, state.change, state.previous, last, state.tolerance, stopping)
    state.previous.copy_(rms)
    if not bfloat16:
        going.copy_(going & (unfinished | state.diverged))
    state.remaining.copy_(going.sum())


@dataclass(frozen=True)
class _Standing:
    """Where a module stands: sweeps done, the samples that go on (None: all), their changes before."""

    done: int = 0
    active: torch.Tensor | None = None
    previous: torch.Tensor | None = None


class _Sweeper:
    """Jacobi updates of one block. `found` holds the iterate in the block's order."""

    def __init__(
        self, system: FlowSystem, strategy: BlockStrategy, clamp: float | None, trace: BlockTrace, watch: Watch
    ) -> None:
        self.system = system
        self.clamp = clamp
        self.trace = trace
        self.watch = watch
        self.found = first_iterate(system, strategy.guess)
        # Nothing is read back from a cache when one module spans the sequence.
        self.caches = None if strategy.modules == 1 else system.new_caches()
        self.whole = strategy.modules == 1
        self.diverged = torch.zeros(system.batch, dtype=torch.bool, device=self.found.device)

    def sweep(
        self,
        start: int,
        end: int,
        module: int,
        active: torch.Tensor | None,
        caches: list | None,
        bfloat16: bool = False,
    ) -> torch.Tensor:
        """Updates the tokens `start + 1 .. end` of the `active` samples; returns their sums of squared changes."""
        found, first = self.found, start + 1
        rows = found if active is None else found.index_select(0, active)
        new, change, wild = _renew(self.system, rows, start, end, caches, active, bfloat16, self.clamp)
        if active is None:
            found[:, first : end + 1] = new
            self.diverged, everyone = wild, change
        else:
            found[active, first : end + 1] = new
            self.diverged[active] = wild
            everyone = change.new_zeros(self.system.batch).index_copy(0, active, change)
        if self.clamp is not None and self.whole:
            everyone = everyone + _clamp_first_token(found, self.clamp)
        self.trace.sweeps += 1 if active is None else torch.zeros_like(self.trace.sweeps).index_fill(0, active, 1)
        self.book(everyone, module, end - start, bfloat16)
        return everyone

    def book(self, change: torch.Tensor, module: int, covered: int, bfloat16: bool) -> None:
        """Notes a sweep in the trace, but for the samples that took part."""
        self.trace.residuals.append(change)
        self.trace.modules.append(module)
        self.trace.covered.append(covered)
        self.trace.calls += 1
        self.trace.bfloat16_calls += bfloat16
        self.watch.progress(1)


def _sweep_recorded(
    sweeper: _Sweeper, graphs: FlowGraphs, budget: int, tolerance: float, stopping: str, bfloat16_sweeps: int
) -> _Standing:
    """The sweeps of a single module as graphs: one launch each, and where samples may stop one wait for their number.

    Shapes are fixed, so that the batch does not shrink: finished samples are computed along and keep what they have.
    That costs arithmetic and saves launches. Once fewer than half of the samples go on, their sweeps are left to
    `_solve_modules`, which computes nobody else.
    """
    system, trace, watch = sweeper.system, sweeper.trace, sweeper.watch
    held, done, few = graphs.block(system), 0, False
    state = held.state
    state.begin(sweeper.found, tolerance)
    while done < budget and not few:
        if watch.should_stop():
            trace.interrupted = True
            break
        done += 1
        bfloat16 = done <= bfloat16_sweeps
        part = partial(_sweep_held, bfloat16=bfloat16, clamp=sweeper.clamp, stopping=stopping)
        held.run(("sweep", bfloat16, sweeper.clamp, stopping), part)
        sweeper.book(state.change.clone(), 0, system.length - 1, bfloat16)
        if done == budget or tolerance < 0 or bfloat16:
            continue
        remaining = int(state.remaining)
        if remaining == 0:
            watch.progress(budget - done)
            done = budget
        few = 2 * remaining < system.batch
    sweeper.found.copy_(state.found)
    sweeper.diverged.copy_(state.diverged)
    trace.sweeps.copy_(state.sweeps)
    active = state.going.nonzero().flatten() if done < budget else None
    return _Standing(done, active, state.previous.clone())


def _solve_modules(
    sweeper: _Sweeper,
    calls: list[tuple[int, int, int]],
    tolerance: float,
    stopping: str,
    bfloat16_sweeps: int,
    standing: _Standing,
) -> None:
    """Module after module; a sample whose estimated error is within `tolerance` takes no part in its later sweeps.

    The first `bfloat16_sweeps` of each module run in bfloat16; no sample leaves before a sweep in float32. The first
    module goes on from `standing`.
    """
    system, wild = sweeper.system, torch.zeros_like(sweeper.diverged)
    position = 0
    while position < len(calls):
        start, end, module = calls[position]
        budget = sum(1 for call in calls if call[2] == module)
        position += budget
        active, previous, caches = standing.active, standing.previous, sweeper.caches
        for done in range(standing.done + 1, budget + 1):
            if sweeper.watch.should_stop():
                sweeper.trace.interrupted = True
                return
            change = sweeper.sweep(start, end, module, active, caches, done <= bfloat16_sweeps)
            if done == budget or tolerance < 0:
                continue
            going, previous = _unfinished(system, change, previous, end - start, tolerance, stopping)
            if done <= bfloat16_sweeps:
                continue
            going = going | sweeper.diverged
            if active is not None:
                going = going & torch.zeros_like(going).index_fill(0, active, True)
            remaining = going.nonzero().flatten()
            if remaining.numel() == 0:
                sweeper.watch.progress(budget - done)
                break
            if remaining.numel() < (system.batch if active is None else active.numel()):
                _store(sweeper.caches, caches, system, active, start, end)
                active = remaining
                rows = system.rows(active)
                caches = None if caches is None else [cache.rows(rows) for cache in sweeper.caches]
        _store(sweeper.caches, caches, system, active, start, end)
        wild, standing = wild | sweeper.diverged, _Standing()
        sweeper.diverged = torch.zeros_like(wild)
    sweeper.diverged = wild


def _store(
    full: list[LayerCache] | None,
    part: list[LayerCache] | None,
    system: FlowSystem,
    active: torch.Tensor | None,
    start: int,
    end: int,
) -> None:
    """Copies what a smaller batch wrote at `start .. end - 1` back into the caches of the whole batch."""
    if full is None or active is None:
        return
    rows = system.rows(active)
    for target, source in zip(full, part, strict=True):
        target.keys[rows, :, start:end] = source.keys[:, :, start:end]
        target.values[rows, :, start:end] = source.values[:, :, start:end]


class GSJacobiScheduler(SchedulerMixin, ConfigMixin):
    """Solves the blocks of a `TarFlowModel` one by one, each in its own way. Its config is the strategy file.

    Lists are in SAMPLING order: entry 0 is the last block. Without lists every block is solved sequentially.

    Args:
        modules: per block, 0 sequential, 1 Jacobi, G modules.
        sweeps: per block, updates per module at most.
        guesses: per block, "latent", "zero" or "linear".
        tolerances: per block, a sample leaves a module when its root mean square error, estimated from the changes of
            the last two sweeps (`estimated_error`), is at most this; negative: the number of sweeps is fixed.
        tolerance: the same for blocks whose own is lower.
        stopping: "sample" decides for every sample by itself; "batch" is the reference's pooled rule (Frobenius norm
            over the batch / (batch * token_dim) against `tolerance`).
        clamp: bound on updated tokens (3.0 in the reference), or None. The sequential loop never clamps.
        bfloat16_sweeps: per block, the first sweeps of a module that run in bfloat16 where the device has units for it.
        planned: what the planner measured, kept for the record.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        modules: list[int] | None = None,
        sweeps: list[int] | None = None,
        guesses: list[str] | None = None,
        tolerances: list[float] | None = None,
        tolerance: float = -1.0,
        stopping: str = "sample",
        clamp: float | None = None,
        bfloat16_sweeps: list[int] | None = None,
        planned: dict | None = None,
    ) -> None:
        if stopping not in STOPPING:
            raise ValueError(f"stopping must be one of {', '.join(STOPPING)}, got {stopping!r}")
        if clamp is not None and not clamp > 0:
            raise ValueError(f"clamp must be above 0 or None, got {clamp}")
        if math.isnan(tolerance):
            raise ValueError("tolerance must be a number, got nan")
        given = {"modules": modules, "sweeps": sweeps, "guesses": guesses, "tolerances": tolerances}
        given["bfloat16_sweeps"] = bfloat16_sweeps
        lengths = {name: len(values) for name, values in given.items() if values is not None}
        if lengths and ("modules" not in lengths or len(set(lengths.values())) > 1):
            raise ValueError(f"a strategy needs lists of one length, modules among them, got lengths {lengths}")
        self.strategies: tuple[BlockStrategy, ...] = ()
        if modules is not None:
            count = len(modules)
            columns = (
                modules,
                sweeps or [1] * count,
                guesses or ["latent"] * count,
                tolerances or [-1.0] * count,
                bfloat16_sweeps or [0] * count,
            )
            self.strategies = tuple(BlockStrategy(*row) for row in zip(*columns, strict=True))
        self.timesteps = torch.zeros(0, dtype=torch.int64)
        self._graphs: FlowGraphs | None = None

    def set_cuda_graphs(self, enabled: bool) -> None:
        """On a GPU, run the loop of a sequential block as one CUDA graph, and every sweep of a block that is one module
        as another. Elsewhere, and for several modules, nothing changes.

        They are recorded at the first batch of a kind (same blocks, batch size and guidance) and kept until one of
        another kind comes or this is turned off. Progress and interruption of a sequential block then go by the whole
        block. Hooks do not run, so weights must stay where they are: not with offloading. Precision flags of torch and
        adapters of the blocks are those of the recording: turn this off and on again after changing them.
        """
        if not enabled:
            self._graphs = None
        elif self._graphs is None:
            self._graphs = FlowGraphs()

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """One step per block: `timesteps` are the block indices in sampling order, B - 1 .. 0."""
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)

    def strategy_of(self, block: int, num_blocks: int) -> BlockStrategy:
        """How block `block` (in forward order) is solved.

        Raises:
            ValueError: the strategy is for another number of blocks.
        """
        if self.strategies and len(self.strategies) != num_blocks:
            raise ValueError(f"the strategy lists {len(self.strategies)} blocks, but the model has {num_blocks}")
        return self.strategies[num_blocks - 1 - block] if self.strategies else BlockStrategy()

    @torch.no_grad()
    def step(
        self,
        model_output: TarFlowBlock,
        timestep: int,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        guidance: FlowGuidance | None = None,
        strategy: BlockStrategy | None = None,
        tolerance: float | None = None,
        progress: Callable[[int], None] = ignore,
        should_stop: Callable[[], bool] = never,
        return_dict: bool = True,
    ) -> BlockTrace | tuple[torch.Tensor]:
        """Inverts one block.

        Args:
            model_output: the block itself: this scheduler's step is a solver that evaluates the network as it needs.
            timestep: the block's index.
            sample: `(batch, tokens, token_dim)` in image order; not modified.
            class_labels: `(batch,)` of classes >= 0, or None.
            guidance: off by default.
            strategy: instead of the planned one.
            tolerance: instead of the planned one.
            progress: told the number of finished network calls.
            should_stop: asked before every network call.

        Raises:
            FlowOverflow: a sample overflowed even when solved sequentially.
        """
        block, guidance = model_output, guidance or FlowGuidance()
        if strategy is None:
            strategy = self.strategy_of(int(timestep), len(self.strategies) or int(timestep) + 1)
        trace = BlockTrace(sample, block=int(timestep))
        trace.sweeps = torch.zeros(len(sample), dtype=torch.int64, device=sample.device)
        limit = max(strategy.tolerance, self.config.tolerance) if tolerance is None else tolerance
        solver = partial(
            self._solve_block,
            guidance=guidance,
            strategy=strategy,
            limit=limit,
            trace=trace,
            watch=Watch(progress, should_stop),
        )
        # `forward` and not a call: offloading hooks sit there, while a compiled block must not trace a solver.
        found = block.forward(sample, class_labels, solver)
        if not trace.interrupted and not bool(torch.isfinite(found).all()):
            wrong = (~torch.isfinite(found).flatten(1).all(dim=1)).nonzero().flatten().tolist()
            raise FlowOverflow(
                f"block {int(timestep)} overflowed for sample(s) {', '.join(map(str, wrong))} of the batch; "
                "lower the guidance scale or raise the attention temperature"
            )
        trace.prev_sample = found
        return trace if return_dict else (trace.prev_sample,)

    def _solve_block(
        self,
        block: TarFlowBlock,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None,
        guidance: FlowGuidance,
        strategy: BlockStrategy,
        limit: float,
        trace: BlockTrace,
        watch: Watch,
    ) -> torch.Tensor:
        """The tokens in image order; runs inside the block's forward."""
        system = FlowSystem(block, sample, class_labels, guidance)
        graphs = self._graphs
        if graphs is not None and sample.device.type != graphs.device_type:
            graphs = None
        if strategy.is_sequential(system.length):
            if graphs is None or watch.should_stop():
                return block.order(solve_sequential(system, trace, watch))
            held = graphs.block(system)
            held.run(("sequential",), _substitute)
            trace.calls += system.length - 1
            watch.progress(system.length - 1)
            return block.order(held.state.found.clone())
        sweeper, reduced = _Sweeper(system, strategy, self.config.clamp, trace, watch), strategy.bfloat16_sweeps
        if reduced and (reason := why_not_bfloat16(sample.device, block.proj_in.weight.dtype)):
            trace.note, reduced = f"all sweeps ran in the dtype of the weights: {reason}", 0
        stopping, standing = self.config.stopping, _Standing()
        if graphs is not None and sweeper.whole:
            standing = _sweep_recorded(sweeper, graphs, strategy.sweeps, limit, stopping, reduced)
        if not trace.interrupted:
            _solve_modules(sweeper, strategy.calls(system.length), limit, stopping, reduced, standing)
        found = sweeper.found
        if bool(sweeper.diverged.any()) and not trace.interrupted:
            found = self._solve_again(block, sample, class_labels, guidance, sweeper, trace)
        return block.order(found)

    def _solve_again(
        self,
        block: TarFlowBlock,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None,
        guidance: FlowGuidance,
        sweeper: _Sweeper,
        trace: BlockTrace,
    ) -> torch.Tensor:
        """Solves the samples whose sweeps diverged sequentially; the others keep what they have.

        Progress is not told: its total is the planned calls, which the sweeps used up.
        """
        index = sweeper.diverged.nonzero().flatten()
        labels = None if class_labels is None else class_labels.index_select(0, index)
        system = FlowSystem(block, sample.index_select(0, index), labels, guidance)
        trace.fallbacks = tuple(index.tolist())
        watch = replace(sweeper.watch, progress=ignore)
        return sweeper.found.index_copy(0, index, solve_sequential(system, trace, watch))


@dataclass(frozen=True)
class FlowSolution:
    """All blocks solved: `tokens` is the last state, `blocks` every trace in sampling order."""

    tokens: torch.Tensor
    blocks: tuple[BlockTrace, ...]


def solve(
    model: TarFlowModel,
    noise: torch.Tensor,
    class_labels: torch.Tensor | None,
    scheduler: GSJacobiScheduler,
    guidance: FlowGuidance | None = None,
) -> FlowSolution:
    """Noise `(batch, tokens, token_dim)` -> data through every block, the last one first.

    The noise is scaled by the prior's standard deviation first; it is not modified.
    """
    tokens = model.scale_noise(noise)
    count, run, traces = len(model.blocks), Run(), []
    scheduler.set_timesteps(count)
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        strategy = scheduler.strategy_of(timestep, count)
        with publish_step(StepContext(index, count, float(timestep), run=run)):
            trace = scheduler.step(
                model.blocks[timestep], timestep, tokens, class_labels, guidance, strategy, return_dict=True
            )
        tokens = trace.prev_sample
        traces.append(trace)
    return FlowSolution(tokens, tuple(traces))

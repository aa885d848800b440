"""Parts of a TarFlow block's solution as CUDA graphs: forward substitution, or a sweep, in a single launch.

A call of the network is some fifty small kernels, and on a GPU starting them takes longer than running them. So the
whole loop over the positions, or one sweep over the whole batch, is recorded once for a kind of batch and replayed for
every batch of that kind. What is recorded reads and writes memory of its own (`HeldBlock`) and must stay on the device:
nothing in it may wait for a number.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from dit_suite.schedulers.flow_system import FlowSystem

NUMBERS = ("latents", "condition", "weaker", "positions")


def held_copy(system: FlowSystem) -> FlowSystem:
    """A system of its own memory with the same numbers; a graph reads them there."""
    held = copy.copy(system)
    for name in NUMBERS:
        value = getattr(system, name)
        setattr(held, name, None if value is None else value.clone())
    return held


def load(held: FlowSystem, system: FlowSystem) -> None:
    """Puts the numbers of another batch of the same kind into the memory of `held`."""
    for name in NUMBERS:
        value = getattr(system, name)
        if value is not None:
            getattr(held, name).copy_(value)


def kind_of(system: FlowSystem) -> tuple:
    """What a recorded solution depends on besides the numbers of a batch: shape, guidance and where the weights lie."""
    places = tuple(parameter.data_ptr() for parameter in system.block.parameters())
    return (tuple(system.latents.shape), system.guidance, system.condition is None, places)


@dataclass(frozen=True)
class SolverState:
    """What the recorded parts change, in place.

    Attributes:
        found: the iterate in the block's order, `(batch, tokens, token_dim)` float32.
        going: `(batch,)` bool, the samples that take part in the next sweep.
        remaining: their number, `()` int64.
        diverged: `(batch,)` bool, as of the last sweep that each took part in.
        change: `(batch,)` sums of squared changes of the last sweep, 0 for finished samples.
        previous: `(batch,)` root mean square changes of the last sweep; negative before the first.
        sweeps: `(batch,)` int64, the sweeps that each took part in.
        tolerance: `()`, see `BlockStrategy`.
    """

    found: torch.Tensor
    going: torch.Tensor
    remaining: torch.Tensor
    diverged: torch.Tensor
    change: torch.Tensor
    previous: torch.Tensor
    sweeps: torch.Tensor
    tolerance: torch.Tensor

    @staticmethod
    def of(system: FlowSystem) -> "SolverState":
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=system.latents.device)

        batch, found = system.batch, torch.zeros_like(system.latents)
        return SolverState(
            found=found,
            going=zeros(batch, dtype=torch.bool),
            remaining=zeros((), dtype=torch.int64),
            diverged=zeros(batch, dtype=torch.bool),
            change=zeros(batch),
            previous=zeros(batch),
            sweeps=zeros(batch, dtype=torch.int64),
            tolerance=zeros(()),
        )

    def begin(self, found: torch.Tensor, tolerance: float) -> None:
        """Before the first sweep of a batch, from the iterate `found`."""
        self.found.copy_(found)
        self.going.fill_(True)
        self.diverged.fill_(False)
        self.previous.fill_(-1.0)
        self.sweeps.zero_()
        self.tolerance.fill_(tolerance)


Part = Callable[[FlowSystem, SolverState], None]
Record = Callable[[Callable[[], None], Any], Callable[[], None]]


def record_cuda(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Runs `function` once to warm up and records it; returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph.replay


class HeldBlock:
    """One block's equations and iterate in memory of its own, and the graphs that were recorded on it."""

    def __init__(self, system: FlowSystem, record: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        # Memory made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.system, self.state = held_copy(system), SolverState.of(system)
        self._record = record
        self._replays: dict[tuple, Callable[[], None]] = {}

    def run(self, name: tuple, part: Part) -> None:
        """Runs `part` on the held system and state; recorded the first time that its `name` is met."""
        if name not in self._replays:
            tensors = [getattr(self.state, field.name) for field in fields(self.state)]
            before = [tensor.clone() for tensor in tensors]
            self._replays[name] = self._record(partial(part, self.system, self.state))
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        self._replays[name]()


class FlowGraphs:
    """The held blocks of one kind of batch; a block's next kind (other batch size, guidance, weights) drops them all.

    The graphs share their working memory: they never run at the same time, and what they hand on lies outside of it.

    Args:
        record: makes a graph of a function that changes tensors in place: `record(function, pool)` returns what
            replays it.
        device_type: the devices that this works on.
    """

    def __init__(self, record: Record = record_cuda, device_type: str = "cuda") -> None:
        self.device_type = device_type
        self._record = record
        self._pool: Any = None
        self._held: dict[int, tuple[tuple, HeldBlock]] = {}

    def block(self, system: FlowSystem) -> HeldBlock:
        """The held block for `system`, with its numbers loaded."""
        kind, place = kind_of(system), id(system.block)
        if place in self._held and self._held[place][0] != kind:
            self._held.clear()
        if place not in self._held:
            if not self._held:
                # A pool whose last graph is gone can't be used again.
                self._pool = torch.cuda.graph_pool_handle() if self.device_type == "cuda" else None
            self._held[place] = kind, HeldBlock(system, partial(self._record, pool=self._pool))
        held = self._held[place][1]
        load(held.system, system)
        return held

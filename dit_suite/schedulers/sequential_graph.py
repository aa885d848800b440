"""Forward substitution of a TarFlow block as one CUDA graph: all of its one-token calls in a single launch.

A call of one token is some fifty small kernels, and on a GPU starting them takes longer than running them. The whole
loop over the positions is recorded once for a kind of batch and replayed for every batch of that kind.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dit_suite.schedulers.flow_system import FlowSystem


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    system: FlowSystem
    found: torch.Tensor


def held_copy(system: FlowSystem) -> FlowSystem:
    """A system of its own memory with the same numbers; a graph reads them there."""
    held = copy.copy(system)
    for name in ("latents", "condition", "weaker", "positions"):
        value = getattr(system, name)
        setattr(held, name, None if value is None else value.clone())
    return held


def load(held: FlowSystem, system: FlowSystem) -> None:
    """Puts the numbers of another batch of the same kind into the memory of `held`."""
    for name in ("latents", "condition", "weaker", "positions"):
        value = getattr(system, name)
        if value is not None:
            getattr(held, name).copy_(value)


def kind_of(system: FlowSystem) -> tuple:
    """What a recorded solution depends on besides the numbers of a batch: shape, guidance and where the weights lie."""
    places = tuple(parameter.data_ptr() for parameter in system.block.parameters())
    return (tuple(system.latents.shape), system.guidance, system.condition is None, places)


class SequentialGraphs:
    """The recorded solutions of the blocks, one for each: another kind of batch replaces a block's own.

    Args:
        solve: the loop, called with a system; it has to stay on the device.
    """

    def __init__(self, solve: Callable[[FlowSystem], torch.Tensor]) -> None:
        self.solve = solve
        self._recorded: dict[int, tuple[tuple, _Recorded]] = {}

    def __call__(self, system: FlowSystem) -> torch.Tensor:
        """Tokens `(batch, tokens, token_dim)` in the block's order, like `solve(system)`."""
        kind, place = kind_of(system), id(system.block)
        known = self._recorded.get(place)
        if known is None or known[0] != kind:
            self._recorded.pop(place, None)
            self._recorded[place] = (kind, self._record(system))
        recorded = self._recorded[place][1]
        load(recorded.system, system)
        recorded.graph.replay()
        return recorded.found.clone()

    def _record(self, system: FlowSystem) -> _Recorded:
        held = held_copy(system)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.solve(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.solve(held)
        return _Recorded(graph, held, found)

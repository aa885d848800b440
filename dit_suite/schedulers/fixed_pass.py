"""Passes of one shape: the whole key-value buffer is read under a mask, so that nothing depends on the frame's index.

Such a pass can be compiled once, and on a GPU recorded once as a CUDA graph and replayed for every frame. There are as
many graphs as there are kinds of passes: a plain sampler has two, the first pass of a frame, which also writes the
frame before, and the others.
"""

from dataclasses import dataclass

import torch

from dit_suite.models.frame_attention import FixedInputs
from dit_suite.models.kv_cache import FrameCache
from dit_suite.models.nfd import NFDTransformer3DModel

WARM_UP = 3


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor


class FixedPass:
    """Runs passes over the frames that follow what a cache holds.

    Args:
        transformer: the network.
        cache: from `transformer.new_cache`, with scratch room for the widest pass.
        backend: of `torch.compile`; "none" runs the same pass uncompiled.
    """

    def __init__(self, transformer: NFDTransformer3DModel, cache: FrameCache, backend: str = "inductor"):
        self.transformer, self.cache = transformer, cache
        self._run = transformer.fixed_pass
        if backend != "none":
            self._run = torch.compile(transformer.fixed_pass, backend=backend, fullgraph=True, dynamic=False)
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._places: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}

    def _find_places(self, num_frames: int, num_written: int) -> tuple[torch.Tensor, ...]:
        """Rotary tables, readable blocks and slots; the passes of one frame share them."""
        cache, window = self.cache, self.transformer.config.window
        first, oldest, slots = cache.length, cache.oldest, cache.num_slots
        readable = torch.zeros(num_frames, slots + num_frames, dtype=torch.bool)
        for frame in range(num_frames):
            lowest = max(first + frame - window + 1, 0)
            for block in range(max(lowest, oldest), first):
                readable[frame, block % slots] = True
            for other in range(max(0, lowest - first), frame + 1):
                readable[frame, slots + other] = True
        written = torch.tensor([(first + i) % slots for i in range(num_written)], dtype=torch.int64)
        device = cache.buffer.device
        return (*self.transformer.tables(first, num_frames), readable.to(device), written.to(device))

    def __call__(
        self, frames: torch.Tensor, levels: torch.Tensor, actions: torch.Tensor, num_written: int = 0
    ) -> torch.Tensor:
        """Velocity of the frames that follow the cache, like `NFDTransformer3DModel.forward`; stores the leading ones.

        Args:
            frames: `(batch, channels, frames, height, width)`.
            levels, actions: `(batch, frames)` and `(batch, frames, num_actions)`.
            num_written: leading frames that are stored.
        """
        cache, count = self.cache, frames.shape[2]
        place = (cache.length, cache.oldest, count, num_written)
        if place not in self._places:
            self._places = {place: self._find_places(count, num_written)}
        before = torch.zeros_like(frames[:, :, 0]), torch.ones_like(levels[:, 0])
        if cache.frames is not None:
            before = cache.last_frame(*before)
        arguments = (frames, levels, actions, *self._places[place], *before)
        out = self._replay(arguments, num_written) if frames.is_cuda else self._call(arguments)
        cache.write_frames(frames[:, :, :num_written], levels[:, :num_written])
        cache.advance(num_written)
        return out

    def _call(self, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self._run(*arguments[:3], self.cache.buffer, FixedInputs(*arguments[3:]))

    def _replay(self, arguments: tuple[torch.Tensor, ...], num_written: int) -> torch.Tensor:
        """Records the pass the first time its kind is met; a pass may run twice, its writes are the same each time."""
        kind = (arguments[0].shape[2], num_written)
        if kind not in self._recorded:
            self._recorded[kind] = self._record(arguments)
        recorded = self._recorded[kind]
        for held, new in zip(recorded.inputs, arguments, strict=True):
            held.copy_(new)
        recorded.graph.replay()
        return recorded.output.clone()

    def _record(self, arguments: tuple[torch.Tensor, ...]) -> _Recorded:
        inputs = tuple(tensor.clone() for tensor in arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._call(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._call(inputs)
        return _Recorded(graph, inputs, output)

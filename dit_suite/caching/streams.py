"""Reading and writing the token streams of a transformer block, whatever order its class keeps them in."""

from typing import Any

import torch

from dit_suite.caching.block_probe import StreamLayout


def read_streams(layout: StreamLayout, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor | None]:
    """The streams that enter a block, main stream first."""
    found = []
    for name, position in zip(layout.arguments, layout.positions, strict=True):
        if name in kwargs:
            found.append(kwargs[name])
        elif position < len(args):
            found.append(args[position])
        else:
            found.append(args[0] if position == 0 and args else None)
    return found


def split_streams(layout: StreamLayout, output: Any) -> list[torch.Tensor | None]:
    """The streams that leave a block, main stream first."""
    if isinstance(output, torch.Tensor):
        return [output]
    if layout.outputs is None:
        return list(output)
    return [output[index] for index in layout.outputs]


def join_streams(layout: StreamLayout, streams: list[torch.Tensor | None]) -> Any:
    """The inverse of `split_streams`."""
    if len(streams) == 1:
        return streams[0]
    if layout.outputs is None:
        return tuple(streams)
    output: list[torch.Tensor | None] = [None] * len(streams)
    for index, stream in zip(layout.outputs, streams, strict=True):
        output[index] = stream
    return tuple(output)


def added_streams(entering: list[torch.Tensor | None], leaving: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """What a block added to each stream; None for a stream that does not enter or leave.

    Raises:
        ValueError: the streams don't match, so the block can't be cached by what it adds.
    """
    found: list[torch.Tensor | None] = []
    for before, after in zip(entering, leaving, strict=False):
        if before is not None and after is not None and before.shape != after.shape:
            raise ValueError(
                f"a block took a stream {tuple(before.shape)} and returned {tuple(after.shape)} in its place; "
                'diffusers\' TransformerBlockRegistry must know its class, or use granularity="subblock"'
            )
        found.append(None if before is None or after is None else after - before)
    return found


def flat_tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a module's output in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for item in output if item is not None for tensor in flat_tensors(item)]

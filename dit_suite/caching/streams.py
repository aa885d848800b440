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
    """The streams that leave a block, main stream first.

    Raises:
        ValueError: the block returns several tensors and its class is not in diffusers' block registry.
    """
    if isinstance(output, torch.Tensor):
        return [output]
    if layout.outputs is None:
        raise ValueError(
            "this block returns several values and diffusers' TransformerBlockRegistry does not know its class; "
            'register it there or use granularity="subblock"'
        )
    return [output[index] for index in layout.outputs]


def join_streams(layout: StreamLayout, streams: list[torch.Tensor | None]) -> Any:
    """The inverse of `split_streams`."""
    if layout.outputs is None or len(streams) == 1:
        return streams[0]
    output: list[torch.Tensor | None] = [None] * len(streams)
    for index, stream in zip(layout.outputs, streams, strict=True):
        output[index] = stream
    return tuple(output)


def flat_tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a module's output in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for item in output if item is not None for tensor in flat_tensors(item)]

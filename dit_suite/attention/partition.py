"""Partitions of a video's token grid: VMoBA's 1D, 2D and 3D blocks and compact tiles for block tables.

Tokens come in row-major (t, y, x) order. A partition is a permutation that makes every block contiguous, with the
boundaries of the blocks. Grids that a block does not divide get smaller blocks at the edge; nothing is padded.
"""

import functools
import math
from dataclasses import dataclass

import torch

from dit_suite.attention.rows_triton import take_rows

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Partition:
    """Blocks of a grid.

    Attributes:
        order: int64 `(tokens,)`, the original number of the j-th token in block order.
        inverse: int64 `(tokens,)`, undoes `order`.
        boundaries: int64 `(blocks + 1,)`, block c holds the tokens `boundaries[c]` to `boundaries[c + 1]`. Always on
            the CPU, where loops over blocks read it without waiting for a GPU.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    boundaries: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.order.shape[0]

    @property
    def num_blocks(self) -> int:
        return self.boundaries.shape[0] - 1

    @functools.cached_property
    def sizes(self) -> torch.Tensor:
        """Tokens of each block, int64 `(blocks,)`."""
        return self.boundaries.diff()

    @functools.cached_property
    def pairs_within(self) -> int:
        """Pairs of tokens of one block, over all blocks."""
        return int(self.sizes.square().sum())

    @functools.cached_property
    def block_of_token(self) -> torch.Tensor:
        """Block number of each token in block order, int64 `(tokens,)`, on the device of `order`."""
        return torch.arange(self.num_blocks).repeat_interleave(self.sizes).to(self.order.device)

    def permute(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Brings the token dimension of `tensor` into block order."""
        return _take(tensor, dim, self.order)

    def restore(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Brings the token dimension back to (t, y, x) order."""
        return _take(tensor, dim, self.inverse)


def _take(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    return take_rows(tensor, index) if dim == tensor.ndim - 2 else tensor.index_select(dim, index)


def _check_grid(grid: Grid) -> Grid:
    grid = tuple(int(n) for n in grid)
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"a grid is three positive numbers (frames, rows, columns), got {grid}")
    return grid


def _from_block_ids(ids: torch.Tensor) -> Partition:
    order = torch.argsort(ids, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(ids).cumsum(0)])
    return Partition(order, inverse, boundaries)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept: a later backward pass may save it
def partition(grid: Grid, block: float | tuple[int, ...]) -> Partition:
    """VMoBA's block partition (paper section 3.2, equations 1 and 2).

    Args:
        grid: (frames, rows, columns) of tokens.
        block: a number c: consecutive runs of `int(c * rows * columns)` tokens (1D, c in frames, may be fractional);
            two numbers: spatial blocks that span all frames (2D); three numbers: space-time blocks (3D).

    Raises:
        ValueError: a block of no token, or a tuple that is not 2 or 3 long.
    """
    frames, rows, columns = _check_grid(grid)
    tokens = frames * rows * columns
    if isinstance(block, (int, float)):
        size = int(block * rows * columns)
        if size < 1:
            raise ValueError(f"a block of {block} frames holds no token on a grid of {rows}x{columns}")
        return _from_block_ids(torch.arange(tokens) // size)
    sides = tuple(int(n) for n in block)
    if len(sides) not in (2, 3) or min(sides) < 1:
        raise ValueError(f"a block is a number, (rows, columns) or (frames, rows, columns), got {block}")
    depth, height, width = sides if len(sides) == 3 else (frames, *sides)
    t = torch.arange(frames)[:, None, None] // depth
    y = torch.arange(rows)[None, :, None] // height
    x = torch.arange(columns)[None, None, :] // width
    ids = (t * math.ceil(rows / height) + y) * math.ceil(columns / width) + x
    return _from_block_ids(ids.flatten())


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept: a later backward pass may save it
def partition_on(grid: Grid, block: float | tuple[int, ...], device: torch.device) -> Partition:
    """`partition` with its permutations on a device, copied there once."""
    parts = partition(grid, block)
    return Partition(parts.order.to(device), parts.inverse.to(device), parts.boundaries)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept: a later backward pass may save it
def sizes_on(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Sizes of blocks on a device, int64 `(blocks,)`, copied there once: such a copy waits for all that runs there."""
    return torch.tensor(sizes).to(device)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@functools.lru_cache(maxsize=64)
def auto_block(grid: Grid, kind: int, target_blocks: int) -> float | tuple[int, ...]:
    """Block sides of a kind (1, 2 or 3 dimensions) whose block count comes closest to `target_blocks`.

    Sides divide the grid; among equal counts the most cube-like block wins. Where a prime grid has no useful divisor
    the sides come from rounding and the edge blocks are smaller.
    """
    frames, rows, columns = _check_grid(grid)
    if kind == 1:
        return max(1.0, round(frames / target_blocks)) if frames >= target_blocks else frames / target_blocks
    sides = [_divisors(frames) if kind == 3 else [frames], _divisors(rows), _divisors(columns)]
    best = None
    for depth in sides[0]:
        for height in sides[1]:
            for width in sides[2]:
                count = (frames // depth) * (rows // height) * (columns // width)
                shape = (depth, height, width) if kind == 3 else (height, width)
                key = (abs(math.log(count / target_blocks)), max(shape) / min(shape))
                if best is None or key < best[0]:
                    best = (key, shape)
    if best[0][0] <= math.log(1.6):
        return best[1]
    axes = (frames, rows, columns) if kind == 3 else (rows, columns)
    shrink = (math.prod(axes) / target_blocks) ** (1 / len(axes)) if math.prod(axes) > target_blocks else 1.0
    return tuple(max(1, min(axis, round(shrink))) for axis in axes)


@functools.lru_cache(maxsize=64)
def auto_tile(grid: Grid, block_size: int) -> tuple[int, int, int]:
    """A (frames, rows, columns) tile of `block_size` tokens, longest in time.

    Attention of video models is narrow in space and long in time, so a tile spans as many frames as it can; the spatial
    sides are as square as they can be. Where no tile of that size divides the grid, the tile is as cube-like as powers
    of two allow, tiles at the edge are smaller, and blocks there hold tokens of neighbouring tiles.
    """
    frames, rows, columns = _check_grid(grid)
    best = None
    for depth in _divisors(frames):
        if block_size % depth:
            continue
        for height in _divisors(rows):
            width, rest = divmod(block_size // depth, height)
            if rest or width < 1 or columns % width:
                continue
            key = (-depth, max(height, width) / min(height, width), height)
            if best is None or key < best[0]:
                best = (key, (depth, height, width))
    if best is not None:
        return best[1]
    tile = [1, 1, 1]
    while math.prod(tile) < block_size:
        open_axes = [i for i in (2, 1, 0) if tile[i] < (frames, rows, columns)[i]]
        if not open_axes:
            break
        tile[min(open_axes, key=lambda i: tile[i])] *= 2
    return tuple(tile)

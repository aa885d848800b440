"""Random numbers of training as a pure function of (seed, step, global sample index, stream).

Counter-based: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) written in integer
tensor operations. There is no generator state, so resuming needs nothing, and the numbers of a sample do not depend on
the number of processes, on the micro-batch it sits in, or on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


class Stream(IntEnum):
    """What a draw is for; each purpose has its own sequence."""

    NOISE = 0
    TIMESTEP = 1
    DROPOUT = 2
    CAPTION = 3
    WINDOW = 4
    AUGMENT = 5
    AUXILIARY = 6
    EXTRA_NOISE = 7
    FLIP = 8


def philox(counter: Sequence[torch.Tensor], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape with values in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors of that shape with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Draws:
    """The random numbers of some samples of one training step.

    Attributes:
        seed: seed of the run, 0 <= seed < 2**63.
        step: optimizer step, from 0.
        samples: int64 (batch,), positions in the global batch of this step.
    """

    seed: int
    step: int
    samples: torch.Tensor

    def _words(self, stream: Stream, count: int) -> torch.Tensor:
        """int64 (batch, 4, ceil(count / 4)) of 32-bit words."""
        device = self.samples.device
        blocks = torch.arange(-(-count // 4), device=device)
        position, block = torch.broadcast_tensors(self.samples[:, None], blocks[None])
        step = torch.full_like(block, self.step)
        purpose = torch.full_like(block, int(stream))
        key = (self.seed & _MASK, (self.seed >> 32) & _MASK)
        return torch.stack(philox((block, position, step, purpose), key), dim=1)

    def uniform(self, stream: Stream, shape: Sequence[int] = ()) -> torch.Tensor:
        """float32 (batch, *shape) in (0, 1)."""
        count = math.prod(shape)
        words = self._words(stream, count).flatten(1)[:, :count]
        # 23 bits and a half step keep the value away from 0 and from 1 in float32
        return (((words >> 9).float() + 0.5) * 2.0**-23).reshape(-1, *shape)

    def normal(self, stream: Stream, shape: Sequence[int] = ()) -> torch.Tensor:
        """float32 (batch, *shape), standard normal (Box-Muller on pairs of words)."""
        count = math.prod(shape)
        words = self._words(stream, count)
        radius = torch.sqrt(-2.0 * torch.log((words[:, :2].float() + 0.5) * 2.0**-32))
        angle = (words[:, 2:] >> 8).float() * (2.0 * math.pi * 2.0**-24)
        values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
        return values.flatten(1)[:, :count].reshape(-1, *shape)

    def integers(self, stream: Stream, high: torch.Tensor | int, shape: Sequence[int] = ()) -> torch.Tensor:
        """int64 (batch, *shape) in [0, high); `high`, at most 2^24, broadcasts."""
        count = math.prod(shape)
        words = self._words(stream, count).flatten(1)[:, :count].reshape(-1, *shape)
        # floor(uniform * high) in integers, exact on every device: the uniform is (2 (word >> 9) + 1) / 2^24
        return ((2 * (words >> 9) + 1) * high) >> 24


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator)


def shuffled_indices(seed: int, first: int, count: int, size: int) -> torch.Tensor:
    """Which rows of a data set of `size` rows the global positions first .. first + count - 1 read; int64 (count,).

    Every epoch is its own permutation, a function of (seed, epoch) only.
    """
    wanted = torch.arange(first, first + count)
    rows = torch.empty(count, dtype=torch.int64)
    for epoch in range(first // size, (first + count - 1) // size + 1):
        order = _epoch_order(seed, epoch, size)
        inside = wanted // size == epoch
        rows[inside] = order[wanted[inside] % size]
    return rows

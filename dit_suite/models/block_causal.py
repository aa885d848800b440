"""Attention over blocks of tokens: who reads whom, how it is computed, and the positions that go with it.

ACDiT and Next-Frame Diffusion cut a sequence in blocks (squares of a picture, frames of a clip). Inside an allowed pair
of blocks attention is full, so a mask is a small table over blocks. `BlockPattern` holds that table; `attend` computes
it in one of three ways that agree: by slices of keys (nothing masked is ever computed, the CPU path), as a
FlexAttention block mask (the CUDA path), or as a dense boolean mask (the slow, obvious reference).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BACKENDS = ("auto", "index", "flex", "dense")
NORM_EPS = 1e-6


@dataclass(frozen=True)
class BlockPattern:
    """Which blocks of keys each block of queries reads.

    Attributes:
        rows: for every query block, the key blocks it reads, ascending.
        num_key_blocks: number of key blocks.
        block_size: tokens in a block.
    """

    rows: tuple[tuple[int, ...], ...]
    num_key_blocks: int
    block_size: int

    def table(self) -> torch.Tensor:
        """Bool `(query blocks, key blocks)`, True where attention is allowed."""
        allowed = torch.zeros(len(self.rows), self.num_key_blocks, dtype=torch.bool)
        for query_block, key_blocks in enumerate(self.rows):
            allowed[query_block, list(key_blocks)] = True
        return allowed

    def dense(self) -> torch.Tensor:
        """Bool `(query tokens, key tokens)`."""
        table = self.table()
        return table.repeat_interleave(self.block_size, 0).repeat_interleave(self.block_size, 1)

    def slices(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """The index form: `(first query, last query, [(first key, last key), ...])` in tokens, ends exclusive.

        Neighbouring query blocks with the same keys are one entry, neighbouring key blocks one slice.
        """
        size, plan = self.block_size, []
        start = 0
        while start < len(self.rows):
            end = start + 1
            while end < len(self.rows) and self.rows[end] == self.rows[start]:
                end += 1
            runs: list[tuple[int, int]] = []
            for block in self.rows[start]:
                if runs and runs[-1][1] == block * size:
                    runs[-1] = (runs[-1][0], (block + 1) * size)
                else:
                    runs.append((block * size, (block + 1) * size))
            plan.append((start * size, end * size, runs))
            start = end
        return plan


def skip_causal_pattern(num_blocks: int, block_size: int, drop_last_clean: bool = False) -> BlockPattern:
    """ACDiT's SCAM over `[clean_0 .. clean_{T-1} | noisy_0 .. noisy_{T-1}]` (paper section 3.2).

    Clean i reads clean 0..i. Noisy i reads clean 0..i-1 and itself. `drop_last_clean` leaves out the last clean block,
    which nobody reads.
    """
    num_clean = num_blocks - 1 if drop_last_clean else num_blocks
    clean = [tuple(range(i + 1)) for i in range(num_clean)]
    noisy = [(*range(i), num_clean + i) for i in range(num_blocks)]
    return BlockPattern(tuple(clean + noisy), num_clean + num_blocks, block_size)


def block_causal_pattern(
    num_blocks: int, block_size: int, window: int | None = None, num_past: int = 0
) -> BlockPattern:
    """Block i reads blocks j <= i, at most `window` of them; `num_past` further blocks of keys come before the queries.

    With one token per block this is the causal mask, with one block it is full attention.
    """
    rows = []
    for i in range(num_past, num_past + num_blocks):
        first = 0 if window is None else max(0, i - window + 1)
        rows.append(tuple(range(first, i + 1)))
    return BlockPattern(tuple(rows), num_past + num_blocks, block_size)


def fused_pattern(num_past: int, num_clean: int, block_size: int) -> BlockPattern:
    """The pass that writes clean blocks while it denoises the next one: queries `[clean ... | noisy]`.

    Keys are `num_past` cached blocks, then the queries' own. Clean rows read the past and clean blocks up to their own;
    the noisy row reads everything.
    """
    return block_causal_pattern(num_clean + 1, block_size, num_past=num_past)


@functools.lru_cache(maxsize=64)
def _block_mask(pattern: BlockPattern, device: torch.device) -> BlockMask:
    table, size = pattern.table().to(device), pattern.block_size

    def allowed(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return table[query // size, key // size]

    lengths = len(pattern.rows) * size, pattern.num_key_blocks * size
    return create_block_mask(allowed, None, None, *lengths, device=device)


@functools.lru_cache(maxsize=1)
def _compiled_flex():
    return torch.compile(flex_attention)


def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: BlockPattern) -> torch.Tensor:
    block_mask = _block_mask(pattern, query.device)
    run = _compiled_flex() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return run(query, key, value, block_mask=block_mask)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts along the tokens; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _by_slices(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: BlockPattern) -> torch.Tensor:
    pieces = []
    for first, last, runs in pattern.slices():
        k, v = (_joined([each[:, :, a:b] for a, b in runs]) for each in (key, value))
        pieces.append(F.scaled_dot_product_attention(query[:, :, first:last], k, v))
    return _joined(pieces)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: BlockPattern, backend: str = "auto"
) -> torch.Tensor:
    """Softmax attention `(batch, heads, tokens, head_dim)` under a block pattern.

    Args:
        backend: "auto" takes flex on CUDA and slices elsewhere; "index", "flex" and "dense" force one.

    Raises:
        ValueError: the backend is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"the attention backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = "flex" if query.is_cuda else "index"
    if backend == "flex":
        return _flex(query, key, value, pattern)
    if backend == "dense":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=pattern.dense().to(query.device))
    return _by_slices(query, key, value, pattern)


def split_head_dim(head_dim: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Channels of a head given to each position axis, in proportion to `weights` (all even).

    Raises:
        ValueError: the weights do not divide the head.
    """
    half, total = head_dim // 2, sum(weights)
    parts = tuple(2 * w * (half // total) for w in weights)
    if head_dim % 2 or sum(parts) != head_dim or min(parts) < 2:
        raise ValueError(f"a head of {head_dim} channels cannot be split as {'_'.join(map(str, weights))}")
    return parts


_RADIX = 64


def _angles(positions: torch.Tensor, frequencies: Sequence[float]) -> torch.Tensor:
    """`positions * frequencies` modulo whole turns, float32 `(L, len(frequencies))`, for integer positions.

    The position is taken apart in digits of base 64, whose weights are reduced modulo 2 pi in double precision first,
    so that frame 10,000,000 is rotated as exactly as frame 10.
    """
    remainder, weight = positions.long(), 1
    total = torch.zeros(positions.shape[0], len(frequencies), device=positions.device)
    for _ in range(4):
        turns = torch.tensor([math.fmod(weight * f, 2 * math.pi) for f in frequencies], device=positions.device)
        total = total + (remainder % _RADIX).float()[:, None] * turns[None]
        remainder = torch.div(remainder, _RADIX, rounding_mode="floor")
        weight *= _RADIX
    return total


def rope_frequencies(dim: int, base: float, style: str) -> list[float]:
    """Frequencies of one axis that owns `dim` channels.

    "reference" follows the released ACDiT code, whose exponents run from 0 to 1 inclusive; "axial" is the usual
    `base^(-2j/dim)`.
    """
    half = dim // 2
    if style == "axial":
        return [base ** (-j / half) for j in range(half)]
    return [base ** (-j / (half - 1)) if half > 1 else 1.0 for j in range(half)]


def rope_tables(
    positions: torch.Tensor, dims: Sequence[int], bases: Sequence[float], style: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine tables `(tokens, head_dim)`, float32, for `rotate`.

    Args:
        positions: integer `(axes, tokens)`.
        dims: channels of each axis (they add up to head_dim).
        bases: frequency base of each axis.
        style: "axial" gives every pair (j, j + head_dim/2) one angle, a true rotation: scores depend on position
            differences only. "reference" lays the axes out as the released ACDiT code does, where the two channels of a
            pair carry angles of different axes: no rotation, but what the released weights were trained with.
    """
    per_axis = [
        _angles(row, rope_frequencies(dim, base, style)) for row, dim, base in zip(positions, dims, bases, strict=True)
    ]
    if style == "axial":
        angles = torch.cat(per_axis * 2, dim=-1)
    else:
        angles = torch.cat([angle for axis in per_axis for angle in (axis, axis)], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`x * cos + half_turn(x) * sin` over the whole head, in float32; `x` is `(batch, heads, tokens, head_dim)`."""
    cos, sin = tables
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


class BlockCausalAttention(nn.Module):
    """Projections of multi-head attention with RMS-normalised, rotated queries and keys.

    `project` and `merge` are separate because what lies between them (a pattern, a cache, two streams) is the caller's.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.to_qkv = nn.Linear(hidden_size, 3 * num_heads * head_dim)
        self.norm_q = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.to_out = nn.Linear(num_heads * head_dim, hidden_size)

    def project(
        self, hidden_states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(batch, tokens, hidden)` to query, key and value `(batch, heads, tokens, head_dim)`."""
        batch, tokens, _ = hidden_states.shape
        qkv = self.to_qkv(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return rotate(self.norm_q(query), tables), rotate(self.norm_k(key), tables), value

    def merge(self, attended: torch.Tensor) -> torch.Tensor:
        """Heads `(batch, heads, tokens, head_dim)` back to `(batch, tokens, hidden)`."""
        return self.to_out(attended.transpose(1, 2).flatten(2))

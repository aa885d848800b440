"""Block-sparse attention behind one function: tables in, attention out, the backend chosen by capability and reported.

A table names, for every (batch, head, query block), the key blocks that block may attend to. Query and key blocks are
`block_size` consecutive tokens; the last one may be shorter. Softmax runs over the listed keys only (renormalised).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dit_suite.attention.backend_flash4 import flash4_attention, flash4_unavailable
from dit_suite.attention.backend_flex import flex_attention_tables, flex_unavailable
from dit_suite.attention.backend_grouped import grouped_attention
from dit_suite.attention.merge import attention_with_lse

BACKENDS = ("flash4", "flex", "grouped", "dense_mask")


@dataclass
class WorkCounter:
    """What block-sparse calls computed. `pairs` counts query-key scores, tail blocks at their true size."""

    calls: int = 0
    pairs: int = 0
    dense_pairs: int = 0
    backend: str = ""

    @property
    def density(self) -> float:
        """Share of all query-key pairs that was computed."""
        return self.pairs / self.dense_pairs if self.dense_pairs else 1.0


@dataclass(frozen=True)
class BackendChoice:
    """The chosen backend and, for those that were passed over, why."""

    name: str
    passed_over: tuple[tuple[str, str], ...] = ()


def block_count(length: int, block_size: int) -> int:
    """Blocks of `block_size` that cover `length` tokens."""
    return -(-length // block_size)


def choose_backend(query: torch.Tensor, key: torch.Tensor, block_size: int) -> BackendChoice:
    """The fastest backend that can run these tensors: flash-attn-4, compiled flex, else grouped gather.

    flash-attn-4 needs Hopper, half precision, 128-token blocks and no gradient. Compiled flex is the built-in
    path on CUDA. Everywhere else (CPU, MPS, CUDA without a compiler) the grouped gather really skips blocks.
    """
    passed_over = []
    for name, unavailable in (("flash4", flash4_unavailable), ("flex", flex_unavailable)):
        reason = unavailable(query, key, block_size)
        if reason is None:
            return BackendChoice(name, tuple(passed_over))
        passed_over.append((name, reason))
    return BackendChoice("grouped", tuple(passed_over))


def table_from_mask(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns a bool block mask `(..., q_blocks, k_blocks)` into `(table, counts)` with ascending block numbers.

    The table is as wide as the longest row; slots past a row's count hold 0.
    """
    counts = mask.sum(-1, dtype=torch.int32)
    width = max(int(counts.max()), 1) if counts.numel() else 1
    order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :width].to(torch.int32)
    unused = torch.arange(width, device=mask.device) >= counts[..., None]
    return order.masked_fill(unused, 0).contiguous(), counts.contiguous()


def mask_from_table(block_table: torch.Tensor, block_counts: torch.Tensor, k_blocks: int) -> torch.Tensor:
    """The bool block mask `(..., q_blocks, k_blocks)` of a table; the inverse of `table_from_mask`."""
    used = torch.arange(block_table.shape[-1], device=block_table.device) < block_counts[..., None]
    hits = torch.zeros(*block_table.shape[:-1], k_blocks + 1, dtype=torch.bool, device=block_table.device)
    hits.scatter_(-1, block_table.long().masked_fill(~used, k_blocks), True)
    return hits[..., :k_blocks]


def count_pairs(block_table: torch.Tensor, block_counts: torch.Tensor, q_len: int, k_len: int, block_size: int) -> int:
    """Query-key scores that a table asks for, with tail blocks at their true size."""
    k_blocks = block_count(k_len, block_size)
    keys = torch.full((k_blocks,), block_size, dtype=torch.int64, device=block_table.device)
    keys[-1] = k_len - (k_blocks - 1) * block_size
    rows = torch.full((block_table.shape[2],), block_size, dtype=torch.int64, device=block_table.device)
    rows[-1] = q_len - (block_table.shape[2] - 1) * block_size
    used = torch.arange(block_table.shape[-1], device=block_table.device) < block_counts[..., None]
    kept = (keys[block_table.long()] * used).sum(-1)
    return int((kept * rows).sum())


def dense_mask_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    block_counts: torch.Tensor,
    block_size: int,
    scale: float,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: dense scores with every pair outside the table masked away. Slow and plain on purpose."""
    q_len, k_len = query.shape[-2], key.shape[-2]
    blocks = mask_from_table(block_table, block_counts, block_count(k_len, block_size))
    mask = blocks.repeat_interleave(block_size, -2)[..., :q_len, :].repeat_interleave(block_size, -1)[..., :k_len]
    return attention_with_lse(query, key, value, scale, mask)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor,
    block_size: int,
    order: torch.Tensor | None,
) -> None:
    if query.ndim != 4 or key.shape != value.shape or query.shape[:2] != key.shape[:2]:
        raise ValueError(
            "query, key and value must be (batch, heads, seq, head_dim) with equal batch and heads, got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if order is not None and (tuple(order.shape) != query.shape[2:3] or query.shape[2] != key.shape[2]):
        raise ValueError(
            f"order must name each of the {query.shape[2]} tokens of query and key once, got {tuple(order.shape)} for "
            f"{key.shape[2]} keys"
        )
    rows = (*query.shape[:2], block_count(query.shape[2], block_size))
    if tuple(table.shape[:-1]) != rows or tuple(counts.shape) != rows:
        raise ValueError(
            f"block_table must be {rows} + (slots,) and block_counts {rows}, got {tuple(table.shape)} and "
            f"{tuple(counts.shape)}"
        )
    if table.dtype != torch.int32 or counts.dtype != torch.int32:
        raise ValueError(f"block_table and block_counts must be int32, got {table.dtype} and {counts.dtype}")


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    block_counts: torch.Tensor,
    block_size: int = 128,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    counter: WorkCounter | None = None,
    order: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query block to the key blocks its row of the table lists.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key, value: `(batch, heads, k_len, head_dim)`.
        block_table: int32 `(batch, heads, q_blocks, slots)`; the first `block_counts[...]` entries of a row are
            ascending, distinct key block numbers, the rest is ignored (but must be a valid number).
        block_counts: int32 `(batch, heads, q_blocks)`. A row of 0 gives zeros and an lse of `-inf`.
        block_size: tokens per query and key block; the last block may be shorter.
        scale: factor on the scores, `head_dim ** -0.5` if None.
        backend: "auto", "flash4", "flex", "grouped" or "dense_mask".
        return_lse: also return the log-sum-exp of each row, `(batch, heads, q_len)` in float32.
        counter: adds this call's work, and the backend that ran it.
        order: int64 `(seq,)`: blocks are consecutive tokens of this order (a permutation, for queries and keys alike)
            instead of the tensors' own. Results come back in the tensors' order.

    Gradients flow to query, key and value with "grouped" and "dense_mask", and with "flex" on CUDA.

    Raises:
        ValueError: shapes disagree, or a backend was named that cannot run these tensors (the sentence says why).
    """
    _check(query, key, value, block_table, block_counts, block_size, order)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    name = choose_backend(query, key, block_size).name if backend == "auto" else backend
    runner = _runner(name, query, key, block_size, explicit=backend != "auto")
    output, lse = _ordered(runner, order)(query, key, value, block_table, block_counts, block_size, scale, return_lse)
    if counter is not None:
        counter.calls += 1
        counter.backend = name
        counter.pairs += count_pairs(block_table, block_counts, query.shape[2], key.shape[2], block_size)
        counter.dense_pairs += query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return (output, lse) if return_lse else output


def _ordered(runner: Callable, order: torch.Tensor | None) -> Callable:
    """A backend whose blocks are counted in `order`; the grouped gather reads tokens in any order by itself."""
    if order is None:
        return runner
    if runner is grouped_attention:
        return functools.partial(runner, order=order)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any) -> tuple:
        output, lse = runner(*(t.index_select(2, order) for t in (query, key, value)), *args)
        back = order.argsort()
        return output.index_select(2, back), None if lse is None else lse.index_select(2, back)

    return run


def _runner(name: str, query: torch.Tensor, key: torch.Tensor, block_size: int, explicit: bool) -> Callable:
    runners = {
        "flash4": (flash4_attention, flash4_unavailable),
        "flex": (flex_attention_tables, flex_unavailable),
        "grouped": (grouped_attention, None),
        "dense_mask": (dense_mask_attention, None),
    }
    if name not in runners:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {name!r}")
    run, unavailable = runners[name]
    if explicit and unavailable is not None:
        reason = unavailable(query, key, block_size, explicit=True)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot run this call: {reason}")
    return run

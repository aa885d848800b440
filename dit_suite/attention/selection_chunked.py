"""VMoBA's selection over chunks of queries: scores and selection in one pass, nothing sorted over tokens.

Top-k per query takes this path everywhere. The other modes take it where scores are half precision and torch compiles
(CUDA); elsewhere `selection.select_pairs` sorts. A half-precision score is one of 65,536 values. So a pool of any size
is cut by counting its values: the counts tell the similarity of all pairs from every value up, and with it the value
at which the wanted sum is reached. A query's few blocks are cut by bisection over the 16 bits of that value.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from dit_suite.attention import selection
from dit_suite.attention.compiling import compiler_missing, run_compiled

_BITS = 16
_KEYS = 1 << _BITS
_SIGN = _KEYS >> 1
_CHUNK_SCORES = 1 << 26
_HALF = (torch.float16, torch.bfloat16)
_RANKED_BLOCKS = 128


def chunked_unavailable(query: torch.Tensor) -> str | None:
    """Why selection is not compiled over half-precision scores; None if it is."""
    if query.device.type != "cuda":
        return f"the queries are on {query.device.type}"
    if query.dtype not in _HALF:
        return f"it takes float16 or bfloat16 queries, got {query.dtype}"
    return compiler_missing()


def chunk_length(query: torch.Tensor, blocks: int) -> int:
    """Tokens in a chunk: 8192 on a CPU; on a GPU, where every call costs a launch, as many as make 2^26 scores."""
    if query.device.type == "cpu":
        return 8192
    return max(8192, _CHUNK_SCORES // (query.shape[0] * query.shape[1] * blocks))


def _run_plain(function: Callable, *args: Any) -> Any:
    return function(*args)


def order_keys(scores: torch.Tensor) -> torch.Tensor:
    """int32 numbers from 1 to 65,535 in the order of half-precision scores; equal for equal scores (0.0 and -0.0)."""
    bits = scores.view(torch.int16).int()
    return torch.where(bits < 0, -_SIGN - bits, bits) + _SIGN


def key_scores(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The score of every key of `order_keys`, float32 `(65536,)`; key 0 belongs to no score and holds 0."""
    signed = torch.arange(_KEYS, device=device) - _SIGN
    return torch.where(signed < 0, -_SIGN - signed, signed).to(torch.int16).view(dtype).float()


def _foreign(own: torch.Tensor, blocks: int) -> torch.Tensor:
    """Bool `(blocks, tokens)`: token lies in another block."""
    return own != torch.arange(blocks, device=own.device)[:, None]


def _ties_kept(needed: torch.Tensor, above: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How many pairs of one weight bring the sum from `above` to `needed`; at least one."""
    return torch.where(weight > 0, ((needed - above) / weight).ceil(), 1.0).clamp(min=1.0).long()


def _topk_chunk(query: torch.Tensor, means: torch.Tensor, own: torch.Tensor, k: int) -> torch.Tensor:
    scores = torch.matmul(query, means.transpose(-1, -2)).float()
    blocks = torch.arange(means.shape[-2], device=query.device)
    scores = scores.masked_fill(own[:, None] == blocks, float("-inf"))
    return scores.topk(k, dim=-1, sorted=False).indices


def _rank_chunk(query: torch.Tensor, means: torch.Tensor, own: torch.Tensor, k: int) -> torch.Tensor:
    """`_topk_chunk` of half-precision scores by counting, best first; of equal scores the lower block.

    A key holds the score and the block, so that no two are equal; the rank of a block is the number of keys above its
    own. The work grows with the square of the blocks, but comparing and counting is one compiled kernel, which never
    holds the pairs of blocks; `topk` stays a kernel of its own for one row at a time. Not compiled it does hold them.
    """
    number = means.shape[-2]
    blocks = torch.arange(number, device=query.device, dtype=torch.int32)
    keys = order_keys(torch.matmul(query, means.transpose(-1, -2))) * number + (number - 1 - blocks)
    # A scatter writes to memory, so that the count below reads finished keys and does not make each of them again.
    keys = keys.scatter(-1, own[:, None].expand(*keys.shape[:-1], 1), -1)
    ranks = (keys[..., None, :] > keys[..., None]).sum(-1, dtype=torch.int32)
    chosen = ranks[..., None, :] == torch.arange(k, device=query.device, dtype=torch.int32)[:, None]
    return torch.where(chosen, blocks, 0).sum(-1)


@torch.no_grad()
def foreign_topk(
    query: torch.Tensor,
    means: torch.Tensor,
    own: torch.Tensor,
    k: int,
    chunk: int | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """The `k` best foreign blocks of every token and head, without ever holding the whole gate.

    The default path of top-k per query. With `compiled` the scores, the own-block mask and the top-k of a chunk are one
    compiled region; half-precision queries are multiplied in half precision, which can swap near-equal blocks. Up to
    128 blocks such a region counts ranks instead of calling torch's top-k.

    Args:
        query: `(batch, heads, tokens, head_dim)` in block order.
        means: `(batch, heads, blocks, head_dim)`.
        own: int64 `(tokens,)`, the block of each token.
        k: foreign blocks to keep (capped at blocks - 1).
        chunk: tokens scored at a time; None for `chunk_length`.

    Returns:
        int64 `(batch, heads, tokens, k)`, in no particular order.
    """
    k = min(k, means.shape[-2] - 1)
    if k < 1:
        return torch.empty(*query.shape[:3], 0, dtype=torch.int64, device=query.device)
    run = run_compiled if compiled else _run_plain
    chunk = chunk or chunk_length(query, means.shape[-2])
    dtype = query.dtype if compiled else means.dtype
    means = means.to(dtype)
    best = _rank_chunk if compiled and dtype in _HALF and means.shape[-2] <= _RANKED_BLOCKS else _topk_chunk
    parts = [
        run(best, q.to(dtype), means, block, k)
        for q, block in zip(query.split(chunk, dim=2), own.split(chunk), strict=True)
    ]
    return torch.cat(parts, dim=2)


def _query_chunk(query: torch.Tensor, means: torch.Tensor, own: torch.Tensor, tau: float) -> torch.Tensor:
    """Threshold selection over the blocks of each query: bisection for the lowest score kept, bit by bit."""
    scores = selection.block_gate(query, means)
    foreign = _foreign(own, means.shape[-2])
    gate = scores.float()
    similarity = selection.normalised(gate, gate.amin(-2, keepdim=True), gate.amax(-2, keepdim=True)).double()
    weight = similarity.masked_fill(~foreign, 0.0)
    total, foreign_sum = similarity.sum(-2, keepdim=True), weight.sum(-2, keepdim=True)
    needed = selection.still_needed(total, foreign_sum, tau)
    keys = order_keys(scores).masked_fill(~foreign, 0)
    highest = keys.amax(-2, keepdim=True)
    cut = torch.zeros_like(highest)
    for bit in reversed(range(_BITS)):
        trial = cut + (1 << bit)
        reached = torch.where(keys >= trial, weight, 0.0).sum(-2, keepdim=True) >= needed
        cut = torch.where(reached & (trial <= highest), trial, cut)
    above = torch.where(keys > cut, weight, 0.0).sum(-2, keepdim=True)
    tie = foreign & (keys == cut)
    kept = _ties_kept(needed, above, torch.where(tie, weight, 0.0).amax(-2, keepdim=True))
    return (keys > cut) | (tie & (tie.cumsum(-2) <= kept))


def _count_chunk(
    query: torch.Tensor, means: torch.Tensor, own: torch.Tensor, pools: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Scores `(batch, heads, blocks, tokens)` of a chunk; adds how often each occurs to `counts`, own blocks apart."""
    scores = selection.block_gate(query, means)
    slots = (pools[..., None] * 2 + _foreign(own, means.shape[-2])) * _KEYS + order_keys(scores)
    slots = slots.flatten()
    counts.view(-1).index_add_(0, slots, torch.ones_like(slots, dtype=counts.dtype))
    return scores


def _cut_pools(
    counts: torch.Tensor, dtype: torch.dtype, tau: float | None, pairs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key of the lowest score kept in every pool, and how many pairs of that score are kept; `(pools,)` both.

    Args:
        counts: int32 `(pools, 2, 65536)`, own pairs and foreign pairs by key.
        tau: share of threshold selection; None for the best `pairs` foreign pairs of every pool.
    """
    foreign = counts[:, 1]
    keys = torch.arange(_KEYS, device=counts.device)
    if tau is None:
        weight = torch.ones(foreign.shape, dtype=torch.float64, device=counts.device)
        needed = weight[:, :1] * pairs
    else:
        everyone = counts.sum(1)
        scores = key_scores(dtype, counts.device)
        low = torch.where(everyone > 0, scores, float("inf")).amin(-1, keepdim=True)
        high = torch.where(everyone > 0, scores, float("-inf")).amax(-1, keepdim=True)
        weight = torch.where(everyone > 0, selection.normalised(scores, low, high), 0.0).double()
        total, foreign_sum = (everyone * weight).sum(-1, keepdim=True), (foreign * weight).sum(-1, keepdim=True)
        needed = selection.still_needed(total, foreign_sum, tau)
    sums = foreign * weight
    from_here_up = sums.flip(-1).cumsum(-1).flip(-1)
    highest = torch.where(foreign > 0, keys, 0).amax(-1, keepdim=True)
    cut = torch.where((from_here_up >= needed) & (keys <= highest), keys, 0).amax(-1, keepdim=True)
    above = torch.where(keys > cut, sums, 0.0).sum(-1, keepdim=True)
    return cut[:, 0], _ties_kept(needed, above, weight.gather(-1, cut))[:, 0]


def _ties_of_chunk(scores: torch.Tensor, own: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Foreign pairs `(batch, heads, blocks)` of a chunk that lie on the cut."""
    return (_foreign(own, cut.shape[-1]) & (order_keys(scores) == cut[..., None])).sum(-1)


def _keep_chunk(scores: torch.Tensor, own: torch.Tensor, cut: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """Foreign pairs above the cut, and on it the first `ties` of every block."""
    keys, foreign = order_keys(scores), _foreign(own, cut.shape[-1])
    tie = foreign & (keys == cut[..., None])
    first = tie.cumsum(-1, dtype=torch.int32) <= ties[..., None]
    return (foreign & (keys > cut[..., None])) | (tie & first)


def _pool_numbers(shape: torch.Size, pool: str, device: torch.device) -> tuple[torch.Tensor, int]:
    """Pool of each of `(batch, heads, blocks)`, numbered as `selection.to_pools` lines them up, and their number."""
    batch, heads, blocks = shape
    sides = {"head_global": (batch, heads, 1), "overall": (batch, 1, 1), "block": (batch, 1, blocks)}[pool]
    number = math.prod(sides)
    return torch.arange(number, device=device).view(sides).expand(shape), number


def _wide_pools(
    run: Callable, chunks: list[tuple[torch.Tensor, torch.Tensor]], means: torch.Tensor, pool: str, *rule: Any
) -> list[torch.Tensor]:
    """Selection in pools that span all tokens: count scores, cut the pools, give out the ties in order, keep."""
    pools, number = _pool_numbers(means.shape[:3], pool, means.device)
    counts = torch.zeros(number, 2, _KEYS, dtype=torch.int32, device=means.device)
    parts = [(run(_count_chunk, query, means, own, pools, counts), own) for query, own in chunks]
    cut, kept = (per_pool[pools] for per_pool in run(_cut_pools, counts, means.dtype, *rule))
    ties = torch.stack([run(_ties_of_chunk, scores, own, cut) for scores, own in parts], dim=-1)
    in_order, restore = selection.to_pools(ties, pool)
    left = (kept[..., None] - restore(in_order.cumsum(-1) - in_order)).unbind(-1)
    return [run(_keep_chunk, scores, own, cut, rest) for (scores, own), rest in zip(parts, left, strict=True)]


@torch.no_grad()
def foreign_mask(
    query: torch.Tensor,
    means: torch.Tensor,
    own: torch.Tensor,
    mode: str,
    pool: str,
    k: int,
    tau: float,
    chunk: int = 8192,
    compiled: bool = False,
) -> torch.Tensor:
    """Foreign pairs of threshold selection, and of top-k in pools wider than a query; own blocks are left out.

    The pairs of `selection.select_threshold` and `selection.select_topk` on the same half-precision scores. What is
    held for all tokens is the mask and, in pools wider than a query, two bytes of score per (head, block, token). The
    table of counts and sums (a few mebibytes per pool) does not grow with the tokens.

    Args:
        query: float16 or bfloat16 `(batch, heads, tokens, head_dim)` in block order.
        means: `(batch, heads, blocks, head_dim)`; rounded to the dtype of `query`.
        own: int64 `(tokens,)`, the block of each token.
        mode: "topk" or "threshold".
        pool: what is ranked together; top-k takes "head_global" or "overall" here.
        k: blocks per query and head that top-k keeps, own block counted.
        tau: share of the similarity that threshold selection keeps.
        chunk: tokens scored at a time (torch 2.11 fails to compile the counting of 32,760 at once).
        compiled: compile each step over a chunk.

    Returns:
        bool `(batch, heads, blocks, tokens)`.

    Raises:
        ValueError: the queries are not half precision, or top-k with another pool.
    """
    if query.dtype not in _HALF:
        raise ValueError(f"selection by counting takes float16 or bfloat16 queries, got {query.dtype}")
    if mode == "topk" and pool not in ("head_global", "overall"):
        raise ValueError(f"top-k by counting pools over head_global or overall, got {pool!r}")
    batch, heads, tokens, _ = query.shape
    blocks = means.shape[2]
    if (mode == "topk" and k >= blocks) or (mode == "threshold" and tau >= 1.0):
        return _foreign(own, blocks).expand(batch, heads, -1, -1)
    if blocks == 1 or (mode == "topk" and k == 1):
        return torch.zeros(batch, heads, blocks, tokens, dtype=torch.bool, device=query.device)
    run = run_compiled if compiled else _run_plain
    means = means.to(query.dtype)
    chunks = list(zip(query.split(chunk, dim=2), own.split(chunk), strict=True))
    if pool == "query_head":
        parts = [run(_query_chunk, q, means, block, tau) for q, block in chunks]
    else:
        pairs = (k - 1) * tokens * (heads if pool == "overall" else 1)
        parts = _wide_pools(run, chunks, means, pool, None if mode == "topk" else tau, pairs)
    return torch.cat(parts, dim=-1)

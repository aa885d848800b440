"""VMoBA's gate and selection: which key blocks each query token attends to (paper section 3.3).

Everything here decides per sample, so that a sample's result does not depend on its batch mates, and carries no
gradient: selection is a constant of the backward pass.
"""

from collections.abc import Callable

import torch

from dit_suite.attention.partition import sizes_on

SELECT_MODES = ("topk", "threshold")
POOLS = ("query_head", "head_global", "overall", "block")
_EPS = 1e-6
_BUCKETS, _CHUNK = 1 << 14, 1 << 20


def block_means(key: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """Mean key of every block, in float32 (float64 for float64 input).

    Args:
        key: `(batch, heads, tokens, head_dim)` in block order.
        boundaries: `(blocks + 1,)`.

    Returns:
        `(batch, heads, blocks, head_dim)`.
    """
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    sizes = boundaries.diff()
    batch, heads, tokens, dim = key.shape
    size = int(sizes[0])
    if bool((sizes == size).all()):
        return key.view(batch, heads, -1, size, dim).mean(3, dtype=dtype)
    sizes = sizes_on(tuple(sizes.tolist()), key.device)
    blocks = torch.arange(sizes.shape[0], device=key.device).repeat_interleave(sizes, output_size=tokens)
    sums = torch.zeros(batch, heads, sizes.shape[0], dim, dtype=dtype, device=key.device)
    return sums.index_add_(2, blocks, key.to(dtype)) / sizes.to(dtype)[:, None]


def block_gate(query: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Scores `(batch, heads, blocks, tokens)` of every query against every block mean; no scale, no softmax."""
    return torch.matmul(means, query.to(means.dtype).transpose(-1, -2))


def own_block_mask(boundaries: torch.Tensor) -> torch.Tensor:
    """Bool `(blocks, tokens)`: token lies in block."""
    tokens = torch.arange(int(boundaries[-1]), device=boundaries.device)
    return (tokens >= boundaries[:-1, None]) & (tokens < boundaries[1:, None])


def to_pools(gate: torch.Tensor, pool: str) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Lines up each pool of `(batch, heads, blocks, tokens)` in the last dimension; the second value undoes it."""
    batch, heads, blocks, tokens = gate.shape
    if pool == "query_head":
        return gate.transpose(-1, -2), lambda mask: mask.transpose(-1, -2)
    if pool == "head_global":
        return gate.flatten(2), lambda mask: mask.view(batch, heads, blocks, tokens)
    flat = gate.transpose(1, 2).flatten(1 if pool == "overall" else 2)
    return flat, lambda mask: mask.view(batch, blocks, heads, tokens).transpose(1, 2)


@torch.no_grad()
def select_topk(gate: torch.Tensor, own: torch.Tensor, k: int, pool: str = "query_head") -> torch.Tensor:
    """Keeps the best pairs; a token's own block always ranks first and counts.

    Per pool: `query_head` k blocks for every (head, token); `head_global` k * tokens pairs per head; `overall`
    k * heads * tokens pairs per sample. k is capped at the number of blocks.

    Args:
        gate: `(batch, heads, blocks, tokens)`.
        own: bool `(blocks, tokens)`.

    Returns:
        bool mask like `gate`, own blocks included.

    Raises:
        ValueError: pool "block", for which top-k is not defined, or k < 1.
    """
    if pool not in POOLS or pool == "block":
        raise ValueError(f"top-k selection pools over query_head, head_global or overall, got {pool!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1 (a token's own block), got {k}")
    _, heads, blocks, tokens = gate.shape
    per_pool = {"query_head": 1, "head_global": tokens, "overall": heads * tokens}[pool]
    flat, restore = to_pools(gate.masked_fill(own, float("inf")), pool)
    best = flat.argsort(dim=-1, descending=True, stable=True)[..., : min(k, blocks) * per_pool]
    return restore(torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, True))


def heaviest_by_sorting(ranks: torch.Tensor, values: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """The fewest of every row, highest rank first, whose values sum to `needed`, the one that reaches it included.

    The first of equal ranks goes first. A row that never reaches its sum keeps everything, one that needs nothing its
    first highest rank.

    Args:
        ranks: `(..., length)`.
        values: `(..., length)`, from 0 to 1, not rising where ranks fall.
        needed: `(..., 1)`, not negative; sums are taken in its type.

    Returns:
        bool mask like `ranks`.
    """
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    reached = values.gather(-1, order).cumsum(-1, dtype=needed.dtype) >= needed
    return torch.zeros_like(reached).scatter_(-1, order, reached.cumsum(-1) - reached.long() == 0)


def heaviest_by_buckets(ranks: torch.Tensor, values: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """What `heaviest_by_sorting` gives, for long rows on CPU: only the values around the last one kept are sorted.

    One pass sums the values of each of `_BUCKETS` equal ranges, in chunks; the ranges above the one in which the sum is
    reached are kept whole. `needed` is float64.
    """
    length = ranks.shape[-1]
    rows = zip(ranks.reshape(-1, length), values.reshape(-1, length), needed.reshape(-1), strict=True)
    return torch.stack([_heaviest_of_row(*row) for row in rows]).view(ranks.shape)


def _heaviest_of_row(ranks: torch.Tensor, values: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    mass = torch.zeros(_BUCKETS + 1, dtype=torch.float64)
    for part in values.split(_CHUNK):
        mass += torch.bincount((part * _BUCKETS).long(), weights=part.double(), minlength=_BUCKETS + 1)
    from_the_top = mass.flip(0).cumsum(0)
    highest_bucket = int(values.max() * _BUCKETS)
    index = max(int(torch.searchsorted(from_the_top, needed[None])), _BUCKETS - highest_bucket)
    if index > _BUCKETS:
        return torch.ones_like(values, dtype=torch.bool)
    above = from_the_top[index - 1] if index else torch.zeros((), dtype=torch.float64)
    lowest, highest = (_BUCKETS - index) / _BUCKETS, (_BUCKETS - index + 1) / _BUCKETS
    kept = values >= highest
    bucket = ((values >= lowest) & ~kept).nonzero().squeeze(1)
    kept[bucket[heaviest_by_sorting(ranks[bucket], values[bucket], (needed - above)[None])]] = True
    return kept


def normalised(gate: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Gates from 0 at their pool's lowest to 1 at its highest; a pool without a span is only shifted."""
    span = high - low
    return (gate - low) / torch.where(span <= _EPS, torch.ones_like(span), span)


def still_needed(total: torch.Tensor, foreign: torch.Tensor, tau: float) -> torch.Tensor:
    """Similarity that foreign pairs have to bring, given a pool's sum over all pairs and over foreign pairs."""
    return (tau * (total + _EPS) - (total - foreign)).clamp(min=0.0)


@torch.no_grad()
def select_threshold(gate: torch.Tensor, own: torch.Tensor, tau: float, pool: str = "head_global") -> torch.Tensor:
    """Keeps own blocks and then the best pairs until their min-max normalised gates sum to `tau` of the pool's total.

    Own pairs are not ranked: their share counts first, foreign pairs bring the rest. The pair that reaches the sum is
    included, so even tau = 0 keeps one extra pair per pool. tau >= 1 keeps everything. Shifting a pool's gates or
    scaling them by a positive number changes nothing.

    Args:
        gate: `(batch, heads, blocks, tokens)`.
        own: bool `(blocks, tokens)`.
        tau: share of the pool's similarity, own blocks' share counted first.
        pool: what is normalised and sorted together, within one sample: the blocks of a query ("query_head"), a head
            ("head_global"), a block over all heads ("block") or everything ("overall").

    Returns:
        bool mask like `gate`, own blocks included.

    Raises:
        ValueError: an unknown pool.
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
    if tau >= 1.0:
        return torch.ones_like(gate, dtype=torch.bool)
    flat, restore = to_pools(gate, pool)
    is_own, _ = to_pools(own.expand_as(gate), pool)
    similarity = normalised(flat, flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True))
    foreign = similarity.masked_fill(is_own, 0.0)
    precise = torch.float32 if flat.device.type == "mps" else torch.float64
    total, foreign_sum = (part.sum(-1, keepdim=True, dtype=precise) for part in (similarity, foreign))
    needed = still_needed(total, foreign_sum, tau)
    in_buckets = flat.device.type == "cpu" and flat.shape[-1] > _BUCKETS
    heaviest = heaviest_by_buckets if in_buckets else heaviest_by_sorting
    kept = heaviest(flat.masked_fill(is_own, float("-inf")), foreign, needed)
    return restore(kept | is_own)


@torch.no_grad()
def select_pairs(
    query: torch.Tensor, means: torch.Tensor, boundaries: torch.Tensor, mode: str, pool: str, k: int, tau: float
) -> torch.Tensor:
    """Gate and selection in one go, one (sample, head) at a time where the pool allows it (memory stays linear).

    Args:
        query: `(batch, heads, tokens, head_dim)` in block order.
        means: `(batch, heads, blocks, head_dim)` from `block_means`.

    Returns:
        bool mask `(batch, heads, blocks, tokens)`, own blocks included.
    """
    own = own_block_mask(boundaries).to(query.device)

    def choose(gate: torch.Tensor) -> torch.Tensor:
        return select_topk(gate, own, k, pool) if mode == "topk" else select_threshold(gate, own, tau, pool)

    if pool in ("overall", "block"):
        return torch.cat([choose(block_gate(q, m)) for q, m in zip(query.split(1), means.split(1), strict=True)])
    rows = []
    for q, m in zip(query.split(1), means.split(1), strict=True):
        heads = zip(q.split(1, dim=1), m.split(1, dim=1), strict=True)
        rows.append(torch.cat([choose(block_gate(head_q, head_m)) for head_q, head_m in heads], dim=1))
    return torch.cat(rows)

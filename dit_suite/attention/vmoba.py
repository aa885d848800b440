"""VMoBA: mixture-of-block attention for video diffusion (arXiv 2506.23858), exact and differentiable.

Per layer: permute the tokens so that each block of a 1D, 2D or 3D partition is contiguous, score every query token
against the mean key of every block, select, attend exactly to the union of the own block and the selected blocks, undo
the permutation. Two queries of one block may select different blocks, so block tables cannot carry the selection: each
(head, block) gathers the queries that chose it, attends once, and the partial results are merged by log-sum-exp.
"""

import math
from dataclasses import dataclass

import torch

from dit_suite.attention import selection, selection_chunked
from dit_suite.attention.block_sparse import WorkCounter
from dit_suite.attention.merge import accumulation_dtype, attention_with_lse
from dit_suite.attention.partition import Grid, Partition, auto_block, partition_on
from dit_suite.attention.vmoba_dispatch import (
    PairAttention,
    PairLists,
    pairs_from_indices,
    pairs_from_mask,
    varlen_available,
)
from dit_suite.options import Options, option

KINDS = (1, 2, 3)
_TARGET_BLOCKS = {1: 8, 2: 48, 3: 72}
_FEWEST_BLOCKS, _TOKENS_PER_BLOCK = 8, 128
# The paper's blocks of each kind by token grid (its Table 4: 81x480x832, 81x720x1280, 93x576x1024, 141x480x832). Its k
# of 2, 6, 18 and 2, 10, 9 blocks are a quarter of the blocks, which is the default of `topk_ratio`.
_PAPER_BLOCKS = {
    (21, 30, 52): (3.0, (5, 13), (7, 5, 13)),
    (21, 45, 80): (3.0, (9, 10), (7, 15, 20)),
    (24, 36, 64): (3.0, (6, 8), (8, 12, 8)),
    (36, 30, 52): (3.0, (5, 13), (12, 10, 13)),
}


@dataclass(frozen=True)
class VMoBAConfig(Options):
    """Options of VMoBA.

    Sides left at None are the paper's on its four grids and else chosen from the grid: about 8, 48 and 72 blocks; fewer
    (but not below 8) where blocks would hold less than 128 tokens.
    """

    block_1d: float | None = option(None, "1D block length in frames (may be fractional)", minimum=1e-3, advanced=True)
    block_2d: tuple[int, ...] | None = option(None, "2D block: rows columns", minimum=1, advanced=True)
    block_3d: tuple[int, ...] | None = option(None, "3D block: frames rows columns", minimum=1, advanced=True)
    select: str = option("topk", "how pairs are selected", choices=selection.SELECT_MODES)
    pool: str = option("query_head", "what is ranked together", choices=selection.POOLS)
    topk: tuple[int, ...] | None = option(None, "blocks kept per query for 1D 2D 3D, own block counted", minimum=1)
    topk_ratio: float = option(0.25, "share of blocks kept where topk is not given", minimum=0.0, maximum=1.0)
    tau: float = option(0.25, "similarity kept by threshold selection", minimum=0.0, maximum=1.0)
    cycle: tuple[int, ...] = option((1, 1, 1), "layers in a row of kind 1D 2D 3D", minimum=0, advanced=True)
    dense_first_layers: int = option(0, "layers at the input that stay dense", minimum=0, advanced=True)
    dense_first_steps: float = option(0.25, "share of sampling steps that stay dense", minimum=0.0, maximum=1.0)
    empty_selection: str = option(
        "self", "no block selected: own block only, or full", choices=("self", "full"), advanced=True
    )
    min_tokens: int | None = option(
        None, "stay dense below this many tokens (default by device)", minimum=0, advanced=True
    )

    def validate(self) -> None:
        if self.select == "topk" and self.pool == "block":
            raise ValueError("top-k selection pools over query_head, head_global or overall, got 'block'")
        for name, length in (("block_2d", 2), ("block_3d", 3), ("topk", 3), ("cycle", 3)):
            value = getattr(self, name)
            if value is not None and len(value) != length:
                raise ValueError(f"{name} must have {length} numbers, got {value}")
        if sum(self.cycle) == 0:
            raise ValueError("cycle must name at least one layer, got (0, 0, 0)")

    @classmethod
    def training_free(cls, **changes) -> "VMoBAConfig":
        """The paper's settings on a model trained dense: per-query top-k, first quarter of the steps dense."""
        return cls(**{"select": "topk", "pool": "query_head", "dense_first_steps": 0.25, **changes})

    @classmethod
    def trained(cls, **changes) -> "VMoBAConfig":
        """The paper's settings for a model trained with VMoBA: global threshold 0.25 per head, no dense step."""
        return cls(**{"select": "threshold", "pool": "head_global", "tau": 0.25, "dense_first_steps": 0.0, **changes})

    def kind(self, layer: int) -> int | None:
        """1, 2 or 3 for the partition of this layer, None where the layer stays dense (paper equation 1)."""
        if layer < self.dense_first_layers:
            return None
        place = (layer - self.dense_first_layers) % sum(self.cycle)
        for kind, count in zip(KINDS, self.cycle, strict=True):
            if place < count:
                return kind
            place -= count
        return None

    def block(self, grid: Grid, kind: int) -> float | tuple[int, ...]:
        """Block sides of a kind on a grid."""
        grid = tuple(grid)
        given = {1: self.block_1d, 2: self.block_2d, 3: self.block_3d}[kind]
        if given is None and grid in _PAPER_BLOCKS:
            return _PAPER_BLOCKS[grid][KINDS.index(kind)]
        most = max(_FEWEST_BLOCKS, math.prod(grid) // _TOKENS_PER_BLOCK)
        return auto_block(grid, kind, min(_TARGET_BLOCKS[kind], most)) if given is None else given

    def kept_blocks(self, kind: int, blocks: int) -> int:
        """k of top-k selection for a kind with this many blocks."""
        if self.topk is not None:
            return min(self.topk[KINDS.index(kind)], blocks)
        return max(1, min(blocks, round(self.topk_ratio * blocks)))


def select(query: torch.Tensor, key: torch.Tensor, parts: Partition, config: VMoBAConfig, kind: int) -> PairLists:
    """Foreign pairs (own blocks left out) of every (sample, head, block)."""
    means = selection.block_means(key, parts.boundaries)
    k = config.kept_blocks(kind, parts.num_blocks)
    compiled = selection_chunked.chunked_unavailable(query) is None
    if config.select == "topk" and config.pool == "query_head":
        chosen = selection_chunked.foreign_topk(query, means, parts.block_of_token, k - 1, compiled=compiled)
        return pairs_from_indices(chosen, parts.num_blocks)
    rule = (config.select, config.pool, k, config.tau)
    if compiled:
        return pairs_from_mask(selection_chunked.foreign_mask(query, means, parts.block_of_token, *rule, compiled=True))
    mask = selection.select_pairs(query, means, parts.boundaries, *rule)
    return pairs_from_mask(mask & ~selection.own_block_mask(parts.boundaries).to(mask.device))


def vmoba_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    config: VMoBAConfig,
    layer: int,
    *,
    scale: float | None = None,
    counter: WorkCounter | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mixture-of-block attention of one layer.

    Args:
        query, key, value: `(batch, heads, tokens, head_dim)` in (t, y, x) order, after normalisation and rotary
            embedding; tokens = frames * rows * columns of `grid`.
        layer: picks the partition kind by `config.cycle`; a layer kept dense by the config is dense here too.
        scale: factor on the scores, `head_dim ** -0.5` if None.
        counter: adds the pairs this call computed.

    Returns:
        output like `query`, and the log-sum-exp `(batch, heads, tokens)` if asked for. Differentiable in all three
        inputs; the selection is a constant of the backward pass.

    Raises:
        ValueError: the grid does not hold `tokens` tokens.
    """
    if math.prod(grid) != query.shape[2]:
        raise ValueError(f"a grid of {grid} holds {math.prod(grid)} tokens, the query has {query.shape[2]}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    kind = config.kind(layer)
    if kind is None:
        out, lse = attention_with_lse(query, key, value, scale)
        return (out, lse) if return_lse else out
    parts = partition_on(tuple(grid), config.block(grid, kind), query.device)
    query, key, value = (parts.permute(t, 2) for t in (query, key, value))
    pairs = select(query.detach(), key.detach(), parts, config, kind)
    scores = pairs.scores(parts.sizes) if counter is not None else None
    out, lse = attend_pairs(query, key, value, parts, pairs, scale, config.empty_selection)
    if counter is not None:
        full = config.empty_selection == "full" and pairs.total == 0
        own = query.shape[0] * query.shape[1] * parts.pairs_within
        counter.calls += 1
        counter.dense_pairs += query.shape[0] * query.shape[1] * query.shape[2] ** 2
        counter.pairs += counter.dense_pairs if full else own + scores()
        counter.backend = "varlen" if varlen_available(query) else "loop"
    out = parts.restore(out, 2)
    return (out, parts.restore(lse, 2)) if return_lse else out


def attend_pairs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Partition,
    pairs: PairLists,
    scale: float,
    empty_selection: str = "self",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention over own block plus selected pairs, everything in block order.

    Args:
        query, key, value: `(batch, heads, tokens, head_dim)`.
        pairs: from `select`, own blocks left out.
        empty_selection: with no pair at all: "self" attends to own blocks only, "full" to everything.

    Returns:
        output like `query`, and its log-sum-exp `(batch, heads, tokens)` in float32 (float64 for float64 input).
    """
    if pairs.total == 0 and empty_selection == "full":
        return attention_with_lse(query, key, value, scale)
    return PairAttention.apply(query, key, value, parts.boundaries, pairs, scale)


def masked_oracle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, parts: Partition, scale: float
) -> torch.Tensor:
    """Dense attention under the selection mask `(batch, heads, blocks, tokens)`; block order. For tests."""
    allowed = mask[:, :, parts.block_of_token.to(mask.device)].transpose(-1, -2)
    dtype = accumulation_dtype(query.dtype)
    scores = torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)) * scale
    weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1)
    return torch.matmul(weights, value.to(dtype)).to(query.dtype)


def transformer_flops(
    tokens: int,
    dim: int,
    ffn_dim: int,
    layers: int,
    text_tokens: int = 300,
    selections: tuple[tuple[float, float], ...] | None = None,
) -> float:
    """FLOPs of one forward pass (a multiply-add is 2; softmax, norms and embeddings are left out).

    Args:
        selections: None for dense attention, else (blocks, kept blocks per query) for each kind of layer; the kinds
            share the layers equally.
    """
    projections = 8 * tokens * dim**2
    cross = 4 * tokens * dim**2 + 4 * text_tokens * dim**2 + 4 * tokens * text_tokens * dim
    feed_forward = 4 * tokens * dim * ffn_dim
    if selections is None:
        attention = 4.0 * tokens**2 * dim
    else:
        costs = [
            2 * tokens * dim * math.floor(blocks) + 4 * tokens * dim * (kept * tokens / blocks)
            for blocks, kept in selections
        ]
        attention = sum(costs) / len(costs)
    return layers * (projections + attention + cross + feed_forward)

"""Rivals of AdaSpa as rules for the same block tables: what to attend to, at an equal number of blocks per row.

Each rule is a reimplementation of the idea at block granularity, run by the same kernel and after the same dense steps,
so that a comparison shows the selection and nothing else: Radial Attention (static, the spatial window shrinks with
distance in time), Sliding Tile Attention (static, a window of 3D tiles), XAttention (scores on antidiagonals of the
block, every step), and the oracle that sees the exact block masses at every step.
"""

from collections.abc import Callable

import torch

from dit_suite.attention.adaspa import AdaSpaConfig, LayerState, SearchResult, build_table, recall, search
from dit_suite.attention.calls import AttentionCall
from dit_suite.attention.merge import attention_with_lse
from dit_suite.attention.methods import AdaSpaMethod
from dit_suite.attention.partition import Grid

Positions = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def block_centres(grid: Grid, order: torch.Tensor | None, block_size: int) -> Positions:
    """Mean (frame, row, column) of the tokens of every block, each float32 `(blocks,)`."""
    frames, rows, columns = grid
    tokens = torch.arange(frames * rows * columns) if order is None else order.cpu()
    places = (tokens // (rows * columns), tokens // columns % rows, tokens % columns)
    return tuple(torch.stack([part.float().mean() for part in place.split(block_size)]) for place in places)


def radial_score(centres: Positions) -> torch.Tensor:
    """Higher is nearer: spatial distance counts double with every doubling of the distance in time."""
    t, y, x = (c[:, None] - c[None, :] for c in centres)
    space = torch.sqrt(y**2 + x**2)
    return -(space + 1.0) * (1.0 + t.abs())


def sliding_tile_score(centres: Positions) -> torch.Tensor:
    """Higher is nearer: largest distance along any axis, each in units of the grid's extent."""
    distances = [(c[:, None] - c[None, :]).abs() / max(float(c.max() - c.min()), 1.0) for c in centres]
    ties = sum(distances) * 1e-3
    return -(torch.stack(distances).amax(0) + ties)


def antidiagonal_score(
    query: torch.Tensor, key: torch.Tensor, block_size: int, scale: float, stride: int = 8
) -> torch.Tensor:
    """Approximate block masses `(batch, heads, q_blocks, k_blocks)` from one antidiagonal per stride x stride cell.

    Token i of a query cell meets token stride - 1 - i of a key cell; the cell scores are softmaxed over all keys and
    summed per block. Costs 1 / stride of the exact scores. Tail tokens that fill no cell are left out.
    """
    batch, heads, _, dim = query.shape
    q_cells, k_cells = query.shape[2] // stride, key.shape[2] // stride
    q = query[:, :, : q_cells * stride].reshape(batch, heads, q_cells, stride * dim)
    k = key[:, :, : k_cells * stride].reshape(batch, heads, k_cells, stride, dim).flip(3).flatten(3)
    weights = torch.softmax((q @ k.mT).float() * (scale / stride), dim=-1)
    per_block = max(1, block_size // stride)
    q_blocks, k_blocks = -(-query.shape[2] // block_size), -(-key.shape[2] // block_size)
    weights = torch.nn.functional.pad(weights, (0, k_blocks * per_block - k_cells, 0, q_blocks * per_block - q_cells))
    return weights.view(batch, heads, q_blocks, per_block, k_blocks, per_block).sum((3, 5))


class RuleMethod(AdaSpaMethod):
    """AdaSpa's schedule with another selection. Tables are made once ("static") or at every step."""

    def __init__(self, name: str, config: AdaSpaConfig, *, every_step: bool) -> None:
        super().__init__(config)
        self.name = name
        self._every_step = every_step
        self._rules: dict[str, Callable[..., torch.Tensor]] = {
            "radial": radial_score,
            "sliding-tile": sliding_tile_score,
        }

    def planned_searches(self, num_steps: int) -> int:
        return 1

    def _phase(self, state: LayerState, step: int, searches: tuple[int, ...]) -> str:
        phase = super()._phase(state, step, searches[:1])
        return "cached" if phase == "sparse" and self._every_step else phase

    def _choose(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        key: torch.Tensor,
        lse: torch.Tensor,
        kept_apart: torch.Tensor | None,
    ) -> SearchResult:
        block = self._block_size(call)
        if self.name == "oracle":
            exact = attention_with_lse(query, key, key, call.scale)[1]
            return search(query, key, exact, self.config, block, call.scale, kept_apart)
        if self.name == "antidiagonal":
            score = antidiagonal_score(query, key, block, call.scale)
        else:
            order = self._order(call)
            centres = block_centres(call.layout.grid, None if order is None else order.order, block)
            score = self._rules[self.name](centres).to(query.device)
            score = (score - score.min() + 1e-6).expand(*query.shape[:2], -1, -1)
        sparsity = torch.full(query.shape[:2], self.config.sparsity, dtype=torch.float64)
        table, counts = build_table(score, sparsity)
        claimed = recall(score, table, counts, kept_apart)
        return SearchResult(table, counts, sparsity, claimed, claimed)

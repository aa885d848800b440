"""AdaSpa: training-free adaptive block-sparse attention with precise online search (arXiv 2502.21079).

At one early step the exact block masses are computed next to the dense output; the heaviest key blocks of every query
block make the table that later steps attend with. Heads whose weight is concentrated get a sparser tier, heads whose
weight is diffuse a denser one. Later searches reuse the log-sum-exp cached at the first.
"""

import math
from dataclasses import dataclass, field

import torch

from dit_suite.attention.block_mass import SEARCH_IMPLS, block_mass
from dit_suite.attention.block_sparse import BACKENDS, mask_from_table, table_from_mask
from dit_suite.options import Options, option

_ROUND = 1e-9
LSE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class AdaSpaConfig(Options):
    """Options of AdaSpa.

    `search_steps` below 1 are shares of the number of steps, others are step numbers counted from 0. The steps before
    the first search are dense; at the first search the dense output is used; later searches cost one pass over queries
    and keys. `head_adaptive=False` and `lse_cache=False` are the paper's ablations.
    """

    sparsity: float = option(0.8, "share of key blocks skipped", minimum=0.0, maximum=1.0)
    block_size: int | None = option(None, "tokens per block (default: 128 on CUDA, 64 elsewhere)", minimum=1)
    search_steps: tuple[float, ...] = option((0.2, 0.6), "steps that search, shares of the run or numbers", minimum=0.0)
    dense_steps: int | None = option(None, "dense steps; overrides the first search step", minimum=1)
    head_adaptive: bool = option(True, "give concentrated heads a sparser tier and diffuse heads a denser one")
    recall_threshold: float = option(0.8, "recall above which a head counts as concentrated", minimum=0.0, maximum=1.0)
    row_wise: bool = option(True, "every query block keeps equally many key blocks", advanced=True)
    keep_diagonal: bool = option(False, "always keep a query block's own key block", advanced=True)
    lse_cache: bool = option(True, "later searches reuse the log-sum-exp of the first", advanced=True)
    lse_dtype: str = option("float32", "storage of the cached log-sum-exp", choices=tuple(LSE_DTYPES), advanced=True)
    token_order: str = option("tile", "order in which tokens form blocks", choices=("tile", "native"), advanced=True)
    tile: tuple[int, ...] | None = option(None, "tile: frames rows columns (default: chosen)", minimum=1, advanced=True)
    backend: str = option("auto", "block-sparse kernel", choices=("auto", *BACKENDS), advanced=True)
    search_impl: str = option("auto", "search kernel", choices=SEARCH_IMPLS, advanced=True)
    min_tokens: int | None = option(None, "stay dense below this many tokens (default by device)", minimum=0)

    def validate(self) -> None:
        if not self.search_steps:
            raise ValueError("search_steps must name at least one step")
        if any(s >= 1.0 and s != int(s) for s in self.search_steps):
            raise ValueError(f"search_steps of 1 or more must be whole step numbers, got {self.search_steps}")
        if self.tile is not None and len(self.tile) != 3:
            raise ValueError(f"tile must have 3 numbers, got {self.tile}")

    def searches(self, num_steps: int) -> tuple[int, ...]:
        """Step numbers, from 0 and ascending, at which a search is due in a run of `num_steps`.

        A share f stands for the round(f * num_steps)-th step counted from 1 (the paper's {10, 30} of 50 are 0.2, 0.6).

        Raises:
            ValueError: shares were given and the number of steps is unknown (0).
        """
        if num_steps < 1 and any(0.0 < s < 1.0 for s in self.search_steps):
            raise ValueError("search_steps are shares of the run, but the number of steps is unknown")
        steps = [int(s) if s >= 1.0 or s == 0.0 else max(0, round(s * num_steps) - 1) for s in self.search_steps]
        if self.dense_steps is not None:
            steps[0] = self.dense_steps - 1
        return tuple(sorted(set(steps)))


def row_budget(sparsity: float, blocks: int) -> int:
    """Key blocks that a row of `blocks` candidates keeps: `ceil((1 - sparsity) * blocks)`, at least 1."""
    return max(1, min(blocks, math.ceil((1.0 - sparsity) * blocks - _ROUND)))


def head_tiers(recall: torch.Tensor, sparsity: float, threshold: float = 0.8) -> torch.Tensor:
    """Sparsity of every head from its recall at the base sparsity (paper section 4.3).

    With n heads above the threshold (at most half of them), the n of highest recall get (1 + s) / 2, the n of lowest
    recall (3s - 1) / 2, the rest s. Below s = 1/3 the low tier stops at 0 and the high tier at 2s, so that the mean
    over heads stays s and sparsity 0 stays dense. Ties go by head number.

    Args:
        recall: `(batch, heads)`.

    Returns:
        float64 `(batch, heads)`, on CPU.
    """
    recall = recall.detach().cpu().double()
    heads = recall.shape[1]
    tiers = torch.full(recall.shape, sparsity, dtype=torch.float64)
    low = max(0.0, (3.0 * sparsity - 1.0) / 2.0)
    for sample, row in enumerate(recall):
        n = min(int((row > threshold).sum()), heads // 2)
        ranked = row.argsort(descending=True, stable=True)
        tiers[sample, ranked[:n]] = 2.0 * sparsity - low
        tiers[sample, ranked[heads - n :]] = low
    return tiers


def build_table(
    mass: torch.Tensor,
    sparsity: torch.Tensor,
    *,
    sink_blocks: int = 0,
    row_wise: bool = True,
    keep_diagonal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table of the heaviest key blocks (paper equation 14).

    Args:
        mass: `(batch, heads, q_blocks, k_blocks)`; the last `sink_blocks` rows and columns are text.
        sparsity: `(batch, heads)`, over the blocks that are not text.
        sink_blocks: text blocks; every pair with one of them is kept, on top of the budget.
        row_wise: the same number of key blocks in every row; otherwise the budget is spent over the whole head, with at
            least the best block of every row.
        keep_diagonal: keep a query block's own block (it counts in the budget).

    Returns:
        int32 `(table, counts)` as `block_sparse_attention` takes them. Ties go to the lower block number.
    """
    batch, heads, q_blocks, k_blocks = mass.shape
    rows, columns = q_blocks - sink_blocks, k_blocks - sink_blocks
    ranked = mass[:, :, :rows, :columns]
    if keep_diagonal:
        ranked = ranked.masked_fill(torch.eye(rows, columns, dtype=torch.bool, device=mass.device), float("inf"))
    budgets = torch.tensor([[row_budget(float(s), columns) for s in row] for row in sparsity], device=mass.device)
    keep = torch.ones(batch, heads, q_blocks, k_blocks, dtype=torch.bool, device=mass.device)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    if row_wise:
        chosen = (torch.arange(columns, device=mass.device) < budgets[:, :, None, None]).expand(order.shape)
        keep[:, :, :rows, :columns] = torch.zeros_like(chosen).scatter(-1, order, chosen)
    else:
        best = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order[..., :1], True)
        flat = ranked.masked_fill(best, float("inf")).flatten(2)
        order = flat.argsort(dim=-1, descending=True, stable=True)
        chosen = torch.arange(order.shape[-1], device=mass.device) < (budgets * rows)[:, :, None]
        keep[:, :, :rows, :columns] = torch.zeros_like(chosen).scatter(-1, order, chosen).view(ranked.shape)
    return table_from_mask(keep)


def recall(
    mass: torch.Tensor, block_table: torch.Tensor, block_counts: torch.Tensor, kept_apart: torch.Tensor | None = None
) -> torch.Tensor:
    """Share of the softmax weight that a table keeps, `(batch, heads)` (paper equation 9).

    Args:
        kept_apart: `(batch, heads)` weight that is always kept and lies outside `mass` (text keys and text rows).
    """
    mask = mask_from_table(block_table, block_counts, mass.shape[-1])
    kept, total = (mass * mask).sum((-1, -2)), mass.sum((-1, -2))
    if kept_apart is not None:
        kept, total = kept + kept_apart, total + kept_apart
    return kept / total


@dataclass
class SearchResult:
    """The table of one layer and what the search found out about it; all per (sample, head)."""

    table: torch.Tensor
    counts: torch.Tensor
    sparsity: torch.Tensor
    recall_before: torch.Tensor
    recall: torch.Tensor


def choose_blocks(mass: torch.Tensor, config: AdaSpaConfig, kept_apart: torch.Tensor | None = None) -> SearchResult:
    """Base table, recall per head, tiers, final table (paper section 4.3, steps 1 to 3)."""
    base = torch.full(mass.shape[:2], config.sparsity, dtype=torch.float64)
    rules = {"row_wise": config.row_wise, "keep_diagonal": config.keep_diagonal}
    table, counts = build_table(mass, base, **rules)
    before = after = recall(mass, table, counts, kept_apart)
    tiers = base
    if config.head_adaptive:
        tiers = head_tiers(before, config.sparsity, config.recall_threshold)
        if not torch.equal(tiers, base):
            table, counts = build_table(mass, tiers, **rules)
            after = recall(mass, table, counts, kept_apart)
    return SearchResult(table, counts, tiers, before, after)


def search(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    config: AdaSpaConfig,
    block_size: int,
    scale: float,
    kept_apart: torch.Tensor | None = None,
) -> SearchResult:
    """One search over the video tokens of a layer: masses, then `choose_blocks`."""
    mass = block_mass(query, key, lse.to(torch.float32), block_size, scale=scale, impl=config.search_impl)
    return choose_blocks(mass, config, kept_apart)


@dataclass
class LayerState:
    """What one layer remembers within one run, guidance branch and sub-batch."""

    lse: torch.Tensor | None = None
    result: SearchResult | None = None
    searches_done: int = 0
    last_step: int = -1


@dataclass
class RunningMean:
    """A mean that keeps two numbers, however many values it has seen."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class LayerReport:
    """Counts of one layer since the last reset."""

    backend: str | None = None
    search: str | None = None
    dense_calls: int = 0
    fused_searches: int = 0
    cached_searches: int = 0
    sparse_calls: int = 0
    search_seconds: float = 0.0
    density: RunningMean = field(default_factory=RunningMean)
    recall_before: RunningMean = field(default_factory=RunningMean)
    recall: RunningMean = field(default_factory=RunningMean)
    tiers: dict[float, int] = field(default_factory=dict)

    def record_search(self, result: SearchResult) -> None:
        self.recall_before.add(float(result.recall_before.mean()))
        self.recall.add(float(result.recall.mean()))
        for tier in result.sparsity.flatten().tolist():
            self.tiers[round(tier, 6)] = self.tiers.get(round(tier, 6), 0) + 1


def phase_of(state: LayerState, step: int, searches: tuple[int, ...]) -> str:
    """ "dense", "fused" (dense output plus search), "cached" (search, sparse output) or "sparse" at an executed step.

    A search whose step was skipped by a step cache happens at the next executed step.
    """
    due = sum(s <= step for s in searches)
    if due == 0:
        return "dense"
    if state.result is None:
        return "fused"
    return "cached" if due > state.searches_done and step > state.last_step else "sparse"


def estimate_speedup(attn_share: float, dense_step_share: float, density: float, search_overhead: float = 0.0) -> float:
    """Upper bound on the end-to-end gain of sparse steps.

    Args:
        attn_share: share of the dense run's time spent in the attention that becomes sparse.
        dense_step_share: share of steps that stay dense.
        density: computed share of the attention at the other steps.
        search_overhead: time of all searches as a share of the dense run.
    """
    attention = dense_step_share + (1.0 - dense_step_share) * density
    return 1.0 / ((1.0 - attn_share) + attn_share * attention + search_overhead)

"""VMoBA: fixtures, the spec's acceptance facts A1 to A13, and what the dispatch really computes."""

import math
from pathlib import Path

import pytest
import torch

from dit_suite.attention import selection, selection_chunked, vmoba_dispatch
from dit_suite.attention.block_sparse import WorkCounter
from dit_suite.attention.partition import auto_block, auto_tile, partition
from dit_suite.attention.vmoba import VMoBAConfig, masked_oracle, transformer_flops, vmoba_attention
from dit_suite.golden import read_fixture, vmoba

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("vmoba_*.safetensors"))
GRID = (4, 6, 6)
ONLY_3D = {"cycle": (0, 0, 1), "block_3d": (2, 3, 3)}


def _qkv(batch=1, heads=2, tokens=144, dim=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, dim, generator=generator, dtype=dtype) for _ in range(3)]


def _dense(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def _gate(query, key, parts):
    means = selection.block_means(parts.permute(key, 2), parts.boundaries)
    return selection.block_gate(parts.permute(query, 2), means)


@pytest.mark.parametrize("path", GOLDEN, ids=[p.stem for p in GOLDEN])
def test_fixtures(path):
    failed = [r for r in vmoba.check(*read_fixture(path)) if not r.passed]
    assert not failed


def test_there_are_fixtures():
    assert len(GOLDEN) == 6


@pytest.mark.parametrize("block", [2, 1.5, 0.4, (2, 3), (4, 4), (2, 2, 2), (3, 4, 5), (9, 9, 9)])
def test_partition_restores_and_blocks_are_boxes(block):
    parts = partition((5, 6, 7), block)
    tokens = torch.randn(2, 210, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(parts.restore(parts.permute(tokens, 1), 1), tokens)
    assert int(parts.boundaries[-1]) == 210
    assert (parts.sizes > 0).all()
    t, y, x = parts.order // 42, parts.order % 42 // 7, parts.order % 7
    if isinstance(block, tuple):
        depth, height, width = block if len(block) == 3 else (5, *block)
        for a, b in zip(parts.boundaries[:-1], parts.boundaries[1:], strict=True):
            own = slice(int(a), int(b))
            assert t[own].unique().numel() <= depth
            assert y[own].unique().numel() <= height
            assert x[own].unique().numel() <= width
            assert b - a == t[own].unique().numel() * y[own].unique().numel() * x[own].unique().numel()
    else:
        assert torch.equal(parts.order, torch.arange(210))


def test_auto_block_and_tile():
    assert auto_tile((16, 16, 16), 64) == (16, 2, 2)
    assert auto_tile((21, 45, 80), 128) == (4, 4, 8)
    assert auto_tile((21, 30, 52), 64) == (4, 4, 4)
    assert auto_tile((1, 4, 4), 16) == (1, 4, 4)
    for grid, kind, target in (
        ((21, 30, 52), 2, 48),
        ((21, 30, 52), 3, 72),
        ((24, 36, 64), 3, 72),
        ((7, 13, 11), 3, 72),
    ):
        parts = partition(grid, auto_block(grid, kind, target))
        assert target / 2.2 < parts.num_blocks < target * 2.2
    assert auto_block((24, 36, 64), 1, 8) == 3


@pytest.mark.parametrize("block", [1.5, (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("changes", [{"topk_ratio": 1.0}, {"select": "threshold", "pool": "block", "tau": 1.0}])
def test_full_selection_equals_dense(block, changes):
    kind = len(block) if isinstance(block, tuple) else 1
    cycle = tuple(int(k == kind) for k in (1, 2, 3))
    config = VMoBAConfig(**{f"block_{kind}d": block, "cycle": cycle, **changes})
    query, key, value = _qkv()
    assert (vmoba_attention(query, key, value, GRID, config, 0) - _dense(query, key, value)).abs().max() < 1e-5


def test_one_block_equals_dense():
    query, key, value = _qkv()
    config = VMoBAConfig(cycle=(0, 0, 1), block_3d=GRID, topk=(1, 1, 1))
    assert (vmoba_attention(query, key, value, GRID, config, 0) - _dense(query, key, value)).abs().max() < 1e-5


@pytest.mark.parametrize("pool", ["query_head", "head_global", "overall"])
def test_output_equals_masked_oracle_and_depends_on_selected_pairs_only(pool):
    query, key, value = _qkv(batch=2)
    config = VMoBAConfig(pool=pool, topk=(3, 3, 3), **ONLY_3D)
    parts = partition(GRID, (2, 3, 3))
    mask = selection.select_topk(_gate(query, key, parts), selection.own_block_mask(parts.boundaries), 3, pool)
    out = vmoba_attention(query, key, value, GRID, config, 0)
    oracle = masked_oracle(*(parts.permute(t, 2) for t in (query, key, value)), mask, parts, 8**-0.5)
    assert (out - parts.restore(oracle, 2)).abs().max() < 2e-6

    changed = value.clone()
    block = parts.order[parts.boundaries[5] : parts.boundaries[6]]
    changed[:, :, block] += 100.0
    difference = (vmoba_attention(query, key, changed, GRID, config, 0) - out).abs().amax(-1)
    reached = parts.restore(mask[:, :, 5], 2)
    assert difference[~reached].max() < 1e-5
    assert difference[reached].min() > 1e-3
    assert 0 < reached.sum() < reached.numel()


def test_own_block_is_always_selected_and_ragged_blocks_stay_finite():
    query, key, value = _qkv(tokens=5 * 6 * 7)
    parts = partition((5, 6, 7), (2, 4, 4))
    own = selection.own_block_mask(parts.boundaries)
    gate = _gate(query, key, parts)
    masks = [selection.select_topk(gate, own, 1, pool) for pool in ("query_head", "head_global", "overall")]
    masks += [selection.select_threshold(gate, own, 0.1, pool) for pool in selection.POOLS]
    assert all((mask | ~own).all() for mask in masks)
    for select in ("topk", "threshold"):
        config = VMoBAConfig(select=select, cycle=(0, 0, 1), block_3d=(2, 4, 4))
        assert vmoba_attention(query, key, value, (5, 6, 7), config, 0).isfinite().all()


def test_topk_budgets():
    query, key, _ = _qkv(batch=2, heads=3)
    parts = partition(GRID, (2, 3, 3))
    gate, own = _gate(query, key, parts), selection.own_block_mask(parts.boundaries)
    for pool in ("query_head", "head_global", "overall"):
        mask = selection.select_topk(gate, own, 3, pool)
        assert mask.sum((1, 2, 3)).tolist() == [3 * 3 * math.prod(GRID)] * 2
    assert (selection.select_topk(gate, own, 3, "query_head").sum(2) == 3).all()
    assert selection.select_topk(gate, own, 99, "query_head").all()
    with pytest.raises(ValueError, match="top-k selection pools over"):
        selection.select_topk(gate, own, 3, "block")


@pytest.mark.parametrize("pool", selection.POOLS)
def test_threshold_is_a_sorted_prefix_and_monotone(pool):
    query, key, _ = _qkv()
    parts = partition(GRID, (2, 3, 3))
    gate, own = _gate(query, key, parts), selection.own_block_mask(parts.boundaries)
    masks = [selection.select_threshold(gate, own, tau, pool) for tau in (0.0, 0.2, 0.4, 0.7, 0.999, 1.0)]
    for smaller, larger in zip(masks, masks[1:], strict=False):
        assert (larger | ~smaller).all()
    assert masks[0].sum() < masks[2].sum() < masks[5].sum() == gate.numel()

    flat, _ = selection.to_pools(gate, pool)
    kept, _ = selection.to_pools(masks[2], pool)
    is_own, _ = selection.to_pools(own.expand_as(gate), pool)
    lowest_kept = flat.masked_fill(~kept | is_own, float("inf")).amin(-1)
    highest_left = flat.masked_fill(kept | is_own, float("-inf")).amax(-1)
    assert (lowest_kept >= highest_left).all()
    pools = flat[..., 0].numel()
    assert int(masks[0].sum()) == 2 * math.prod(GRID) + pools  # tau 0: own blocks and one pair per pool


def _rows(kind: str) -> torch.Tensor:
    """Values from 0 to 1, `(6, 500)`."""
    generator = torch.Generator().manual_seed(3)
    random = torch.rand(6, 500, generator=generator)
    return {
        "random": random,
        "float64": random.double() ** 3,
        "tied": (random * 5).floor() / 4,
        "one outlier": torch.where(random == random.amax(-1, keepdim=True), 1.0, random * 1e-4),
        "all equal": torch.full((6, 500), 0.25),
        "nothing": torch.zeros(6, 500),
    }[kind]


@pytest.mark.parametrize("kind", ["random", "float64", "tied", "one outlier", "all equal", "nothing"])
@pytest.mark.parametrize("buckets", [4, 64])
def test_buckets_keep_what_sorting_keeps(kind, buckets, monkeypatch):
    """Over chunks that do not divide the row, with sums that are never reached, reached at once and reached exactly."""
    monkeypatch.setattr(selection, "_BUCKETS", buckets)
    monkeypatch.setattr(selection, "_CHUNK", 77)
    values = _rows(kind)
    totals = values.sum(-1, keepdim=True, dtype=torch.float64)
    counts = []
    for needed in (0.0, totals * 0.1, totals * 0.5, totals * 0.9, totals + 1.0):
        needed = torch.as_tensor(needed, dtype=torch.float64).expand(6, 1)
        kept = selection.heaviest_by_sorting(values, values, needed)
        assert torch.equal(selection.heaviest_by_buckets(values, values, needed), kept)
        for row, mask, least in zip(values.double(), kept, needed[:, 0], strict=True):
            assert mask.all() or row[mask].sum() >= least - 1e-9
            assert mask.all() or row[mask].sum() - row[mask].min() <= least
            assert row[mask].min() >= row.masked_fill(mask, 0.0).max()
        counts.append(int(kept.sum()))
    assert counts == sorted(counts) and counts[0] == 6 and counts[-1] == values.numel()
    if kind == "all equal":
        halves = torch.full((6, 1), 0.25 * 100, dtype=torch.float64)
        assert selection.heaviest_by_buckets(values, values, halves)[:, :100].all()
        assert selection.heaviest_by_buckets(values, values, halves).sum() == 600


def test_equal_values_go_by_rank(monkeypatch):
    """Gates that normalise to the same similarity still differ."""
    monkeypatch.setattr(selection, "_BUCKETS", 4)
    values = _rows("tied")
    ranks = values + torch.rand(6, 500, generator=torch.Generator().manual_seed(4)) * 0.2
    needed = values.sum(-1, keepdim=True, dtype=torch.float64) * 0.3
    kept = selection.heaviest_by_sorting(ranks, values, needed)
    assert torch.equal(selection.heaviest_by_buckets(ranks, values, needed), kept)
    assert (ranks.masked_fill(~kept, 9.0).amin(-1) > ranks.masked_fill(kept, -9.0).amax(-1)).all()
    assert not torch.equal(selection.heaviest_by_sorting(values, values, needed), kept)


@pytest.mark.parametrize("pool", selection.POOLS)
def test_own_pairs_are_never_the_extra_one(pool):
    """A gate of equal numbers at tau 0: the pair kept on top of the own blocks is the pool's first foreign one."""
    parts = partition(GRID, (2, 3, 3))
    own = selection.own_block_mask(parts.boundaries)
    foreign = selection.select_threshold(torch.zeros(1, 2, 8, 144), own, 0.0, pool) & ~own
    first, _ = selection.to_pools((~own).expand_as(foreign), pool)
    assert torch.equal(selection.to_pools(foreign, pool)[0], first & (first.cumsum(-1) == 1))


@pytest.mark.parametrize("path", GOLDEN, ids=[p.stem for p in GOLDEN])
def test_masks_of_the_fixtures_by_buckets(path, monkeypatch):
    monkeypatch.setattr(selection, "_BUCKETS", 4)
    monkeypatch.setattr(selection, "_CHUNK", 50)
    sorted_rows = []
    plain = selection.heaviest_by_sorting
    monkeypatch.setattr(
        selection, "heaviest_by_sorting", lambda *row: sorted_rows.append(row[0].numel()) or plain(*row)
    )
    tensors, config = read_fixture(path)
    results = vmoba.check(tensors, config)
    assert not [r for r in results if not r.passed]
    assert bool(sorted_rows) == any(mode == "threshold" for mode, *_ in config["modes"])


@pytest.mark.parametrize("pool", selection.POOLS)
def test_threshold_ignores_shift_and_positive_scale(pool):
    query, key, _ = _qkv(dtype=torch.float64)
    parts = partition(GRID, (2, 3, 3))
    gate, own = _gate(query, key, parts), selection.own_block_mask(parts.boundaries)
    expected = selection.select_threshold(gate, own, 0.3, pool)
    assert torch.equal(selection.select_threshold(gate * 7.5 + 3.0, own, 0.3, pool), expected)


@pytest.mark.parametrize("pool", selection.POOLS)
@pytest.mark.parametrize("select", ["topk", "threshold"])
def test_a_sample_does_not_depend_on_its_batch(pool, select):
    if select == "topk" and pool == "block":
        pytest.skip("top-k has no block pool")
    config = VMoBAConfig(select=select, pool=pool, topk=(3, 3, 3), **ONLY_3D)
    query, key, value = _qkv(batch=3)
    whole = vmoba_attention(query, key, value, GRID, config, 0)
    for i in range(3):
        alone = vmoba_attention(*(t[i : i + 1] for t in (query, key, value)), GRID, config, 0)
        assert (whole[i : i + 1] - alone).abs().max() < 1e-6


@pytest.mark.parametrize("budget", [None, 1, 5000])
def test_gradients_equal_masked_autograd_and_include_the_lse(budget, monkeypatch):
    if budget is not None:  # the padded batches that accelerators take
        plain = vmoba_dispatch._expert_batches
        monkeypatch.setattr(vmoba_dispatch, "_prefers_batches", lambda query: True)
        monkeypatch.setattr(vmoba_dispatch, "_expert_batches", lambda *args: plain(*args, budget=budget))
    leaves = [t.requires_grad_() for t in _qkv(batch=2, dtype=torch.float64)]
    block = (3, 3, 4)  # does not divide the grid: blocks of several sizes
    config = VMoBAConfig(select="threshold", pool="head_global", tau=0.3, cycle=(0, 0, 1), block_3d=block)
    parts = partition(GRID, block)
    with torch.no_grad():
        own = selection.own_block_mask(parts.boundaries)
        mask = selection.select_threshold(_gate(*leaves[:2], parts), own, 0.3, "head_global")
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, 2, 144, 8, generator=generator, dtype=torch.float64)
    upstream_lse = torch.randn(2, 2, 144, generator=generator, dtype=torch.float64)
    out, lse = vmoba_attention(*leaves, GRID, config, 0, return_lse=True)
    actual = torch.autograd.grad((out * upstream).sum() + (lse * upstream_lse).sum(), leaves)

    q, k, v = (parts.permute(t, 2) for t in leaves)
    allowed = mask[:, :, parts.block_of_token].transpose(-1, -2)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~allowed, float("-inf"))
    oracle, oracle_lse = parts.restore(scores.softmax(-1) @ v, 2), parts.restore(scores.logsumexp(-1), 2)
    assert (lse - oracle_lse).abs().max() < 1e-12
    expected = torch.autograd.grad((oracle * upstream).sum() + (oracle_lse * upstream_lse).sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() < 1e-11


def test_layer_schedule():
    config = VMoBAConfig()
    assert [config.kind(i) for i in range(6)] == [1, 2, 3, 1, 2, 3]
    config = VMoBAConfig(cycle=(2, 0, 1), dense_first_layers=1)
    assert [config.kind(i) for i in range(7)] == [None, 1, 1, 3, 1, 1, 3]
    query, key, value = _qkv()
    assert torch.equal(vmoba_attention(query, key, value, GRID, config, 0), _dense(query, key, value))


def test_kinds_differ():
    query, key, value = _qkv()
    config = VMoBAConfig(block_1d=1.0, block_2d=(3, 3), block_3d=(2, 3, 3), topk=(2, 2, 2))
    outs = [vmoba_attention(query, key, value, GRID, config, layer) for layer in range(3)]
    assert (outs[0] - outs[1]).abs().max() > 1e-2
    assert (outs[1] - outs[2]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("tokens", "selections", "expected"),
    [
        (13440, None, 67.734),
        (32760, None, 281.640),
        (55296, None, 705.015),
        (75600, None, 1246.785),
        (13440, ((60, 15),), 42.838),
        (32760, ((60, 15),), 133.46),
        (55296, ((60, 15),), 282.63),
        (75600, ((60, 15),), 457.11),
        (13440, tuple((n, 0.18 * n) for n in (7, 40, 60)), 40.477),
        (32760, tuple((n, 0.31 * n) for n in (7, 24, 72)), 145.25),
        (55296, tuple((n, 0.19 * n) for n in (8, 48, 72)), 248.73),
        (56160, tuple((n, 0.18 * n) for n in (7, 24, 36)), 248.39),
        (75600, tuple((n, 0.31 * n) for n in (7, 40, 36)), 520.09),
    ],
)
def test_flop_model_reproduces_the_papers_table(tokens, selections, expected):
    flops = transformer_flops(tokens, 1536, 8960, 30, selections=selections) / 1e12
    assert flops == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("select", ["topk", "threshold"])
def test_cpu_path_computes_exactly_the_selected_scores(select, monkeypatch):
    query, key, value = _qkv(heads=3)
    config = VMoBAConfig(select=select, topk=(3, 3, 3), tau=0.3, **ONLY_3D)
    parts = partition(GRID, (2, 3, 3))
    mask = selection.select_pairs(
        parts.permute(query, 2),
        selection.block_means(parts.permute(key, 2), parts.boundaries),
        parts.boundaries,
        select,
        "query_head",
        3,
        0.3,
    )
    expected = int((mask.sum((0, 1, 3)) * parts.sizes).sum())
    seen = []
    original = vmoba_dispatch.attention_with_lse

    def counting(q, k, v, scale=None, mask=None):
        seen.append(q[..., 0].numel() * k.shape[-2])
        return original(q, k, v, scale, mask)

    monkeypatch.setattr(vmoba_dispatch, "attention_with_lse", counting)
    counter = WorkCounter()
    vmoba_attention(query, key, value, GRID, config, 0, counter=counter)
    assert sum(seen) == counter.pairs == expected < counter.dense_pairs == 3 * 144 * 144


def test_empty_selection_is_own_block_unless_parity_asks_for_full():
    query, key, value = _qkv()
    own_only = VMoBAConfig(topk=(1, 1, 1), **ONLY_3D)
    full = VMoBAConfig(topk=(1, 1, 1), empty_selection="full", **ONLY_3D)
    parts = partition(GRID, (2, 3, 3))
    mask = selection.own_block_mask(parts.boundaries).expand(1, 2, -1, -1)
    oracle = masked_oracle(*(parts.permute(t, 2) for t in (query, key, value)), mask, parts, 8**-0.5)
    assert (vmoba_attention(query, key, value, GRID, own_only, 0) - parts.restore(oracle, 2)).abs().max() < 1e-6
    counter = WorkCounter()
    out = vmoba_attention(query, key, value, GRID, full, 0, counter=counter)
    assert (out - _dense(query, key, value)).abs().max() < 1e-6
    assert counter.density == 1.0


def test_foreign_topk_is_independent_of_the_chunk():
    query, key, _ = _qkv(batch=2)
    parts = partition(GRID, (2, 3, 3))
    q, means = parts.permute(query, 2), selection.block_means(parts.permute(key, 2), parts.boundaries)
    whole = selection_chunked.foreign_topk(q, means, parts.block_of_token, 3).sort(-1).values
    chunked = selection_chunked.foreign_topk(q, means, parts.block_of_token, 3, chunk=10).sort(-1).values
    assert torch.equal(whole, chunked)
    mask = selection.select_topk(_gate(query, key, parts), selection.own_block_mask(parts.boundaries), 4)
    from_indices = torch.zeros_like(mask).transpose(-1, -2).scatter(-1, whole, True).transpose(-1, -2)
    assert torch.equal(from_indices | selection.own_block_mask(parts.boundaries), mask)


def test_bad_options_and_grids():
    with pytest.raises(ValueError, match="pools over"):
        VMoBAConfig(select="topk", pool="block")
    with pytest.raises(ValueError, match="topk must have 3 numbers"):
        VMoBAConfig(topk=(2, 2))
    with pytest.raises(ValueError, match="holds 8 tokens"):
        vmoba_attention(*_qkv(), (2, 2, 2), VMoBAConfig(), 0)
    with pytest.raises(ValueError, match="holds no token"):
        partition((2, 2, 2), 0.01)


@pytest.mark.parametrize(
    ("grid", "blocks", "kept"),
    [
        ((21, 30, 52), (7, 24, 72), (2, 6, 18)),
        ((21, 45, 80), (7, 40, 36), (2, 10, 9)),
        ((24, 36, 64), (8, 48, 72), (2, 12, 18)),
        ((36, 30, 52), (12, 24, 36), (3, 6, 9)),
    ],
)
def test_training_free_has_the_papers_blocks_on_its_grids(grid, blocks, kept):
    """Table 4 of the paper; it gives k for the first two grids only, the others are a quarter of the blocks."""
    config = VMoBAConfig.training_free()
    counts = tuple(partition(grid, config.block(grid, kind)).num_blocks for kind in (1, 2, 3))
    assert counts == blocks
    assert tuple(config.kept_blocks(kind, count) for kind, count in zip((1, 2, 3), counts, strict=True)) == kept
    assert VMoBAConfig(block_2d=(2, 2)).block(grid, 2) == (2, 2)

"""AdaSpa's pieces: the spec's worked example and its facts B1 to B7, B10, B12 to B14."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_suite.attention.adaspa import (
    AdaSpaConfig,
    LayerState,
    build_table,
    choose_blocks,
    estimate_speedup,
    head_tiers,
    phase_of,
    recall,
    row_budget,
    search,
)
from dit_suite.attention.block_mass import block_mass
from dit_suite.attention.block_sparse import block_sparse_attention, count_pairs, mask_from_table

HEAD_0 = [
    [0.60, 0.15, 0.08, 0.07, 0.10],
    [0.15, 0.60, 0.07, 0.08, 0.10],
    [0.07, 0.08, 0.60, 0.15, 0.10],
    [0.08, 0.07, 0.15, 0.60, 0.10],
    [0.20] * 5,
]
HEAD_1 = [
    [0.24, 0.20, 0.19, 0.17, 0.20],
    [0.20, 0.24, 0.17, 0.19, 0.20],
    [0.19, 0.17, 0.24, 0.20, 0.20],
    [0.17, 0.19, 0.20, 0.24, 0.20],
    [0.20] * 5,
]


@pytest.fixture
def example():
    """Queries one-hot in their block, keys holding the log weights: 10 tokens, blocks of 2, the last block text."""
    weights = torch.tensor([HEAD_0, HEAD_1], dtype=torch.float64)
    block_of = torch.arange(10) // 2
    query = torch.eye(5, dtype=torch.float64)[block_of].expand(1, 2, 10, 5)
    key = torch.log(weights / 2)[:, :, block_of].transpose(-1, -2)[None]
    value = torch.arange(10, dtype=torch.float64).view(1, 1, 10, 1).expand(1, 2, 10, 1)
    return weights, query, key, value


def _attend(query, key, value, table, counts, block=2):
    return block_sparse_attention(query, key, value.expand(*value.shape[:3], 5), table, counts, block, scale=1.0)[
        ..., 0
    ]


def _qkv(length, dim=16, batch=1, heads=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, length, dim, generator=generator, dtype=dtype) * 1.5 for _ in range(3)]


def _lse(query, key):
    return (query @ key.mT * query.shape[-1] ** -0.5).logsumexp(-1)


def test_worked_example(example):
    weights, query, key, value = example
    lse = (query @ key.mT).logsumexp(-1)
    assert lse.abs().max() < 1e-12
    mass = block_mass(query, key, lse, 2, scale=1.0)
    assert (mass - 2 * weights).abs().max() < 1e-12

    table, counts = build_table(mass, torch.full((1, 2), 0.5), sink_blocks=1)
    assert table[0, :, 0].tolist() == [[0, 1, 4, 0, 0]] * 2
    assert counts[0].tolist() == [[3, 3, 3, 3, 5]] * 2
    before = recall(mass, table, counts)
    assert before[0].tolist() == pytest.approx([0.88, 0.712], abs=1e-6)
    tiers = head_tiers(before, 0.5, 0.8)
    assert tiers[0].tolist() == [0.75, 0.25]
    table, counts = build_table(mass, tiers, sink_blocks=1)
    assert counts.sum().item() == 34
    assert counts.sum(-1)[0].tolist() == [13, 21]
    after = recall(mass, table, counts)
    assert after[0].tolist() == pytest.approx([0.76, 0.864], abs=1e-6)
    assert (before.mean().item(), after.mean().item()) == pytest.approx((0.796, 0.812), abs=1e-6)

    dense = (torch.softmax(query @ key.mT, -1) @ value)[0, :, ::2, 0]
    assert dense[0].tolist() == pytest.approx([2.34, 3.26, 4.76, 5.64, 4.5], abs=1e-6)
    assert dense[1].tolist() == pytest.approx([4.28, 4.40, 4.60, 4.72, 4.5], abs=1e-6)
    sparse = _attend(query, key, value, table, counts)[0, :, ::2]
    assert sparse[0].tolist() == pytest.approx([1.642857, 3.357143, 5.071429, 6.785714, 4.5], abs=1e-6)
    assert sparse[1].tolist() == pytest.approx([3.825301, 4.379518, 5.030120, 5.584337, 4.5], abs=1e-6)


def test_worked_example_with_a_stale_lse(example):
    weights, query, key, _ = example
    lse = torch.zeros(1, 2, 10, dtype=torch.float64)
    lse[0, 0, 0] -= torch.log(torch.tensor(2.0))
    mass = block_mass(query, key, lse, 2, scale=1.0)
    assert mass[0, 0, 0].tolist() == pytest.approx([1.8, 0.45, 0.24, 0.21, 0.30], abs=1e-6)
    tiers = torch.tensor([[0.75, 0.25]])
    fresh, _ = build_table(2 * weights[None], tiers, sink_blocks=1)
    stale, _ = build_table(mass, tiers, sink_blocks=1)
    assert torch.equal(fresh, stale)


def test_worked_example_with_text_kept_apart(example):
    """The plug-in keeps text outside the table; recall and tiers come out the same."""
    weights, query, key, _ = example
    video_q, video_k = query[:, :, :8], key[:, :, :8]
    lse = torch.zeros(1, 2, 8, dtype=torch.float64)
    text = torch.full((1, 2), 4 * 0.2 + 2.0, dtype=torch.float64)
    text[0, 0] = 4 * 2 * 0.1 + 2.0
    text[0, 1] = 4 * 2 * 0.2 + 2.0
    result = search(video_q, video_k, lse, AdaSpaConfig(sparsity=0.5), 2, 1.0, kept_apart=text)
    assert result.recall_before[0].tolist() == pytest.approx([0.88, 0.712], abs=1e-6)
    assert result.recall[0].tolist() == pytest.approx([0.76, 0.864], abs=1e-6)
    assert result.counts[0].tolist() == [[1] * 4, [3] * 4]


@pytest.mark.parametrize(("length", "block"), [(96, 16), (100, 16), (9, 16), (130, 64)])
def test_mass_rows_sum_to_their_tokens(length, block):
    query, key, _ = _qkv(length)
    mass = block_mass(query, key, _lse(query, key), block)
    rows = torch.full((mass.shape[2],), block, dtype=torch.float64)
    rows[-1] = length - (mass.shape[2] - 1) * block
    assert (mass.sum(-1) - rows).abs().max() < 1e-10
    assert (mass.sum((-1, -2)) - length).abs().max() < 1e-9
    low = [t.float() for t in (query, key)]
    assert (block_mass(*low, _lse(*low), block) / mass - 1).abs().max() < 1e-3


@pytest.mark.parametrize("length", [96, 100])
def test_full_budget_and_one_block_equal_dense(length):
    query, key, value = _qkv(length, dtype=torch.float32)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for sparsity, block in ((0.0, 16), (0.9, 128)):
        result = search(query, key, _lse(query, key), AdaSpaConfig(sparsity=sparsity), block, 16**-0.5)
        out = block_sparse_attention(query, key, value, result.table, result.counts, block)
        assert (out - dense).abs().max() < 1e-5
        assert result.recall.min() > 0.999999


def test_no_table_with_the_same_row_budget_has_more_recall():
    query, key, _ = _qkv(6 * 8)
    mass = block_mass(query, key, _lse(query, key), 8)[:, :1, :2]
    table, counts = build_table(mass, torch.full((1, 1), 0.5))
    best = recall(mass, table, counts).item()
    rows = list(itertools.combinations(range(6), 3))
    most = 0.0
    for choice in itertools.product(rows, repeat=2):
        other = torch.tensor(choice, dtype=torch.int32)[None, None]
        most = max(most, recall(mass, other, counts).item())
    assert best == pytest.approx(most, abs=1e-12)
    assert best < 0.999


def test_recall_grows_with_the_budget_and_beats_the_share():
    query, key, _ = _qkv(160)
    mass = block_mass(query, key, _lse(query, key), 16)
    last = torch.zeros(1, 3, dtype=torch.float64)
    for sparsity in (0.9, 0.7, 0.5, 0.3, 0.0):
        table, counts = build_table(mass, torch.full((1, 3), sparsity))
        now = recall(mass, table, counts)
        assert (now >= last).all()
        assert (now >= 1 - sparsity).all()
        last = now
    assert (last - 1).abs().max() < 1e-12


def test_row_budget_survives_floating_point():
    assert row_budget(0.7, 10) == 3
    assert row_budget(0.8, 64) == 13
    assert row_budget(1.0, 10) == 1
    assert row_budget(0.0, 10) == 10
    assert row_budget(0.5, 5) == 3


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.8, 0.9])
def test_head_tiers(sparsity):
    recalls = torch.tensor([[0.5, 0.95, 0.7, 0.85, 0.6, 0.1], [0.9] * 6, [0.1] * 6])
    tiers = head_tiers(recalls, sparsity)
    high, low = (1 + sparsity) / 2, (3 * sparsity - 1) / 2
    assert tiers[0].tolist() == pytest.approx([low, high, sparsity, high, sparsity, low])
    assert tiers[1].tolist() == pytest.approx([high] * 3 + [low] * 3)  # n is capped at half, ties by head number
    assert tiers[2].tolist() == [sparsity] * 6
    assert tiers.mean(1).tolist() == pytest.approx([sparsity] * 3)
    assert head_tiers(recalls, 0.2)[0].tolist() == pytest.approx([0.0, 0.4, 0.2, 0.4, 0.2, 0.0])
    assert head_tiers(recalls, 0.0).abs().max() == 0.0
    assert head_tiers(torch.tensor([[0.9]]), sparsity).tolist() == [[sparsity]]


def test_rows_are_uniform_and_text_is_a_sink():
    query, key, _ = _qkv(112)
    mass = block_mass(query, key, _lse(query, key), 16)
    table, counts = build_table(mass, torch.tensor([[0.9, 0.5, 0.0]]), sink_blocks=2)
    mask = mask_from_table(table, counts, 7)
    assert counts[0, :, :5].tolist() == [[3] * 5, [5] * 5, [7] * 5]
    assert mask[:, :, 5:].all()
    assert mask[..., 5:].all()


def test_budget_over_the_head_leaves_no_row_empty_and_keeps_more():
    query, key, _ = _qkv(160)
    query[:, :, :32] *= 4
    mass = block_mass(query, key, _lse(query, key), 16)
    sparsity = torch.full((1, 3), 0.8)
    even, even_counts = build_table(mass, sparsity)
    free, free_counts = build_table(mass, sparsity, row_wise=False)
    assert free_counts.min() == 1
    assert free_counts.sum() == even_counts.sum() == 3 * 10 * 2
    assert free_counts.unique().numel() > 1
    assert (recall(mass, free, free_counts) >= recall(mass, even, even_counts)).all()


def test_keep_diagonal():
    query, key, _ = _qkv(96)
    mass = block_mass(query, key, _lse(query, key), 16)
    config = AdaSpaConfig(sparsity=0.8, keep_diagonal=True, head_adaptive=False)
    result = choose_blocks(mass, config)
    mask = mask_from_table(result.table, result.counts, 6)
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    assert result.counts.unique().tolist() == [2]


def test_a_stale_lse_shifted_per_block_gives_the_same_table():
    query, key, _ = _qkv(96)
    lse = _lse(query, key)
    mass = block_mass(query, key, lse, 16)
    shifted = lse + torch.linspace(-1, 1, 6, dtype=torch.float64).repeat_interleave(16)
    for sparsity in (0.5, 0.8):
        tables = [build_table(m, torch.full((1, 3), sparsity)) for m in (mass, block_mass(query, key, shifted, 16))]
        assert torch.equal(tables[0][0], tables[1][0])


def test_steps_of_a_run():
    config = AdaSpaConfig()
    assert config.searches(50) == (9, 29)
    assert AdaSpaConfig(search_steps=(9, 29)).searches(0) == (9, 29)
    assert AdaSpaConfig(search_steps=(0, 0.6)).searches(50) == (0, 29)
    assert AdaSpaConfig(dense_steps=5).searches(50) == (4, 29)
    with pytest.raises(ValueError, match="number of steps is unknown"):
        config.searches(0)
    state, phases = LayerState(), []
    for step in (0, 1, 2, 3, 5, 6, 7):  # step 4, a search step, was skipped by a step cache
        phase = phase_of(state, step, (2, 4))
        phases.append(phase)
        if phase in ("fused", "cached"):
            state.result, state.searches_done, state.last_step = object(), sum(s <= step for s in (2, 4)), step
    assert phases == ["dense", "dense", "fused", "sparse", "cached", "sparse", "sparse"]


def test_bad_options():
    for bad, sentence in (
        ({"sparsity": 1.4}, "sparsity must be between 0 and 1, got 1.4"),
        ({"search_steps": ()}, "at least one step"),
        ({"search_steps": (2.5,)}, "whole step numbers"),
        ({"tile": (4, 4)}, "tile must have 3 numbers"),
        ({"backend": "magic"}, "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            AdaSpaConfig(**bad)
    query, key, _ = _qkv(32)
    with pytest.raises(ValueError, match="impl must be one of"):
        block_mass(query, key, _lse(query, key), 16, impl="fast")
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        block_mass(query, key, _lse(query, key), 16, impl="triton")


def test_speed_bound_of_the_paper_setting():
    assert estimate_speedup(500 / 600, 10 / 50, 0.2) == pytest.approx(1 / 0.4667, rel=1e-3)
    assert estimate_speedup(500 / 600, 10 / 50, 0.2, 0.05) == pytest.approx(1.94, abs=0.01)
    assert estimate_speedup(1.0, 0.0, 1.0) == 1.0


_INTERPRETED = """
import torch
from dit_suite.attention.block_mass import block_mass
for q_len, k_len, dim, block in ((70, 70, 16, 32), (32, 50, 24, 16), (9, 9, 12, 16)):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, n, dim, generator=generator) for n in (q_len, k_len))
    lse = (query @ key.mT * dim**-0.5).logsumexp(-1)
    kernel = block_mass(query, key, lse, block, impl="triton")
    plain = block_mass(query, key, lse, block, impl="chunked")
    assert kernel.shape == plain.shape
    assert (kernel / plain - 1).abs().max() < 1e-4, (kernel, plain)
    assert (kernel.sum((-1, -2)) - q_len).abs().max() < 1e-3
print("same")
"""


def test_triton_search_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _INTERPRETED], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert run.stdout.strip() == "same", run.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dim", [64, 128])
def test_triton_search_kernel_on_cuda(dim):
    query, key, _ = (t.to("cuda", torch.bfloat16) for t in _qkv(1000, dim=dim))
    lse = _lse(query.float(), key.float())
    kernel = block_mass(query, key, lse, 64, impl="triton")
    plain = block_mass(query.float(), key.float(), lse, 64, impl="chunked")
    assert (kernel - plain).abs().max() / plain.max() < 1e-2


class _NoFloat64(TorchDispatchMode):
    """Apple's GPUs have no float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            raise TypeError(f"{func} made a float64 tensor")
        return out


@pytest.mark.parametrize("row_wise", [True, False])
def test_tables_are_made_without_float64(row_wise):
    mass = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    with _NoFloat64():
        table, counts = build_table(mass, torch.full((1, 2), 0.5), row_wise=row_wise)
        # 3 of 6 blocks of 8 tokens in each of 6 rows and 2 heads, whichever they are
        assert count_pairs(table, counts, 48, 48, 8) == 3 * 6 * 2 * 64

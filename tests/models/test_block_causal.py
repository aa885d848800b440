"""Patterns, attention backends, rotary positions and the key-value cache."""

import pytest
import torch

from dit_suite.models.block_causal import (
    BlockPattern,
    attend,
    block_causal_pattern,
    fused_pattern,
    rope_tables,
    rotate,
    skip_causal_pattern,
    split_head_dim,
)
from dit_suite.models.kv_cache import BlockKVCache


def _heads(query_tokens: int, key_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(2, 3, n, 16, generator=generator) for n in (query_tokens, key_tokens, key_tokens)]
    return draw[0], draw[1], draw[2]


def test_skip_causal_counts_and_row_sums():
    for blocks, size in ((1, 4), (3, 2), (4, 4)):
        mask = skip_causal_pattern(blocks, size).dense()
        assert int(mask.sum()) == (blocks**2 + blocks) * size**2
        sums = mask.sum(1).reshape(2 * blocks, size)
        expected = torch.tensor([(i % blocks + 1) * size for i in range(2 * blocks)])
        assert torch.equal(sums, expected[:, None].expand(-1, size))
        assert int(skip_causal_pattern(blocks, size, drop_last_clean=True).dense().sum()) == (blocks * size) ** 2


def test_block_causal_limits_and_count():
    """N1: one frame is full attention, one token a frame is causal, n^2 F(F+1)/2 entries in general."""
    assert block_causal_pattern(1, 5).dense().all()
    assert torch.equal(block_causal_pattern(6, 1).dense(), torch.ones(6, 6).tril().bool())
    assert int(block_causal_pattern(4, 3).dense().sum()) == 9 * 4 * 5 // 2


def test_window_limits_how_far_back_a_block_reads():
    rows = block_causal_pattern(5, 1, window=2).rows
    assert rows == ((0,), (0, 1), (1, 2), (2, 3), (3, 4))
    assert block_causal_pattern(2, 1, window=3, num_past=3).rows == ((1, 2, 3), (2, 3, 4))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("backend", ["index", "flex"])
@pytest.mark.parametrize(
    "pattern",
    [
        skip_causal_pattern(3, 4),
        skip_causal_pattern(4, 4, True),
        block_causal_pattern(5, 3, window=2),
        fused_pattern(3, 2, 4),
    ],
    ids=["skip", "skip-short", "window", "fused"],
)
def test_backends_agree_with_the_dense_mask(pattern: BlockPattern, backend: str):
    size = pattern.block_size
    q, k, v = _heads(len(pattern.rows) * size, pattern.num_key_blocks * size)
    torch.testing.assert_close(attend(q, k, v, pattern, backend), attend(q, k, v, pattern, "dense"), atol=1e-5, rtol=0)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of"):
        attend(*_heads(4, 4), block_causal_pattern(1, 4), "fast")


def test_axial_rope_is_relative_and_keeps_norms_while_the_reference_form_does_not():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 1, 1, 32, generator=generator), torch.randn(1, 1, 1, 32, generator=generator)

    def score(style: str, shift: int) -> torch.Tensor:
        tables = [
            rope_tables(torch.tensor([[row + shift], [column]]), (16, 16), (100.0, 100.0), style)
            for row, column in ((2, 5), (4, 1))
        ]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    axial = torch.stack([score("axial", shift) for shift in (0, 3, 7)])
    reference = torch.stack([score("reference", shift) for shift in (0, 3, 7)])
    assert float(axial.max() - axial.min()) < 1e-4
    assert float(reference.max() - reference.min()) > 0.1
    tables = rope_tables(torch.tensor([[3], [9]]), (16, 16), (100.0, 100.0), "axial")
    torch.testing.assert_close(rotate(q, tables).norm(), q.norm(), atol=1e-5, rtol=0)


def test_scores_stay_relative_after_ten_million_frames():
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(1, 1, 1, 16, generator=generator), torch.randn(1, 1, 1, 16, generator=generator)

    def score(frame: int) -> float:
        near, far = (rope_tables(torch.tensor([[f]]), (16,), (256.0,), "axial") for f in (frame, frame + 3))
        return float((rotate(q, near) * rotate(k, far)).sum())

    assert abs(score(10_000_000) - score(0)) < 1e-3


def test_head_split_follows_the_proportions():
    assert split_head_dim(64, (1, 1)) == (32, 32)
    assert split_head_dim(64, (2, 3, 3)) == (16, 24, 24)
    with pytest.raises(ValueError, match="cannot be split"):
        split_head_dim(62, (2, 3, 3))


def _filled(cache: BlockKVCache, blocks: range) -> None:
    shape = (cache.batch_size, cache.buffer.shape[3], cache.block_size, cache.buffer.shape[5])
    for block in blocks:
        for layer in range(cache.num_layers):
            cache.write(layer, torch.full(shape, float(block)), torch.full(shape, -float(block)))
        cache.advance(1)


def test_cache_reads_in_order_across_the_wrap():
    cache = BlockKVCache(2, 1, 1, 2, block_size=2, num_slots=4)
    _filled(cache, range(6))
    parts = cache.read(1, 2, 6)
    keys = torch.cat([k for k, _ in parts], dim=2)[0, 0, :, 0]
    values = torch.cat([v for _, v in parts], dim=2)[0, 0, :, 0]
    assert keys.tolist() == [2, 2, 3, 3, 4, 4, 5, 5]
    assert torch.equal(values, -keys)
    with pytest.raises(IndexError, match="2..5 are kept"):
        cache.read(0, 1, 6)


def test_writing_ahead_leaves_the_readable_window_untouched_and_truncate_hides_it():
    """A ring of window + draft slots: two blocks written ahead and rolled back change nothing that can be read."""
    cache = BlockKVCache(1, 1, 1, 2, block_size=2, num_slots=3 + 2)
    _filled(cache, range(7))
    before = [k.clone() for k, _ in cache.read(0, 4, 7)]
    _filled(cache, range(90, 92))
    cache.truncate(7)
    after = [k for k, _ in cache.read(0, 4, 7)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(IndexError):
        cache.read(0, 4, 8)
    with pytest.raises(IndexError):
        cache.read(0, 3, 7)
    with pytest.raises(ValueError, match="cannot be rolled back to 8"):
        cache.truncate(8)
    with pytest.raises(ValueError, match="must be positive"):
        BlockKVCache(1, 0, 1, 2, 2, 2)

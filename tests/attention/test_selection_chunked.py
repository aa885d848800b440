"""Selection over chunks of half-precision scores against the sort, mask for mask.

Queries and means are small whole numbers: their products are exact in float32, so that a chunk has the scores of the
whole, and many scores are equal.
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_suite.attention import compiling, selection, selection_chunked
from dit_suite.attention.partition import partition
from dit_suite.attention.vmoba import VMoBAConfig, masked_oracle, vmoba_attention

GRID = (5, 6, 7)
RAGGED = partition(GRID, (2, 4, 4))  # 12 blocks of 6 to 32 tokens
THRESHOLD = [("threshold", pool) for pool in selection.POOLS]
TOPK = [("topk", "head_global"), ("topk", "overall")]


def _whole_numbers(largest, dtype=torch.bfloat16, batch=2, heads=3, parts=RAGGED, dim=8, device="cpu"):
    """Queries `(batch, heads, tokens, dim)` and means `(batch, heads, blocks, dim)`."""
    generator = torch.Generator().manual_seed(largest)
    shapes = ((batch, heads, parts.num_tokens, dim), (batch, heads, parts.num_blocks, dim))
    return [torch.randint(-largest, largest + 1, shape, generator=generator).to(device, dtype) for shape in shapes]


def _by_sorting(query, means, parts, mode, pool, k, tau):
    """Foreign pairs of the slow reference on the same scores, all samples and tokens at once."""
    own = selection.own_block_mask(parts.boundaries).to(query.device)
    gate = selection.block_gate(query, means).float()
    if mode == "topk":
        return selection.select_topk(gate, own, k, pool) & ~own
    return selection.select_threshold(gate, own, tau, pool) & ~own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_have_the_order_of_the_scores(dtype):
    scores = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    scores = scores[scores.isfinite()].sort().values
    keys = selection_chunked.order_keys(scores)
    assert torch.equal(keys.diff() > 0, scores.float().diff() > 0)
    assert (keys.diff() == 0).sum() == 1 and keys.min() > 0 and keys.max() < 1 << 16  # only 0.0 and -0.0 share one
    assert torch.equal(selection_chunked.key_scores(dtype, scores.device)[keys], scores.float())


@pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize(("mode", "pool"), THRESHOLD)
def test_threshold_keeps_what_sorting_keeps(mode, pool, tau):
    for largest, dtype in ((1, torch.bfloat16), (60, torch.bfloat16), (40, torch.float16)):
        query, means = _whole_numbers(largest, dtype)
        expected = _by_sorting(query, means, RAGGED, mode, pool, 1, tau)
        for chunk in (13, 8192):
            mask = selection_chunked.foreign_mask(query, means, RAGGED.block_of_token, mode, pool, 1, tau, chunk)
            assert torch.equal(mask, expected)
        pools = selection.to_pools(expected, pool)[0][..., 0].numel()
        everything = 2 * 3 * 210 * 11
        assert {0.0: pools, 1.0: everything}.get(tau, int(expected.sum())) == expected.sum() <= everything


@pytest.mark.parametrize("k", [1, 2, 5, 11, 12, 99])
@pytest.mark.parametrize(("mode", "pool"), TOPK)
def test_topk_of_wide_pools_keeps_what_sorting_keeps(mode, pool, k):
    for largest, dtype in ((1, torch.bfloat16), (60, torch.bfloat16), (40, torch.float16)):
        query, means = _whole_numbers(largest, dtype)
        expected = _by_sorting(query, means, RAGGED, mode, pool, k, 0.0)
        for chunk in (13, 8192):
            mask = selection_chunked.foreign_mask(query, means, RAGGED.block_of_token, mode, pool, k, 0.0, chunk)
            assert torch.equal(mask, expected)
        assert mask.sum((1, 2, 3)).tolist() == [(min(k, 12) - 1) * 3 * 210] * 2


@pytest.mark.parametrize(("mode", "pool"), THRESHOLD + TOPK)
def test_equal_scores_are_given_out_in_order(mode, pool):
    """All scores equal: what is kept lies first in the pool, whichever chunk it is in."""
    query, means = _whole_numbers(1)
    mask = selection_chunked.foreign_mask(query * 0, means, RAGGED.block_of_token, mode, pool, 3, 0.3, chunk=13)
    foreign = ~selection.own_block_mask(RAGGED.boundaries).expand_as(mask)
    budget = 2 * 210 * (3 if pool == "overall" else 1)
    if mode == "threshold":  # no similarity at all: the sum is never reached, and at tau 0 at once
        assert torch.equal(mask, foreign)
        mask = selection_chunked.foreign_mask(query * 0, means, RAGGED.block_of_token, mode, pool, 3, 0.0, chunk=13)
        budget = 1
    kept, _ = selection.to_pools(mask, pool)
    candidates, _ = selection.to_pools(foreign, pool)
    assert torch.equal(kept, candidates & (candidates.cumsum(-1) <= budget))


def test_two_levels_of_equal_scores_by_hand():
    """One head, two blocks of two tokens: queries 1 0 1 1 score the same with both blocks, own pairs sum to 3 of 6."""
    parts = partition((1, 1, 4), 0.5)
    query = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.bfloat16).view(1, 1, 4, 1)
    means = torch.ones(1, 1, 2, 1, dtype=torch.bfloat16)
    # 0.6 of 6 needs 0.6 more: the first foreign pair of score 1; 0.9 needs 2.4 more: all three
    mask = selection_chunked.foreign_mask(query, means, parts.block_of_token, "threshold", "head_global", 1, 0.6)
    assert mask[0, 0].int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    mask = selection_chunked.foreign_mask(query, means, parts.block_of_token, "threshold", "head_global", 1, 0.9)
    assert mask[0, 0].int().tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]


def test_one_block_has_no_foreign_pair():
    parts = partition(GRID, GRID)
    query, means = _whole_numbers(3, parts=parts)
    for mode, pool in THRESHOLD + TOPK:
        assert not selection_chunked.foreign_mask(query, means, parts.block_of_token, mode, pool, 1, 0.5).any()


def test_a_sample_is_selected_alone():
    query, means = _whole_numbers(60)
    for mode, pool in THRESHOLD + TOPK:
        select = functools.partial(selection_chunked.foreign_mask, own=RAGGED.block_of_token, mode=mode, pool=pool)
        both = select(query, means, k=4, tau=0.3)
        assert torch.equal(both[1:], select(query[1:], means[1:], k=4, tau=0.3))


@pytest.mark.parametrize(("mode", "pool"), [*THRESHOLD, *TOPK, ("topk", "query_head")])
def test_every_step_compiles_as_one_graph(mode, pool, monkeypatch):
    def run(function, *args):
        return torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager")(*args)

    query, means = _whole_numbers(60)
    expected = _by_sorting(query, means, RAGGED, mode, pool, 4, 0.3)
    monkeypatch.setattr(selection_chunked, "run_compiled", run)
    torch._dynamo.reset()
    if pool == "query_head" and mode == "topk":
        chosen = selection_chunked.foreign_topk(query, means, RAGGED.block_of_token, 3, chunk=105, compiled=True)
        mask = torch.zeros_like(expected).transpose(-1, -2).scatter(-1, chosen, True).transpose(-1, -2)
        gate = selection.block_gate(query, means).float()  # equal scores: any of them will do
        assert torch.equal((gate * mask).sum(-2), (gate * expected).sum(-2)) and (mask.sum(-2) == 3).all()
    else:
        mask = selection_chunked.foreign_mask(
            query, means, RAGGED.block_of_token, mode, pool, 4, 0.3, chunk=105, compiled=True
        )
        assert torch.equal(mask, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranks_are_those_of_a_stable_sort(dtype):
    """Best first, of equal scores the lower block; 0.0 and -0.0 are equal, and a score of no number costs no slot."""
    own = RAGGED.block_of_token
    for largest in (1, 60):
        query, means = _whole_numbers(largest, dtype)
        query[0, 0, :50] *= -0.0
        scores = selection.block_gate(query, means).float().transpose(-1, -2)
        scores = scores.masked_fill(own[:, None] == torch.arange(12), float("-inf"))
        best = scores.sort(dim=-1, descending=True, stable=True).indices
        for k in (1, 3, 11):
            assert torch.equal(selection_chunked._rank_chunk(query, means, own, k), best[..., :k])
            chosen = selection_chunked.foreign_topk(query, means, own, k, chunk=13, compiled=False)
            assert torch.equal(
                scores.gather(-1, chosen).sort(dim=-1, descending=True).values, scores.gather(-1, best)[..., :k]
            )
    query[1] = float("nan")
    chosen = selection_chunked._rank_chunk(query, means, own, 11).sort(dim=-1).values
    assert torch.equal(chosen[1], best[0, :1, :, :11].sort(dim=-1).values.expand(3, -1, -1))


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor made, by element size; masks of one byte and stored scores of two apart."""

    def __init__(self):
        super().__init__()
        self.wide = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.element_size() > 2:
                self.wide = max(self.wide, tensor.numel())
        return out


@pytest.mark.parametrize(("mode", "pool"), THRESHOLD + TOPK)
def test_no_wide_number_is_held_for_every_pair(mode, pool):
    """What takes four bytes or more is made for one chunk at a time; counts do not grow with the tokens."""
    seen = []
    for frames in (4, 32):
        parts = partition((frames, 40, 40), (frames, 8, 8))
        query, means = _whole_numbers(2, batch=1, heads=2, parts=parts, dim=4)
        with _Largest() as largest:
            selection_chunked.foreign_mask(query, means, parts.block_of_token, mode, pool, 4, 0.3, chunk=1600)
        seen.append(largest.wide)
    pairs = 2 * 25 * 32 * 1600
    counts = 2 * (1 << 16) * {"query_head": 0, "head_global": 2, "overall": 1, "block": 25}[pool]
    assert seen[0] == seen[1] <= max(counts, 2 * 25 * 1600) < 2 * pairs


@pytest.mark.parametrize(("mode", "pool"), THRESHOLD + TOPK)
def test_attention_over_the_chunked_selection_equals_the_oracle(mode, pool, monkeypatch):
    """The route that CUDA takes in half precision, with its steps run plainly."""
    monkeypatch.setattr(selection_chunked, "chunked_unavailable", lambda query: None)
    monkeypatch.setattr(selection_chunked, "run_compiled", lambda function, *args: function(*args))
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, 3, 210, 8, generator=generator).bfloat16() for _ in range(3))
    config = VMoBAConfig(select=mode, pool=pool, topk=(4, 4, 4), tau=0.3, cycle=(0, 0, 1), block_3d=(2, 4, 4))
    q, k, v = (RAGGED.permute(t, 2) for t in (query, key, value))
    means = selection.block_means(k, RAGGED.boundaries).bfloat16()
    own = selection.own_block_mask(RAGGED.boundaries)
    mask = _by_sorting(q, means, RAGGED, mode, pool, 4, 0.3) | own
    oracle = RAGGED.restore(masked_oracle(q.float(), k.float(), v.float(), mask, RAGGED, 8**-0.5), 2)
    out = vmoba_attention(query, key, value, GRID, config, 0)
    assert (out.float() - oracle).abs().max() < 0.02  # bfloat16 rounding of values up to 4
    other = mask.roll(1, dims=-1) | own
    moved = RAGGED.restore(masked_oracle(q.float(), k.float(), v.float(), other, RAGGED, 8**-0.5), 2)
    assert (moved - oracle).abs().max() > 0.2


def test_where_the_compiled_selection_runs():
    query, means = _whole_numbers(2)
    assert selection_chunked.chunked_unavailable(query) == "the queries are on cpu"
    with pytest.raises(ValueError, match="takes float16 or bfloat16 queries, got torch.float32"):
        selection_chunked.foreign_mask(query.float(), means, RAGGED.block_of_token, "threshold", "block", 1, 0.5)
    with pytest.raises(ValueError, match="head_global or overall, got 'query_head'"):
        selection_chunked.foreign_mask(query, means, RAGGED.block_of_token, "topk", "query_head", 2, 0.5)
    with torch._dynamo.config.patch(disable=True):
        assert compiling.compiler_missing() is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("block", [(2, 8, 8), (3, 8, 10), (1, 8, 8)])
def test_compiled_topk_of_each_query_on_a_gpu(block):
    """100 and 60 blocks by counting, 200 by torch's top-k. Written without a GPU at hand; it has never run."""
    parts = partition((8, 40, 40), block)
    query, means = _whole_numbers(6, parts=parts, dim=64, device="cuda")
    own = parts.block_of_token.cuda()
    chosen = selection_chunked.foreign_topk(query, means, own, 9, chunk=5000, compiled=True)
    scores = selection.block_gate(query, means).float().transpose(-1, -2)
    scores = scores.masked_fill(own[:, None] == torch.arange(parts.num_blocks, device="cuda"), float("-inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :9]
    if parts.num_blocks <= 128:
        assert torch.equal(chosen, best)
    chosen = chosen.sort(dim=-1).values
    assert (chosen.diff() > 0).all()
    assert torch.equal(scores.gather(-1, chosen).sort(dim=-1).values, scores.gather(-1, best).sort(dim=-1).values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("mode", "pool"), THRESHOLD + TOPK)
def test_compiled_selection_on_a_gpu(mode, pool):
    parts = partition((8, 40, 40), (2, 8, 8))
    query, means = _whole_numbers(6, parts=parts, dim=64, device="cuda")
    assert selection_chunked.chunked_unavailable(query) is None
    own = parts.block_of_token.cuda()
    mask = selection_chunked.foreign_mask(query, means, own, mode, pool, 6, 0.3, chunk=5000, compiled=True)
    assert torch.equal(mask, _by_sorting(query, means, parts, mode, pool, 6, 0.3))

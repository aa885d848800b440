"""Every backend of block_sparse_attention against the dense-mask oracle, and what `auto` chooses."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_suite.attention import backend_flash4, backend_flex, compiling
from dit_suite.attention.block_sparse import (
    WorkCounter,
    block_count,
    block_sparse_attention,
    choose_backend,
    count_pairs,
    mask_from_table,
    table_from_mask,
)
from dit_suite.attention.merge import attention_with_lse, flash_takes, merge_by_lse

gpu = pytest.mark.gpu


def _tensors(batch, heads, q_len, k_len, dim, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, q_len, dim), (batch, heads, k_len, dim), (batch, heads, k_len, dim)]
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def _random_table(batch, heads, q_len, k_len, block, density, seed=0, empty_row=False):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = block_count(q_len, block), block_count(k_len, block)
    mask = torch.rand(batch, heads, rows, columns, generator=generator) < density
    if empty_row:
        mask[:, :, 0] = False
    return (*table_from_mask(mask), mask)


def _oracle(query, key, value, mask, block, scale):
    mask = mask.repeat_interleave(block, -2)[:, :, : query.shape[2]]
    mask = mask.repeat_interleave(block, -1)[..., : key.shape[2]]
    scores = (query.double() @ key.double().mT) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights @ value.double(), torch.logsumexp(scores, -1)


class _CountScores(TorchDispatchMode):
    """Counts the query-key scores that attention kernels really compute."""

    def __init__(self):
        super().__init__()
        self.pairs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            query, key = args[0], args[1]
            self.pairs += query[..., 0].numel() * key.shape[-2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dim", [12, 32, 64, 96, 128])
@pytest.mark.parametrize(("q_len", "k_len", "block"), [(64, 64, 16), (70, 70, 16), (50, 83, 32), (9, 9, 16)])
def test_grouped_equals_oracle_on_ragged_lengths_and_empty_rows(dim, q_len, k_len, block):
    query, key, value = _tensors(2, 3, q_len, k_len, dim)
    table, counts, mask = _random_table(2, 3, q_len, k_len, block, 0.4, empty_row=q_len > block)
    mask[0, 0, -1, -1] = True
    table, counts = table_from_mask(mask)
    expected, expected_lse = _oracle(query, key, value, mask, block, dim**-0.5)
    for backend in ("grouped", "dense_mask"):
        out, lse = block_sparse_attention(query, key, value, table, counts, block, backend=backend, return_lse=True)
        assert (out - expected).abs().max() < 2e-6
        empty = expected_lse.isinf()
        assert empty.any() or q_len <= block
        assert torch.equal(lse.isinf(), empty)
        assert (lse[~empty] - expected_lse[~empty]).abs().max() < 2e-6
        assert out[empty].abs().sum() == 0


def test_full_table_equals_dense_and_one_block_does_not():
    query, key, value = _tensors(1, 2, 100, 100, 16)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    full = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    out = block_sparse_attention(query, key, value, *table_from_mask(full), 32)
    assert (out - dense).abs().max() < 1e-6
    one = torch.eye(4, dtype=torch.bool).expand(1, 2, 4, 4)
    sparse = block_sparse_attention(query, key, value, *table_from_mask(one), 32)
    assert (sparse - dense).abs().max() > 0.05


@pytest.mark.parametrize("length", [64, 70])
@pytest.mark.parametrize("backend", ["grouped", "dense_mask"])
@pytest.mark.parametrize("heads_inside", [True, False])
def test_blocks_of_another_order_equal_permuting_by_hand(length, backend, heads_inside):
    """Whatever the memory layout, with a gradient or without."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(5))
    plain = _tensors(2, 3, length, length, 8)
    table, counts, mask = _random_table(2, 3, length, length, 16, 0.5, empty_row=True)
    table, counts = table_from_mask(mask)
    expected, expected_lse = _oracle(*(t[:, :, order] for t in plain), mask, 16, 8**-0.5)
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) if heads_inside else t for t in plain]
    for needs_grad in (False, True):
        given = [t.clone().requires_grad_(needs_grad) for t in tensors]
        assert given[0].is_contiguous() != heads_inside
        out, lse = block_sparse_attention(*given, table, counts, 16, backend=backend, order=order, return_lse=True)
        assert (out[:, :, order] - expected).abs().max() < 2e-6
        finite = expected_lse.isfinite()
        assert not finite.all()
        assert (lse[:, :, order] - expected_lse)[finite].abs().max() < 2e-6
        assert lse[:, :, order][~finite].isinf().all()


def test_an_order_that_is_not_one_number_per_token_is_refused():
    query, key, value = _tensors(1, 1, 32, 32, 8)
    table, counts, _ = _random_table(1, 1, 32, 32, 16, 0.5)
    with pytest.raises(ValueError, match="order must name each of the 32 tokens"):
        block_sparse_attention(query, key, value, table, counts, 16, order=torch.arange(16))


def test_table_and_mask_are_inverse():
    table, counts, mask = _random_table(2, 2, 90, 130, 16, 0.3, empty_row=True)
    assert torch.equal(mask_from_table(table, counts, mask.shape[-1]), mask)
    used = torch.arange(table.shape[-1]) < counts[..., None]
    steps = table.diff(dim=-1)[used[..., 1:]]
    assert (steps > 0).all()


@pytest.mark.parametrize("length", [128, 120])
def test_grouped_computes_exactly_the_listed_scores(length):
    query, key, value = _tensors(1, 2, length, length, 16)
    table, counts, mask = _random_table(1, 2, length, length, 32, 0.4)
    sizes = torch.tensor([32, 32, 32, length - 96])
    expected = int((mask * sizes[:, None] * sizes[None, :]).sum())
    assert 0 < expected < 2 * length * length
    counter = WorkCounter()
    with _CountScores() as seen:
        block_sparse_attention(query, key, value, table, counts, 32, backend="grouped", counter=counter)
    assert seen.pairs == expected
    assert counter.pairs == expected == count_pairs(table, counts, length, length, 32)
    assert counter.density == pytest.approx(expected / (2 * length * length))
    assert counter.backend == "grouped"


@pytest.mark.parametrize("backend", ["grouped", "dense_mask"])
def test_gradients_equal_masked_autograd(backend):
    tensors = [t.double().requires_grad_() for t in _tensors(1, 2, 70, 70, 8)]
    table, counts, mask = _random_table(1, 2, 70, 70, 16, 0.5)
    upstream = torch.randn(1, 2, 70, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out = block_sparse_attention(*tensors, table, counts, 16, backend=backend)
    actual = torch.autograd.grad((out * upstream).sum(), tensors)
    expected_out, _ = _oracle(*tensors, mask, 16, 8**-0.5)
    expected = torch.autograd.grad((expected_out * upstream).sum(), tensors)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() < 1e-10


def test_bfloat16_stays_close():
    query, key, value = _tensors(1, 2, 96, 96, 32, dtype=torch.bfloat16)
    table, counts, mask = _random_table(1, 2, 96, 96, 32, 0.6)
    out = block_sparse_attention(query, key, value, table, counts, 32)
    expected, _ = _oracle(query, key, value, mask, 32, 32**-0.5)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 2e-2


def test_merge_by_lse_joins_disjoint_keys():
    query, key, value = _tensors(1, 2, 20, 50, 8)
    whole, lse = attention_with_lse(query, key, value)
    parts = [attention_with_lse(query, key[:, :, a:b], value[:, :, a:b]) for a, b in ((0, 11), (11, 50))]
    merged, merged_lse = merge_by_lse([p[0] for p in parts], [p[1] for p in parts])
    assert (merged - whole).abs().max() < 1e-6
    assert (merged_lse - lse).abs().max() < 1e-6
    nothing = torch.zeros(1, 1, 1, 20, 50, dtype=torch.bool)[0]
    masked, empty = attention_with_lse(query, key, value, mask=nothing)
    assert masked.abs().max() == 0
    assert empty.isinf().all()


def test_cuda_flash_attention_is_left_out_where_it_would_fail(monkeypatch):
    """Turing and older, float32, odd or long heads and AMD take the two products (or VMoBA's loop) instead."""

    def takes(dim=64, dtype=torch.bfloat16, device="cuda", capability=(9, 0), hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        return flash_takes(SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 2, 5, dim)))

    assert takes() and takes(256, torch.float16, capability=(8, 0))
    assert not takes(capability=(7, 5)) and not takes(dtype=torch.float32) and not takes(hip="6.4")
    assert not takes(dim=12) and not takes(dim=264) and not takes(device="cpu")


def test_auto_on_cpu_is_grouped_and_says_why():
    query, key, _ = _tensors(1, 1, 32, 32, 16)
    choice = choose_backend(query, key, 16)
    assert choice.name == "grouped"
    assert [name for name, _ in choice.passed_over] == ["flash4", "flex"]
    assert all(reason for _, reason in choice.passed_over)


def test_bad_input_is_one_sentence():
    query, key, value = _tensors(1, 1, 32, 32, 16)
    table, counts, _ = _random_table(1, 1, 32, 32, 16, 1.0)
    with pytest.raises(ValueError, match="backend must be auto or one of"):
        block_sparse_attention(query, key, value, table, counts, 16, backend="fast")
    with pytest.raises(ValueError, match="flash-attn-4 runs on CUDA"):
        block_sparse_attention(query, key, value, table, counts, 16, backend="flash4")
    with pytest.raises(ValueError, match="int32"):
        block_sparse_attention(query, key, value, table.long(), counts, 16)
    with pytest.raises(ValueError, match="block_table must be"):
        block_sparse_attention(query, key, value, table, counts, 8)
    with pytest.raises(ValueError, match="no backward on CPU"):
        block_sparse_attention(query.requires_grad_(), key, value, table, counts, 16, backend="flex")


def test_flex_is_refused_where_torch_does_not_compile():
    query, key, value = _tensors(1, 1, 32, 32, 16)
    table, counts, _ = _random_table(1, 1, 32, 32, 16, 0.5)
    assert not compiling.compilation_is_off()
    assert not torch.compiler.disable(compiling.compilation_is_off)()  # how the plug-in's backend is called
    for off in (torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(disable=True)):
        with off:
            with pytest.raises(ValueError, match="compilation is switched off"):
                block_sparse_attention(query, key, value, table, counts, 16, backend="flex")
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="ignores block tables"):
        backend_flex.flex_attention_tables(query, key, value, table, counts, 16, 1.0, return_lse=False)
    torch._dynamo.reset()


def test_flex_never_turns_eager_after_many_variants(monkeypatch):
    """Torch gives up on a function after 8 variants and runs it eagerly, which here would be dense attention."""
    compiled = torch.compile(backend_flex._flex, dynamic=False, fullgraph=True, backend="eager")
    monkeypatch.setattr(compiling, "_compiled", lambda function: compiled)

    def run(length):
        query, key, value = _tensors(1, 1, length, length, 16)
        table, counts, _ = _random_table(1, 1, length, length, 16, 1.0)
        return backend_flex.flex_attention_tables(query, key, value, table, counts, 16, 0.25, return_lse=False)

    torch._dynamo.reset()
    with torch.no_grad():
        for blocks in range(1, 10):
            run(16 * blocks)
        monkeypatch.setattr(compiling, "VARIANTS", 9)
        with pytest.raises(Exception, match="fullgraph"):
            run(16 * 10)
    torch._dynamo.reset()


@pytest.mark.skipif(
    not os.environ.get("DIT_SUITE_SLOW"), reason="compiles C++ for a minute or more; set DIT_SUITE_SLOW=1"
)
def test_compiled_flex_on_cpu_honours_the_table():
    for length in (256, 240):
        query, key, value = _tensors(1, 2, length, length, 32)
        table, counts, mask = _random_table(1, 2, length, length, 64, 0.5, empty_row=True)
        out = block_sparse_attention(query, key, value, table, counts, 64, backend="flex")
        expected, _ = _oracle(query, key, value, mask, 64, 32**-0.5)
        assert (out - expected).abs().max() < 2e-6
    with pytest.raises(ValueError, match="no log-sum-exp on CPU"):
        block_sparse_attention(query, key, value, table, counts, 64, backend="flex", return_lse=True)


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["flex", "flash4", "grouped"])
@pytest.mark.parametrize("length", [1024, 1000])
def test_cuda_backends_equal_oracle(backend, length):
    query, key, value = _tensors(2, 2, length, length, 64, dtype=torch.bfloat16, device="cuda")
    table, counts, mask = _random_table(2, 2, length, length, 128, 0.4, empty_row=True)
    table, counts, mask = table.cuda(), counts.cuda(), mask.cuda()
    reason = dict(choose_backend(query, key, 128).passed_over).get(backend)
    if reason is not None:
        pytest.skip(reason)
    out, lse = block_sparse_attention(query, key, value, table, counts, 128, backend=backend, return_lse=True)
    expected, expected_lse = _oracle(query, key, value, mask, 128, 64**-0.5)
    kept = ~expected_lse.isinf()
    assert (out - expected).abs().max() < 2e-2
    assert (lse[kept] - expected_lse[kept]).abs().max() < 2e-2
    assert out[~kept].abs().max() == 0


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (None, "flash-attn-4 is not installed"),
        ("import cutlass_that_is_absent", "installed without what it needs: No module named 'cutlass_that_is_absent'"),
        ("raise AttributeError('no arch')", "can't be imported: AttributeError: no arch"),
        ("", None),
    ],
)
def test_flash_attn_that_can_not_be_imported_says_why(tmp_path, monkeypatch, body, sentence):
    """An older flash-attn without the new kernels, one without its library, a broken one, and one that imports."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").touch()
    if body is not None:
        (package / "cute").mkdir()
        (package / "cute" / "__init__.py").touch()
        (package / "cute" / "interface.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    backend_flash4.import_problem.cache_clear()
    try:
        problem = backend_flash4.import_problem()
        assert problem is None if sentence is None else sentence in problem
    finally:
        backend_flash4.import_problem.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            del sys.modules[name]

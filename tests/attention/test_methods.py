"""AdaSpa and VMoBA as the plug-in runs them: grids, defaults, what is remembered and what is reported."""

import warnings

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from dit_suite.attention import AdaSpaConfig, VMoBAConfig, apply_adaspa, apply_vmoba, estimate_speedup
from dit_suite.attention.adaspa import LSE_DTYPES
from dit_suite.step_plan import Run
from tests.attention import tiny_models
from tests.attention.test_plugin import SEARCH_AT_0, VMOBA, _run_steps
from tests.attention.tiny_models import build, forward


def _wan_inputs(frames, rows, columns):
    """Inputs of a grid of tokens; a patch is 1x2x2."""
    generator = torch.Generator().manual_seed(5)
    return tiny_models.wan_inputs() | {
        "hidden_states": torch.randn(1, 4, frames, 2 * rows, 2 * columns, generator=generator)
    }


@pytest.mark.parametrize("method", ["tile", "native", "vmoba"])
@pytest.mark.parametrize("grid", [(3, 5, 7), (1, 3, 11)])
def test_any_token_grid(grid, method):
    """Grids that no block divides: every block kept is dense attention, few are something else and finite."""
    model, given = build("wan"), _wan_inputs(*grid)
    dense = forward(model, given)

    def sampled(share):
        if method == "vmoba":
            handle = apply_vmoba(model, VMoBAConfig(topk_ratio=share, dense_first_steps=0.0, min_tokens=0))
        else:
            config = AdaSpaConfig(sparsity=1.0 - share, token_order=method, **SEARCH_AT_0)
            handle = apply_adaspa(model, config)
        with handle, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "AdaSpa keeps 100%")
            out = _run_steps(model, given, range(2))[1]
            assert handle.stats()["sparse_calls"] > 0 and handle.fallbacks == {}
        return out

    assert (sampled(1.0) - dense).abs().max() < 1e-4 * max(1.0, dense.abs().max())
    few = sampled(0.25)
    assert few.isfinite().all() and (few - dense).abs().max() > 1e-4


def test_the_default_block_size():
    """64 tokens on a CPU: a grid of 4x8x8 has four blocks."""
    model, given = build("wan"), _wan_inputs(4, 8, 8)
    run = Run()
    with apply_adaspa(model, AdaSpaConfig(sparsity=0.75, search_steps=(0.0,), min_tokens=0)) as handle:
        _run_steps(model, given, range(2), run=run)
        assert {tuple(state.result.counts.shape) for state in handle.method._runs[run].values()} == {(1, 2, 4)}
        assert handle.stats()["density"] == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("dtype", list(LSE_DTYPES))
def test_a_log_sum_exp_kept_in_less_room(dtype):
    """Its error shifts the weights of a row a little: the search at step 1 keeps about as much weight."""
    model, given = build("wan"), tiny_models.wan_inputs()
    recalls = {}
    for kept in ("float32", dtype):
        config = AdaSpaConfig(sparsity=0.75, block_size=16, search_steps=(0.0, 1), min_tokens=0, lse_dtype=kept)
        run = Run()
        with apply_adaspa(model, config) as handle:
            _run_steps(model, given, range(2), run=run)
            states = handle.method._runs[run].values()
            assert {state.lse.dtype for state in states} == {LSE_DTYPES[kept]}
            assert handle.stats()["cached_searches"] == 3
            recalls[kept] = torch.stack([state.result.recall for state in states])
    assert (recalls[dtype] - recalls["float32"]).abs().max() < 0.02


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
def test_a_cached_search_on_the_same_input_finds_what_the_fused_one_found(name):
    """The first layer sees the same tokens at both steps; its weights, with and without text, are counted alike."""
    model, given = build(name), getattr(tiny_models, f"{name}_inputs")()
    config = AdaSpaConfig(sparsity=0.75, block_size=16, search_steps=(0.0, 1), min_tokens=0)
    run, found = Run(), []
    with apply_adaspa(model, config) as handle:
        for step in range(2):
            _run_steps(model, given, [step], run=run)
            found.append(next(s for key, s in handle.method._runs[run].items() if key[2] == 0).result)
        assert handle.stats()["layers"][0]["cached_searches"] == 1
    fused, cached = found
    assert cached is not fused and torch.equal(cached.table, fused.table)
    assert (cached.recall - fused.recall).abs().max() < 1e-5 and fused.recall.max() < 0.999


def test_a_search_that_first_block_cache_skipped_happens_at_the_next_step_that_runs():
    """Step 2 searches and the cache skips it behind the first block; the input changes at step 3."""
    model, given = build("wan"), tiny_models.wan_inputs()
    other = given | {"hidden_states": 3.0 - 2.0 * given["hidden_states"]}
    model.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    config = AdaSpaConfig(sparsity=0.5, block_size=16, search_steps=(0.0, 2), min_tokens=0, keep_diagonal=True)
    run = Run()
    with apply_adaspa(model, config) as handle, model.cache_context("cond"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "AdaSpa keeps")
        _run_steps(model, other, [0, 1], run=run)  # the first sparse step differs from the dense one: both run
        before = [row["sparse_calls"] for row in handle.stats()["layers"]]
        _run_steps(model, other, [2], run=run)
        skipped = [row["sparse_calls"] for row in handle.stats()["layers"]]
        _run_steps(model, given, [3], run=run)
        searched = {key[2]: state.last_step for key, state in handle.method._runs[run].items()}
    model.disable_cache()
    assert [after - was for after, was in zip(skipped, before, strict=True)] == [1, 0, 0]
    assert searched == {0: 2, 1: 3, 2: 3}


def test_half_of_the_blocks_stays_dense_on_a_cpu_unless_asked_for(monkeypatch):
    monkeypatch.setattr("dit_suite.attention.methods.AdaSpaMethod.smallest", {"cuda": 0, "elsewhere": 0})
    model, given = build("wan"), tiny_models.wan_inputs()
    dense = forward(model, given)
    changes = {"block_size": 16, "search_steps": (0.0,)}
    with (
        apply_adaspa(model, AdaSpaConfig(sparsity=0.5, **changes)) as handle,
        pytest.warns(RuntimeWarning, match="stays dense: keeping 50% of the blocks saves no time on a CPU"),
    ):
        assert torch.equal(_run_steps(model, given, range(2))[1], dense)
        assert sum(handle.fallbacks.values()) == 6
    with apply_adaspa(model, AdaSpaConfig(sparsity=0.75, **changes)) as handle:
        assert not torch.equal(_run_steps(model, given, range(2))[1], dense) and handle.fallbacks == {}


def test_stats_name_the_kernels_and_the_most_that_can_be_gained():
    model, given = build("wan"), tiny_models.wan_inputs()
    with apply_adaspa(model, AdaSpaConfig(sparsity=0.75, **SEARCH_AT_0)) as handle:
        assert handle.stats()["attention_speedup_at_most"] is None
        _run_steps(model, given, range(4))
        stats = handle.stats()
    assert (stats["backend"], stats["search"]) == ("grouped", "chunked")
    # One of four steps is dense, the others compute a quarter: 1 / (1/4 + 3/4 * 1/4).
    assert stats["density"] == pytest.approx(0.25) and stats["attention_speedup_at_most"] == pytest.approx(16 / 7)
    with apply_vmoba(model, VMoBAConfig(topk=(1, 1, 1), **VMOBA)) as handle:
        _run_steps(model, given, range(2))
        stats = handle.stats()
    assert stats["backend"] == "loop" and {row["backend"] for row in stats["layers"]} == {"loop"}
    assert stats["attention_speedup_at_most"] == pytest.approx(estimate_speedup(1.0, 0.0, stats["density"]))

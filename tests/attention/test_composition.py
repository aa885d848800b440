"""Sparse attention beside other things that hook into a transformer: BAC, group offload."""

from unittest.mock import patch

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module

from dit_suite.attention import AdaSpaConfig, VMoBAConfig, apply_adaspa, apply_vmoba
from dit_suite.caching.bac import apply_bac
from dit_suite.caching.plan import BACConfig, build_schedule
from dit_suite.caching.recorder import ProfileRecorder
from tests.attention.tiny_models import build, forward, wan_inputs
from tests.caching.conftest import Case

FULL = {"sparsity": 0.0, "block_size": 8, "min_tokens": 0}


@pytest.fixture(scope="module")
def case():
    return Case("wan")


@pytest.fixture(scope="module")
def schedule(case):
    with ProfileRecorder(case.model) as recorder:
        case.sample()
        case.sample(shift=0.1)
    return build_schedule(recorder.profile(), BACConfig(budget=3, granularity="subblock"))


@pytest.mark.parametrize("sparse_first", [True, False])
@pytest.mark.parametrize("removed_in_order", [True, False])
def test_bac_and_adaspa_compose(case, schedule, sparse_first, removed_in_order):
    plain = case.sample()
    with apply_bac(case.model, schedule):
        cached = case.sample()
    config = AdaSpaConfig(search_steps=(0.0, 2), **FULL)
    makers = [lambda: apply_adaspa(case.model, config), lambda: apply_bac(case.model, schedule)]
    handles = [make() for make in (makers if sparse_first else makers[::-1])]
    both = case.sample()
    stats = [handle.stats() for handle in (handles if sparse_first else handles[::-1])]
    for handle in handles if removed_in_order else handles[::-1]:
        handle.remove()
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(both, cached, strict=True))
    assert stats[0]["fused_searches"] == 2
    assert stats[0]["cached_searches"] <= 2
    assert 0 < stats[0]["sparse_calls"] < 2 * 4  # attention that BAC reuses is not computed at all
    assert sum(stats[1]["reused"].values()) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, case.sample(), strict=True))
    left = [name for name, m in case.model.named_modules() if "_diffusers_hook" in vars(m) or "forward" in vars(m)]
    assert left == []


def test_bac_and_vmoba_compose(case, schedule):
    with apply_bac(case.model, schedule):
        cached = case.sample()
    full = VMoBAConfig(topk_ratio=1.0, dense_first_steps=0.0, min_tokens=0, block_1d=1.0)
    with apply_vmoba(case.model, full) as sparse, apply_bac(case.model, schedule) as bac:
        both = case.sample()
        assert sparse.stats()["sparse_calls"] > 0 and sparse.stats()["fallbacks"] == {}
        assert sum(bac.stats()["reused"].values()) > 0
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(both, cached, strict=True))


def test_group_offload_keeps_working():
    model, given = build("wan"), wan_inputs()
    dense = forward(model, given)
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, use_stream=False
    )
    with apply_adaspa(model, AdaSpaConfig(search_steps=(1,), **FULL)) as handle:
        for timestep in (900.0, 700.0, 500.0):
            out = forward(model, given | {"timestep": torch.tensor([timestep])})
        assert handle.stats()["sparse_calls"] == 3
    assert out.isfinite().all()
    assert (forward(model, given) - dense).abs().max() < 1e-6


@pytest.mark.parametrize("offload_first", [True, False])
def test_model_offload_survives_the_plug_in(offload_first):
    """What `enable_model_cpu_offload` does to a transformer, with the CPU as its device."""
    model, given = build("wan"), wan_inputs()
    dense = forward(model, given)
    config = AdaSpaConfig(search_steps=(1,), **FULL)
    handle = None if offload_first else apply_adaspa(model, config)
    cpu_offload_with_hook(model, torch.device("cpu"))
    moved = []
    with patch.object(model._hf_hook, "pre_forward", side_effect=lambda m, *a, **k: moved.append(m) or (a, k)):
        handle = handle or apply_adaspa(model, config)
        for timestep in (900.0, 700.0, 500.0):
            out = forward(model, given | {"timestep": torch.tensor([timestep])})
        assert handle.stats()["sparse_calls"] == 3
        handle.remove()
        assert torch.equal(forward(model, given), dense)
    assert len(moved) == 4
    assert out.isfinite().all()
    remove_hook_from_module(model)
    assert torch.equal(forward(model, given), dense)
    assert "_diffusers_hook" not in vars(model)

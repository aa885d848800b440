"""BAC beside sparse attention on one model: they compose, and each leaves the other as it was."""

import pytest
import torch

from dit_suite.attention.adaspa import AdaSpaConfig
from dit_suite.attention.plugin import apply_adaspa, apply_vmoba
from dit_suite.attention.vmoba import VMoBAConfig
from dit_suite.caching.bac import apply_bac
from dit_suite.caching.plan import BACConfig
from dit_suite.caching.recorder import ProfileRecorder
from tests.caching.conftest import Case


def _adaspa(model: torch.nn.Module):
    return apply_adaspa(model, AdaSpaConfig(sparsity=0.5, block_size=4, search_steps=(2.0,), min_tokens=0))


def _vmoba(model: torch.nn.Module):
    return apply_vmoba(model, VMoBAConfig(min_tokens=0, dense_first_steps=0.0))


@pytest.mark.parametrize("sparse", [_adaspa, _vmoba], ids=["adaspa", "vmoba"])
@pytest.mark.parametrize("granularity", ["subblock", "stack"])
def test_composition(sparse, granularity: str) -> None:
    case = Case("wan")
    plain = case.sample()
    with ProfileRecorder(case.model) as recorder:
        case.sample()
    profile = recorder.profile()
    with sparse(case.model):
        alone = case.sample()
        with apply_bac(case.model, BACConfig(budget=5, granularity=granularity), profile=profile):
            both = case.sample()
        assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
        with apply_bac(case.model, BACConfig(budget=3, granularity=granularity), profile=profile) as handle:
            cached = case.sample()
            assert sum(handle.stats()["reused"].values()) == 2 * len(profile.select(granularity))
        assert all(torch.isfinite(x).all() for x in cached) and torch.equal(cached[0], alone[0])
        assert all(torch.equal(a, b) for a, b in zip(alone, case.sample(), strict=True))
    handle = apply_bac(case.model, BACConfig(budget=3, granularity=granularity), profile=profile)
    expected = case.sample()
    with sparse(case.model):
        assert torch.isfinite(case.sample()[-1]).all()
    assert all(torch.equal(a, b) for a, b in zip(expected, case.sample(), strict=True))
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(plain, case.sample(), strict=True))

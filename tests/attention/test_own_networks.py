"""VMoBA in the suite's own networks: full budget equals dense, gradients are right, a graft is left alone."""

import pytest
import torch
from torch import nn

from dit_suite.attention import AdaSpaConfig, VMoBAConfig, apply_adaspa, apply_vmoba, supported
from dit_suite.grafting.models import graft
from dit_suite.grafting.plan import GraftPlan
from dit_suite.step_plan import StepContext, publish_step
from tests.attention.tiny_models import OWN_CASES, build, forward, picture_inputs, pt_dit_inputs

NAMES = list(OWN_CASES)
BLOCKS = {"dense_first_steps": 0.0, "min_tokens": 0, "block_1d": 0.25, "block_2d": (2, 2), "block_3d": (2, 2, 2)}


def _lively(name):
    """The tiny network with random weights where they start at zero, so that attention reaches the output."""
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.2, generator=torch.Generator().manual_seed(2))
    return model


def _gradients(model, given):
    loss = model(**given, return_dict=False)[0].pow(2).mean()
    weights = [
        m.to_k.weight for n, m in model.named_modules() if n in {r.name for r in supported(model) if r.supported}
    ]
    return torch.autograd.grad(loss, weights)


@pytest.mark.parametrize("name", NAMES)
def test_full_budget_equals_dense_with_its_gradients_and_less_does_not(name):
    model, case = _lively(name), OWN_CASES[name]
    given = case.inputs(2)
    dense, gradients = forward(model, given), _gradients(model, given)
    assert len(gradients) == case.layers
    with apply_vmoba(model, VMoBAConfig.trained(**BLOCKS | {"tau": 1.0})) as handle:
        assert (forward(model, given) - dense).abs().max() <= 1e-5 * max(1.0, dense.abs().max())
        full = _gradients(model, given)
        stats = handle.stats()
    assert (stats["sparse_calls"], stats["fallbacks"]) == (2 * case.layers, {})
    assert stats["density"] == pytest.approx(1.0)
    for actual, expected in zip(full, gradients, strict=True):
        assert expected.abs().max() > 0
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    with apply_vmoba(model, VMoBAConfig.trained(**BLOCKS)) as handle:
        sparse = _gradients(model, given)
        assert (forward(model, given) - dense).abs().max() > 1e-5
        assert 0.1 < handle.stats()["density"] < 0.8
    assert all(s.isfinite().all() and s.any() and not torch.equal(s, g) for s, g in zip(sparse, gradients, strict=True))
    assert torch.equal(forward(model, given), dense)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_self_attention_over_the_grid_is_touched(name):
    rows = [row for row in supported(build(name)) if row.supported]
    assert [row.route for row in rows] == [OWN_CASES[name].route] * OWN_CASES[name].layers


def test_several_proxies_per_window_stay_dense():
    model = build("pt_dit")
    model.register_to_config(compress_ratios=(1, 4, 4), proxy_compress_ratios=(1, 2, 2))
    given = pt_dit_inputs()
    dense = forward(model, given)
    with apply_vmoba(model, VMoBAConfig(**BLOCKS)), pytest.warns(RuntimeWarning, match="could not be read"):
        # PT-DiT's lean blocks step aside for hooks, which changes last bits
        torch.testing.assert_close(forward(model, given), dense, atol=1e-5, rtol=1e-5)


def test_operators_that_were_grafted_in_are_left_alone():
    model = graft(build("dit"), GraftPlan.from_dict({"attention": {"1": {"kind": "swa"}}}, 3)).eval()
    with apply_adaspa(model, AdaSpaConfig(min_tokens=0, search_steps=(0.0,), block_size=16)) as handle:
        with publish_step(StepContext(0, 4, 500.0)):
            forward(model, picture_inputs())
        assert [row["fused_searches"] for row in handle.stats()["layers"]] == [1, 1]
    assert [row.name for row in supported(model)] == ["transformer_blocks.0.attn", "transformer_blocks.2.attn"]
    model = graft(build("dit"), GraftPlan.from_dict({"attention": {"kind": "swa"}}, 3))
    with pytest.raises(ValueError, match="this GraftedDiTModel has no self-attention that could become sparse"):
        apply_adaspa(model)


@pytest.mark.parametrize(("name", "part"), [("dit", "attn"), ("pixart", "attn1")])
def test_both_sides_of_a_pair_become_sparse(name, part):
    """Depth to width: the two blocks of a pair are layers like the others."""
    model = graft(_lively(name), GraftPlan(pairs=((0, 1),))).eval()
    layers = [f"transformer_blocks.{place}.{part}" for place in ("0.first", "0.second", "1")][: OWN_CASES[name].layers]
    assert [row.name for row in supported(model) if row.supported] == layers
    given = OWN_CASES[name].inputs(2)
    dense = forward(model, given)
    with apply_vmoba(model, VMoBAConfig.trained(**BLOCKS | {"tau": 1.0})) as handle:
        assert (forward(model, given) - dense).abs().max() <= 1e-5 * max(1.0, dense.abs().max())
        assert handle.stats()["sparse_calls"] == len(layers)
    with apply_vmoba(model, VMoBAConfig.trained(**BLOCKS)):
        assert (forward(model, given) - dense).abs().max() > 1e-5

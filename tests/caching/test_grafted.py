"""BAC on a grafted PixArt: a grafted operator is a unit like the attention or feed-forward whose place it took."""

import pytest
import torch

from dit_suite.caching.bac import apply_bac
from dit_suite.caching.block_probe import find_units
from dit_suite.caching.plan import BACConfig
from dit_suite.caching.recorder import ProfileRecorder
from dit_suite.grafting import GraftPlan, graft

OPERATORS = ("hyena_se", "hyena_x", "hyena_y", "hyena_x_2d", "mamba2", "gla", "swa", "pool_2d", "mha")


@pytest.mark.parametrize("kind", OPERATORS)
def test_units_of_grafted_blocks(pixart, kind: str) -> None:
    spec = {"kind": kind, "d_state": 8} if kind == "mamba2" else {"kind": kind}
    plan = {"attention": {"1": spec}, "mlp": {"0": {"kind": "mlp", "ratio": 3.0}, "1": {"kind": "mlp_hyena_x"}}}
    units = find_units(graft(pixart.model, GraftPlan.from_dict(plan, 2)), "subblock")
    names = [f"transformer_blocks.{i}.{part}" for i in range(2) for part in ("attn1", "attn2", "ff")]
    assert [(unit.name, unit.kind) for unit in units] == list(zip(names, ["sa", "ca", "ffn"] * 2, strict=True))


def test_operators_are_cached(pixart) -> None:
    """Two of five steps: every unit, the Hyena and the Mamba-2 among them, runs twice and is recalled three times."""
    plan = {"attention": {"0": {"kind": "hyena_y"}, "1": {"kind": "mamba2", "d_state": 8}}}
    pixart.model = graft(pixart.model, GraftPlan.from_dict(plan, 2)).eval()
    plain = pixart.sample()
    with ProfileRecorder(pixart.model) as recorder:
        pixart.sample()
    profile = recorder.profile()
    operators = [pixart.model.transformer_blocks[i].attn1 for i in range(2)]
    ran: list[int] = []
    outputs: list[torch.Tensor] = []
    for operator in operators:
        operator.in_proj.register_forward_hook(lambda *_: ran.append(1))
    operators[0].register_forward_hook(lambda *given: outputs.append(given[2]))
    with apply_bac(pixart.model, BACConfig(budget=5, granularity="subblock"), profile=profile):
        assert all(torch.equal(a, b) for a, b in zip(plain, pixart.sample(), strict=True))
    assert len(ran) == 10
    ran.clear()
    outputs.clear()
    reuse = BACConfig(budget=2, granularity="subblock", predictor="reuse")
    with apply_bac(pixart.model, reuse, profile=profile) as handle:
        pixart.sample()
        facts = handle.stats()
        steps = handle.schedules[5].plan("*").steps[0]
    assert facts["computed"] == {"ca": 4, "ffn": 4, "sa": 4} and facts["reused"] == {"ca": 6, "ffn": 6, "sa": 6}
    assert len(ran) == 4 and len(outputs) == 5
    for step in range(1, 5):
        assert torch.equal(outputs[step], outputs[step - 1]) == (step not in steps)
    assert facts["compute_fraction"][5] < 0.5

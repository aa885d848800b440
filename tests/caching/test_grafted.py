"""BAC on a grafted PixArt: a grafted operator is a unit like the attention or feed-forward whose place it took."""

from pathlib import Path

import pytest
import torch

from dit_suite.caching.bac import apply_bac
from dit_suite.caching.block_probe import StreamLayout, find_units, stream_layout
from dit_suite.caching.plan import BACConfig, build_schedule
from dit_suite.caching.recorder import FlopMeter, ProfileRecorder
from dit_suite.checkpoints import load_pipeline
from dit_suite.grafting import GraftPlan, graft
from dit_suite.grafting.models import GraftedPixArtTransformer2DModel
from dit_suite.grafting.surgery import ParallelPair
from tests.tiny import tiny_pixart, tiny_text_to_image

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


def test_a_pair_of_pixart_blocks_adds_both_increments() -> None:
    """As grafted, a pair gives x + (A(x) - x) + (B(x) - x), text and time included."""
    model, calls = tiny_pixart(layers=4), []
    grafted = graft(model, GraftPlan(pairs=((1, 2),)))
    pair = grafted.transformer_blocks[1]
    assert stream_layout(pair) == StreamLayout(("hidden_states",), (0,))
    pair.register_forward_hook(lambda module, *given: calls.append(given), with_kwargs=True)
    with torch.no_grad():
        tiny_text_to_image(transformer=grafted)("red cat", num_inference_steps=1)
        (x, *_), given, out = calls[0]
        first, second = (block(x, **given) for block in model.transformer_blocks[1:3])
    assert given["encoder_hidden_states"].abs().max() > 0.1 and (first - x).abs().max() > 0.1
    torch.testing.assert_close(out, first + second - x, atol=1e-5, rtol=1e-4)


def test_depth_to_width_saves_loads_samples_and_is_cached(tmp_path: Path) -> None:
    plan = {"attention": {"3": {"kind": "hyena_x"}}, "mlp": {"1": {"kind": "mlp", "ratio": 2}}, "pairs": [[0, 1]]}
    model = graft(tiny_pixart(layers=4), GraftPlan.from_dict(plan, 4)).eval()
    torch.nn.init.normal_(model.transformer_blocks[0].merge.weight, std=0.2)
    pipe = tiny_text_to_image(transformer=model)

    def sample() -> torch.Tensor:
        return pipe(["red cat", "sun"], num_inference_steps=4, guidance_scale=3.0, output_type="pt",
                    generator=[torch.Generator().manual_seed(i) for i in range(2)]).images  # fmt: skip

    expected = sample()
    pipe.save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.transformer, GraftedPixArtTransformer2DModel)
    assert [isinstance(block, ParallelPair) for block in pipe.transformer.transformer_blocks] == [True, False, False]
    assert torch.equal(sample(), expected)

    with ProfileRecorder(pipe) as recorder, FlopMeter() as meter:
        sample()
    full, profile = meter.total, recorder.profile()
    names = {size: [profile.units[i].name for i in profile.select(size)] for size in ("subblock", "block", "stack")}
    sides = [f"0.{side}" for side in ("first", "second")]
    parts = [f"transformer_blocks.{place}.{part}" for place in [*sides, "1", "2"] for part in ("attn1", "attn2", "ff")]
    assert names["subblock"] == parts and names["stack"] == ["transformer_blocks"]
    assert names["block"] == [f"transformer_blocks.{i}" for i in range(3)]
    for size, units in names.items():
        with apply_bac(pipe, BACConfig(budget=4, granularity=size), profile=profile):
            assert torch.equal(sample(), expected)
        schedule = build_schedule(profile, BACConfig(budget=2, granularity=size, predictor="reuse"))
        with apply_bac(pipe, schedule) as handle, FlopMeter() as meter:
            cached = sample()
            facts = handle.stats()
        assert sum(facts["computed"].values()) == sum(facts["reused"].values()) == 2 * len(units)
        saved = (1 - schedule.compute_fraction) * 4 * len(profile.branches) * profile.total_flops
        assert full - meter.total == pytest.approx(saved, rel=1e-6) and saved > 0.3 * full
        assert 1e-4 < (cached - expected).abs().max() < 0.5
    assert torch.equal(sample(), expected)

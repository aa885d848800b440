"""The backbones benchmark: its counts are the paper's, its clock is fair."""

import argparse
from importlib import import_module

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit_suite.benchmarks import backbones
from dit_suite.benchmarks.trained_backbones import evaluation_cost
from dit_suite.models.dit import DiTModel
from dit_suite.models.pt_dit import attention_mac_share
from dit_suite.pipelines.pipeline_class_to_image import ClassToImagePipeline


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    backbones.add_arguments(parser)
    return parser.parse_args(given)


def test_text_rows_report_attention_and_linear_terms():
    """PT-DiT section 3.3: 34.4 % and 9.8 % of the attention products, a larger linear term, and the width decides who
    wins at 512 px."""
    rows = {}
    for width in ((5, 32), (6, 48)):
        args = options("--pixels", "256", "512", "--timed-pixels", "--layers", "1")
        args.heads, args.head_dim = width
        rows[width] = backbones.text_rows(args)
        for row, tokens, window in zip(rows[width], (256, 1024), (4, 16), strict=True):
            assert row["attention_percent"] == pytest.approx(100 * attention_mac_share(tokens, window), rel=1e-6)
            assert row["linear_gflops"] > 1.3 * row["baseline_linear_gflops"]
    assert rows[5, 32][1]["total_percent"] < 100 < rows[6, 48][1]["total_percent"]
    assert rows[5, 32][0]["total_percent"] > 100


def test_the_break_even_size_is_the_first_cheaper_one():
    args = options("--layers", "1")
    found = backbones.break_even_row(args)
    assert found["setting"] == "break-even at 640 px (width 288)" and found["total_percent"] < 100


def test_the_cost_of_an_evaluation_is_the_networks_first_one():
    """FLOPs as on the meta device, for the batch of two that guidance asks for; the clock runs as often as told."""

    def make():
        torch.manual_seed(0)
        return DiTModel(8, 2, 3, 2, 2, 8, num_classes=4, learn_sigma=False).eval()

    pipe = ClassToImagePipeline(make(), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))

    def sample():
        return pipe([1], num_inference_steps=2, output_type="latent")

    cost = evaluation_cost(pipe.transformer, sample, 3, "cpu")
    assert len(calls) == 2 + 1 + 1 + 3 and cost["evaluation_s"] > 0

    def call():
        model = make()
        return lambda: model(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).long())

    attention, total = backbones.count_flops(call)
    assert attention > 0 and cost["evaluation_gflops"] == pytest.approx(total, rel=1e-9)


def test_rounds_turn_the_order():
    order = []
    times = backbones.interleaved([lambda k=k: order.append(k) for k in range(3)], 3, "cpu")
    assert order == [0, 1, 2] + [0, 1, 2] + [1, 2, 0] + [2, 0, 1]
    assert [len(each) for each in times] == [3, 3, 3]
    assert backbones.ratio([(4.0, 1.0), (6.0, 1.0), (9.0, 1.0)], [(2.0, 1.0)] * 3, 0) == 3.0


def test_one_switch_row(monkeypatch):
    """The merged experts add 7.5 % of the FLOPs at S/2."""
    args = options("--pairs", "1")
    monkeypatch.setattr(backbones, "paired", lambda *given: {"speedup": 0.9, "cpu_speedup": 0.9})
    with torch.no_grad():
        row = backbones.class_rows(args)[0]
    assert row["total_percent"] == pytest.approx(107.5, abs=0.05)
    assert row["params_m"] == pytest.approx(38.2, abs=0.01) and row["baseline_params_m"] == pytest.approx(
        32.87, abs=0.01
    )
    assert row["overhead_percent"] == pytest.approx(100 / 0.9 - 100)


def test_lego_rows_compare_pipelines_with_pipelines_and_passes_with_passes(monkeypatch):
    """Twice the DiT, then LEGO by t_break; all sides make 15 evaluations, and 7 leave out the last brick at 0.5."""
    ran = []

    def stub(calls, pairs, device):
        watched = []
        for name in ("SwitchDiTTransformer2DModel", "LegoTransformer2DModel"):
            module = "switch_dit" if name.startswith("Switch") else "lego"
            kind = getattr(import_module(f"dit_suite.models.{module}"), name)
            monkeypatch.setattr(
                kind, "forward", lambda self, x, *_, **given: watched.append(given.get("stop_after")) or (x,)
            )
        for call in calls:
            watched.clear()
            call()
            ran.append((len(watched), watched.count(1)))
        return [[(float(1 + place), 1.0)] for place in range(len(calls))]

    monkeypatch.setattr(backbones, "interleaved", stub)
    with torch.no_grad():
        rows = backbones.lego_rows(options())
    assert ran == 2 * [(15, 0), (15, 0), (15, 3), (15, 7), (15, 11), (15, 15)]
    assert [row["speedup"] for row in rows] == [1 / (2 + k) for k in range(5)]
    assert [row["network_speedup"] for row in rows] == [7 / (8 + k) for k in range(5)]
    assert rows[0]["last_brick_percent"] == pytest.approx(82, abs=0.5)
    left = (8 + 7 * (1 - rows[0]["last_brick_percent"] / 100)) / 15
    assert rows[2]["total_percent"] == pytest.approx(left * rows[0]["total_percent"])

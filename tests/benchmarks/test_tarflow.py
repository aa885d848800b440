"""The TarFlow benchmark: what it counts on a small flow, and its table."""

import json

import pytest
import torch

from dit_suite.benchmarks.tarflow import Bench, Method, methods
from dit_suite.schedulers.gs_jacobi import BlockStrategy, FlowGuidance, GSJacobiScheduler
from scripts.benchmark import main
from tests.pipelines.test_pipeline_tarflow import tiny_pipe


def test_table_of_all_methods(tmp_path, capsys):
    """Three blocks of nine tokens; the plan solves them sequentially, in 3 sweeps, and in 3 modules of 2 sweeps."""
    tiny_pipe().save_pretrained(tmp_path / "model")
    arguments = ["tarflow", "--model", str(tmp_path / "model"), "--batch-size", "2", "--num-samples", "4"]
    arguments += ["--features", "random-conv", "--device", "cpu", "--output", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "first GS 8x32" in printed and "planned, all in float32" not in printed
    assert {"rms", "fd_random-conv_to_sequential"} <= set(printed.split())
    rows = {row["method"]: row for row in json.loads((tmp_path / "tarflow.json").read_text())["rows"]}
    sequential, planned = rows["sequential"], rows["planned"]
    exact, rough = rows["first GS 8x32, rest Jacobi x10"], rows["first sequential, rest Jacobi x2"]
    assert sequential["network_calls"] == 3 * 8 and planned["network_calls"] == 8 + 3 + 6
    assert sequential["passes"] == pytest.approx(3 * 8 / 9) and planned["passes"] == pytest.approx(8 / 9 + 3 + 2)
    assert sequential["sweeps"] == 0 and planned["sweeps"] == (3 + 6) / 2
    assert sequential["rms"] == 0 and sequential["psnr_min"] is None
    assert exact["rms"] < 1e-5 and exact["psnr_min"] > 90
    assert rough["rms"] > 1e-4 and 10 < rough["psnr_min"] <= rough["psnr_mean"] < 90
    distances = {name: row.get("fd_random-conv_to_sequential") for name, row in rows.items()}
    assert abs(distances["sequential"]) < 1e-6 < distances["first sequential, rest Jacobi x2"]
    assert main([*arguments, "--num-samples", "3"]) == 2
    assert "multiple of --batch-size" in capsys.readouterr().err


def test_samples_that_are_solved_again_are_counted():
    """One of three diverges in every block: 2 whole sequences of sweeps, and 8 of 9 tokens once more for a third."""
    bench = Bench(tiny_pipe(volume_preserving=True), FlowGuidance(), "cpu")
    noise = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(0))
    noise[1, 4, 0] = 5e6
    method = Method("modules", [BlockStrategy(3, 2)] * 3)
    bench.sample(method, noise, torch.tensor([0, 1, 2]))
    assert method.calls == [3 * (6 + 8)]
    assert method.token_passes == [pytest.approx(3 * (2 + 8 / 9 / 3))]


def test_a_plan_with_bfloat16_sweeps_is_compared_with_its_float32_run(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    pipe = tiny_pipe(GSJacobiScheduler([0, 1, 3], [1, 3, 2], bfloat16_sweeps=[0, 2, 1]))
    rows = methods(pipe, "planned")
    assert [row.name for row in rows] == ["sequential", "planned", "planned, all in float32"]
    noise = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    for row in rows:
        Bench(pipe, FlowGuidance(), "cpu").sample(row, noise, torch.tensor([0, 1]))
    assert [row.bfloat16[0] for row in rows] == [0, 2 + 3, 0]
    assert rows[1].calls == rows[2].calls == [8 + 3 + 6]


def test_an_unplanned_checkpoint_is_refused(tmp_path, capsys):
    tiny_pipe(GSJacobiScheduler()).save_pretrained(tmp_path / "model")
    assert main(["tarflow", "--model", str(tmp_path / "model"), "--batch-size", "1"]) == 2
    assert "is not a planned TarFlow" in capsys.readouterr().err

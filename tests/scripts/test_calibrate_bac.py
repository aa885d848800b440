"""`calibrate_bac.py`: the search for the smallest budget that reaches a PSNR, and the sentences for bad input."""

import importlib.util
from pathlib import Path

import pytest

from dit_suite.caching.plan import BACConfig, BACSchedule
from dit_suite.caching.profile import SimilarityProfile
from dit_suite.options import fields_of
from dit_suite.registry import TECHNIQUES
from tests.tiny import save_tiny

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "calibrate_bac.py"
STEPS = 7


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("calibrate_bac", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    model = save_tiny(tmp_path_factory.mktemp("tiny") / "model")
    return ["--model", str(model), "--prompts", "red apple", "green sun", "--num-inference-steps", str(STEPS)]


@pytest.fixture(scope="module")
def measured(main, call, tmp_path_factory):
    """PSNR of every budget, measured one by one."""
    output = tmp_path_factory.mktemp("all")
    budgets = [str(budget) for budget in range(1, STEPS + 1)]
    assert main([*call, "--budget", "2", "--measure", *budgets, "--output", str(output)]) == 0
    rows = SimilarityProfile.load(output / f"profile-{STEPS}.safetensors").quality
    return {row["budget"]: row["psnr"] for row in rows}


@pytest.mark.parametrize("wanted", [2, 4, STEPS])
def test_the_smallest_budget_is_found(main, call, measured, wanted, tmp_path, capsys):
    target = measured[wanted] - 1e-3
    assert main([*call, "--psnr", str(target), "--output", str(tmp_path)]) == 0
    schedule = BACSchedule.load(tmp_path / f"schedule-{STEPS}.json")
    assert schedule.config["budget"] == min(budget for budget, psnr in measured.items() if psnr >= target)
    assert measured[1] < target and capsys.readouterr().out.count("PSNR") <= 4


def test_a_target_out_of_reach(main, call, tmp_path, capsys):
    assert main([*call, "--psnr", "500", "--output", str(tmp_path)]) == 2
    assert "no budget up to 7 computed steps reaches 500" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_option_of_a_pipeline_is_called_like_one_of_a_plug_in():
    """The command takes both as flags."""
    ours = {field.name for field in fields_of(BACConfig)}
    taken = {row.name: ours & {field.name for field in fields_of(row.options_class())} for row in TECHNIQUES}
    assert not any(taken.values()), taken

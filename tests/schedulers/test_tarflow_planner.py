"""The planner: fitted guesses, the choice among measured candidates, and the command end to end."""

import math
import shutil

import pytest
import torch

from dit_suite import load_pipeline, sample_generators
from dit_suite.compact_weights import save_compact
from dit_suite.pipelines.pipeline_tarflow import TarFlowPipeline
from dit_suite.schedulers.gs_jacobi import BlockStrategy, FlowGuidance, GSJacobiScheduler
from dit_suite.schedulers.tarflow_metrics import FlowMetrics
from dit_suite.schedulers.tarflow_planner import (
    TOLERANCES,
    Candidate,
    Planner,
    calibrate,
    choose,
    fit_guesses,
    floor,
    psnr,
    tough_blocks,
)
from scripts.plan_tarflow import main, stored_dtype
from tests.models.test_tarflow import tiny_model


def calibration(model, count: int = 24):
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(count, model.num_tokens, model.token_dim, generator=generator)
    return calibrate(model, noise, torch.arange(count) % model.config.num_classes, FlowGuidance())


def candidate(seconds: float, *errors: float, sweeps: int = 1) -> Candidate:
    return Candidate(BlockStrategy(1, sweeps), torch.tensor(errors), seconds)


def test_fitted_guess_is_closer_than_the_latent_on_new_samples():
    model = tiny_model()
    data = calibration(model)
    fitted = fit_guesses(model, data.rows(slice(8, None)), kernel=1, ridge=1.0)
    assert fitted.config.guess_kernel == 1 and model.config.guess_kernel == 0
    held_out = data.rows(slice(0, 8))
    for index, block in enumerate(reversed(fitted.blocks)):
        latents, exact = held_out.states[index], held_out.states[index + 1]
        assert (block.initial_guess(latents) - exact).square().mean() < (latents - exact).square().mean()
    image = model.unpatchify(data.states[-1][:2])
    assert torch.equal(fitted(image).latents, model(image).latents)
    with pytest.raises(ValueError, match="another guess_kernel"):
        fit_guesses(fitted, data, kernel=0)


def test_choose_takes_the_fastest_combination_within_the_tolerance():
    table = [
        [candidate(10.0, 0.0, 0.0), candidate(2.0, 0.3, 0.4)],
        [candidate(10.0, 0.0, 0.0), candidate(1.0, 0.4, 0.1), candidate(3.0, 0.1, 0.1)],
    ]
    assert [c.seconds for c in choose(table, [1.0, 1.0], 1.0)] == [2.0, 1.0]
    assert [c.seconds for c in choose(table, [1.0, 1.0], 0.45)] == [2.0, 3.0]
    assert [c.seconds for c in choose(table, [0.1, 1.0], 0.15)] == [2.0, 3.0]
    assert [c.seconds for c in choose(table, [1.0, 1.0], 1e-6)] == [10.0, 10.0]
    assert [c.seconds for c in choose(table, [1.0, 1.0], 0.0, max_seconds=12.0)] == [10.0, 1.0]
    with pytest.raises(ValueError, match="no combination"):
        choose(table, [1.0, 1.0], 1.0, max_seconds=2.0)


def test_psnr_of_known_errors():
    exact = torch.zeros(2, 4)
    found = torch.tensor([[0.02] * 4, [9.0] * 4])
    torch.testing.assert_close(psnr(found, exact), torch.tensor([40.0, 6.0206]), atol=1e-3, rtol=0)


def test_floor_is_below_the_worst_picture_where_they_scatter():
    assert floor(torch.tensor([40.0, 40.0, 34.0, 40.0])) == pytest.approx(38.5 - 2.5 * 3.0)
    assert floor(torch.tensor([39.0] + [40.0] * 99)) == pytest.approx(39.0)


def test_plan_meets_its_target_and_beats_the_sequential_sampler():
    model = tiny_model(spread=0.1)
    data = calibration(model)
    model = fit_guesses(model, data.rows(slice(12, None)))
    said = []
    held_out, unseen = data.rows(slice(0, 8)), data.rows(slice(8, 12))
    planner = Planner(model, held_out, unseen, FlowGuidance(), batch_size=2, repeats=1, say=said.append)
    plan = planner.plan(target_psnr=40.0)
    assert floor(planner.check(plan.strategies)) >= 40.0 and len(plan.psnr) == 4
    assert plan.seconds <= plan.fixed[-1]["seconds"] + 1e-4
    assert len(plan.strategies) == 3 and said
    assert plan.metrics["gains"][-1] == pytest.approx(1.0, abs=1e-3)
    scheduler = plan.scheduler({"batch_size": 2})
    assert scheduler.strategies == plan.strategies and scheduler.config.planned["batch_size"] == 2
    assert scheduler.config.planned["unseen"]["samples"] == 4
    torch.testing.assert_close(planner.check((BlockStrategy(),) * 3), torch.full((8,), 120.0), atol=30.0, rtol=0)


def test_modules_are_tried_for_the_blocks_with_the_most_crm():
    parts = torch.zeros(5, 4)
    parts[:, 3] = torch.tensor([50.0, 5.0, 0.0, 4.0, 41.0])
    assert tough_blocks(FlowMetrics(torch.zeros(5, 2), parts)) == {0, 4}
    parts[:, 3] = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.1])
    assert tough_blocks(FlowMetrics(torch.zeros(5, 2), parts)) == {0}


def test_module_candidates_reach_their_tolerances_while_they_are_fast_enough():
    model = tiny_model()
    data = calibration(model, 6)
    planner = Planner(model, data.rows(slice(0, 4)), data.rows(slice(4, 6)), FlowGuidance(), batch_size=2, repeats=1)
    found = planner._gauss_seidel(1, "zero", 2, limit=math.inf)
    assert [each.strategy for each in found] == [BlockStrategy(2, 5, "zero", t) for t in TOLERANCES]
    assert all(float(each.errors.max()) < 2 * t for each, t in zip(found, TOLERANCES, strict=True))
    assert float(found[0].errors.max()) > float(found[-1].errors.max())
    assert planner._gauss_seidel(1, "zero", 4, limit=0.0) == []
    offered = {each.strategy.modules for each in planner.candidates(1, "zero", modules=(4, 16))}
    assert offered <= {0, 1, 4}


class Listed(Planner):
    """A planner that tries modules by name only."""

    def _gauss_seidel(self, index, guess, modules, limit):
        return [candidate(0.0, 0.0, sweeps=100 + modules)]


@pytest.mark.parametrize(("spread", "tried"), [(0.01, set()), (0.3, {104, 108})])
def test_modules_are_not_tried_where_one_sweep_is_enough(spread, tried):
    model = tiny_model(spread=spread)
    data = calibration(model, 6)
    planner = Listed(model, data.rows(slice(0, 4)), data.rows(slice(4, 6)), FlowGuidance(), batch_size=2, repeats=1)
    once = planner._jacobi(1, "zero", math.inf)[0]
    assert once.strategy.sweeps == 1 and (float(once.errors.mean()) > TOLERANCES[0]) == bool(tried)
    offered = {each.strategy.sweeps for each in planner.candidates(1, "zero", modules=(4, 8))}
    assert {sweeps for sweeps in offered if sweeps > 100} == tried


class Raced(Planner):
    """A planner whose race has known results: sequential, plan, fixed with the paper's guess, fixed with the linear.

    A plan that sweeps the first block too has a last rival that does so.
    """

    times = (1.0, 2.0, 4.0, 3.0)

    def race(self, rivals):
        assert rivals[0] == (BlockStrategy(),) * 3 and all(each[0] == BlockStrategy() for each in rivals[2:4])
        assert len(rivals) == (4 if rivals[1][0] == BlockStrategy() else 5)
        return [*self.times, 8.0][: len(rivals)]


def test_the_plan_must_be_faster_than_the_sequential_and_the_fixed_ways(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    model = tiny_model(spread=0.1)
    data = calibration(model, 12)
    model = fit_guesses(model, data.rows(slice(4, None)))
    given = (model, data.rows(slice(0, 2)), data.rows(slice(2, 4)), FlowGuidance(), 2, 1)
    plan = Raced(*given).plan(target_psnr=40.0)
    assert plan.strategies == (BlockStrategy(),) * 3 and plan.seconds == 1.0
    assert {"paper", "linear"} <= {row["guess"] for row in plan.fixed} <= {"paper", "linear", "linear, every block"}
    assert plan.fixed[-1]["guess"] == "linear" and plan.fixed[-1]["seconds"] == 3.0

    class FixedWins(Raced):
        times = (9.0, 2.0, 4.0, 1.5)

    plan = FixedWins(*given).plan(target_psnr=40.0)
    assert plan.seconds == 1.5 and plan.strategies[0] == BlockStrategy()
    assert {each.guess for each in plan.strategies[1:]} == {"linear"}


def test_the_dtype_on_the_disk(tmp_path):
    model = tiny_model(in_channels=3)
    model.save_pretrained(tmp_path / "usual" / "transformer")
    assert stored_dtype(tmp_path / "usual") == torch.float32
    with pytest.raises(ValueError, match="no floating-point weights"):
        stored_dtype(tmp_path / "none")


def test_fixed_ways_sweep_the_first_block_only_where_the_plan_does(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model = tiny_model(spread=0.1)
    data = calibration(model, 12)
    model = fit_guesses(model, data.rows(slice(4, None)))
    planner = Planner(model, data.rows(slice(0, 2)), data.rows(slice(2, 4)), FlowGuidance(), 2, 1)
    names = [rows[-1][1]["guess"] for rows in planner.rivals(["zero"] * 3, 40.0, sequential_first=True)]
    assert names == ["paper", "linear", "linear, bfloat16"]
    found = planner.rivals(["zero"] * 3, 40.0, sequential_first=False)
    swept = {rows[-1][1]["guess"]: rows[-1][0] for rows in found}
    assert list(swept) == [*names, "linear, every block", "linear, every block, bfloat16"]
    assert all(strategies[0] == BlockStrategy() for strategies in (swept[name] for name in names))
    sweeps = swept["linear, every block"][0].sweeps
    assert swept["linear, every block"] == (BlockStrategy(1, sweeps, "linear"),) * 3
    assert {each.bfloat16_sweeps for each in swept["linear, every block, bfloat16"]} == {
        swept["linear, every block, bfloat16"][0].sweeps - 1
    }


def test_nothing_that_misses_the_target_is_chosen():
    """Every candidate is predicted exact but is not: the sequential loop remains."""
    model = tiny_model()
    data = calibration(model, 4)
    planner = Planner(model, data.rows(slice(0, 2)), data.rows(slice(2, 4)), FlowGuidance(), batch_size=2)
    lie = Candidate(BlockStrategy(1, 1, "zero"), torch.zeros(2), 0.1)
    table = [[Candidate(BlockStrategy(), torch.zeros(2), 1.0), lie] for _ in range(3)]
    strategies, values = planner.search(table, [1.0] * 3, 60.0, None)
    assert strategies == (BlockStrategy(),) * 3 and float(values.min()) > 90


def test_command_writes_a_checkpoint_that_samples_by_its_plan(tmp_path, capsys):
    source, output = tmp_path / "source", tmp_path / "planned"
    pipe = TarFlowPipeline(tiny_model(spread=0.1, in_channels=3).half(), GSJacobiScheduler(), id2label={0: "a/b"})
    pipe.save_pretrained(source)
    (source / "README.md").write_text("card")
    arguments = [str(source), str(output), "--samples", "12", "--batch-size", "2", "--psnr", "35", "--device", "cpu"]
    assert main(arguments) == 0
    assert "unseen pictures: worst" in capsys.readouterr().out
    planned = load_pipeline(output)
    assert (output / "README.md").read_text() == "card"
    assert planned.transformer.config.guess_kernel == 3 and len(planned.scheduler.strategies) == 3
    planned.set_progress_bar_config(disable=True)
    given = {"generator": sample_generators(3, [0]), "output_type": "pt", "denoise_strength": 0.0}
    fast = planned([1], **given).images
    exact = planned([1], strategy="sequential", **{**given, "generator": sample_generators(3, [0])}).images
    assert float(psnr(fast * 2 - 1, exact * 2 - 1)) > 30
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([str(output), str(tmp_path / "again"), "--kernel", "5", "--device", "cpu"]) == 2
    assert "has a linear guess already (guess_kernel 3)" in capsys.readouterr().err


def test_command_fits_a_stale_guess_again_and_keeps_compact_weights(tmp_path):
    flow = tiny_model(spread=0.1, in_channels=3, guess_kernel=3)
    source, output = tmp_path / "source", tmp_path / "planned"
    TarFlowPipeline(flow, GSJacobiScheduler()).save_pretrained(source)
    shutil.rmtree(source / "transformer")
    save_compact(flow, source / "transformer")
    arguments = [str(source), str(output), "--samples", "12", "--batch-size", "2", "--psnr", "35", "--device", "cpu"]
    assert main([*arguments, "--refit", "--kernel", "5"]) == 0
    assert [path.name for path in output.rglob("*.safetensors")] == ["weights.int8.safetensors"]
    before, after = load_pipeline(source).transformer, load_pipeline(output).transformer
    assert after.config.guess_kernel == 5 and after.blocks[1].guess.weight.abs().max() > 0.01
    for name, value in before.state_dict().items():
        if ".guess." not in name:
            torch.testing.assert_close(after.state_dict()[name], value, rtol=1e-6, atol=0, msg=name)

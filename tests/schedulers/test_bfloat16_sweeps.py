"""First sweeps in bfloat16: what runs in it, who may stop when, the error left, offloading, saving, planning."""

import json

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading

from dit_suite.schedulers.flow_system import why_not_bfloat16
from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler, solve
from dit_suite.schedulers.tarflow_planner import TOLERANCES, Planner, calibrate, fit_guesses
from dit_suite.schedulers.tarflow_strategy import BlockStrategy, FlowGuidance
from tests.models.test_tarflow import tiny_model
from tests.pipelines.test_pipeline_tarflow import linear_pipe, run
from tests.schedulers.test_gs_jacobi import GUIDED, LABELS, TOKENS, noise


def units(monkeypatch, present: bool) -> None:
    """Torch computes in bfloat16 on every processor: only the choice depends on this answer."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: present)


@pytest.fixture
def with_units(monkeypatch):
    units(monkeypatch, True)


@pytest.fixture
def without_units(monkeypatch):
    units(monkeypatch, False)


def rms(error: torch.Tensor) -> torch.Tensor:
    return error.square().mean(dim=(1, 2)).sqrt()


def reduced_pipe(count: int = 1):
    """Starts its sweeps from a linear guess, the first `count` of them in bfloat16."""
    pipe = linear_pipe()
    given = {name: pipe.scheduler.config[name] for name in ("modules", "guesses")}
    most = [0, min(count, 2), min(count, 1)]
    pipe.scheduler = GSJacobiScheduler(sweeps=[1, 3, 2], bfloat16_sweeps=most, **given)
    return pipe


@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("guidance", [FlowGuidance(), GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("count", [1, 2])
def test_samples_still_reach_the_tolerated_error(with_units, count, guidance, modules):
    """Also where the tolerance is far below the rounding of bfloat16. Errors of one module pass into the next."""
    model, z = tiny_model(), noise(4)
    block, scheduler = model.blocks[1], GSJacobiScheduler()
    exact = scheduler.step(block, 1, z, LABELS, guidance).tokens
    for tolerance in (3e-2, 1e-3, 1e-5):
        strategy = BlockStrategy(modules, 12, tolerance=tolerance, bfloat16_sweeps=count)
        trace = scheduler.step(block, 1, z, LABELS, guidance, strategy)
        assert rms(trace.tokens - exact).max() < 2 * modules * tolerance
        assert trace.bfloat16_calls == count * modules < trace.calls and trace.note == ""


def test_enough_float32_sweeps_are_exact_and_bfloat16_ones_are_not(with_units):
    model, z = tiny_model(), noise(3)
    exact = solve(model, z, LABELS[:3], GSJacobiScheduler()).tokens
    for modules, length in ((1, TOKENS - 1), (3, 3)):
        given = {"modules": [modules] * 3, "sweeps": [length + 2] * 3}
        found = solve(model, z, LABELS[:3], GSJacobiScheduler(**given, bfloat16_sweeps=[2] * 3)).tokens
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)
    rounded = GSJacobiScheduler([1] * 3, [TOKENS + 2] * 3, bfloat16_sweeps=[TOKENS + 1] * 3)
    error = rms(solve(model, z, LABELS[:3], rounded).tokens - exact)
    assert error.min() > 1e-5 and error.max() < 3e-2


@pytest.mark.parametrize("guidance", [FlowGuidance(), GUIDED], ids=["plain", "guided"])
def test_the_network_of_the_first_sweeps_runs_in_bfloat16(with_units, guidance):
    """Every module again begins with them; the state and the map itself stay in float32."""
    model, seen = tiny_model(), []
    model.blocks[1].layers[0].ff_out.register_forward_hook(lambda m, a, output: seen.append(output.dtype))
    strategy = BlockStrategy(2, 3, bfloat16_sweeps=1)
    trace = GSJacobiScheduler().step(model.blocks[1], 1, noise(2), LABELS[:2], guidance, strategy)
    assert seen == [torch.bfloat16, torch.float32, torch.float32] * 2 and trace.bfloat16_calls == 2
    assert trace.tokens.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("stopping", ["sample", "batch"])
def test_nobody_stops_before_a_float32_sweep(with_units, stopping):
    scheduler = GSJacobiScheduler(stopping=stopping)
    strategy = BlockStrategy(1, 6, tolerance=1e9, bfloat16_sweeps=2)
    trace = scheduler.step(tiny_model().blocks[0], 0, noise(2), strategy=strategy)
    assert trace.calls == 3 and trace.sweeps.tolist() == [3, 3]


def test_samples_do_not_influence_each_other(with_units):
    model = tiny_model(spread=0.3)
    z = noise(4)
    z[1] *= 0.01
    scheduler = GSJacobiScheduler([1, 2, 1], [12] * 3, tolerance=1e-3, bfloat16_sweeps=[1, 1, 2])
    together = solve(model, z, LABELS, scheduler)
    sweeps = torch.stack([trace.sweeps for trace in together.blocks])
    assert len(set(sweeps.flatten().tolist())) > 1
    for i in range(4):
        alone = solve(model, z[i : i + 1], LABELS[i : i + 1], scheduler)
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], atol=5e-4, rtol=0)


def test_without_units_it_is_the_float32_run_bit_for_bit_and_says_so(without_units):
    block, z = tiny_model().blocks[1], noise(4)
    step = GSJacobiScheduler().step
    for strategy in (BlockStrategy(1, 9, tolerance=1e-3), BlockStrategy(2, 4)):
        wanted = step(block, 1, z, LABELS, strategy=strategy)
        asked = BlockStrategy(strategy.modules, strategy.sweeps, tolerance=strategy.tolerance, bfloat16_sweeps=1)
        found = step(block, 1, z, LABELS, strategy=asked)
        assert torch.equal(found.tokens, wanted.tokens) and found.sweeps.tolist() == wanted.sweeps.tolist()
        assert found.bfloat16_calls == 0 and "no bfloat16 matrix units" in found.note and wanted.note == ""


def test_where_it_is_not_used(with_units):
    cpu = torch.device("cpu")
    assert why_not_bfloat16(cpu, torch.float32) == ""
    assert why_not_bfloat16(cpu, torch.float16) == "the weights are in float16, not float32"
    assert "meta" in why_not_bfloat16(torch.device("meta"), torch.float32)
    model = tiny_model().bfloat16()
    trace = GSJacobiScheduler().step(model.blocks[0], 0, noise(1), strategy=BlockStrategy(1, 3, bfloat16_sweeps=1))
    assert trace.bfloat16_calls == 0 and "weights are in bfloat16" in trace.note


def test_offloading_inference_mode_and_gradients_change_nothing(with_units, tmp_path):
    pipe = reduced_pipe()
    wanted = run(pipe)
    assert np.abs(wanted - run(pipe, bfloat16_sweeps=0)).max() > 1e-5
    pipe.transformer.requires_grad_(True)
    np.testing.assert_allclose(run(pipe), wanted, atol=1e-6)
    with torch.inference_mode():
        np.testing.assert_allclose(run(pipe), wanted, atol=1e-6)
    apply_group_offloading(
        pipe.transformer, torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    np.testing.assert_allclose(run(pipe), wanted, atol=1e-6)
    pipe = reduced_pipe()
    cpu_offload(pipe.transformer, torch.device("cpu"))
    np.testing.assert_allclose(run(pipe), wanted, atol=1e-6)


def test_weights_changed_after_a_call_count_in_the_next(with_units):
    """Gradients on: torch keeps casts of such weights where a cache is allowed."""
    pipe, other = reduced_pipe(), reduced_pipe()
    for each in (pipe, other):
        each.transformer.requires_grad_(True)
    before = run(pipe)
    for each in (pipe, other):
        with torch.no_grad():
            each.transformer.blocks[1].layers[0].to_qkv.weight.mul_(0.5)
    assert np.array_equal(run(pipe), run(other)) and not np.array_equal(run(pipe), before)


def test_option_of_the_call(with_units):
    pipe = reduced_pipe(2)
    assert [row.bfloat16_sweeps for row in pipe.block_strategies("planned", 1, 1)] == [0, 2, 1]
    assert [row.bfloat16_sweeps for row in pipe.block_strategies("planned", 1, 1, bfloat16_sweeps=9)] == [0, 2, 1]
    assert [row.bfloat16_sweeps for row in pipe.block_strategies("gauss-seidel", 3, 2, bfloat16_sweeps=1)] == [1] * 3
    assert [row.bfloat16_sweeps for row in pipe.block_strategies("jacobi", 3, 1)] == [0] * 3
    assert np.array_equal(run(pipe, bfloat16_sweeps=0), run(linear_pipe(), bfloat16_sweeps=0))
    traces = pipe([0], output_type="latent").blocks
    assert [trace.bfloat16_calls for trace in traces] == [0, 2, 3]


def test_strategy_file(tmp_path):
    """One without the list opens as before."""
    scheduler = GSJacobiScheduler([0, 1, 4], [1, 2, 3], bfloat16_sweeps=[0, 1, 2])
    scheduler.save_pretrained(tmp_path)
    loaded = GSJacobiScheduler.from_pretrained(tmp_path)
    assert loaded.strategies == scheduler.strategies
    assert [each.bfloat16_sweeps for each in loaded.strategies] == [0, 1, 2]
    file = tmp_path / "scheduler_config.json"
    older = {name: value for name, value in json.loads(file.read_text()).items() if name != "bfloat16_sweeps"}
    file.write_text(json.dumps(older))
    loaded = GSJacobiScheduler.from_pretrained(tmp_path)
    assert [(each.modules, each.sweeps, each.bfloat16_sweeps) for each in loaded.strategies] == [
        (0, 1, 0), (1, 2, 0), (4, 3, 0)
    ]  # fmt: skip


@pytest.mark.parametrize(("modules", "sweeps", "count"), [(0, 5, 1), (1, 2, 2), (1, 1, 1), (4, 3, -1)])
def test_the_last_sweep_and_the_sequential_loop_are_never_in_bfloat16(modules, sweeps, count):
    with pytest.raises(ValueError, match="bfloat16_sweeps must be between 0 and"):
        BlockStrategy(modules, sweeps, bfloat16_sweeps=count)
    with pytest.raises(ValueError, match="bfloat16_sweeps must be between 0 and"):
        GSJacobiScheduler([modules], [sweeps], bfloat16_sweeps=[count])


class Timed(Planner):
    """Times are made up: a sweep 1 s, one in bfloat16 a quarter of it, the sequential loop 100 s."""

    def _seconds(self, index, strategy):
        return 100.0 if strategy.modules == 0 else strategy.sweeps - 0.75 * strategy.bfloat16_sweeps

    def race(self, rivals):
        steps = [sum(self._seconds(0, each) for each in rival) for rival in rivals]
        return [0.01 * step if number == 1 else step for number, step in enumerate(steps)]


def planner() -> Planner:
    model = tiny_model(spread=0.1)
    z = torch.randn(24, TOKENS, 8, generator=torch.Generator().manual_seed(5))
    data = calibrate(model, z, torch.arange(24) % 3, FlowGuidance())
    model = fit_guesses(model, data.rows(slice(12, None))).requires_grad_(False)
    return Timed(model, data.rows(slice(0, 8)), data.rows(slice(8, 12)), FlowGuidance(), 2, 1)


def test_planner_measures_what_the_solver_does(with_units):
    """Errors of its one run for all candidates equal those of the strategies solved by themselves."""
    own = planner()
    found = own._jacobi(1, "linear", float("inf"), bfloat16=2)
    assert [each.strategy for each in found] == [BlockStrategy(1, 8, "linear", t, 2) for t in TOLERANCES]
    for each in found:
        torch.testing.assert_close(own._candidate(1, each.strategy).errors, each.errors, atol=2e-5, rtol=1e-2)


def test_a_plan_is_judged_by_its_worse_run(monkeypatch):
    """In float32 a loose tolerance lets every sample stop after one sweep; with bfloat16 after two."""
    own = planner()
    strategies = (BlockStrategy(), *[BlockStrategy(1, 8, "linear", 10.0, 1)] * 2)
    units(monkeypatch, True)
    one, two = (own.check((BlockStrategy(), *[BlockStrategy(1, sweeps, "linear")] * 2)) for sweeps in (1, 2))
    assert two.min() > one.max() and torch.equal(own.check(strategies), one)
    found = {each.strategy: each for each in own.candidates(1, "latent")}
    for tolerance in TOLERANCES:
        plain = found[BlockStrategy(1, 8, "linear", tolerance)]
        for sweeps in (1, 2, 3):
            reduced = found[BlockStrategy(1, 8, "linear", tolerance, sweeps)]
            assert (reduced.errors >= plain.errors).all()
            assert reduced.seconds >= sweeps / 4 + 1


def test_planner_offers_it_where_it_is_faster(monkeypatch):
    own = planner()
    units(monkeypatch, True)
    plan = own.plan(target_psnr=45.0)
    assert any(each.bfloat16_sweeps for each in plan.strategies)
    assert plan.scheduler({}).strategies == plan.strategies
    fixed = {row["guess"].replace(", every block", "") for row in plan.fixed}
    assert fixed == {"paper", "linear", "linear, bfloat16"}
    units(monkeypatch, False)
    plan = own.plan(target_psnr=45.0)
    assert not any(each.bfloat16_sweeps for each in plan.strategies)
    assert plan.scheduler({}).config.bfloat16_sweeps is None
    assert {row["guess"].replace(", every block", "") for row in plan.fixed} == {"paper", "linear"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu():
    model, z = tiny_model().cuda(), noise(4).cuda()
    exact = GSJacobiScheduler().step(model.blocks[1], 1, z, LABELS.cuda()).tokens
    strategy = BlockStrategy(1, 12, tolerance=1e-4, bfloat16_sweeps=1)
    trace = GSJacobiScheduler().step(model.blocks[1], 1, z, LABELS.cuda(), strategy=strategy)
    assert trace.bfloat16_calls == 1 and rms(trace.tokens - exact).max() < 2e-4

"""GS-Jacobi solvers: exactness, causality, per-sample stopping, NaN safety, partitions, metrics, golden parity."""

from pathlib import Path

import pytest
import torch

from dit_suite.golden import read_fixture
from dit_suite.golden.gs_jacobi import check
from dit_suite.schedulers.flow_system import estimated_error
from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler, solve
from dit_suite.schedulers.tarflow_metrics import flow_metrics
from dit_suite.schedulers.tarflow_strategy import BlockStrategy, FlowGuidance
from tests.models.test_tarflow import images, tiny_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TOKENS = 9
GUIDED = FlowGuidance(0.7, "ab", 0.8, annealed=True)


def noise(count: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, TOKENS, 8, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize("name", ["gs_jacobi_cond", "gs_jacobi_uncond", "gs_jacobi_metrics"])
def test_golden(name):
    results = check(*read_fixture(GOLDEN / f"{name}.safetensors"))
    assert len(results) >= 20
    assert not [(r.name, r.error) for r in results if not r.passed]


@pytest.mark.parametrize("guidance", [FlowGuidance(), GUIDED], ids=["plain", "guided"])
def test_sequential_equals_the_prefix_reference(guidance):
    model = tiny_model()
    z = noise(2)
    found = solve(model, z, LABELS[:2], GSJacobiScheduler(), guidance).tokens
    if not guidance.active:
        for block in reversed(model.blocks):
            z = block.reverse_by_prefix(z, LABELS[:2])
        torch.testing.assert_close(found, z, atol=1e-5, rtol=0)
    else:
        full = GSJacobiScheduler(modules=[1] * 3, sweeps=[TOKENS - 1] * 3)
        torch.testing.assert_close(found, solve(model, z, LABELS[:2], full, guidance).tokens, atol=1e-5, rtol=0)
        plain = solve(model, z, LABELS[:2], GSJacobiScheduler()).tokens
        assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("guess", ["latent", "zero", "linear"])
@pytest.mark.parametrize("modules", [1, 2, 3, 4, 5, 8])
def test_enough_sweeps_are_exact_for_every_partition(modules, guess):
    """9 tokens: only 1 and 3 divide them. A module of L tokens is exact after L sweeps."""
    model = tiny_model(guess_kernel=3)
    for block in model.blocks:
        torch.nn.init.normal_(block.guess.weight, std=0.1)
    exact = solve(model, noise(3), LABELS[:3], GSJacobiScheduler()).tokens
    length = -(-TOKENS // modules)
    scheduler = GSJacobiScheduler([modules] * 3, [length] * 3, [guess] * 3)
    solution = solve(model, noise(3), LABELS[:3], scheduler)
    torch.testing.assert_close(solution.tokens, exact, atol=1e-5, rtol=0)
    if length > 2 and modules > 1:
        short = GSJacobiScheduler([modules] * 3, [1] * 3, [guess] * 3)
        assert (solve(model, noise(3), LABELS[:3], short).tokens - exact).abs().max() > 1e-4


def test_first_tokens_are_exact_after_each_sweep():
    model, scheduler = tiny_model(), GSJacobiScheduler()
    block, z = model.blocks[-2], noise(2)
    exact = block.order(scheduler.step(block, 1, z, LABELS[:2]).tokens)
    for sweeps in (1, 3, 5):
        found = scheduler.step(block, 1, z, LABELS[:2], strategy=BlockStrategy(1, sweeps, "zero")).tokens
        error = (block.order(found) - exact).abs().amax(dim=(0, 2))
        assert error[: sweeps + 1].max() < 1e-5
        assert error[sweeps + 1] > 1e-4


def test_calls_cover_every_token():
    for tokens in (2, 7, 16):
        for modules in range(1, tokens + 2):
            covered = [0] * tokens
            for start, end, _ in BlockStrategy(modules, 2).calls(tokens):
                for position in range(start, end):
                    covered[position + 1] += 1
            wanted = 1 if modules >= tokens else 2
            assert covered[0] == 0 and set(covered[1:]) == {wanted}, (tokens, modules)


def test_number_of_sweeps():
    model, z = tiny_model(), noise(2)
    block = model.blocks[0]
    everything = GSJacobiScheduler(tolerance=1e9).step(block, 0, z, strategy=BlockStrategy(1, 6))
    assert everything.calls == 1 and everything.sweeps.tolist() == [1, 1]
    fixed = GSJacobiScheduler(tolerance=-1.0).step(block, 0, z, strategy=BlockStrategy(1, 20))
    assert fixed.calls == 20
    assert fixed.residual_norms()[TOKENS:].max() < 1e-7
    stopped = GSJacobiScheduler(tolerance=0.0).step(block, 0, z, strategy=BlockStrategy(1, 20))
    assert TOKENS - 2 <= stopped.calls <= TOKENS
    torch.testing.assert_close(stopped.tokens, fixed.tokens, atol=1e-6, rtol=0)


def test_error_estimate_of_geometric_convergence_is_exact():
    errors = torch.tensor([0.8, 0.2, 0.05, 0.0125])
    changes = errors[:-1] - errors[1:]
    for k in (1, 2):
        estimate = estimated_error(changes[k : k + 1], changes[k - 1 : k])
        torch.testing.assert_close(estimate, errors[k + 1 : k + 2])
    assert float(estimated_error(changes[:1], None)) == float(changes[0])
    stuck = torch.tensor([0.3])
    assert float(estimated_error(stuck, stuck)) > 0.3
    assert float(estimated_error(torch.zeros(1), torch.zeros(1))) == 0.0


@pytest.mark.parametrize("modules", [1, 2])
def test_samples_keep_about_the_tolerated_error(modules):
    model, z = tiny_model(), noise(4)
    block, scheduler = model.blocks[1], GSJacobiScheduler()
    exact = scheduler.step(block, 1, z, LABELS).tokens
    for tolerance in (3e-2, 1e-3):
        trace = scheduler.step(block, 1, z, LABELS, strategy=BlockStrategy(modules, 9, tolerance=tolerance))
        assert (trace.tokens - exact).square().mean(dim=(1, 2)).sqrt().max() < 2 * tolerance
        assert trace.calls < 8 * modules


@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("guidance", [FlowGuidance(), GUIDED], ids=["plain", "guided"])
def test_samples_stop_alone_and_do_not_influence_each_other(modules, guidance):
    model = tiny_model(spread=0.3)
    z = noise(4)
    z[1] *= 0.01
    scheduler = GSJacobiScheduler([modules] * 3, [12] * 3, tolerance=1e-3)
    together = solve(model, z, LABELS, scheduler, guidance)
    sweeps = torch.stack([trace.sweeps for trace in together.blocks])
    assert len(set(sweeps.flatten().tolist())) > 1
    for i in range(4):
        alone = solve(model, z[i : i + 1], LABELS[i : i + 1], scheduler, guidance)
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], atol=2e-6, rtol=0)
        assert [int(t.sweeps[0]) for t in alone.blocks] == sweeps[:, i].tolist()


@pytest.mark.parametrize("modules", [1, 2])
def test_finished_samples_leave_the_batch(modules):
    """And come back for the next module."""
    model, sizes = tiny_model(spread=0.3), {0: [], 1: [], 2: []}
    z = noise(4)
    z[1] *= 0.01
    for index, block in enumerate(model.blocks):
        block.proj_in.register_forward_pre_hook(lambda module, args, own=sizes[index]: own.append(args[0].shape[0]))
    solution = solve(model, z, LABELS, GSJacobiScheduler([modules] * 3, [12] * 3, tolerance=1e-3))
    smaller = 0
    for trace in solution.blocks:
        own = sizes[trace.block]
        assert len(own) == trace.calls and sum(own) == int(trace.sweeps.sum())
        for module in range(modules):
            part = [size for size, number in zip(own, trace.modules, strict=True) if number == module]
            assert part[0] == 4 and part == sorted(part, reverse=True)
            smaller += part[-1] < 4
    assert smaller


def test_pooled_stopping_depends_on_the_batch_but_sample_stopping_does_not():
    model = tiny_model(spread=0.3)
    z = noise(2)
    z[1] *= 0.01
    pooled = GSJacobiScheduler([1] * 3, [12] * 3, tolerance=1e-3, stopping="batch")
    assert all(len(set(trace.sweeps.tolist())) == 1 for trace in solve(model, z, LABELS[:2], pooled).blocks)


def test_clamp_bounds_updates_and_is_off_by_default():
    model = tiny_model(spread=0.3)
    z = 3 * noise(2)
    block = model.blocks[0]
    strategy = BlockStrategy(3, 3)
    clamped = GSJacobiScheduler(clamp=0.5).step(block, 0, z, strategy=strategy).tokens
    assert clamped[:, 1:].abs().max() <= 0.5 and torch.equal(clamped[:, 0], z[:, 0])
    assert GSJacobiScheduler().step(block, 0, z, strategy=strategy).tokens.abs().max() > 0.5


def test_diverging_sweeps_fall_back_to_the_sequential_solution():
    """Iterates beyond any data range are taken for divergence; the sample's true solution may still be that large."""
    model = tiny_model(volume_preserving=True)
    z, huge, scheduler, strategy = noise(3), noise(3), GSJacobiScheduler(), BlockStrategy(3, 2)
    huge[1, 4, 0] = 5e6
    trace = scheduler.step(model.blocks[0], 0, huge, LABELS[:3], strategy=strategy)
    assert trace.fallbacks == (1,) and torch.isfinite(trace.tokens).all()
    exact = scheduler.step(model.blocks[0], 0, huge, LABELS[:3]).tokens
    torch.testing.assert_close(trace.tokens[1], exact[1], rtol=1e-5, atol=1e-5)
    plain = scheduler.step(model.blocks[0], 0, z, LABELS[:3], strategy=strategy)
    assert plain.fallbacks == ()
    for row in (0, 2):
        torch.testing.assert_close(trace.tokens[row], plain.tokens[row], rtol=0, atol=1e-6)
        assert (plain.tokens[row] - exact[row]).abs().max() > 1e-5


def test_nan_noise_is_reported_and_stays_in_its_sample():
    model = tiny_model()
    z = noise(3)
    z[2, 4, 0] = float("nan")
    for strategy in (BlockStrategy(), BlockStrategy(3, 2), BlockStrategy(1, 4)):
        with pytest.raises(FloatingPointError, match=r"sample\(s\) 2 of the batch"):
            GSJacobiScheduler().step(model.blocks[0], 0, z, strategy=strategy)


def test_later_modules_never_change_earlier_tokens():
    model = tiny_model()
    z = noise(1)
    changed = z.clone()
    changed[:, 6] += 1.0
    scheduler, strategy = GSJacobiScheduler(), BlockStrategy(3, 2)
    one = scheduler.step(model.blocks[0], 0, z, strategy=strategy).tokens
    two = scheduler.step(model.blocks[0], 0, changed, strategy=strategy).tokens
    assert torch.equal(one[:, :6], two[:, :6]) and not torch.equal(one[:, 6:], two[:, 6:])


def test_inputs_are_not_modified_and_calls_are_counted():
    model, z = tiny_model(), noise(2)
    before = z.clone()
    solution = solve(model, z, LABELS[:2], GSJacobiScheduler())
    assert torch.equal(z, before)
    assert [trace.calls for trace in solution.blocks] == [TOKENS - 1] * 3
    assert [trace.block for trace in solution.blocks] == [2, 1, 0]
    torch.testing.assert_close(model(model.unpatchify(solution.tokens), LABELS[:2]).latents, z, atol=1e-4, rtol=0)


def test_volume_preserving_noise_is_scaled():
    model = tiny_model(volume_preserving=True, num_classes=0)
    model.var.mul_(4.0)
    z = noise(2)
    image = model.unpatchify(solve(model, z, None, GSJacobiScheduler([1] * 3, [4] * 3)).tokens)
    exact = model.unpatchify(solve(model, z, None, GSJacobiScheduler()).tokens)
    torch.testing.assert_close(model(exact).latents, 2 * z, atol=1e-4, rtol=0)
    assert (image - exact).abs().max() < 0.5


def test_guidance_without_a_weaker_branch_does_nothing():
    model = tiny_model(num_classes=0)
    plain = solve(model, noise(1), None, GSJacobiScheduler()).tokens
    assert torch.equal(plain, solve(model, noise(1), None, GSJacobiScheduler(), FlowGuidance(2.0)).tokens)
    assert torch.equal(plain, solve(model, noise(1), None, GSJacobiScheduler(), FlowGuidance(2.0, "")).tokens)
    heated = solve(model, noise(1), None, GSJacobiScheduler(), FlowGuidance(2.0, temperature=0.3)).tokens
    assert (plain - heated).abs().max() > 1e-4


def test_interruption_stops_before_the_next_call():
    model = tiny_model()
    seen = []
    trace = GSJacobiScheduler().step(
        model.blocks[0], 0, noise(1), progress=seen.append, should_stop=lambda: len(seen) == 3
    )
    assert trace.interrupted and trace.calls == 3


def test_interruption_between_the_sweeps_of_a_module():
    """Three modules of 4 sweeps, stopped before the sixth: the later modules still hold their first guess."""
    model, z, seen = tiny_model(), noise(2), []
    trace = GSJacobiScheduler().step(
        model.blocks[0], 0, z, strategy=BlockStrategy(3, 4), progress=seen.append, should_stop=lambda: len(seen) == 5
    )
    assert trace.interrupted and trace.calls == 5 and trace.modules == [0, 0, 0, 0, 1]
    assert torch.equal(trace.tokens[:, 7:], z[:, 7:]) and not torch.equal(trace.tokens[:, 4:6], z[:, 4:6])


def test_interruption_of_the_sequential_fallback():
    """All sweeps run, one sample diverges, and its sequential solution is stopped after two calls of eight."""
    model, huge, asked = tiny_model(volume_preserving=True), noise(3), []
    huge[1, 4, 0] = 5e6

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 6 + 2

    done = []
    trace = GSJacobiScheduler().step(
        model.blocks[0], 0, huge, LABELS[:3], strategy=BlockStrategy(3, 2), progress=done.append, should_stop=stop
    )
    assert trace.fallbacks == (1,) and trace.interrupted and trace.calls == 6 + 2
    assert sum(done) == 6


def test_scheduler_config_round_trip(tmp_path):
    scheduler = GSJacobiScheduler([0, 1, 4], [1, 2, 3], ["latent", "linear", "zero"], [-1.0, 0.02, 0.1], tolerance=0.01)
    scheduler.save_pretrained(tmp_path)
    loaded = GSJacobiScheduler.from_pretrained(tmp_path)
    assert loaded.strategies == scheduler.strategies
    assert loaded.strategy_of(2, 3) == BlockStrategy() and loaded.strategy_of(0, 3).tolerance == 0.1
    assert [len(loaded.strategy_of(block, 3).calls(TOKENS)) for block in (2, 1, 0)] == [8, 2, 12]


def test_bad_strategies_are_refused():
    with pytest.raises(ValueError, match="one length"):
        GSJacobiScheduler([1, 1], [2])
    with pytest.raises(ValueError, match="3 blocks"):
        solve(tiny_model(num_blocks=4), noise(1), None, GSJacobiScheduler([1, 1, 1]))
    with pytest.raises(ValueError, match="sweeps 1 or more"):
        BlockStrategy(1, 0)
    with pytest.raises(ValueError, match="tolerance must be a number"):
        GSJacobiScheduler([1], tolerances=[float("nan")])
    with pytest.raises(ValueError, match="letters a and b"):
        FlowGuidance(1.0, "ac")
    with pytest.raises(ValueError, match="plan_tarflow"):
        GSJacobiScheduler().step(tiny_model().blocks[0], 0, noise(1), strategy=BlockStrategy(1, 1, "linear"))


def test_metrics_of_an_identity_flow_are_zero_and_shares_sum_to_100():
    model = tiny_model()
    metrics = flow_metrics(model, images(4))
    assert abs(float(metrics.crm_share.sum()) - 100) < 1e-3
    assert metrics.guesses() == ["latent" if a <= b else "zero" for a, b in reversed(metrics.igm.tolist())]
    for block in model.blocks:
        torch.nn.init.zeros_(block.proj_out.weight)
        torch.nn.init.zeros_(block.proj_out.bias)
    identity = flow_metrics(model, images(4))
    assert identity.igm.abs().max() == 0 and identity.crm_parts[:, 3].max() == 0

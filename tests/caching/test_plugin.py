"""The plug-in on tiny diffusers transformers: what is computed, what is reused, and what is left behind."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

from dit_suite.caching.bac import apply_bac
from dit_suite.caching.block_probe import find_units
from dit_suite.caching.plan import BACConfig, BACSchedule, build_schedule
from dit_suite.caching.profile import SimilarityProfile
from dit_suite.caching.recorder import FlopMeter, ProfileRecorder
from dit_suite.step_plan import Run, StepContext, publish_step

NAMES = ("dit", "pixart", "sd3", "flux", "wan", "hunyuan", "cogvideox", "ltx", "latte")
SUBBLOCK = {"granularity": "subblock", "predictor": "reuse", "order": 1}


def profile_of(case) -> SimilarityProfile:
    with ProfileRecorder(case.model) as recorder:
        case.sample()
        case.sample(shift=0.1)
    return recorder.profile()


def leftovers(model: torch.nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if "_diffusers_hook" in vars(m) or "forward" in vars(m)]


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_every_architecture(case) -> None:
    plain = case.sample()
    profile = profile_of(case)
    assert profile.num_runs == 2 and profile.num_evaluations == 5
    assert leftovers(case.model) == []
    for granularity in ("subblock", "block", "stack"):
        if granularity == "stack" and case.name == "latte":
            with pytest.raises(ValueError, match="don't follow one another"):
                profile.select("stack")
            continue
        count = len(profile.select(granularity))
        with apply_bac(case.model, BACConfig(budget=5, granularity=granularity), profile=profile):
            full = case.sample()
        assert all(torch.equal(a, b) for a, b in zip(plain, full, strict=True))
        schedule = build_schedule(profile, BACConfig(budget=3, granularity=granularity, order=2))
        with apply_bac(case.model, schedule) as handle:
            cached = case.sample()
            again = case.sample()
            facts = handle.stats()
        assert sum(facts["computed"].values()) == 2 * 3 * count
        assert sum(facts["reused"].values()) == 2 * 2 * count
        assert facts["runs"] == 2 and facts["peak_bytes"] > 0
        assert torch.equal(cached[0], plain[0])
        skipped = sorted(set(range(5)) - set(schedule.plan("*").steps[0]))
        assert not torch.equal(cached[skipped[0]], plain[skipped[0]])
        assert all(torch.equal(a, b) for a, b in zip(cached, again, strict=True))
    assert leftovers(case.model) == []
    assert all(torch.equal(a, b) for a, b in zip(plain, case.sample(), strict=True))


def test_units_of_known_classes(case_names=NAMES) -> None:
    from tests.caching.conftest import Case

    kinds = {name: [unit.kind for unit in find_units(Case(name).model, "subblock")] for name in case_names}
    assert kinds["dit"] == ["sa", "ffn"] * 2
    assert kinds["pixart"] == kinds["wan"] == kinds["ltx"] == ["sa", "ca", "ffn"] * 2
    assert kinds["sd3"] == ["sa", "ffn", "ffn", "sa", "ffn"]
    assert kinds["flux"] == kinds["hunyuan"] == ["sa", "ffn", "ffn"] * 2 + ["block"] * 2
    assert kinds["latte"] == ["sa", "ca", "ffn"] * 2 + ["sa", "ffn"] * 2


def test_reuse_returns_the_cached_branch(pixart) -> None:
    """At a skipped step, a reused sub-block gives exactly its last computed output and does not run."""
    seen: list[torch.Tensor] = []
    module = pixart.model.transformer_blocks[0].ff
    schedule = build_schedule(profile_of(pixart), BACConfig(budget=3, schedule="uniform", **SUBBLOCK))
    steps = schedule.plan("*").steps[0]
    runs: list[int] = []
    inner = module.net[0].register_forward_hook(lambda *_: runs.append(1))
    with apply_bac(pixart.model, schedule):
        watch = pixart.model.transformer_blocks[0].register_forward_hook(lambda *_: None)
        original = module.forward
        module.forward = lambda *a, **k: seen.append(original(*a, **k)) or seen[-1]
        pixart.sample()
        module.forward = original
        watch.remove()
    inner.remove()
    assert steps == (0, 1, 3) and len(runs) == 3
    assert torch.equal(seen[1], seen[2]) and torch.equal(seen[3], seen[4]) and not torch.equal(seen[2], seen[3])


def test_forecast_is_the_weighted_sum_of_computed_outputs(pixart) -> None:
    profile = profile_of(pixart)
    schedule = build_schedule(profile, BACConfig(budget=3, granularity="block", order=2))
    steps = schedule.plan("*").steps[0]
    step = next(k for k in range(2, 5) if k not in steps)
    anchors = [c for c in reversed(steps) if c < step][:2]
    increments: dict[int, torch.Tensor] = {}
    with apply_bac(pixart.model, schedule):
        block = pixart.model.transformer_blocks[1]
        original, count = block.forward, []

        def watched(hidden_states, *args, **kwargs):
            output = original(hidden_states, *args, **kwargs)
            increments[len(count)] = output - hidden_states
            count.append(1)
            return output

        block.forward = watched
        pixart.sample()
        block.forward = original
    weights = schedule.plan("*").weights[1][step]
    expected = sum(w * increments[a] for w, a in zip(weights, anchors, strict=True))
    torch.testing.assert_close(increments[step], expected, atol=1e-5, rtol=1e-4)


def test_guidance_branches_do_not_mix(pixart) -> None:
    profile = profile_of(pixart)
    schedule = build_schedule(profile, BACConfig(budget=2, **SUBBLOCK))
    other = {"cond": pixart.start, "uncond": pixart.start.flip(0) + 0.5}

    @torch.no_grad()
    def run(order: tuple[str, ...]) -> dict[str, list[torch.Tensor]]:
        outputs: dict[str, list[torch.Tensor]] = {branch: [] for branch in order}
        run_key = Run()
        for k in range(5):
            for branch in order:
                with publish_step(StepContext(k, 5, 900.0 - 150.0 * k, branch, 0, run_key)):
                    outputs[branch].append(pixart.call(other[branch], 900.0 - 150.0 * k))
        return outputs

    with apply_bac(pixart.model, schedule):
        both, reverse, alone = run(("cond", "uncond")), run(("uncond", "cond")), run(("uncond",))
    for branch in both:
        assert all(torch.equal(a, b) for a, b in zip(both[branch], reverse[branch], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(both["uncond"], alone["uncond"], strict=True))


@pytest.mark.parametrize("case", ["pixart", "wan"], indirect=True)
@pytest.mark.parametrize("evaluation", [0, 3])
def test_error_in_mid_run_leaves_nothing(case, evaluation: int) -> None:
    """An evaluation that fails ends its run, also where the next run starts at the same timestep."""
    schedule = build_schedule(profile_of(case), BACConfig(budget=2, **SUBBLOCK))
    block = next(m for name, m in case.model.named_modules() if name.endswith("blocks.1"))
    passes: list[int] = []

    def fail(*_) -> None:
        passes.append(1)
        if len(passes) == evaluation + 1:
            raise MemoryError("out of memory")

    with apply_bac(case.model, schedule) as handle:
        fresh = case.sample()
        watch = block.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            case.sample(shift=2.0)
        watch.remove()
        after = case.sample()
        assert all(torch.equal(a, b) for a, b in zip(fresh, after, strict=True))
        assert handle.stats()["runs"] == 3
        assert handle.stats()["cached_bytes"] == 0 < handle.stats()["peak_bytes"]
        handle.reset()
        assert handle.stats()["peak_bytes"] == 0 and handle.stats()["runs"] == 0


@pytest.mark.parametrize("granularity", ["subblock", "stack"])
def test_reset_ends_a_loop_that_was_left(granularity: str) -> None:
    """A loop around a bare model that is left after its first evaluation can't be seen; `reset` tells."""
    from tests.caching.conftest import Case

    pixart, wan = Case("pixart"), Case("wan")

    @torch.no_grad()
    def named(count: int, start: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for k in range(count):
            with wan.model.cache_context("cond"):
                outputs.append(wan.call(start, 900.0 - 150.0 * k))
        return outputs

    runs = {
        pixart: (lambda: pixart.sample(), lambda: pixart.sample(num_steps=1, shift=2.0)),
        wan: (lambda: named(5, wan.start), lambda: named(1, wan.start + 2.0)),
    }
    for case, (whole, left) in runs.items():
        config = BACConfig(budget=2, granularity=granularity)
        with apply_bac(case.model, config, profile=profile_of(case)) as handle:
            fresh = whole()
            left()
            assert handle.stats()["cached_bytes"] > 0
            handle.reset()
            assert handle.stats()["cached_bytes"] == 0
            assert all(torch.equal(a, b) for a, b in zip(fresh, whole(), strict=True))


def test_change_of_shape_is_a_miss(pixart) -> None:
    schedule = build_schedule(profile_of(pixart), BACConfig(budget=2, update_last=False, **SUBBLOCK))
    run_key = Run()
    pieces = []
    with apply_bac(pixart.model, schedule) as handle, torch.no_grad():
        for k in range(5):
            rows = 2 if k < 1 else 1
            extra = {key: v[:rows] if isinstance(v, torch.Tensor) else v for key, v in pixart.extra.items()}
            time = 900.0 - 150.0 * k
            with publish_step(StepContext(k, 5, time, "batched", 0, run_key)):
                timestep = torch.full((rows,), int(time))
                pieces.append(pixart.model(pixart.start[:rows], timestep=timestep, return_dict=False, **extra)[0])
        computed = sum(handle.stats()["computed"].values())
    assert [len(p) for p in pieces] == [2, 1, 1, 1, 1]
    assert computed == 6 * (3 if 1 not in schedule.plan("*").steps[0] else 2)


def test_refusals(pixart, tmp_path) -> None:
    profile = profile_of(pixart)
    schedule = build_schedule(profile, BACConfig(budget=2))
    with apply_bac(pixart.model, schedule):
        with pytest.raises(ValueError, match="already applied"):
            apply_bac(pixart.model, schedule)
        with pytest.raises(ValueError, match="made for 5 steps and this run has 7"):
            with publish_step(StepContext(0, 7, 900.0)):
                pixart.call(pixart.start, 900.0)
        with pytest.raises(ValueError, match="another scheduler or noise schedule"):
            with publish_step(StepContext(1, 5, 400.0)):
                pixart.call(pixart.start, 400.0)
        pixart.model.train()
        with pytest.raises(ValueError, match="before training"):
            with publish_step(StepContext(0, 5, 900.0)):
                pixart.call(pixart.start, 900.0)
        pixart.model.eval()
    pixart.model.transformer_blocks[0].ff.net[2].bias.data += 0.5
    with pytest.raises(ValueError, match="other weights"):
        apply_bac(pixart.model, schedule)
    with pytest.raises(ValueError, match="no BAC profile"):
        apply_bac(pixart.model)
    other = tmp_path / "schedule.json"
    other.write_text('{"format": "bac-schedule/1"}')
    with pytest.raises(ValueError, match="not a BAC schedule"):
        apply_bac(pixart.model, other)


def test_refuses_beside_another_cache() -> None:
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache

    from tests.caching.conftest import Case

    wan = Case("wan")
    schedule = build_schedule(profile_of(wan), BACConfig(budget=2))
    wan.model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="another cache"):
        apply_bac(wan.model, schedule)
    wan.model.disable_cache()
    with apply_bac(wan.model, schedule):
        assert wan.model.is_cache_enabled
        with pytest.raises(ValueError, match="already been enabled"):
            wan.model.enable_cache(FirstBlockCacheConfig())
    assert not wan.model.is_cache_enabled
    pixart = Case("pixart")
    apply_first_block_cache(pixart.model, FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="another cache"):
        apply_bac(pixart.model, schedule)


def _other_caches() -> dict:
    config = diffusers.TaylorSeerCacheConfig(use_lite_mode=True)
    ratios = diffusers.MagCacheConfig(num_inference_steps=5, mag_ratios=[1.0] * 5)
    return {"MagCache": ratios, "TaylorSeer": config, "FirstBlockCache": diffusers.FirstBlockCacheConfig()}


@pytest.mark.parametrize("name", list(_other_caches()))
def test_refuses_beside_every_cache_of_diffusers(name: str) -> None:
    """Switched on by the model or by hand, told by the hooks; free again when they are gone."""
    from tests.caching.conftest import Case

    wan = Case("wan")
    plain = wan.sample()
    schedule = build_schedule(profile_of(wan), BACConfig(budget=2))
    wan.model.enable_cache(_other_caches()[name])
    with pytest.raises(ValueError, match="another cache .* is active; disable it"):
        apply_bac(wan.model, schedule)
    wan.model.disable_cache()
    apply_bac(wan.model, schedule).remove()
    assert all(torch.equal(a, b) for a, b in zip(plain, wan.sample(), strict=True))


def test_refuses_beside_cache_dit(pixart) -> None:
    """cache-dit marks the pipeline and the transformer it works on with `_is_cached`."""
    schedule = build_schedule(profile_of(pixart), BACConfig(budget=2))
    pipe = SimpleNamespace(transformer=pixart.model)
    for marked in (pipe, pixart.model):
        marked._is_cached = True
        with pytest.raises(ValueError, match="cache-dit is active on this pipeline; disable it"):
            apply_bac(pipe, schedule)
        del marked._is_cached
    apply_bac(pipe, schedule).remove()


def test_refuses_another_class(pixart) -> None:
    from tests.caching.conftest import Case

    schedule = build_schedule(profile_of(pixart), BACConfig(budget=2))
    with pytest.raises(ValueError, match="was made for PixArtTransformer2DModel, this model is WanTransformer3DModel"):
        apply_bac(Case("wan").model, schedule)


@pytest.mark.parametrize("granularity", ["subblock", "block", "stack"])
@pytest.mark.parametrize("budget", [1, 2, 4])
def test_constant_outputs_are_reproduced(pixart, granularity: str, budget: int) -> None:
    """Where every unit gives the same at all steps, any schedule gives the full output: what a sub-block reuses to the
    bit, what a block adds to the stream to rounding."""

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        outputs, run_key = [], Run()
        for k in range(5):
            with publish_step(StepContext(k, 5, 900.0 - 150.0 * k, "none", 0, run_key)):
                outputs.append(pixart.call(pixart.start, 500.0))
        return outputs

    with ProfileRecorder(pixart.model) as recorder:
        plain = run()
    config = BACConfig(budget=budget, granularity=granularity, predictor="reuse")
    with apply_bac(pixart.model, config, profile=recorder.profile()) as handle:
        cached = run()
        assert sum(handle.stats()["reused"].values()) > 0
    assert all(torch.equal(output, plain[0]) for output in plain)
    for output in cached:
        if granularity == "subblock":
            assert torch.equal(output, plain[0])
        torch.testing.assert_close(output, plain[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["pixart", "flux", "latte"], indirect=True)
@pytest.mark.parametrize("schedule", ["shared", "per_block"])
def test_the_compute_fraction_is_what_is_executed(case, schedule: str) -> None:
    """rho of the schedule, bubbling included, is the ratio of the counted operations of a cached and a full run."""
    profile = profile_of(case)
    with FlopMeter() as full:
        case.sample()
    assert full.total == 5 * profile.total_flops
    fractions = []
    for granularity in ("subblock", "block"):
        config = BACConfig(budget=2, granularity=granularity, schedule=schedule, bubble=2)
        with apply_bac(case.model, config, profile=profile) as handle, FlopMeter() as meter:
            case.sample()
        fractions.append(handle.schedules[5].compute_fraction)
        assert meter.total / full.total == pytest.approx(fractions[-1], abs=1e-9)
    assert all(2 / 5 < fraction < 1 for fraction in fractions)


def test_diffusers_contexts_and_reset() -> None:
    """cond and uncond contexts of a CacheMixin model are kept apart, also when a context was opened before apply."""
    from tests.caching.conftest import Case

    wan = Case("wan")
    with wan.model.cache_context("cond"):
        wan.call(wan.start, 900.0)
    schedule = build_schedule(profile_of(wan), BACConfig(budget=2, **SUBBLOCK))

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        outputs = []
        for k in range(5):
            for name, start in (("cond", wan.start), ("uncond", wan.start + 1.0)):
                with wan.model.cache_context(name):
                    outputs.append(wan.call(start, 900.0 - 150.0 * k))
        wan.model._reset_stateful_cache()
        return outputs

    with apply_bac(wan.model, schedule) as handle:
        first, second = run(), run()
        assert handle.stats()["runs"] == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[2], first[3])


def test_half_precision_cache(pixart) -> None:
    profile = profile_of(pixart)
    config = BACConfig(budget=2, granularity="block")
    sizes = []
    for dtype in ("same", "bfloat16"):
        with apply_bac(
            pixart.model, BACConfig(**{**config.to_dict(), "cache_dtype": dtype}), profile=profile
        ) as handle:
            assert pixart.sample()[3].dtype == torch.float32
            sizes.append(handle.stats()["peak_bytes"])
    assert sizes[0] == 2 * sizes[1] == 2 * 2 * (2 * 16 * 16) * 4


def test_compiled_once(pixart) -> None:
    """Per-module compilation: fullgraph, no recompilation from step to step, same numbers.

    The five steps of the first run compile one graph for each kind of sub-block, or two for the blocks (the input of
    the first block has other strides), and later runs none.
    """
    import torch._dynamo as dynamo

    profile = profile_of(pixart)
    for granularity, graphs in (("subblock", 3), ("stack", 2)):
        dynamo.reset()
        dynamo.utils.counters.clear()
        with apply_bac(pixart.model, BACConfig(budget=3, granularity=granularity), profile=profile) as handle:
            eager = pixart.sample()
            handle.compile(backend="eager", fullgraph=True)
            compiled = pixart.sample()
            assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs
            pixart.sample(shift=0.3)
            assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs
            assert not dynamo.utils.counters["graph_break"]
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
    assert leftovers(pixart.model) == []
    pixart.model.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(ValueError, match="compiled"):
        apply_bac(pixart.model, BACConfig(budget=3), profile=profile)


def test_schedule_file_round_trip(pixart, tmp_path) -> None:
    profile = profile_of(pixart)
    again = SimilarityProfile.load(profile.save(tmp_path / "profile-5.safetensors"))
    config = BACConfig(budget=3, granularity="subblock", schedule="per_block", bubble=2)
    schedule = build_schedule(again, config)
    assert schedule.branches == build_schedule(profile, config).branches
    loaded = BACSchedule.load(schedule.save(tmp_path / "schedule-5.json"))
    with apply_bac(pixart.model, schedule):
        expected = pixart.sample()
    with apply_bac(pixart.model, tmp_path / "schedule-5.json") as handle:
        found = pixart.sample()
        assert "5 steps" in handle.summary()
    assert loaded.blocks == schedule.blocks and loaded.compute_fraction == schedule.compute_fraction
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

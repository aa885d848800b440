"""BAC on this suite's own networks, through their pipelines."""

import contextlib
import gc

import numpy as np
import pytest

from dit_suite.caching.bac import apply_bac
from dit_suite.caching.plan import BACConfig, build_schedule
from dit_suite.caching.recorder import ProfileRecorder
from tests.conformance.cases import PIPELINES

CASES = {case.name: case for case in PIPELINES}
STEPS = 4


def sample(case, pipe) -> np.ndarray:
    return np.asarray(pipe(**case.arguments(num_inference_steps=STEPS), return_dict=False)[0])


@pytest.mark.parametrize("name", ["pixart", "pt-dit", "dit", "switch-dit", "acdit", "nfd", "wan"])
def test_own_pipelines(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    plain = sample(case, pipe)
    with ProfileRecorder(pipe) as recorder:
        recorded = sample(case, pipe)
    assert np.array_equal(plain, recorded)
    profile = recorder.profile()
    assert profile.num_evaluations == STEPS and profile.num_inference_steps == STEPS
    assert profile.num_runs == case.trajectories or profile.num_runs % case.trajectories == 0
    whole = profile.granularity("auto")
    assert whole == ("block" if name == "switch-dit" else "stack")
    for granularity in ("subblock", "block", whole):
        with apply_bac(pipe, BACConfig(budget=STEPS, granularity=granularity), profile=profile) as handle:
            assert np.array_equal(plain, sample(case, pipe))
            assert sum(handle.stats()["reused"].values()) == 0
    schedule = build_schedule(profile, BACConfig(budget=2))
    with apply_bac(pipe, schedule) as handle:
        cached, again = sample(case, pipe), sample(case, pipe)
        facts = handle.stats()
    assert facts["reused"][whole] > 0 and np.isfinite(cached).all()
    assert np.array_equal(cached, again) and not np.array_equal(cached, plain)
    assert np.array_equal(plain, sample(case, pipe))
    registries = [vars(m)["_diffusers_hook"] for m in pipe.transformer.modules() if "_diffusers_hook" in vars(m)]
    assert not any(registry.hooks for registry in registries)


def test_two_pass_guidance_has_two_caches() -> None:
    case = CASES["dit-flow"]
    pipe = case.build()
    call = {"num_inference_steps": STEPS, "batched_guidance": False}
    with ProfileRecorder(pipe) as recorder:
        plain = np.asarray(pipe(**case.arguments(**call), return_dict=False)[0])
    profile = recorder.profile()
    assert set(profile.branches) == {"cond", "uncond"}
    config = BACConfig(budget=2, granularity="block", per_branch=True)
    schedule = build_schedule(profile, config)
    assert set(schedule.branches) == {"cond", "uncond"}
    with apply_bac(pipe, schedule) as handle:
        cached = np.asarray(pipe(**case.arguments(**call), return_dict=False)[0])
        assert handle.stats()["computed"]["block"] == 2 * 2 * 2
    assert not np.array_equal(plain, cached)


def test_interpolated_profile_is_labelled() -> None:
    case = CASES["dit-flow"]
    pipe = case.build()
    with ProfileRecorder(pipe) as recorder:
        sample(case, pipe)
    profile = recorder.profile()
    pipe.scheduler.set_timesteps(6)
    wider = profile.interpolate(6, pipe.scheduler.timesteps.tolist())
    assert wider.interpolated_from == STEPS and wider.num_evaluations == 6
    np.testing.assert_allclose(wider.gram["batched"][:, 0, 0], profile.gram["batched"][:, 0, 0], rtol=1e-6)
    with apply_bac(pipe, BACConfig(budget=3), profile=[profile, wider]) as handle:
        pipe(**case.arguments(num_inference_steps=6), return_dict=False)
        sample(case, pipe)
        assert handle.stats()["interpolated_from"] == {6: STEPS} and "interpolated from 4" in handle.summary()
        with pytest.raises(ValueError, match="made for 4, 6 steps and this run has 5"):
            pipe(**case.arguments(num_inference_steps=5), return_dict=False)


def test_a_config_may_guess_the_schedule_of_another_step_count() -> None:
    case = CASES["dit-flow"]
    pipe = case.build()
    with ProfileRecorder(pipe) as recorder:
        sample(case, pipe)
    profile = recorder.profile()
    pipe.scheduler.set_timesteps(5)
    by_hand = profile.interpolate(5, pipe.scheduler.timesteps.tolist())
    with apply_bac(pipe, build_schedule(by_hand, BACConfig(budget=3))):
        wanted = pipe(**case.arguments(num_inference_steps=5), return_dict=False)[0]
    with apply_bac(pipe, BACConfig(budget=3, interpolate=True), profile=profile) as handle:
        guessed = pipe(**case.arguments(num_inference_steps=5), return_dict=False)[0]
        assert handle.stats()["interpolated_from"] == {5: STEPS} and "interpolated from 4" in handle.summary()
    np.testing.assert_array_equal(np.asarray(guessed), np.asarray(wanted))


def test_another_scheduler_is_refused() -> None:
    from diffusers import DDIMScheduler

    case = CASES["dit-flow"]
    pipe = case.build()
    with ProfileRecorder(pipe) as recorder:
        sample(case, pipe)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="scheduler FlowMatchEulerDiscreteScheduler, this pipeline has DDIMScheduler"):
        apply_bac(pipe, BACConfig(budget=2), profile=recorder.profile())


def test_budgets() -> None:
    case = CASES["dit-flow"]
    pipe = case.build()
    with ProfileRecorder(pipe) as recorder:
        sample(case, pipe)
    profile = recorder.profile()
    for fraction in (0.6, 0.8, 1.0):
        schedule = build_schedule(profile, BACConfig(flop_fraction=fraction, granularity="subblock"))
        assert schedule.compute_fraction <= fraction
        larger = schedule.config["budget"] + 1
        if larger <= STEPS:
            assert build_schedule(profile, BACConfig(budget=larger, granularity="subblock")).compute_fraction > fraction
    with pytest.raises(ValueError, match="fits 0.01 of the FLOPs"):
        build_schedule(profile, BACConfig(flop_fraction=0.01))
    with pytest.raises(ValueError, match="more than the 4"):
        build_schedule(profile, BACConfig(budget=5))
    with pytest.raises(ValueError, match="no measured schedule reaches 30 dB"):
        build_schedule(profile, BACConfig(psnr=30.0))
    with pytest.raises(ValueError, match="give one of budget"):
        BACConfig(budget=3, psnr=30.0)


def test_flops_are_counted() -> None:
    """The recorder's share of a feed-forward is its matrix products over those of the whole network."""
    case = CASES["dit-flow"]
    pipe = case.build()
    with ProfileRecorder(pipe) as recorder:
        sample(case, pipe)
    profile = recorder.profile()
    unit = next(u for u in profile.units if u.kind == "ffn")
    width, inner, rows = 16, 64, 2 * 2 * 16
    assert unit.flops == 2 * rows * (width * inner + inner * width)
    stack = profile.units[profile.select("stack")[0]]
    assert sum(u.flops for u in profile.units if u.kind == "block") == stack.flops < profile.total_flops


@pytest.mark.parametrize("granularity", ["subblock", "block", "stack"])
def test_cached_tensors_die_with_their_run(granularity: str) -> None:
    case = CASES["dit-flow"]
    pipe = case.build()
    with ProfileRecorder(pipe) as recorder:
        sample(case, pipe)

    def stop(_pipe, step: int, *_) -> dict:
        if step == 1:
            raise RuntimeError("stop")
        return {}

    with apply_bac(pipe, BACConfig(budget=2, granularity=granularity), profile=recorder.profile()) as handle:
        fresh = sample(case, pipe)
        with contextlib.suppress(RuntimeError):
            pipe(**case.arguments(num_inference_steps=STEPS), callback_on_step_end=stop)
        gc.collect()
        assert handle.stats()["runs"] == 2
        assert handle.stats()["cached_bytes"] == 0 < handle.stats()["peak_bytes"]
        peak = handle.stats()["peak_bytes"]
        assert np.array_equal(sample(case, pipe), fresh) and handle.stats()["peak_bytes"] == peak

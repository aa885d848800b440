"""Schedules: exact programmes against exhaustive search, the bubbling union's rules, and the forecasts."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dit_suite.caching.plan import BACConfig, build_schedule
from dit_suite.caching.profile import SimilarityProfile, UnitInfo, similarity_matrix
from dit_suite.caching.schedule import (
    adaptive_schedule,
    adjacent_schedule,
    bubbling_union,
    forecast_costs,
    forecast_error,
    forecast_schedule,
    forecast_weights,
    mask_of,
    rank_blocks,
    smallest_budget,
    spread_schedule,
    step_lengths,
)


def every_schedule(num_steps: int, budget: int):
    return ([0, *rest] for rest in itertools.combinations(range(1, num_steps), budget - 1))


def anchor_score(matrix: np.ndarray, steps: list[int]) -> float:
    ends = [*steps[1:], len(matrix)]
    return sum(matrix[c, t] for c, end in zip(steps, ends, strict=True) for t in range(c, end))


@pytest.mark.parametrize("maximise", [True, False])
@pytest.mark.parametrize(("num_steps", "budget"), [(7, 3), (9, 4), (11, 2), (10, 9), (6, 6), (5, 1)])
def test_adaptive_equals_exhaustive_search(num_steps: int, budget: int, maximise: bool) -> None:
    matrix = np.random.default_rng(num_steps * 31 + budget).normal(size=(num_steps, num_steps))
    sign = 1 if maximise else -1
    best = max(every_schedule(num_steps, budget), key=lambda steps: sign * anchor_score(matrix, steps))
    steps, score = adaptive_schedule(matrix, budget, maximise)
    assert steps == best and len(steps) == budget
    assert score == pytest.approx(anchor_score(matrix, best), abs=1e-9)


def test_ties_fall_to_the_earlier_boundary() -> None:
    assert adaptive_schedule(np.ones((8, 8)), 3, True)[0] == [0, 1, 2]


def test_score_grows_with_the_budget() -> None:
    features = np.cumsum(np.random.default_rng(0).normal(size=(12, 20)), axis=0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scores = [adaptive_schedule(np.abs(unit @ unit.T), m, True)[1] for m in range(1, 13)]
    assert all(b >= a for a, b in itertools.pairwise(scores)) and scores[-1] == pytest.approx(12.0)


def test_adjacent_is_the_least_similar_steps() -> None:
    matrix = np.random.default_rng(1).uniform(size=(9, 9))
    likeness = {k: matrix[k - 1, k] for k in range(1, 9)}
    assert adjacent_schedule(matrix, 4, True) == sorted([0, *sorted(likeness, key=likeness.get)[:3]])
    assert adjacent_schedule(-matrix, 4, False) == adjacent_schedule(matrix, 4, True)


@pytest.mark.parametrize("budget", [0, 9])
def test_budget_out_of_range(budget: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 8"):
        adaptive_schedule(np.ones((8, 8)), budget, True)


KINDS, LAYERS = ["sa", "ca", "ffn"] * 3, [0] * 3 + [1] * 3 + [2] * 3
STEPS = [[0, k] for k in range(1, 10)]


def test_bubbling_union() -> None:
    grown = bubbling_union(STEPS, KINDS, LAYERS, [0, 4, 5])
    assert grown[0] == [0, 1, 3, 6, 9] and grown[4] == [0, 5, 6, 9] and grown[5] == [0, 6, 9]
    assert [grown[i] for i in (1, 2, 3, 6, 7, 8)] == [STEPS[i] for i in (1, 2, 3, 6, 7, 8)]
    assert grown == bubbling_union(STEPS, KINDS, LAYERS, [5, 0, 4])
    assert grown == bubbling_union(grown, KINDS, LAYERS, [0, 4, 5])
    assert bubbling_union(STEPS, KINDS, LAYERS, []) == STEPS
    assert bubbling_union(STEPS, KINDS, LAYERS, [3])[3] == [0, 4, 6, 9]
    assert np.all(mask_of(grown, 10) >= mask_of(STEPS, 10))


def test_whole_blocks_count_as_feed_forwards() -> None:
    assert bubbling_union(STEPS[:3], ["block"] * 3, [0, 1, 2], [0, 1, 2]) == [[0, 1, 2, 3], [0, 2, 3], [0, 3]]


def test_ranking_is_stable() -> None:
    assert rank_blocks([1.0, 3.0, 3.0, 0.5], 3) == [1, 2, 0]


def gram_of(num_steps: int, seed: int) -> np.ndarray:
    features = np.cumsum(np.random.default_rng(seed).normal(size=(num_steps, 30)), axis=0)
    return features @ features.T


@pytest.mark.parametrize("predictor", ["reuse", "linear", "fitted"])
def test_forecast_costs_and_programme(predictor: str) -> None:
    num_steps, budget, times = 8, 4, np.linspace(1.0, 0.05, 8) ** 2
    gram = gram_of(num_steps, 5)
    cost = forecast_costs(gram, predictor, times)
    for steps in ([0, 2], [0, 1, 5], [0, 3, 4]):
        for step in range(steps[-1] + 1, num_steps):
            anchors = steps[::-1][:2]
            weights = forecast_weights(gram, anchors, step, predictor, times)
            assert cost[anchors[1], anchors[0], step] ** 2 == pytest.approx(
                forecast_error(gram, anchors, step, weights), rel=1e-6, abs=1e-9
            )

    def total(steps: list[int]) -> float:
        score = 0.0
        for i, (c, end) in enumerate(zip(steps, [*steps[1:], num_steps], strict=True)):
            before = steps[i - 1] if i else num_steps
            score += sum(cost[before, c, t] for t in range(c + 1, end))
        return score

    best = min(every_schedule(num_steps, budget), key=total)
    steps, score = forecast_schedule(cost, budget)
    assert steps == best and score == pytest.approx(total(best))


def test_linear_forecast_is_exact_on_a_line() -> None:
    features = np.outer(np.linspace(3.0, 1.0, 6), np.ones(4)) + np.arange(4)
    gram = features @ features.T
    weights = forecast_weights(gram, [2, 0], 5, "linear")
    np.testing.assert_allclose(weights[0] * features[2] + weights[1] * features[0], features[5], atol=1e-12)
    assert forecast_error(gram, [2, 0], 5, weights) == pytest.approx(0.0, abs=1e-9)


def test_fitted_weights_beat_every_other() -> None:
    gram = gram_of(8, 9)
    for step in (4, 6, 7):
        errors = {p: forecast_error(gram, [3, 1], step, forecast_weights(gram, [3, 1], step, p)) for p in
                  ("reuse", "linear", "fitted")}  # fmt: skip
        assert errors["fitted"] <= min(errors.values()) + 1e-6


def test_uniform() -> None:
    assert spread_schedule(12, 4) == [0, 3, 6, 9] and spread_schedule(7, 3) == [0, 2, 4]
    with pytest.raises(ValueError, match="between 1 and 10 computed steps"):
        spread_schedule(10, 0)


def test_step_lengths() -> None:
    """The way to the next other timestep, the last to zero; a short last step counts for little."""
    assert step_lengths([1000.0, 750.0, 500.0, 10.0]).tolist() == pytest.approx([250 / 490, 250 / 490, 1.0, 10 / 490])
    heun = [1000.0, 600.0, 600.0, 100.0, 100.0]
    assert step_lengths(heun).tolist() == pytest.approx([0.8, 1.0, 1.0, 0.2, 0.2])
    assert step_lengths([0.0, 0.0]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("objective", "spends"), [("sum", True), ("squares", False)])
def test_an_update_in_a_vanishing_step_is_wasted(objective: str, spends: bool) -> None:
    """The last output is unlike all others but moves the sample by a thousandth of a step."""
    rng = np.random.default_rng(0)
    rows = np.cumsum(rng.normal(size=(6, 40)), axis=0)
    rows[-1] = 30 * rng.normal(size=40)
    timesteps = (500.0, 400.0, 300.0, 200.0, 100.0, 0.1)
    profile = SimilarityProfile(
        model="M", fingerprint="", scheduler={}, num_inference_steps=6, timesteps=timesteps,
        positions=tuple((i, 0) for i in range(6)), units=(UnitInfo("blocks", "stack", 0, 1.0, 0.0),),
        total_flops=1.0, gram={"batched": (rows @ rows.T)[None]}, cosine={"batched": np.ones((1, 6, 6))},
    )  # fmt: skip
    schedule = build_schedule(profile, BACConfig(budget=3, objective=objective))
    assert (5 in schedule.plan("*").steps[0]) == spends


@pytest.mark.parametrize("target", [0.0, 3.0, 3.5, 7.0, 12.0])
def test_smallest_budget_by_bisection(target: float) -> None:
    quality = {1: 1.0, 2: 3.0, 3: 3.0, 4: 7.0, 5: 9.0, 6: 12.0}
    tried: list[int] = []
    found = smallest_budget(lambda budget: tried.append(budget) or quality[budget], 6, target)
    assert found == min(budget for budget, value in quality.items() if value >= target)
    assert len(tried) <= 4 and found - 1 in (0, *tried)
    with pytest.raises(ValueError, match="no budget up to 6 computed steps reaches 13"):
        smallest_budget(quality.__getitem__, 6, 13.0)


def _drifting_profile() -> SimilarityProfile:
    """Two blocks of two sub-blocks whose outputs drift, each in its own way."""
    rng = np.random.default_rng(3)
    rows = np.cumsum(rng.normal(size=(4, 9, 12)) * rng.uniform(0.2, 3.0, size=(4, 9, 1)), axis=1)
    gram = rows @ rows.transpose(0, 2, 1)
    norm = np.sqrt(np.einsum("ukk->uk", gram))
    units = tuple(UnitInfo(f"blocks.{i // 2}.{i % 2}", ("sa", "ffn")[i % 2], i // 2, 1.0, 4.0 - i)
                  for i in range(4))  # fmt: skip
    timesteps = tuple(900.0 * (1 - k / 9) ** 2 for k in range(9))
    return SimilarityProfile(
        model="M", fingerprint="", scheduler={}, num_inference_steps=9, timesteps=timesteps,
        positions=tuple((i, 0) for i in range(9)), units=units, total_flops=5.0, gram={"batched": gram},
        cosine={"batched": gram / (norm[:, :, None] * norm[:, None, :])},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "where_it_counts", "where_it_does_not"),
    [
        ({"metric": "cosine"}, {"predictor": "reuse"}, {"predictor": "fitted"}),
        ({"metric": "cosine"}, {"similarity": "adjacent"}, {"predictor": "linear"}),
        ({"objective": "sum"}, {"predictor": "fitted"}, {"predictor": "reuse"}),
        ({"objective": "sum"}, {"predictor": "linear"}, {"similarity": "adjacent"}),
        ({"bubble": -1}, {"schedule": "per_block"}, {"schedule": "shared"}),
        ({"order": 3}, {"predictor": "fitted"}, {"predictor": "reuse"}),
        ({"similarity": "adjacent"}, {"predictor": "reuse"}, {"schedule": "uniform"}),
    ],
)
def test_options_that_others_leave_out(change: dict, where_it_counts: dict, where_it_does_not: dict) -> None:
    """What the options' help says about one another."""
    profile = _drifting_profile()

    def plans(**settings) -> dict:
        return build_schedule(profile, BACConfig(budget=4, granularity="subblock", **settings)).branches

    assert plans(**where_it_counts, **change) != plans(**where_it_counts)
    assert plans(**where_it_does_not, **change) == plans(**where_it_does_not)


@pytest.mark.parametrize("predictor", ["reuse", "linear", "fitted"])
def test_scale_of_the_outputs_does_not_matter(predictor: str) -> None:
    """Outputs twice as large give the same schedule, with distances twice as large."""
    profile = _drifting_profile()
    larger = dataclasses.replace(profile, gram={"batched": 4.0 * profile.gram["batched"]})
    for schedule in ("shared", "per_block"):
        config = BACConfig(budget=4, granularity="subblock", predictor=predictor, schedule=schedule)
        plain, scaled = build_schedule(profile, config).plan("*"), build_schedule(larger, config).plan("*")
        assert plain.steps == scaled.steps
        for ours, theirs in zip(plain.weights, scaled.weights, strict=True):
            assert ours.keys() == theirs.keys()
            for step, weights in ours.items():
                assert weights == pytest.approx(theirs[step], rel=1e-6)
    unit = profile.matrices("l2", 0, ["batched"])
    np.testing.assert_allclose(larger.matrices("l2", 0, ["batched"]), 2.0 * unit)
    steps, score = adaptive_schedule(unit, 4, False)
    again, doubled = adaptive_schedule(2.0 * unit, 4, False)
    assert steps == again and doubled == pytest.approx(2.0 * score)


def test_cosine_is_blind_to_scale() -> None:
    """Each step's output times its own positive factor: the cosine matrix, and so the schedule, stay as they were."""
    rows = np.random.default_rng(1).normal(size=(8, 20)).cumsum(axis=0)
    factors = np.linspace(0.5, 4.0, 8)[:, None]
    plain, scaled = similarity_matrix(rows, "cosine"), similarity_matrix(rows * factors, "cosine")
    np.testing.assert_allclose(plain, scaled, atol=1e-12)
    assert not np.allclose(similarity_matrix(rows, "l2"), similarity_matrix(rows * factors, "l2"))
    assert adaptive_schedule(plain, 3, True)[0] == adaptive_schedule(scaled, 3, True)[0]


def test_a_damaged_profile_is_refused_and_an_unknown_fact_left_aside(tmp_path) -> None:
    profile = _drifting_profile()
    path = profile.save(tmp_path / "profile.safetensors")

    def rewrite(change) -> None:
        tensors, facts = load_file(path), json.loads(safe_open(path, "np").metadata()["profile"])
        change(facts["units"][1])
        save_file(tensors, path, {"profile": json.dumps(facts)})

    rewrite(lambda unit: unit.update(colour="red"))
    assert SimilarityProfile.load(path).units == profile.units
    rewrite(lambda unit: unit.pop("flops"))
    with pytest.raises(ValueError, match="is not a BAC profile: KeyError"):
        SimilarityProfile.load(path)

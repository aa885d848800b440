"""Intervals and verdicts: replicates against plain resampling, coverage, and the three answers."""

import pytest
import torch

from dit_suite.evaluation.distances import kid
from dit_suite.evaluation.resampling import (
    bootstrap_counts,
    frechet_replicates,
    interval_around,
    judge,
    kid_replicates,
    real_floor,
)
from dit_suite.evaluation.statistics import FeatureStatistics


def gaussian(count: int, dimension: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) + shift


@pytest.mark.parametrize("count, dimension, tolerance", [(60, 12, 1e-9), (10, 24, 1e-6)])
def test_frechet_replicates_equal_the_distance_of_repeated_rows(count, dimension, tolerance):
    x, reference = gaussian(count, dimension, 0), FeatureStatistics.of(gaussian(200, dimension, 1))
    counts = bootstrap_counts(count, 4, 0)
    expected = [FeatureStatistics.of(x.repeat_interleave(row.long(), 0)).frechet_distance(reference) for row in counts]
    assert frechet_replicates(x, reference, counts).tolist() == pytest.approx(expected, rel=tolerance)


def test_kid_replicates_leave_out_copies():
    x, y = gaussian(30, 5, 0), gaussian(40, 5, 1)
    assert float(kid_replicates(x, y, torch.ones(1, 30, dtype=torch.float64))) == pytest.approx(kid(x, y), rel=1e-10)
    one = bootstrap_counts(30, 1, 3)
    weights = one[0]
    rows = (x @ x.T / 5 + 1).pow(3) * torch.outer(weights, weights)
    off = ~torch.eye(30, dtype=torch.bool)
    within = rows[off].sum() / torch.outer(weights, weights)[off].sum()
    kernel_y = (y @ y.T / 5 + 1).pow(3)
    within_y = (kernel_y.sum() - kernel_y.trace()) / (40 * 39)
    across = (weights @ (x @ y.T / 5 + 1).pow(3)).sum() / (30 * 40)
    assert float(kid_replicates(x, y, one)) == pytest.approx(float(within + within_y - 2 * across), rel=1e-10)


def test_counts_are_a_resample_and_depend_on_the_seed_alone():
    counts = bootstrap_counts(50, 6, 1)
    assert counts.sum(1).tolist() == [50.0] * 6
    assert torch.equal(counts, bootstrap_counts(50, 6, 1))
    assert not torch.equal(counts, bootstrap_counts(50, 6, 2))


def test_the_interval_covers_the_expected_distance_at_this_n():
    reference = FeatureStatistics.of(gaussian(4000, 4, 999))
    sets = [gaussian(80, 4, seed, 0.3) for seed in range(60)]
    values = [FeatureStatistics.of(x).frechet_distance(reference) for x in sets]
    expected = sum(values) / len(values)
    covered = 0
    for seed, (x, value) in enumerate(zip(sets, values, strict=True)):
        replicates = frechet_replicates(x, reference, bootstrap_counts(80, 100, seed))
        interval = interval_around(value, replicates)
        covered += interval.low <= expected <= interval.high
    assert covered >= 0.85 * len(sets)


def verdict(run: torch.Tensor, baseline: torch.Tensor, margin: float = 0.03):
    reference = FeatureStatistics.of(gaussian(3000, 6, 77))
    counts = bootstrap_counts(len(run), 200, 0)
    values = [FeatureStatistics.of(x).frechet_distance(reference) for x in (run, baseline)]
    replicates = [frechet_replicates(x, reference, counts) for x in (run, baseline)]
    return judge("fd", *values, *replicates, margin)


def test_the_three_answers():
    baseline = gaussian(400, 6, 0, 0.5)
    noise = gaussian(400, 6, 5)
    assert verdict(baseline + 1e-3 * noise, baseline).verdict == "held"
    assert verdict(baseline + 0.2, baseline).verdict == "worse"
    unpaired = verdict(gaussian(400, 6, 9, 0.5), baseline)
    assert unpaired.verdict == "not resolved at this N"
    assert unpaired.relative.low < 0 < unpaired.relative.high
    assert verdict(baseline - 0.2, baseline).verdict == "held"


def test_a_baseline_within_noise_has_no_relative_difference():
    flat = torch.zeros(50, dtype=torch.float64)
    spread = torch.linspace(-0.1, 0.1, 50, dtype=torch.float64)
    worse = judge("kid", 1.0, -0.01, 1.0 + spread, flat)
    assert (worse.verdict, worse.relative) == ("worse", None)
    assert judge("kid", 0.0, -0.01, spread, flat).verdict == "not resolved at this N"


def test_pairing_narrows_the_interval():
    baseline = gaussian(300, 6, 0, 0.5)
    near = baseline + 0.05 * gaussian(300, 6, 1)
    paired = verdict(near, baseline).relative
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shuffled = verdict(near[order], baseline).relative
    assert paired.high - paired.low < 0.3 * (shuffled.high - shuffled.low)


def test_floor_uses_disjoint_halves_and_says_its_size():
    rows = gaussian(40, 3, 0)
    seen = []
    value, n = real_floor(rows, 100, lambda a, b: seen.append((a, b)) or 1.5)
    assert (value, n) == (1.5, 20)
    part, rest = seen[0]
    assert len(torch.unique(torch.cat([part, rest]), dim=0)) == 40
    assert real_floor(rows, 5, lambda a, b: float(len(b)))[0] == 35

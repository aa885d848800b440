"""Distances against definitions, limits and the golden fixture."""

import pytest
import torch

from dit_suite.evaluation import distances
from dit_suite.evaluation.statistics import FeatureStatistics
from dit_suite.golden import frechet, read_fixture


def gaussian(count: int, dimension: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) + shift


def test_golden_values():
    results = frechet.check(*read_fixture("tests/golden/frechet_features.safetensors"))
    assert len(results) == 25
    assert [result.name for result in results if not result.passed] == []


def test_golden_check_notices_a_wrong_value():
    tensors, config = read_fixture("tests/golden/frechet_features.safetensors")
    tensors["output.recall_k3"] = tensors["output.recall_k3"] + 1e-3
    assert [r.name for r in frechet.check(tensors, config) if not r.passed] == ["recall_k3"]


def test_frechet_distance_of_a_set_to_itself_is_zero():
    side = FeatureStatistics.of(gaussian(400, 12, 0))
    assert abs(side.frechet_distance(side)) < 1e-9 * float(side.covariance.trace())


def test_frechet_distance_is_symmetric_and_rotation_invariant():
    x, y = gaussian(300, 10, 0), 1.5 * gaussian(300, 10, 1, 0.3)
    rotation = torch.linalg.qr(gaussian(10, 10, 2)).Q
    one = FeatureStatistics.of(x).frechet_distance(FeatureStatistics.of(y))
    other = FeatureStatistics.of(y).frechet_distance(FeatureStatistics.of(x))
    rotated = FeatureStatistics.of(x @ rotation).frechet_distance(FeatureStatistics.of(y @ rotation))
    assert one == pytest.approx(other, rel=1e-10)
    assert one == pytest.approx(rotated, rel=1e-10)


def test_frechet_distance_of_equal_covariances_is_the_squared_mean_shift():
    x = gaussian(200, 8, 3)
    shifted = FeatureStatistics.of(x + 2.0)
    assert FeatureStatistics.of(x).frechet_distance(shifted) == pytest.approx(4.0 * 8, rel=1e-9)


def test_frechet_distance_of_diagonal_gaussians_has_the_closed_form():
    first, second = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 16.0])
    zero = torch.zeros(3)
    expected = float((first.sqrt() - second.sqrt()).square().sum())
    assert distances.frechet_distance(zero, first.diag(), zero, second.diag()) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_with_fewer_samples_than_dimensions_is_finite_and_not_negative():
    x, y = gaussian(5, 20, 0), gaussian(5, 20, 1)
    value = FeatureStatistics.of(x).frechet_distance(FeatureStatistics.of(y))
    assert value > 0
    assert FeatureStatistics.of(x).frechet_distance(FeatureStatistics.of(x)) > -1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_frechet_distance_refuses_values_that_are_not_finite(bad):
    mean = torch.tensor([0.0, bad])
    with pytest.raises(ValueError, match="not finite"):
        distances.frechet_distance(mean, torch.eye(2), torch.zeros(2), torch.eye(2))


def test_swapping_the_sides_swaps_precision_and_recall_and_keeps_kid():
    generated, real = gaussian(60, 5, 0) * 0.5, gaussian(80, 5, 1)
    precision, recall = distances.precision_recall(generated, real, 3)
    assert distances.precision_recall(real, generated, 3) == (recall, precision)
    assert precision > recall
    assert distances.kid(generated, real) == pytest.approx(distances.kid(real, generated), rel=1e-12)


def test_density_and_coverage_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[0.5], [100.0]])
    # Radii to the nearest other real sample: 1, 1, 1, 8. 0.5 lies in the balls of 0 and 1 only; 100 in none.
    density, coverage = distances.density_coverage(generated, real, 1)
    assert density == pytest.approx(2 / 2)
    assert coverage == pytest.approx(2 / 4)


def test_kid_is_unbiased_where_the_biased_form_is_not():
    values = [distances.kid(gaussian(40, 6, 2 * s), gaussian(40, 6, 2 * s + 1)) for s in range(200)]
    mean = sum(values) / len(values)
    spread = torch.tensor(values).std() / len(values) ** 0.5
    assert abs(mean) < 4 * float(spread)
    assert min(values) < 0
    assert distances.kid(gaussian(40, 6, 0), gaussian(40, 6, 1), unbiased=False) > 10 * abs(mean)


def test_gaussian_mmd_of_equal_sets_is_zero():
    x = gaussian(30, 7, 0)
    assert distances.gaussian_mmd(x, x) == pytest.approx(0.0, abs=1e-9)
    assert distances.gaussian_mmd(x, x + 3) > 1e-3


def test_blocks_of_rows_do_not_change_a_value(monkeypatch):
    x, y = gaussian(70, 6, 0), gaussian(50, 6, 1, 0.2)
    functions = [
        distances.kid,
        distances.gaussian_mmd,
        lambda a, b: distances.precision_recall(a, b, 3)[1],
        lambda a, b: distances.density_coverage(a, b, 3)[0],
    ]
    whole = [function(x, y) for function in functions]
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", 16)
    assert [function(x, y) for function in functions] == pytest.approx(whole, rel=1e-11)


def test_nearest_distances_finds_copies():
    bank = gaussian(50, 4, 0)
    values, rows = distances.nearest_distances(bank[[7, 31]] + 1e-9, bank)
    assert rows.tolist() == [7, 31]
    assert float(values.max()) < 1e-6


def test_small_inputs_give_one_clear_sentence():
    few, many = gaussian(3, 4, 0), gaussian(30, 4, 1)
    for call, words in (
        (lambda: distances.precision_recall(few, many, 3), "nearest neighbours"),
        (lambda: distances.density_coverage(few, many, 5), "nearest neighbours"),
        (lambda: distances.kid(few[:1], many), "at least two"),
        (lambda: distances.kid_subsets(few, many, 2, 10, 0), "subset of 10"),
        (lambda: distances.inception_score(few, 10), "10 splits"),
    ):
        with pytest.raises(ValueError, match=words):
            call()

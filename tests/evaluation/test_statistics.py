"""Statistics that add up, and the files that keep them."""

import json

import numpy as np
import pytest
import torch

from dit_suite.evaluation.statistics import (
    ExtractorTag,
    FeatureSet,
    FeatureStatistics,
    check_comparable,
    load_feature_set,
    save_feature_set,
)

TAG = ExtractorTag("random-conv", "a" * 64, "bicubic-antialias", 32, 6, "torch")


def features(count: int = 90, dimension: int = 6, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) + offset


def close(one: FeatureStatistics, other: FeatureStatistics) -> bool:
    return (
        one.count == other.count
        and torch.allclose(one.mean, other.mean, rtol=0, atol=1e-10)
        and torch.allclose(one.covariance, other.covariance, rtol=0, atol=1e-10)
    )


@pytest.mark.parametrize("sizes", [(90,), (1,) * 90, (7, 83), (40, 0, 50)])
def test_any_split_into_batches_gives_the_covariance_of_the_whole(sizes):
    rows = features(offset=1000.0)
    statistics = FeatureStatistics(6)
    for part in rows.split(list(sizes)):
        statistics.update(part)
    assert torch.allclose(statistics.covariance, torch.cov(rows.T), rtol=0, atol=1e-9)
    assert close(statistics, FeatureStatistics.of(rows))


def test_merge_is_associative_and_takes_empty_parts():
    a, b, c = (FeatureStatistics.of(features(n, seed=n)) for n in (5, 30, 55))
    assert close(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert close(a.merge(FeatureStatistics(6)), a)
    whole = torch.cat([features(n, seed=n) for n in (5, 30, 55)])
    assert close(a.merge(b).merge(c), FeatureStatistics.of(whole))


def test_float32_features_far_from_zero_keep_their_digits():
    rows = features(500, offset=1000.0).float()
    expected = torch.cov(rows.double().T)
    assert torch.allclose(FeatureStatistics.of(rows).covariance, expected, rtol=0, atol=1e-9)


def test_file_keeps_float64_and_provenance(tmp_path):
    given = FeatureSet(TAG, FeatureStatistics.of(features()), features().float(), source={"kind": "folder"})
    save_feature_set(tmp_path / "s.npz", given)
    found = load_feature_set(tmp_path / "s.npz")
    assert torch.equal(found.statistics.mean, given.statistics.mean)
    assert torch.allclose(found.statistics.covariance, given.statistics.covariance, rtol=0, atol=1e-15)
    assert torch.equal(found.features, given.features)
    assert found.tag == TAG
    assert found.source == {"kind": "folder", "statistics_file": "s.npz"}
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


@pytest.mark.parametrize("keep_features, tolerance", [(True, 1e-4), (False, 1e-6)])
def test_compact_file_is_near_and_smaller(tmp_path, keep_features, tolerance):
    rows = features(300, 40) * torch.arange(1, 41) / 40
    given = FeatureSet(TAG, FeatureStatistics.of(rows), rows.float())
    save_feature_set(tmp_path / "full.npz", given, keep_features=keep_features)
    save_feature_set(tmp_path / "compact.npz", given, compact=True, keep_features=keep_features)
    other = FeatureStatistics.of(features(200, 40, seed=9))
    full, compact = (load_feature_set(tmp_path / f"{n}.npz") for n in ("full", "compact"))
    expected = full.statistics.frechet_distance(other)
    assert compact.statistics.frechet_distance(other) == pytest.approx(expected, rel=tolerance)
    assert (compact.features is not None) == keep_features
    assert (tmp_path / "compact.npz").stat().st_size < 0.6 * (tmp_path / "full.npz").stat().st_size


@pytest.mark.parametrize(
    "field, value", [("name", "inception"), ("weights_sha256", "b"), ("resize", "bilinear"), ("input_size", 64)]
)
def test_other_features_are_refused(field, value):
    other_tag = ExtractorTag(**{**TAG.__dict__, field: value})
    one, other = (FeatureSet(tag, FeatureStatistics.of(features())) for tag in (TAG, other_tag))
    with pytest.raises(ValueError, match=f"cannot be compared.*{field}"):
        check_comparable(one, other)


def test_another_library_version_is_accepted_and_another_dimension_is_not():
    newer = FeatureSet(ExtractorTag(**{**TAG.__dict__, "version": "torch 9"}), FeatureStatistics.of(features()))
    check_comparable(FeatureSet(TAG, FeatureStatistics.of(features())), newer)
    with pytest.raises(ValueError, match="6 against 5"):
        check_comparable(newer, FeatureSet(None, FeatureStatistics.of(features(dimension=5))))


def test_foreign_statistics_need_consent(tmp_path):
    path = tmp_path / "adm.npz"
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(3), sigma_s=np.eye(3), arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="foreign-statistics"):
        load_feature_set(path)
    found = load_feature_set(path, accept_foreign=True, foreign_count=50000)
    assert (found.count, found.tag, found.spatial.dimension) == (50000, None, 3)
    assert torch.allclose(found.statistics.covariance, torch.eye(4, dtype=torch.float64))


def test_bad_files_give_one_clear_sentence(tmp_path):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK not a zip")
    other = tmp_path / "other.npz"
    np.savez(other, weights=np.zeros(3))
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, mu=np.zeros(4), sigma=np.eye(3), provenance=np.array(json.dumps({})))
    nan = tmp_path / "nan.npz"
    np.savez(nan, mu=np.full(2, np.nan), sigma=np.eye(2), provenance=np.array(json.dumps({})))
    for path, words in (
        (broken, "not a readable"),
        (other, "no statistics file"),
        (wrong, "covariance"),
        (nan, "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            load_feature_set(path)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics.of(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))

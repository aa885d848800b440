"""Feature statistics in float64 that add up across batches and processes, and the files that keep them.

A statistics file is an npz with `mu (d,)`, `sigma (d, d)` and a JSON string `provenance`: how the features were made.
A compact file holds single features in float16 instead of `sigma`, or its upper triangle in float32.
Two sides are compared only when extractor, weights, resize and dimension agree.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from dit_suite.evaluation.distances import frechet_distance
from dit_suite.files import write_atomically

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ExtractorTag:
    """What must agree before two sets of features may be compared.

    `version` names the library that ran the network; it is written down but not compared.
    """

    name: str
    weights_sha256: str
    resize: str
    input_size: int
    dimension: int
    version: str = ""

    def difference(self, other: "ExtractorTag") -> str | None:
        """A sentence about the first thing that differs, or None."""
        mine, theirs = asdict(self), asdict(other)
        for key in ("name", "resize", "input_size", "dimension", "weights_sha256"):
            if mine[key] != theirs[key]:
                return f"{key} {mine[key]!r} against {theirs[key]!r}"
        return None


class FeatureStatistics:
    """Running count, mean and scatter of feature vectors in float64.

    Any split into batches, in any order, gives the same result to rounding; `merge` adds the parts of several
    processes. Mean and centred scatter are kept instead of raw sums, so a large offset costs no digits.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    @classmethod
    def of(cls, features: torch.Tensor) -> Self:
        """The statistics of all rows of `(n, d)` at once."""
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    @classmethod
    def from_moments(cls, count: int, mean: torch.Tensor, covariance: torch.Tensor) -> Self:
        """From a count, a mean `(d,)` and a covariance `(d, d)` normalised by count - 1."""
        statistics = cls(len(mean))
        statistics.count, statistics.mean = int(count), mean.double()
        statistics.scatter = covariance.double() * max(int(count) - 1, 1)
        return statistics

    @property
    def dimension(self) -> int:
        return len(self.mean)

    def update(self, features: torch.Tensor) -> None:
        """Adds the rows of `(n, d)`; raises `ValueError` when the shape is wrong or a value is not finite."""
        if features.ndim != 2 or features.shape[1] != self.dimension:
            raise ValueError(f"expected features (n, {self.dimension}), got {tuple(features.shape)}")
        rows = features.detach().cpu().double()
        if not bool(rows.isfinite().all()):
            raise ValueError("the features hold values that are not finite")
        if len(rows):
            mean = rows.mean(0)
            centred = rows - mean
            self._add(len(rows), mean, centred.T @ centred)

    def merge(self, other: "FeatureStatistics") -> Self:
        """The statistics of both sets together, as a new object."""
        if other.dimension != self.dimension:
            raise ValueError(f"cannot merge statistics of {self.dimension} and {other.dimension} dimensions")
        merged = type(self)(self.dimension)
        for part in (self, other):
            if part.count:
                merged._add(part.count, part.mean, part.scatter)
        return merged

    def _add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """`(d, d)`, normalised by count - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two samples, got {self.count}")
        return self.scatter / (self.count - 1)

    def frechet_distance(self, other: "FeatureStatistics") -> float:
        """See `distances.frechet_distance`."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


@dataclass
class FeatureSet:
    """One side of a comparison: statistics, and the single features where they are known.

    `features (n, d)`, `logits (n, classes)` and `spatial` (statistics of the spatial features of sFID) may be absent.
    `source` describes where the samples came from (count, fingerprint, options); it is copied into every result.
    `tag` is None only for foreign statistics without provenance that the caller chose to accept.
    """

    tag: ExtractorTag | None
    statistics: FeatureStatistics
    features: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    spatial: FeatureStatistics | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.statistics.count


def check_comparable(one: FeatureSet, other: FeatureSet) -> None:
    """Raises `ValueError` with one sentence when the two sides were made by different feature extractors."""
    if one.statistics.dimension != other.statistics.dimension:
        raise ValueError(
            "the two sides cannot be compared: "
            f"{one.statistics.dimension} against {other.statistics.dimension} feature dimensions"
        )
    if one.tag is not None and other.tag is not None and (difference := one.tag.difference(other.tag)):
        raise ValueError(f"the two sides cannot be compared: they were made with {difference}")


def save_feature_set(
    path: str | Path, feature_set: FeatureSet, *, compact: bool = False, keep_features: bool = True
) -> None:
    """Writes a statistics file (temporary name first).

    Args:
        compact: the features in float16 and no covariance (it follows from them), or, without features, the
            covariance as its upper triangle in float32 (`docs/evaluation.md` says what that costs).
        keep_features: write the single features too (needed for KID, precision/recall and the floor).
    """
    statistics = feature_set.statistics
    arrays: dict[str, np.ndarray] = {"mu": statistics.mean.numpy()}
    covariance = statistics.covariance.numpy()
    with_features = keep_features and feature_set.features is not None
    if not compact:
        arrays["sigma"] = covariance
    elif not with_features:
        arrays["sigma_upper"] = covariance[np.triu_indices(len(covariance))].astype(np.float32)
    if feature_set.spatial is not None and not compact:
        arrays["mu_s"] = feature_set.spatial.mean.numpy()
        arrays["sigma_s"] = feature_set.spatial.covariance.numpy()
    if with_features:
        features = feature_set.features.cpu().numpy()
        arrays["features"] = features.astype(np.float16 if compact else np.float32)
    if keep_features and feature_set.logits is not None and not compact:
        arrays["logits"] = feature_set.logits.cpu().numpy()
    provenance = {
        "format": FORMAT_VERSION,
        "count": statistics.count,
        "extractor": asdict(feature_set.tag) if feature_set.tag else None,
        "source": dict(feature_set.source),
    }
    arrays["provenance"] = np.array(json.dumps(provenance, sort_keys=True))
    write_atomically(Path(path), lambda temporary: _write_npz(temporary, arrays))


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_feature_set(path: str | Path, *, accept_foreign: bool = False, foreign_count: int | None = None) -> FeatureSet:
    """Reads a statistics file.

    Args:
        accept_foreign: also read `mu`/`sigma` files of other tools, which do not say how their features were made.
        foreign_count: the number of images behind a foreign file.

    Raises:
        ValueError: the file is damaged, is no statistics file, lacks provenance, or holds values that are not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files if key not in ("arr_0", "arr_1")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable npz file: {error}") from error
    if "mu" not in arrays or not {"sigma", "sigma_upper", "features"} & set(arrays):
        raise ValueError(f"{path} is no statistics file: it holds {', '.join(sorted(arrays)) or 'nothing'}")
    mean = torch.from_numpy(arrays["mu"].astype(np.float64))
    covariance = _covariance_from(arrays, len(mean), path)
    if not bool(mean.isfinite().all()) or not bool(covariance.isfinite().all()):
        raise ValueError(f"{path} holds statistics that are not finite")
    if "provenance" in arrays:
        provenance = json.loads(str(arrays["provenance"]))
    elif accept_foreign and foreign_count:
        provenance = {"count": foreign_count, "extractor": None, "source": {"kind": "foreign statistics"}}
    else:
        raise ValueError(
            f"{path} does not say how its features were made; accept it with --foreign-statistics N, "
            "where N is the number of images behind it"
        )
    tag = ExtractorTag(**provenance["extractor"]) if provenance["extractor"] else None
    spatial = None
    if "mu_s" in arrays and "sigma_s" in arrays:
        spatial = FeatureStatistics.from_moments(
            provenance["count"], torch.from_numpy(arrays["mu_s"]), torch.from_numpy(arrays["sigma_s"])
        )
    singles = {key: torch.from_numpy(arrays[key]).float() for key in ("features", "logits") if key in arrays}
    source = {**provenance["source"], "statistics_file": Path(path).name}
    statistics = FeatureStatistics.from_moments(provenance["count"], mean, covariance)
    return FeatureSet(tag, statistics, singles.get("features"), singles.get("logits"), spatial, source)


def _covariance_from(arrays: Mapping[str, np.ndarray], dimension: int, path: str | Path) -> torch.Tensor:
    if not {"sigma", "sigma_upper"} & set(arrays):
        return FeatureStatistics.of(torch.from_numpy(arrays["features"])).covariance
    if "sigma" in arrays:
        covariance = arrays["sigma"].astype(np.float64)
        if covariance.shape != (dimension, dimension):
            raise ValueError(f"{path} holds a covariance {covariance.shape} for {dimension} dimensions")
        return torch.from_numpy(covariance)
    upper = arrays["sigma_upper"]
    if upper.shape != (dimension * (dimension + 1) // 2,):
        raise ValueError(f"{path} holds {upper.size} covariance values for {dimension} dimensions")
    covariance = np.zeros((dimension, dimension))
    covariance[np.triu_indices(dimension)] = upper
    return torch.from_numpy(covariance + np.triu(covariance, 1).T)

"""How near samples come to the training set: a model that copies has a small distance and a low Frechet distance too.

Distances are shown beside those of real samples that were not trained on (the reference), where its features are known.
"""

from typing import Any

import numpy as np
import torch

from dit_suite.evaluation.distances import nearest_distances
from dit_suite.evaluation.extraction import Extraction
from dit_suite.evaluation.sources import Source
from dit_suite.evaluation.statistics import FeatureSet

CLOSE_QUANTILE = 0.01
LISTED = 5


def check_sizes(given: tuple[int, ...], trained: tuple[int, ...]) -> None:
    """Refuses pictures that can't be compared in grey levels; an empty shape is one that is not known yet.

    Raises:
        ValueError: training samples and samples differ in size.
    """
    if given and trained and given != trained:
        height, width = given[-3:-1]
        hint = f": give DATA.parquet:train,size={height}" if height == width and len(trained) == 3 else ""
        raise ValueError(f"training samples are {trained}, the samples are {given}{hint}")


class PixelObserver:
    """Root-mean-square grey-level distance (0..255) of every sample to its nearest training sample.

    Raises:
        ValueError: training samples and samples differ in size.
    """

    def __init__(self, train: Source):
        self.train = train
        self.bank: torch.Tensor | None = None

    def _load(self, shape: tuple[int, ...]) -> torch.Tensor:
        check_sizes(shape, tuple(self.train.shape))
        rows = self.train.read(range(len(self.train)))
        return torch.from_numpy(np.ascontiguousarray(rows)).flatten(1).float()

    def __call__(self, indices: range, samples: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.bank is None:
            self.bank = self._load(tuple(samples.shape[1:]))
        values, rows = nearest_distances(samples.flatten(1).float(), self.bank)
        return {"nearest_pixel": values / self.bank.shape[1] ** 0.5, "nearest_pixel_row": rows}


def report(samples: Extraction, train: FeatureSet, real: FeatureSet | None) -> dict[str, Any]:
    """Nearest-neighbour distances of samples to the training set, in features and (where observed) in pixels.

    Args:
        samples: features `(n, d)` and what `PixelObserver` found.
        train: the training set, with single features.
        real: samples that were not trained on; their 1 % quantile is the threshold of `share_closer_than_real`.

    Raises:
        ValueError: the training statistics hold no single features.
    """
    if train.features is None or samples.feature_set.features is None:
        raise ValueError("nearest-neighbour distances need single features of the samples and of the training set")
    values, rows = nearest_distances(samples.feature_set.features, train.features)
    found: dict[str, Any] = {"n_train": train.count, "feature_distance_median": float(values.median())}
    if real is not None and real.features is not None:
        real_values, _ = nearest_distances(real.features, train.features)
        threshold = torch.quantile(real_values, CLOSE_QUANTILE)
        found["real_feature_distance_median"] = float(real_values.median())
        found["share_closer_than_real"] = float((values < threshold).double().mean())
    closest = values.argsort()[:LISTED]
    found["closest"] = [
        {"sample": int(i), "train": int(rows[i]), "feature_distance": float(values[i])} for i in closest
    ]
    pixels = samples.observed.get("nearest_pixel")
    if pixels is not None:
        found["pixel_rms_median"] = float(pixels.median())
        found["pixel_rms_smallest"] = float(pixels.min())
    return found

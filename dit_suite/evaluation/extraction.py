"""One pass over a source: features of every sample, shared between processes, in index order.

Batches are cut by index as in `dit_suite.sampling` and shared by the processes in turn, so that a batch holds the same
pictures for any number of them and the features agree bit for bit.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from dit_suite.evaluation.feature_extractor import FeatureExtractor
from dit_suite.evaluation.sources import Source
from dit_suite.evaluation.statistics import FeatureSet, FeatureStatistics
from dit_suite.sampling import batches

BATCH_SIZE = 32
Observer = Callable[[range, torch.Tensor], dict[str, torch.Tensor]]


@dataclass
class Extraction:
    """A feature set, and what the observers found per sample (`(n,)` each, in index order)."""

    feature_set: FeatureSet
    observed: dict[str, torch.Tensor] = field(default_factory=dict)


def as_pictures(samples: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """uint8 `(B, H, W, 3)` or clips `(B, T, H, W, 3)` to pictures `(B [* T], 3, H, W)` on `device`."""
    pictures = torch.from_numpy(np.ascontiguousarray(samples)).to(device)
    if pictures.ndim == 5:
        pictures = pictures.flatten(0, 1)
    return pictures.permute(0, 3, 1, 2).contiguous()


def share_of(rank: int, world: int, count: int, batch_size: int, made_together: int = 1) -> list[tuple[int, range]]:
    """The batches of process `rank` of `world`, with their numbers.

    Args:
        count: samples in all.
        batch_size: samples per batch.
        made_together: lots in which the source makes its samples. A process gets whole lots, so that no two make the
            same one.
    """
    span = math.lcm(batch_size, made_together)
    numbered = enumerate(batches(count, batch_size))
    return [(number, batch) for number, batch in numbered if batch.start // span % world == rank]


def extract(
    source: Source,
    extractor: FeatureExtractor,
    *,
    batch_size: int = BATCH_SIZE,
    keep_features: bool = True,
    with_spatial: bool = False,
    observers: Sequence[Observer] = (),
    state: Any = None,
    progress: str | None = None,
) -> Extraction:
    """Reads every sample once and returns its features on every process; every frame of a clip is a row, unless the
    extractor takes clips.

    Args:
        batch_size: samples per pass through the extractor.
        keep_features: keep single features and logits; otherwise only statistics travel between processes.
        with_spatial: also the statistics of the spatial features (sFID).
        observers: called as `observer(indices, uint8 samples)`; return per-sample values.
        state: accelerate's `PartialState`, or None for one process.
        progress: label of a progress bar on the main process.
    """
    rank, world = (state.process_index, state.num_processes) if state is not None else (0, 1)
    share = share_of(rank, world, len(source), batch_size, getattr(source, "made_together", 1))
    rows: list[dict[str, Any]] = []
    statistics = FeatureStatistics(extractor.tag.dimension)
    spatial: FeatureStatistics | None = None
    for number, indices in tqdm(share, desc=progress, disable=progress is None or rank != 0):
        samples = source.read(indices)
        inputs = torch.from_numpy(samples) if extractor.takes_clips else as_pictures(samples, extractor.device)
        with torch.inference_mode():
            found = extractor(inputs.to(extractor.device))
        row = {"batch": number, "digests": [hashlib.sha256(sample.tobytes()).digest() for sample in samples]}
        if keep_features:
            row["features"] = found.features.float().cpu()
            row["logits"] = None if found.logits is None else found.logits.float().cpu()
        else:
            statistics.update(found.features)
        if with_spatial:
            spatial = spatial or FeatureStatistics(found.spatial.shape[1])
            spatial.update(found.spatial)
        row["observed"] = {}
        for observer in observers:
            row["observed"].update(observer(indices, torch.from_numpy(samples)))
        rows.append(row)
    if world > 1:
        rows = gather_object(rows)
        statistics = _merged(gather_object([statistics]))
        spatial = _merged(gather_object([spatial]))
    rows.sort(key=lambda row: row["batch"])
    return _assembled(rows, source, extractor, statistics, spatial, keep_features)


def _merged(parts: list[FeatureStatistics | None]) -> FeatureStatistics | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    total = FeatureStatistics(present[0].dimension)
    for part in present:
        total = total.merge(part)
    return total


def _assembled(
    rows: list[dict[str, Any]],
    source: Source,
    extractor: FeatureExtractor,
    statistics: FeatureStatistics,
    spatial: FeatureStatistics | None,
    keep_features: bool,
) -> Extraction:
    fingerprint = hashlib.sha256(b"".join(digest for row in rows for digest in row["digests"])).hexdigest()
    description = {**source.describe(), "shape": list(source.shape), "samples": len(source), "sha256": fingerprint}
    if len(source.shape) == 4 and not extractor.takes_clips:
        description["frames_per_sample"] = source.shape[0]
    features = logits = None
    if keep_features:
        features = torch.cat([row["features"] for row in rows])
        if rows[0]["logits"] is not None:
            logits = torch.cat([row["logits"] for row in rows])
        statistics = FeatureStatistics.of(features)
    observed = {name: torch.cat([row["observed"][name] for row in rows]) for name in rows[0]["observed"]}
    return Extraction(FeatureSet(extractor.tag, statistics, features, logits, spatial, description), observed)

"""Evaluation from start to end: check the request, extract features once per source, compute, report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit_suite.evaluation import distances, memorisation, resampling
from dit_suite.evaluation.extraction import Extraction, Observer, extract
from dit_suite.evaluation.feature_extractor import FeatureExtractor
from dit_suite.evaluation.metric_names import PAIR_METRICS, Request, result_name
from dit_suite.evaluation.options import EvaluationOptions
from dit_suite.evaluation.pairs import PairObserver, pair_metric, summary
from dit_suite.evaluation.report import Report
from dit_suite.evaluation.sources import Source
from dit_suite.evaluation.statistics import FeatureSet, FeatureStatistics, check_comparable

NEED_FEATURES = ("kid", "precision", "recall", "density", "coverage", "mmd")
RESAMPLED = ("fd", "kid")
SMALL_N = 2048
Side = Source | FeatureSet


@dataclass
class Inputs:
    """What an evaluation compares. Each side is a source, or a feature set read from a statistics file.

    Attributes:
        samples: the run to judge.
        reference: real samples.
        baseline: another run, sample i of which belongs to sample i of `samples` (pairs, paired verdict).
        train: the training set, for nearest-neighbour distances.
        floor: other real samples for the real-versus-real floor; None splits the reference.
        with_floor: compute the floor at all.
    """

    samples: Side
    reference: Side | None = None
    baseline: Side | None = None
    train: Side | None = None
    floor: Side | None = None
    with_floor: bool = True


class Evaluation:
    """One evaluation. `check` refuses what cannot work before any feature is computed; `run` does the work.

    With `keep_everything`, `feature_set` (set by `run`) holds single features and spatial statistics, to be saved.
    """

    def __init__(
        self,
        inputs: Inputs,
        extractor: FeatureExtractor,
        requests: Sequence[Request],
        options: EvaluationOptions,
        state: Any = None,
        keep_everything: bool = False,
    ):
        self.keep_everything = keep_everything
        self.inputs, self.extractor, self.options, self.state = inputs, extractor, options, state
        self.requests = {request.kind: request for request in requests}
        self.set_kinds = [kind for kind in self.requests if kind not in PAIR_METRICS]
        self.pair_kinds = [kind for kind in self.requests if kind in PAIR_METRICS]
        self.warnings: list[str] = []
        self.check()

    @property
    def is_main(self) -> bool:
        return self.state is None or self.state.is_main_process

    @property
    def keep_features(self) -> bool:
        """Single features travel only where something needs them; a bare distance adds up statistics."""
        needed = {"is", *NEED_FEATURES} & set(self.set_kinds)
        resampled = self.options.bootstrap and set(RESAMPLED) & set(self.set_kinds)
        return bool(needed or resampled or self.inputs.train is not None or self.keep_everything)

    def check(self) -> None:
        """Raises `ValueError` with one sentence for a request that these inputs and features cannot answer."""
        inputs, name = self.inputs, self.extractor.tag.name
        for kind, needs, has in (("is", "logits", "has_logits"), ("sfd", "spatial features", "has_spatial")):
            if kind in self.requests and not getattr(self.extractor, has):
                raise ValueError(f"{kind} needs {needs}, which {name} does not give")
        if inputs.reference is None and set(self.set_kinds) - {"is"}:
            raise ValueError(f"{self.set_kinds[0]} needs --reference")
        if self.pair_kinds:
            self._check_pairs()
        for side, label in (
            (inputs.samples, "samples"),
            (inputs.reference, "reference"),
            (inputs.baseline, "baseline"),
        ):
            if isinstance(side, FeatureSet):
                self._check_feature_set(side, label)
        memorisation.check_sizes(*(tuple(getattr(side, "shape", ())) for side in (inputs.samples, inputs.train)))
        for side, label in ((inputs.train, "train"), (inputs.floor, "floor")):
            if isinstance(side, FeatureSet):
                check_comparable(side, self._probe())
                if side.features is None:
                    raise ValueError(f"the {label} statistics file holds no single features")

    def _probe(self) -> FeatureSet:
        return FeatureSet(self.extractor.tag, FeatureStatistics(self.extractor.tag.dimension))

    def _check_pairs(self) -> None:
        samples, baseline = self.inputs.samples, self.inputs.baseline
        if baseline is None:
            raise ValueError(f"{self.pair_kinds[0]} compares with another run: give --baseline")
        if isinstance(samples, FeatureSet) or isinstance(baseline, FeatureSet):
            raise ValueError(f"{self.pair_kinds[0]} needs the samples themselves, not a statistics file")
        if len(samples) != len(baseline):
            raise ValueError(
                f"the run holds {len(samples)} samples and the baseline {len(baseline)}: they must pair up"
            )
        if samples.shape and baseline.shape and samples.shape != baseline.shape:
            raise ValueError(f"the run holds samples of {samples.shape} and the baseline of {baseline.shape}")

    def _check_feature_set(self, side: FeatureSet, label: str) -> None:
        check_comparable(side, self._probe())
        wanting = [kind for kind in NEED_FEATURES if kind in self.requests]
        if side.features is None and wanting:
            raise ValueError(f"{wanting[0]} needs single features, and the {label} statistics file holds none")
        if side.spatial is None and "sfd" in self.requests:
            raise ValueError(f"sfd needs spatial statistics, and the {label} statistics file holds none")
        if label == "samples" and side.logits is None and "is" in self.requests:
            raise ValueError("is needs logits, and the samples statistics file holds none")

    def run(self) -> Report | None:
        """Computes everything that was asked for; returns the report on the main process and None on the others."""
        began = time.perf_counter()
        samples = self._extract(self.inputs.samples, "samples", self._observers())
        reference = self._set(self.inputs.reference, "reference")
        baseline = self._set(self.inputs.baseline, "baseline") if self.set_kinds else None
        train = self._set(self.inputs.train, "train")
        floor = self._set(self.inputs.floor, "floor")
        self.feature_set = samples.feature_set
        if not self.is_main:
            return None
        self._warn(samples.feature_set, reference)
        report = Report(
            self.extractor.tag,
            {**samples.feature_set.source, "samples": samples.feature_set.count},
            {**reference.source, "samples": reference.count} if reference else None,
        )
        report.details = {"options": self.options.to_dict()}
        self._set_metrics(report, samples.feature_set, reference)
        if self.inputs.with_floor and reference is not None:
            self._floor(report, samples.feature_set.count, reference, floor)
        if baseline is not None and reference is not None:
            self._compare(report, samples.feature_set, baseline, reference)
        report.pairs = summary({k: v for k, v in samples.observed.items() if not k.startswith("nearest")})
        if train is not None:
            report.memorisation = memorisation.report(samples, train, reference)
        report.warnings = self.warnings
        report.seconds = time.perf_counter() - began
        return report

    def _observers(self) -> list[Observer]:
        observers: list[Observer] = []
        if self.pair_kinds:
            networks = {k: pair_metric(k, self.extractor) for k in self.pair_kinds}
            named = {result_name(k, self.extractor): metric for k, metric in networks.items()}
            observers.append(PairObserver(self.inputs.baseline, named, self.extractor.device))
        train = self.inputs.train
        if train is not None and not isinstance(train, FeatureSet):
            observers.append(memorisation.PixelObserver(train))
        return observers

    def _extract(self, side: Side, label: str, observers: Sequence[Observer] = ()) -> Extraction:
        if isinstance(side, FeatureSet):
            return Extraction(side)
        return extract(
            side,
            self.extractor,
            batch_size=self.options.feature_batch_size,
            keep_features=self.keep_features or label == "floor",
            with_spatial=label in ("samples", "reference")
            and ("sfd" in self.requests or (self.keep_everything and self.extractor.has_spatial)),
            observers=observers,
            state=self.state,
            progress=label,
        )

    def _set(self, side: Side | None, label: str) -> FeatureSet | None:
        return None if side is None else self._extract(side, label).feature_set

    def _warn(self, samples: FeatureSet, reference: FeatureSet | None) -> None:
        tag, smallest = self.extractor.tag, min(samples.count, reference.count if reference else samples.count)
        if "fd" in self.requests and smallest <= tag.dimension:
            self.warnings.append(
                f"N = {smallest} is not above the {tag.dimension} feature dimensions: the covariance is singular and "
                "the Frechet distance is mostly bias; compare at equal N only, and prefer kid"
            )
        elif "fd" in self.requests and smallest < SMALL_N:
            self.warnings.append(
                f"N = {smallest} is small: a Frechet distance has a bias of about 1/N; compare at equal N only"
            )
        for request in self.requests.values():
            if request.count is not None and request.count != samples.count:
                self.warnings.append(
                    f"{request.asked} was asked for {request.count} samples, these are {samples.count}"
                )
            if request.asked in ("fid", "sfid") and not self.extractor.is_inception:
                name = result_name(request.kind, self.extractor)
                self.warnings.append(f"{request.asked} means Inception features; with {tag.name} the result is {name}")
        for label, side in (("samples", samples), ("reference", reference)):
            if side is not None and side.source.get("frames_per_sample"):
                self.warnings.append(f"the {label} are clips, and {tag.name} takes pictures: every frame is a sample")
            if side is not None and side.source.get("lossy_files"):
                self.warnings.append(
                    f"{side.source['lossy_files']} of the {label} are JPEG files, which moves distances"
                )
        shapes = [side.source.get("shape") for side in (samples, reference) if side is not None]
        if len(shapes) == 2 and all(shapes) and shapes[0] != shapes[1]:
            self.warnings.append(
                f"samples are {shapes[0]} and the reference is {shapes[1]}: resized from different sizes"
            )

    def _placed(self, features: torch.Tensor) -> torch.Tensor:
        """Kernel sums over all pairs run where the network ran, if that device has float64."""
        return features.to(self.extractor.device) if self.extractor.device.type == "cuda" else features

    def _distance(self, kind: str) -> Callable[[torch.Tensor, torch.Tensor], float]:
        if kind == "kid":
            return distances.kid
        return lambda one, other: FeatureStatistics.of(one).frechet_distance(FeatureStatistics.of(other))

    def _value(self, kind: str, samples: FeatureSet, reference: FeatureSet) -> float:
        if kind == "fd":
            return samples.statistics.frechet_distance(reference.statistics)
        return distances.kid(self._placed(samples.features), self._placed(reference.features))

    def _replicates(self, kind: str, samples: FeatureSet, reference: FeatureSet) -> torch.Tensor:
        options = self.options
        counts = resampling.bootstrap_counts(samples.count, options.bootstrap, options.statistics_seed)
        if kind == "fd":
            return resampling.frechet_replicates(samples.features, reference.statistics, counts)
        return resampling.kid_replicates(self._placed(samples.features), reference.features, counts)

    def _set_metrics(self, report: Report, samples: FeatureSet, reference: FeatureSet | None) -> None:
        options, found = self.options, {}
        self._replicated: dict[str, torch.Tensor] = {}
        for kind in self.set_kinds:
            if kind in RESAMPLED:
                found[kind] = self._value(kind, samples, reference)
                if options.bootstrap and samples.features is not None:
                    self._replicated[kind] = self._replicates(kind, samples, reference)
        if "sfd" in self.requests:
            found["sfd"] = samples.spatial.frechet_distance(reference.spatial)
        if "is" in self.requests:
            score = distances.inception_score(samples.logits, options.is_splits, options.statistics_seed)
            found["is"] = score.mean
            report.details["is_std"] = score.std
        if {"precision", "recall"} & set(self.requests):
            pair = distances.precision_recall(samples.features, reference.features, options.neighbours)
            found.update(zip(("precision", "recall"), pair, strict=True))
        if {"density", "coverage"} & set(self.requests):
            pair = distances.density_coverage(samples.features, reference.features, options.density_neighbours)
            found.update(zip(("density", "coverage"), pair, strict=True))
        if "mmd" in self.requests:
            found["mmd"] = distances.gaussian_mmd(samples.features, reference.features, options.mmd_sigma)
        if "kid" in self.requests:
            self._kid_subsets(report, samples, reference)
        for kind in self.set_kinds:
            request = self.requests[kind]
            name = result_name(kind, self.extractor)
            if request.count == samples.count:
                name += f"{request.count // 1000}k" if request.count % 1000 == 0 else str(request.count)
            report.metrics[name] = found[kind]
            if kind in self._replicated:
                interval = resampling.interval_around(found[kind], self._replicated[kind], options.level)
                report.intervals[name] = interval.to_dict()

    def _kid_subsets(self, report: Report, samples: FeatureSet, reference: FeatureSet) -> None:
        options = self.options
        subsets = (100 if self.extractor.is_inception else 0) if options.kid_subsets is None else options.kid_subsets
        if not subsets:
            return
        size = min(options.kid_subset_size, samples.count, reference.count)
        if size < options.kid_subset_size:
            self.warnings.append(f"KID subsets hold {size} samples instead of {options.kid_subset_size}")
        found = distances.kid_subsets(samples.features, reference.features, subsets, size, options.statistics_seed)
        report.details["kid_subsets"] = {"mean": found.mean, "std": found.std, "subsets": subsets, "subset_size": size}

    def _floor(self, report: Report, count: int, reference: FeatureSet, floor: FeatureSet | None) -> None:
        if floor is None and reference.features is None:
            self.warnings.append("no real-vs-real floor: the reference file holds no single features (give --floor)")
            return
        for kind in RESAMPLED:
            if kind not in self.requests:
                continue
            if floor is None:
                value, n = resampling.real_floor(
                    reference.features, count, self._distance(kind), self.options.statistics_seed
                )
            else:
                order = torch.randperm(
                    floor.count, generator=torch.Generator().manual_seed(self.options.statistics_seed)
                )
                drawn = floor.features[order[:count]]
                part = FeatureSet(floor.tag, FeatureStatistics.of(drawn), drawn)
                value, n = self._value(kind, part, reference), part.count
            name = next(name for name in report.metrics if name.startswith(result_name(kind, self.extractor)))
            report.floor[name] = {"value": value, "n": n, "against": reference.count if floor else reference.count - n}

    def _compare(self, report: Report, samples: FeatureSet, baseline: FeatureSet, reference: FeatureSet) -> None:
        if not self.options.bootstrap or samples.features is None or baseline.features is None:
            self.warnings.append("no verdict: a paired comparison needs --bootstrap and single features of both runs")
            return
        if samples.count != baseline.count:
            self.warnings.append(f"no verdict: {samples.count} samples against {baseline.count} of the baseline")
            return
        for kind, replicates in self._replicated.items():
            name = result_name(kind, self.extractor)
            verdict = resampling.judge(
                name,
                self._value(kind, samples, reference),
                self._value(kind, baseline, reference),
                replicates,
                self._replicates(kind, baseline, reference),
                self.options.margin,
                self.options.level,
            )
            report.comparison.append(verdict.to_dict())

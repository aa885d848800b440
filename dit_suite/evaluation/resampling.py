"""How sure a distance is at this N: bootstrap intervals, and a verdict on two runs against one reference.

The generated samples are resampled, the reference is held fixed. Two runs are resampled with the same draws, so that
what they share (same seeds, same prompts) cancels in the difference.

A bootstrap sample repeats rows, which raises a Frechet distance by roughly its own O(1/N) bias. Replicates are
used for their spread only: interval = value + (quantiles of the replicates - their mean). KID replicates are weighted
U-statistics that leave out pairs of a row with its own copy, and so stay unbiased.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_suite.evaluation.distances import ROWS_AT_ONCE, polynomial_kernel, symmetric_sqrt, trace_of_sqrt
from dit_suite.evaluation.statistics import FeatureStatistics

LEVEL = 0.95
MARGIN = 0.03
HELD, WORSE, UNRESOLVED = "held", "worse", "not resolved at this N"


def bootstrap_counts(count: int, replicates: int, seed: int) -> torch.Tensor:
    """How often each of `count` rows is drawn in each replicate: `(replicates, count)` float64, rows sum to `count`."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(count, (replicates, count), generator=generator)
    ones = torch.ones(draws.shape, dtype=torch.float64)
    return torch.zeros(replicates, count, dtype=torch.float64).scatter_add_(1, draws, ones)


def frechet_replicates(features: torch.Tensor, reference: FeatureStatistics, counts: torch.Tensor) -> torch.Tensor:
    """The Frechet distance to `reference` of every resampled set: `(replicates,)`.

    With Y = (X - mean) S_ref^(1/2), the trace of the square root needs the eigenvalues of Y's weighted covariance. For
    fewer rows than dimensions those of the weighted, centred Gram matrix Y Y^T are the same and cheaper to get.
    """
    x = features.double().cpu()
    n, dimension = x.shape
    centre = x.mean(0)
    x = x - centre
    squares = x.square().sum(1)
    projected = x @ symmetric_sqrt(reference.covariance)
    gram = projected @ projected.T if n <= dimension else None
    shift = centre - reference.mean
    fixed = float(reference.covariance.trace())
    found = []
    for weights in counts:
        mean = weights @ x / n
        own_trace = float((weights @ squares - n * mean.square().sum()) / (n - 1))
        if gram is None:
            centred = (projected - weights @ projected / n) * weights.sqrt()[:, None]
            moment = centred.T @ centred
        else:
            drawn = weights > 0
            root = weights[drawn].sqrt()
            towards_mean = (gram @ weights / n)[drawn]
            middle = float(weights @ gram @ weights) / n**2
            centred = gram[drawn][:, drawn] - towards_mean[:, None] - towards_mean[None] + middle
            moment = centred * torch.outer(root, root)
        distance = float((mean + shift).square().sum()) + own_trace + fixed
        found.append(distance - 2 * trace_of_sqrt(moment / (n - 1)))
    return torch.tensor(found, dtype=torch.float64)


def kid_replicates(features: torch.Tensor, reference: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The unbiased KID to the reference features of every resampled set: `(replicates,)`."""
    x, y = features.double(), reference.to(features.device).double()
    weights = counts.to(x.device)
    n, m = len(x), len(y)
    within = across = torch.zeros(len(counts), dtype=torch.float64, device=x.device)
    for rows in torch.arange(n, device=x.device).split(ROWS_AT_ONCE):
        others = polynomial_kernel(x[rows], x)
        others[torch.arange(len(rows), device=x.device), rows] = 0
        within = within + ((weights[:, rows] @ others) * weights).sum(1)
        across = across + weights[:, rows] @ polynomial_kernel(x[rows], y).sum(1)
    within_reference = sum(float(polynomial_kernel(part, y).sum()) for part in y.split(ROWS_AT_ONCE))
    within_reference -= float((y.square().sum(1) / y.shape[1] + 1).pow(3).sum())
    distinct_pairs = n**2 - weights.square().sum(1)
    return (within / distinct_pairs + within_reference / (m * (m - 1)) - 2 * across / (n * m)).cpu()


@dataclass(frozen=True)
class Interval:
    """A value and the central interval of its sampling spread at `level`."""

    value: float
    low: float
    high: float
    level: float = LEVEL

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def interval_around(value: float, replicates: torch.Tensor, level: float = LEVEL) -> Interval:
    """`value` plus the quantiles of the replicates' deviations from their own mean."""
    deviations = replicates - replicates.mean()
    tail = (1 - level) / 2
    low, high = torch.quantile(deviations, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(value, value + low, value + high, level)


@dataclass(frozen=True)
class Verdict:
    """What a paired comparison says about one distance (smaller is better).

    `difference` is run - baseline and `relative` is that over baseline (None for a baseline at or below zero, a KID
    within noise), each with its interval. `verdict` is "held" when the relative interval lies at or below +margin,
    "worse" when the difference lies above 0 and is not held, else "not resolved at this N".
    """

    metric: str
    baseline: float
    run: float
    difference: Interval
    relative: Interval | None
    margin: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    metric: str,
    run: float,
    baseline: float,
    run_replicates: torch.Tensor,
    baseline_replicates: torch.Tensor,
    margin: float = MARGIN,
    level: float = LEVEL,
) -> Verdict:
    """The verdict from replicates of both runs that used the same draws."""
    difference = interval_around(run - baseline, run_replicates - baseline_replicates, level)
    relative = None
    if baseline > 0:
        relative = Interval(*(side / baseline for side in (difference.value, difference.low, difference.high)), level)
    if relative is not None and relative.high <= margin:
        verdict = HELD
    elif difference.low > 0:
        verdict = WORSE
    else:
        verdict = UNRESOLVED
    return Verdict(metric, baseline, run, difference, relative, margin, verdict)


def real_floor(
    features: torch.Tensor, count: int, metric: Callable[[torch.Tensor, torch.Tensor], float], seed: int = 0
) -> tuple[float, int]:
    """The distance between two disjoint random parts of the real samples: what a perfect generator would get.

    Args:
        features: real features `(n, d)`.
        count: samples wanted on the generated side; the floor uses `min(count, n // 2)`, the rest is the other side.
        metric: called with (part, rest).

    Returns:
        The floor and the number of samples in the part; compare it with results at that N only.
    """
    part = min(count, len(features) // 2)
    if part < 2:
        raise ValueError(f"a floor needs at least 4 real samples, got {len(features)}")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return metric(features[order[:part]], features[order[part:]]), part

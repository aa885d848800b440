"""Distances between two sets of feature vectors: pure functions on float64 tensors.

Arguments are named `generated` and `real` wherever the two sides are not interchangeable. Inception score, precision
and recall and the subset KID come from torch-fidelity; what it lacks (or computes less safely) is here.
"""

from dataclasses import dataclass

import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class MeanAndStd:
    """A score averaged over splits or subsets; `std` is the population deviation over them."""

    mean: float
    std: float


def symmetric_sqrt(matrix: torch.Tensor) -> torch.Tensor:
    """The positive semi-definite square root `(d, d)` of a symmetric matrix; eigenvalues below 0 count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def trace_of_sqrt(matrix: torch.Tensor) -> float:
    """Sum of the square roots of the eigenvalues of a symmetric matrix; eigenvalues below 0 count as 0."""
    return float(torch.linalg.eigvalsh(matrix).clamp_min(0).sqrt().sum())


def frechet_distance(
    mean_1: torch.Tensor, covariance_1: torch.Tensor, mean_2: torch.Tensor, covariance_2: torch.Tensor
) -> float:
    """Squared Frechet distance of two Gaussians, `|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))`.

    The trace of the square root is the sum of the roots of the eigenvalues of `S1^(1/2) S2 S1^(1/2)`: symmetric, so
    the result is real even when fewer samples than dimensions make a covariance singular. (Heusel et al. 2017, eq. 6.)

    Args:
        mean_1, mean_2: `(d,)`.
        covariance_1, covariance_2: `(d, d)`, symmetric, normalised by n - 1.

    Raises:
        ValueError: the two sides differ in dimension, or hold values that are not finite.
    """
    if mean_1.shape != mean_2.shape or covariance_1.shape != covariance_2.shape:
        raise ValueError(f"the two sides have {mean_1.shape[0]} and {mean_2.shape[0]} feature dimensions")
    sides = [side.double() for side in (mean_1, covariance_1, mean_2, covariance_2)]
    if not all(bool(side.isfinite().all()) for side in sides):
        raise ValueError("the statistics hold values that are not finite")
    m1, s1, m2, s2 = sides
    root = symmetric_sqrt(s1)
    cross = root @ s2 @ root
    traces = float(s1.trace() + s2.trace())
    return float((m1 - m2).square().sum()) + traces - 2 * trace_of_sqrt((cross + cross.T) / 2)


def polynomial_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`(x . y / d + 1)^3`, the kernel of KID (Binkowski et al. 2018): `(n, d), (m, d) -> (n, m)`."""
    return (x @ y.T / x.shape[1] + 1).pow(3)


def gaussian_kernel(x: torch.Tensor, y: torch.Tensor, sigma: float) -> torch.Tensor:
    """`exp(-|x - y|^2 / (2 sigma^2))`: `(n, d), (m, d) -> (n, m)`."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T
    return torch.exp(-squares / (2 * sigma**2))


def kid(generated: torch.Tensor, real: torch.Tensor, unbiased: bool = True) -> float:
    """Squared MMD with the polynomial kernel over all rows at once: the lowest-variance form of KID.

    Args:
        generated, real: `(n, d)` and `(m, d)` features; at least two rows each.
        unbiased: leave the diagonals out (may be slightly negative), or keep them (V-statistic).
    """
    x, y = generated.double(), real.double()
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"KID needs at least two samples on each side, got {n} and {m}")
    sums = []
    for rows, columns, drop in ((x, x, unbiased), (y, y, unbiased), (x, y, False)):
        total = sum(float(polynomial_kernel(part, columns).sum()) for part in rows.split(ROWS_AT_ONCE))
        diagonal = float((rows.square().sum(1) / rows.shape[1] + 1).pow(3).sum()) if drop else 0.0
        sums.append(total - diagonal)
    within_x = sums[0] / (n * (n - 1) if unbiased else n * n)
    within_y = sums[1] / (m * (m - 1) if unbiased else m * m)
    return within_x + within_y - 2 * sums[2] / (n * m)


def kid_subsets(generated: torch.Tensor, real: torch.Tensor, subsets: int, subset_size: int, seed: int) -> MeanAndStd:
    """KID as papers report it: the mean over random subsets (torch-fidelity's, with its draws for `seed`)."""
    if subset_size > min(len(generated), len(real)):
        raise ValueError(
            f"a KID subset of {subset_size} is larger than the {min(len(generated), len(real))} samples given"
        )
    found = kid_features_to_metric(
        generated.double().cpu(),
        real.double().cpu(),
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        rng_seed=seed,
        verbose=False,
    )
    return MeanAndStd(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD])


def gaussian_mmd(generated: torch.Tensor, real: torch.Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Squared MMD of unit-length features with a Gaussian kernel, diagonals kept, times `scale`.

    With CLIP ViT-L/14@336 embeddings this is CMMD (Jayasumana et al. 2024); with other features it is not.
    """
    x, y = (torch.nn.functional.normalize(side.double(), dim=1) for side in (generated, real))
    means = []
    for rows, columns in ((x, x), (y, y), (x, y)):
        total = sum(float(gaussian_kernel(part, columns, sigma).sum()) for part in rows.split(ROWS_AT_ONCE))
        means.append(total / (len(rows) * len(columns)))
    return scale * (means[0] + means[1] - 2 * means[2])


def precision_recall(generated: torch.Tensor, real: torch.Tensor, neighbours: int) -> tuple[float, float]:
    """Precision (generated inside the real manifold) and recall (real inside the generated one).

    Kynkaanniemi et al. 2019; torch-fidelity 0.4's, whose first argument is the generated side.
    """
    _check_neighbours(generated, real, neighbours)
    found = prc_features_to_metric(
        generated.double().cpu(),
        real.double().cpu(),
        prc_neighborhood=neighbours,
        prc_batch_size=ROWS_AT_ONCE,
        save_cpu_ram=True,
        verbose=False,
    )
    # torch-fidelity returns float32 shares; as counts over n they are exact again.
    precision = round(found[KEY_METRIC_PRECISION] * len(generated)) / len(generated)
    recall = round(found[KEY_METRIC_RECALL] * len(real)) / len(real)
    return precision, recall


def density_coverage(generated: torch.Tensor, real: torch.Tensor, neighbours: int) -> tuple[float, float]:
    """Density (mean number of real balls around a generated sample, over k) and coverage (share of real balls hit).

    Naeem et al. 2020, eq. 4 and 5. A ball reaches to the k-th nearest other real sample.
    """
    _check_neighbours(generated, real, neighbours)
    x, y = generated.double(), real.double()
    radii = torch.cat([torch.cdist(part, y).kthvalue(neighbours + 1).values for part in y.split(ROWS_AT_ONCE)])
    inside_total = 0
    covered = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for part in x.split(ROWS_AT_ONCE):
        inside = torch.cdist(part, y) <= radii
        inside_total += int(inside.sum())
        covered |= inside.any(0)
    return inside_total / (neighbours * len(x)), float(covered.double().mean())


def _check_neighbours(generated: torch.Tensor, real: torch.Tensor, neighbours: int) -> None:
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(
            f"{neighbours} nearest neighbours need more than {neighbours} samples on each side, "
            f"got {len(generated)} and {len(real)}"
        )


def inception_score(logits: torch.Tensor, splits: int = 10, shuffle_seed: int | None = 2020) -> MeanAndStd:
    """`exp(mean KL(p(y|x) | p(y)))` averaged over splits (Salimans et al. 2016), through torch-fidelity.

    Args:
        logits: `(n, classes)`, without the bias for the standard Inception score.
        shuffle_seed: rows are shuffled first, so that class-ordered files do not lower the score; None keeps the order.
    """
    if len(logits) < splits:
        raise ValueError(f"an Inception score over {splits} splits needs at least {splits} samples, got {len(logits)}")
    found = isc_features_to_metric(logits.cpu(), splits, shuffle_seed is not None, shuffle_seed)
    return MeanAndStd(found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD])


def nearest_distances(queries: torch.Tensor, bank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean distance of every query `(n, d)` to its nearest row of `bank` `(m, d)`, and that row's index.

    The row is found by matrix products, whose rounding would give a copy a distance above zero; the distance is not.
    """
    rows = torch.cat([torch.cdist(part, bank).argmin(dim=1) for part in queries.split(ROWS_AT_ONCE)])
    pairs = zip(queries.split(ROWS_AT_ONCE), rows.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([torch.linalg.vector_norm(part - bank[found], dim=1) for part, found in pairs]), rows

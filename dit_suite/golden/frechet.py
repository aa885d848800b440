"""Golden fixtures `frechet_*`: distances between two fixed feature matrices."""

from typing import Any

import torch

from dit_suite.evaluation import distances
from dit_suite.evaluation.statistics import FeatureStatistics
from dit_suite.golden import Result, Tensors, compare, section

FAMILY = "frechet_features"
PREFIXES = ("frechet_",)
TOLERANCE = 1e-9
RANK_DEFICIENT_TOLERANCE = 1e-6


def check(tensors: Tensors, config: dict[str, Any]) -> list[Result]:
    """Recomputes every output of the fixture from its features and logits."""
    given, expected = section(tensors, "input"), section(tensors, "output")
    real, generated = given["features_real"], given["features_gen"]
    computed = {
        **_statistics(generated, real, config),
        **_kernels(generated, real, given, config),
        **_neighbours(generated, real, config),
        **_inception_scores(given["logits_gen"], config),
    }
    results = []
    for name, want in expected.items():
        if name not in computed:
            raise ValueError(f"the fixture holds output.{name}, which this family does not compute")
        got = torch.as_tensor(computed[name], dtype=torch.float64).reshape(want.shape)
        rank_deficient = name.endswith("rank_deficient")
        tolerance = RANK_DEFICIENT_TOLERANCE if rank_deficient else TOLERANCE
        results.append(compare(name, got, want, tolerance, relative=not rank_deficient))
    return results


def _statistics(generated: torch.Tensor, real: torch.Tensor, config: dict[str, Any]) -> dict[str, Any]:
    of_real, of_generated = FeatureStatistics.of(real), FeatureStatistics.of(generated)
    rows = config["rank_deficient_rows"]
    few_real, few_generated = FeatureStatistics.of(real[:rows]), FeatureStatistics.of(generated[:rows])
    return {
        "mu_real": of_real.mean,
        "sigma_real": of_real.covariance,
        "mu_gen": of_generated.mean,
        "sigma_gen": of_generated.covariance,
        "frechet_distance": of_generated.frechet_distance(of_real),
        "frechet_distance_rank_deficient": few_generated.frechet_distance(few_real),
    }


def _kernels(
    generated: torch.Tensor, real: torch.Tensor, given: dict[str, torch.Tensor], config: dict[str, Any]
) -> dict[str, Any]:
    rows = config["kid_rows"]
    pairs = zip(given["kid_subset_idx_gen"], given["kid_subset_idx_real"], strict=True)
    subset_values = [distances.kid(generated[g], real[r]) for g, r in pairs]
    subsets = distances.kid_subsets(
        generated, real, config["kid_subsets"], config["kid_subset_size"], config["kid_rng_seed"]
    )
    cmmd_rows = config["cmmd_rows"]
    return {
        "kid_full": distances.kid(generated[:rows], real[:rows]),
        "kid_full_biased": distances.kid(generated[:rows], real[:rows], unbiased=False),
        "kid_subset_values": subset_values,
        "kid_subset_mean": subsets.mean,
        "kid_subset_std": subsets.std,
        "cmmd": distances.gaussian_mmd(
            generated[:cmmd_rows], real[:cmmd_rows], config["cmmd_sigma"], config["cmmd_scale"]
        ),
    }


def _neighbours(generated: torch.Tensor, real: torch.Tensor, config: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for k in config["pr_k"]:
        found[f"precision_k{k}"], found[f"recall_k{k}"] = distances.precision_recall(generated, real, k)
        found[f"density_k{k}"], found[f"coverage_k{k}"] = distances.density_coverage(generated, real, k)
    return found


def _inception_scores(logits: torch.Tensor, config: dict[str, Any]) -> dict[str, Any]:
    splits = config["is_splits"]
    ordered = distances.inception_score(logits, splits, None)
    shuffled = distances.inception_score(logits, splits, config["is_shuffle_seed"])
    return {
        "inception_score_1split": distances.inception_score(logits, 1, None).mean,
        f"inception_score_{splits}split_mean": ordered.mean,
        f"inception_score_{splits}split_std": ordered.std,
        f"inception_score_{splits}split_shuffled_mean": shuffled.mean,
        f"inception_score_{splits}split_shuffled_std": shuffled.std,
    }

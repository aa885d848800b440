"""The settings of an evaluation, written once for the flags, the checks and the results."""

from dataclasses import dataclass

from dit_suite.options import Options, option


@dataclass(frozen=True)
class EvaluationOptions(Options):
    """Settings that decide a number; all of them are written into the result's `details`."""

    neighbours: int = option(3, "k of precision and recall", minimum=1, maximum=1000)
    density_neighbours: int = option(5, "k of density and coverage", minimum=1, maximum=1000)
    is_splits: int = option(10, "splits of the Inception score (rows are shuffled first)", minimum=1, maximum=1000)
    kid_subsets: int | None = option(
        None, "also KID over this many subsets (100 with Inception features, else 0)", minimum=0, maximum=10000
    )
    kid_subset_size: int = option(1000, "samples in a KID subset", minimum=2, maximum=1000000)
    mmd_sigma: float = option(10.0, "width of the Gaussian kernel of mmd/cmmd", minimum=1e-3, maximum=1e6)
    bootstrap: int = option(200, "bootstrap replicates for fd and kid intervals; 0 for none", minimum=0, maximum=100000)
    level: float = option(0.95, "coverage of the intervals", minimum=0.5, maximum=0.999)
    margin: float = option(0.03, "relative loss that still counts as held", minimum=0.0, maximum=1.0)
    statistics_seed: int = option(0, "seed of bootstrap, subsets and floor", minimum=0, maximum=2**31)
    feature_batch_size: int = option(32, "samples per pass through the feature network", minimum=1, maximum=4096)

    def validate(self) -> None:
        if 0 < self.bootstrap < 20:
            raise ValueError(f"bootstrap must be 0 or at least 20, got {self.bootstrap}")

"""Uncertainty weighting of the diffusion loss (ANT, Go et al. 2023): a learned weight for each cluster of timesteps."""

import torch


def timestep_clusters(num_timesteps: int, num_clusters: int) -> torch.Tensor:
    """First and last-plus-one timestep of equal clusters: `(num_clusters, 2)`."""
    if num_timesteps % num_clusters:
        raise ValueError(f"{num_timesteps} timesteps do not split into {num_clusters} equal clusters")
    edges = torch.arange(0, num_timesteps + 1, num_timesteps // num_clusters)
    return torch.stack([edges[:-1], edges[1:]], dim=1)


def uncertainty_weighted(
    losses: torch.Tensor, timestep: torch.Tensor, log_variance: torch.Tensor, num_timesteps: int
) -> torch.Tensor:
    """Uncertainty weighting of timestep clusters (ANT): `sum_i 0.5 (exp(-s_i) L_i / n + s_i)`, a scalar.

    Args:
        losses: unweighted `(batch,)`.
        timestep: `(batch,)` integers; every cluster must occur.
        log_variance: learnable s `(n,)`, zero at the start.
        num_timesteps: length of the timestep scale, cut into n equal clusters with mean losses L_i.

    Raises:
        ValueError: a cluster has no sample in the batch.
    """
    count = len(log_variance)
    cluster = timestep.long() * count // num_timesteps
    members = torch.nn.functional.one_hot(cluster, count).to(losses.dtype)
    sizes = members.sum(dim=0)
    if bool((sizes == 0).any()):
        raise ValueError(f"every one of the {count} timestep clusters needs a sample in the batch")
    means = members.T @ losses / sizes
    return 0.5 * ((-log_variance).exp() * means / count + log_variance).sum()


class UncertaintyWeighting(torch.nn.Module):
    """The learned s. It trains beside the network with its own learning rate and is not part of the checkpoint.

    Args:
        clusters: equal clusters that the timesteps fall in.
        num_timesteps: length of the timestep scale.
        learning_rate: constant rate of s, without weight decay (0.025 as published).

    Raises:
        ValueError: the timesteps do not split into that many clusters.
    """

    def __init__(self, clusters: int, num_timesteps: int, learning_rate: float = 0.025) -> None:
        super().__init__()
        timestep_clusters(num_timesteps, clusters)
        self.num_timesteps, self.learning_rate = num_timesteps, learning_rate
        self.log_variance = torch.nn.Parameter(torch.zeros(clusters))

    @property
    def clusters(self) -> int:
        return len(self.log_variance)

    def forward(self, losses: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Losses `(batch,)` at timesteps `(batch,)` to the scalar that is minimised."""
        return uncertainty_weighted(losses, timestep, self.log_variance, self.num_timesteps)

    def weights(self) -> torch.Tensor:
        """What each cluster's loss is multiplied by, up to the share of the cluster: `exp(-s) / 2`."""
        return 0.5 * (-self.log_variance.detach()).exp()

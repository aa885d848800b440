"""Switch-DiT's diffusion prior loss: pure functions with their definitions, and the term for the trainer.

The weights of the diffusion loss that Switch-DiT is trained with, min-SNR and uncertainty, are options of the diffusion
objective.
"""

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment

from dit_suite.models.switch_dit import (
    WINDOW_EXPONENT,
    SwitchDiTTransformer2DModel,
    sliding_window,
    weights_key,
)
from dit_suite.options import Options, option
from dit_suite.training.objectives import ObjectiveResult, TrainingBatch

_LOG_FLOOR = 1e-6


def diffusion_prior(
    num_timesteps: int, num_layers: int, num_experts: int, active: int, exponent: float = WINDOW_EXPONENT
) -> torch.Tensor:
    """The target pattern `(num_timesteps, num_layers * num_experts)`: a window of `num_layers * active` units that
    slides from the first unit at t = 0 to the last at t = T - 1. With 2k > E the middle units are on at every t."""
    return sliding_window(num_timesteps, num_layers * num_experts, num_layers * active, exponent)


def match_units(selected: torch.Tensor, prior: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Assigns every gate unit a unit of the prior, one to one, with the fewest disagreements over all timesteps.

    Args:
        selected: bool or 0/1 `(num_timesteps, units)`, which gate units are on.
        prior: 0/1 of the same shape.

    Returns:
        `assignment (units,)`, the prior unit of each gate unit, and the number of disagreements. Prior units that are
        on at every timestep are alike, so several assignments may be equally good.
    """
    gates, target = selected.cpu().double(), prior.cpu().double()
    cost = gates.sum(0)[:, None] + target.sum(0)[None] - 2 * gates.T @ target
    rows, columns = linear_sum_assignment(cost.numpy())
    return torch.as_tensor(columns, device=selected.device), int(cost[rows, columns].sum())


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence in nats per row, 1e-6 inside the logarithms as published; between 0 and ln 2."""
    middle = ((p + q) / 2 + _LOG_FLOOR).log()
    terms = p * ((p + _LOG_FLOOR).log() - middle) + q * ((q + _LOG_FLOOR).log() - middle)
    return terms.sum(dim=-1) / 2


def prior_loss(probabilities: torch.Tensor, matched_prior: torch.Tensor) -> torch.Tensor:
    """Divergence of the gates from the prior: `probabilities (batch, layers, E)` and the prior rows of the batch's
    timesteps in the order of the gate units, `(batch, layers * E)`; returns `(batch,)`."""
    gates = probabilities.float().flatten(1) / probabilities.shape[1]
    target = matched_prior.float() / matched_prior.float().sum(dim=1, keepdim=True)
    return jensen_shannon(gates, target)


@dataclass(frozen=True)
class DiffusionPriorLoss(Options):
    """Pulls the gates of a Switch-DiT towards the sliding-window prior; the trainer adds it with its own weight."""

    exponent: float = option(WINDOW_EXPONENT, "how late the window starts to move", minimum=0.1)

    def attach(self, model: torch.nn.Module) -> None:
        """Remembers the bare network. Raises `ValueError` when it routes no experts."""
        if not isinstance(model, SwitchDiTTransformer2DModel) or model.config.routing != "experts":
            raise ValueError("the diffusion prior loss needs a Switch-DiT with routing='experts'")
        config = model.config
        prior = diffusion_prior(
            config.num_timesteps, config.num_layers, config.num_experts, config.experts_per_timestep, self.exponent
        )
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_prior", prior)
        object.__setattr__(self, "_matched", (None, None))

    def assignment(self, prior: torch.Tensor) -> torch.Tensor:
        """`match_units` of the gates as they are: once per optimizer step, whose micro-batches share it."""
        parts = (self._model.routers, self._model.time_embed)
        key = weights_key(parameter for part in parts for parameter in part.parameters())
        if key is None or key != self._matched[0]:
            matched, _ = match_units(self._model.routing_table().flatten(1), prior)
            object.__setattr__(self, "_matched", (key, matched))
        return self._matched[1]

    def loss(self, batch: TrainingBatch, result: ObjectiveResult) -> torch.Tensor:
        """The prior loss `(batch,)` at the timesteps the objective used, in the precision of the weights whatever the
        autocast, so that the gates are not rounded to bfloat16 before they are compared."""
        prior = self._prior.to(result.timestep.device)
        index = result.timestep.long().clamp(0, len(prior) - 1)
        with torch.autocast(result.timestep.device.type, enabled=False):
            target = prior[index][:, self.assignment(prior)]
            return prior_loss(self._model.routing_probabilities(result.timestep), target)


def uniform_gate_divergence(num_experts: int, active: int) -> float:
    """The prior loss of a fresh model, whose gates are uniform: 0.1323 for 2 of 3 experts, whatever the depth."""
    p, q = 1 / num_experts, 1 / active
    on = p * math.log(p / ((p + q) / 2)) + q * math.log(q / ((p + q) / 2))
    off = p * math.log(2.0)
    return (active * on + (num_experts - active) * off) / 2

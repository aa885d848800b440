"""The flow-matching teacher of Next-Frame Diffusion: every frame of a clip at its own noise level.

`x_i = (1 - s_i) x0_i + s_i n_i`, target `n_i - x0_i`, loss the mean over frames; later frames read the noisy earlier
ones (diffusion forcing). The paper draws all s_i from SD3's logit-normal, which almost never shows the nearly clean
context that sampling works with; `context_share` of the frames are therefore drawn near the context level and do not
count in the loss (at level s a velocity error is an x0 error times 1/s, so they would drown the rest). A share of 0
gives the paper's objective. `context: clean` hands the network finished copies of the frames instead (a pass over twice
the frames, all of which count: set `context_share` to 0); it has then seen no noisy neighbour, which joint drafts have.
`weighting: frame` weighs the error by s^2, which makes it the error of the frame: for a
network that answers with a residual of unit size at every level (`frame_std` of the model).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dit_suite.data.draws import Draws, Stream
from dit_suite.options import Options, option
from dit_suite.training.objectives import (
    ObjectiveResult,
    TrainingBatch,
    interpolate,
    logit_normal,
    velocity,
)

CONTEXTS = ("noisy", "clean")
WEIGHTINGS = ("velocity", "frame")


@dataclass(frozen=True)
class NextFrameFlow(Options):
    """mean_i ||v(x_s, s, a)_i - (n_i - x0_i)||^2 with one level per frame; the network sees s itself, in [0, 1]."""

    mean: float = option(0.0, "mean of the normal under the sigmoid")
    std: float = option(1.0, "its standard deviation", minimum=1e-3)
    context_share: float = option(0.0, "share of frames at context quality", minimum=0.0, maximum=1.0)
    context_level: float = option(0.05, "noise level of context frames when sampling", minimum=0.0, maximum=0.5)
    context: str = option(
        "noisy", "frames read the noisy ones before them, or finished copies in the same pass", choices=CONTEXTS
    )
    weighting: str = option("velocity", "error of the velocity, or of the frame it leads to", choices=WEIGHTINGS)

    def sample_levels(self, num_frames: int, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels `(batch, frames)` in (0, 1) and which frames are context (uniform up to twice the context level)."""
        levels = logit_normal(draws.normal(Stream.TIMESTEP, (num_frames,)), self.mean, self.std)
        choice, place = draws.uniform(Stream.AUXILIARY, (2, num_frames)).unbind(1)
        is_context = choice < self.context_share
        return torch.where(is_context, 2 * self.context_level * place, levels), is_context

    def loss(self, model: Callable[..., Any], batch: TrainingBatch) -> ObjectiveResult:
        x0, condition = batch.samples, dict(batch.condition)
        level, is_context = self.sample_levels(x0.shape[2], batch.draws)
        noise = batch.draws.normal(Stream.NOISE, x0.shape[1:])
        if self.context == "clean":
            condition |= self._finished(x0, batch.draws)
        output = model(interpolate(x0, noise, level), timestep=level, **condition)
        error = (output.float() - velocity(x0, noise)).square().mean(dim=(1, 3, 4))
        if self.weighting == "frame":
            error = error * level.square()
        counted = (~is_context).float()
        loss = (error * counted).sum(1) / counted.sum(1).clamp(min=1.0)
        return ObjectiveResult(loss, level, output)

    def _finished(self, x0: torch.Tensor, draws: Draws) -> dict[str, torch.Tensor]:
        """Copies of all frames but the last, at levels up to twice the context level."""
        kept = x0[:, :, :-1]
        level = 2 * self.context_level * draws.uniform(Stream.AUXILIARY, (2, x0.shape[2]))[:, 1, :-1]
        noise = draws.normal(Stream.EXTRA_NOISE, kept.shape[1:])
        return {"context": interpolate(kept, noise, level), "context_timestep": level}

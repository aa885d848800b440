"""The flow-matching teacher of Next-Frame Diffusion: every frame of a clip at its own noise level.

`x_i = (1 - s_i) x0_i + s_i n_i`, target `n_i - x0_i`, loss the mean over frames; later frames read the noisy earlier
ones (diffusion forcing). The paper draws all s_i from SD3's logit-normal, which almost never shows the nearly clean
context that sampling works with; `context_share` of the frames are therefore drawn near the context level (0 gives the
paper's objective).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dit_suite.options import Options, option
from dit_suite.training.draws import Draws, Stream
from dit_suite.training.objectives import (
    ObjectiveResult,
    TrainingBatch,
    interpolate,
    logit_normal,
    mean_per_sample,
    velocity,
)


@dataclass(frozen=True)
class NextFrameFlow(Options):
    """mean_i ||v(x_s, s, a)_i - (n_i - x0_i)||^2 with one level per frame; the network sees s itself, in [0, 1]."""

    mean: float = option(0.0, "mean of the normal under the sigmoid")
    std: float = option(1.0, "its standard deviation", minimum=1e-3)
    context_share: float = option(0.0, "share of frames at context quality", minimum=0.0, maximum=1.0)
    context_level: float = option(0.05, "noise level of context frames when sampling", minimum=0.0, maximum=0.5)

    def sample_levels(self, num_frames: int, draws: Draws) -> torch.Tensor:
        """Levels `(batch, frames)` in (0, 1); context frames are uniform between 0 and twice the context level."""
        levels = logit_normal(draws.normal(Stream.TIMESTEP, (num_frames,)), self.mean, self.std)
        choice, place = draws.uniform(Stream.AUXILIARY, (2, num_frames)).unbind(1)
        return torch.where(choice < self.context_share, 2 * self.context_level * place, levels)

    def loss(self, model: Callable[..., Any], batch: TrainingBatch) -> ObjectiveResult:
        x0 = batch.samples
        level = self.sample_levels(x0.shape[2], batch.draws)
        noise = batch.draws.normal(Stream.NOISE, x0.shape[1:])
        output = model(interpolate(x0, noise, level), timestep=level, **batch.condition)
        error = output.float() - velocity(x0, noise)
        return ObjectiveResult(mean_per_sample(error.square()), level, output)

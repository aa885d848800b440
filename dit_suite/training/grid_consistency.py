"""Consistency of a few-step student on the very times at which it will sample: a discrete variant of ours.

The student's answer at time t_i should be its own answer at the next lower time t_{i+1} of the same path (Song et al.,
"Consistency models", algorithms 2 and 3), and at the lowest time the path's end. There are only as many times as the
student has passes, so a small network spends all it has on them. `path` says how t_{i+1} is reached:

- "data": along the recorded frame's own path, with the noise kept (consistency training, started from the teacher's
  weights). Unbiased where the context fixes the next frame, as in a game.
- "teacher": one step of the teacher's TrigFlow ODE (consistency distillation). It inherits the teacher's errors, but
  keeps apart the frames that a vague context allows.

The first frame of a clip has no context; `first_share` is the chance that it counts. The continuous-time objective of
the paper is `dit_suite.training.consistency`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dit_suite.data.draws import Draws, Stream
from dit_suite.options import Options, option
from dit_suite.schedulers.trigflow import consistency_sample, trig_time
from dit_suite.training.consistency import as_trigflow, checkpoint_teacher
from dit_suite.training.objectives import ObjectiveResult, TrainingBatch, expand_to

SMALLEST_TIME = 1e-3


@dataclass(frozen=True)
class GridConsistency(Options):
    """mean ||F(x_t, t) - F*||^2 over frames that are not context, where F* leads to the answer at the next time."""

    times: tuple[float, ...] = option((1.5708, 0.55, 0.32, 0.2), "times of the student, falling from pi/2", minimum=0.0)
    path: str = option("data", "how the next time is reached", choices=("data", "teacher"))
    teacher: str = option("", "checkpoint of the flow teacher (path: teacher): a bundled name or a folder")
    sigma_data: float = option(1.0, "standard deviation the samples are divided by", minimum=1e-3)
    context_share: float = option(0.5, "share of frames at context quality", minimum=0.0, maximum=1.0)
    context_level: float = option(0.05, "noise level of context frames when sampling", minimum=0.0, maximum=0.5)
    first_share: float = option(0.1, "chance that the first frame of a clip counts", minimum=0.0, maximum=1.0)

    def validate(self) -> None:
        falling = all(a > b for a, b in zip(self.times, self.times[1:], strict=False))
        if not self.times or not falling or self.times[-1] <= 0 or self.times[0] > math.pi / 2 + 1e-4:
            raise ValueError("times must fall from at most pi/2 to above 0")

    def sample_places(self, num_frames: int, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Which time each frame has, int64 `(batch, frames)`, and which frames are context."""
        place = draws.integers(Stream.TIMESTEP, len(self.times), (num_frames,))
        chance = draws.uniform(Stream.AUXILIARY, (num_frames,))
        is_context = chance < self.context_share
        is_context[:, 0] = chance[:, 0] > self.first_share
        return place, is_context

    def loss(
        self, model: Callable[..., Any], batch: TrainingBatch, teacher: Callable[..., Any] | None = None
    ) -> ObjectiveResult:
        """The loss of every clip.

        Args:
            teacher: used instead of the checkpoint in `teacher` (called like `model`).
        """
        x0, sigma, condition = batch.samples, self.sigma_data, dict(batch.condition)
        place, is_context = self.sample_places(x0.shape[2], batch.draws)
        grid = torch.tensor((*self.times, 0.0), device=x0.device).clamp(max=math.pi / 2)
        held = trig_time(torch.full_like(grid[place], self.context_level))
        times, following = (torch.where(is_context, held, grid[place + i]) for i in (0, 1))
        t, later = expand_to(times, x0), expand_to(following, x0)
        noise = sigma * batch.draws.normal(Stream.NOISE, x0.shape[1:])
        sample = t.cos() * x0 + t.sin() * noise
        with torch.no_grad():
            if self.path == "data":
                after = later.cos() * x0 + later.sin() * noise
            else:
                teacher = teacher or checkpoint_teacher(self.teacher, x0.device)
                slope = sigma * as_trigflow(teacher, condition)(sample / sigma, times)
                after = (t - later).cos() * sample - (t - later).sin() * slope
            told = following.clamp(min=SMALLEST_TIME)
            answer = as_trigflow(model, condition)(after / sigma, told)
            estimate = consistency_sample(after, answer, later, sigma)
            target = (t.cos() * sample - estimate) / (sigma * t.sin())
        output = as_trigflow(model, condition)(sample / sigma, times)
        error = (output.float() - target).square().mean(dim=(1, 3, 4))
        counted = (~is_context).float()
        loss = (error * counted).sum(1) / counted.sum(1).clamp(min=1.0)
        return ObjectiveResult(loss, times, output)

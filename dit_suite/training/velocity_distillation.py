"""Distillation of a flow model into another network: the target is the teacher's velocity instead of n - x0.

The velocity of a single noisy sample is a noisy target: its mean over all pictures that lead to the same x_s is what a
trained network answers. A teacher that has learned this mean tells it without the noise, so a student close to the
teacher, such as a grafted copy, needs far fewer samples. The recorded pictures only say where to ask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dit_suite.data.draws import Stream
from dit_suite.options import option
from dit_suite.training.objectives import ObjectiveResult, RectifiedFlow, TrainingBatch, interpolate, mean_per_sample
from dit_suite.training.teacher import load_teacher


@dataclass(frozen=True)
class DistilledFlow(RectifiedFlow):
    """mean_i ||v(x_s, 1000 s) - v_teacher(x_s, 1000 s)||^2 at the levels of `RectifiedFlow`, with the same condition.

    The logged part `relative` is that error over the teacher's mean square: what is left of the difference.
    """

    teacher: str = option("", "checkpoint whose velocity is the target: a bundled name or a folder")

    def validate(self) -> None:
        if not self.teacher:
            raise ValueError("distilled_flow needs the teacher's checkpoint: set objective.options.teacher")

    def loss(
        self, model: Callable[..., Any], batch: TrainingBatch, teacher: Callable[..., Any] | None = None
    ) -> ObjectiveResult:
        """The loss of every sample.

        Args:
            teacher: used instead of the checkpoint in `teacher` (a network called with `return_dict=False`).
        """
        x0 = batch.samples
        level = self.sample_levels(x0, batch.draws)
        noisy = interpolate(x0, batch.draws.normal(Stream.NOISE, x0.shape[1:]), level)
        timestep = self.timestep_scale * level
        teacher = teacher or load_teacher(self.teacher, str(x0.device))
        constant = getattr(model, "constant", {})
        with torch.no_grad():
            target = teacher(noisy, timestep=timestep, **batch.condition, **constant, return_dict=False)[0]
            target = target[:, : x0.shape[1]].float()
        output = model(noisy, timestep=timestep, **batch.condition)
        error = mean_per_sample((output[:, : x0.shape[1]].float() - target).square())
        return ObjectiveResult(error, timestep, output, {"relative": error / mean_per_sample(target.square())})

"""Consistency distillation of a flow teacher into a few-step student: continuous-time (sCM) with a JVP.

Lu and Song, "Simplifying, stabilizing and scaling continuous-time consistency models", extended to video by Next-Frame
Diffusion: every frame has its own time t_i and all frames move at once along their own t_i. The student is the same
network as the teacher and starts from its weights; both are read as TrigFlow networks through the exact change of
variables of `dit_suite.schedulers.trigflow`. The adversarial term of the paper is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_suite.data.draws import Draws, Stream
from dit_suite.options import Options, option
from dit_suite.schedulers.trigflow import flow_input, flow_level, trig_time, trig_velocity
from dit_suite.training.objectives import ObjectiveResult, TrainingBatch, expand_to, mean_per_sample
from dit_suite.training.teacher import load_teacher

SMALLEST_TIME = 1e-3
TrigNetwork = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def as_trigflow(network: Callable[..., Any], condition: dict[str, Any]) -> TrigNetwork:
    """F(x_t / sigma_data, t) of a flow network called as `network(sample, timestep=..., **condition)`.

    t is `(batch, frames)`, samples are `(batch, channels, frames, height, width)`.
    """

    def trig(scaled: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = flow_level(t)
        wide = expand_to(level, scaled)
        sample = flow_input(scaled, wide)
        return trig_velocity(sample, network(sample, timestep=level, **condition), wide)

    return trig


def consistency_tangent(
    sample: torch.Tensor,
    trig: torch.Tensor,
    trig_tangent: torch.Tensor,
    slope: torch.Tensor,
    t: torch.Tensor,
    sigma_data: float,
    warmup: float,
) -> torch.Tensor:
    """g = -cos^2 t (sigma F - dx/dt) - r (cos t sin t x_t + sigma dF), Lu and Song eq. 6 times cos t.

    Args:
        sample: x_t.
        trig: F of the student at (x_t / sigma, t), no gradient.
        trig_tangent: dF, its directional derivative along (cos t sin t dx/dt / sigma, cos t sin t).
        slope: dx/dt of the teacher's ODE at x_t.
        t: broadcasts against `sample`.
        warmup: r in [0, 1]; 0 leaves only the stable first part.
    """
    cos, sin = t.cos(), t.sin()
    first = -cos.square() * (sigma_data * trig - slope)
    return first - warmup * (cos * sin * sample + sigma_data * trig_tangent)


def normalise_tangent(tangent: torch.Tensor, per: str, constant: float) -> torch.Tensor:
    """g / (rms(g) + c): one norm per clip over frames, pixels and channels, or one per frame.

    The root mean square stands for the norm so that `constant` means the same at every size. "none" leaves g as it is:
    small batches of a teacher that is almost consistent already would drown in the noise of unit-sized tangents.
    """
    if per == "none":
        return tangent
    axes = (1, 2, 3, 4) if per == "clip" else (1, 3, 4)
    return tangent / (tangent.square().mean(dim=axes, keepdim=True).sqrt() + constant)


def jvp_of(
    trig: TrigNetwork, scaled: torch.Tensor, t: torch.Tensor, tangents: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """F and dF by forward-mode differentiation; attention takes the plain path, fused kernels have no such mode."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(trig, (scaled, t), tangents)


def checkpoint_teacher(name: str, device: torch.device) -> Callable[..., Any]:
    """The teacher of a checkpoint as a call that returns the velocity.

    Raises:
        ValueError, FileNotFoundError: as `load_teacher`.
    """
    teacher = load_teacher(name, str(device))

    def call(sample: torch.Tensor, timestep: torch.Tensor, **condition: Any) -> torch.Tensor:
        return teacher(sample, timestep, **condition, return_dict=False)[0]

    return call


@dataclass(frozen=True)
class ConsistencyDistillation(Options):
    """mean weight(t) ||F - F^- - g||^2 with the normalised tangent g; the network is called with flow levels.

    Frames chosen as context stay fixed at the context level: they neither move nor count in the loss, as when sampling.
    """

    teacher: str = option("", "checkpoint of the flow teacher: a bundled name or a folder")
    sigma_data: float = option(1.0, "standard deviation the samples are divided by", minimum=1e-3)
    mean: float = option(0.0, "mean of log(sigma_data tan t)")
    std: float = option(1.6, "its standard deviation", minimum=1e-3)
    context_share: float = option(0.5, "share of frames at context quality", minimum=0.0, maximum=1.0)
    context_level: float = option(0.05, "noise level of context frames when sampling", minimum=0.0, maximum=0.5)
    warmup_steps: int = option(4000, "steps until the JVP part has its full weight", minimum=1)
    tangent_norm: str = option(
        "clip", "one tangent norm per clip, per frame, or none", choices=("clip", "frame", "none")
    )
    tangent_constant: float = option(0.1, "added to the tangent norm", minimum=0.0)
    weighting: str = option("inverse_tan", "weight of a time", choices=("inverse_tan", "uniform"))

    def sample_times(self, num_frames: int, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Times `(batch, frames)` and which frames are context."""
        normal = draws.normal(Stream.TIMESTEP, (num_frames,))
        t = torch.atan(torch.exp(self.mean + self.std * normal) / self.sigma_data).clamp(min=SMALLEST_TIME)
        is_context = draws.uniform(Stream.AUXILIARY, (num_frames,)) < self.context_share
        level = torch.full_like(t, self.context_level)
        return torch.where(is_context, trig_time(level), t), is_context

    def loss(
        self, model: Callable[..., Any], batch: TrainingBatch, teacher: Callable[..., Any] | None = None
    ) -> ObjectiveResult:
        """The loss of every clip.

        Args:
            teacher: used instead of the checkpoint in `teacher` (called like `model`).
        """
        x0, sigma, condition = batch.samples, self.sigma_data, dict(batch.condition)
        times, is_context = self.sample_times(x0.shape[2], batch.draws)
        t, moving = expand_to(times, x0), expand_to((~is_context).to(x0.dtype), x0)
        noise = sigma * batch.draws.normal(Stream.NOISE, x0.shape[1:])
        sample = t.cos() * x0 + t.sin() * noise
        scaled = sample / sigma
        teacher = teacher or checkpoint_teacher(self.teacher, x0.device)
        with torch.no_grad():
            slope = sigma * as_trigflow(teacher, condition)(scaled, times)
        speed = times.cos() * times.sin() * (~is_context)
        direction = expand_to(speed, x0) * slope / sigma
        frozen, tangent = jvp_of(as_trigflow(model, condition), scaled, times, (direction, speed))
        warmup = min(1.0, (batch.draws.step + 1) / self.warmup_steps)
        g = moving * consistency_tangent(sample, frozen, tangent, slope, t, sigma, warmup)
        g = normalise_tangent(g, self.tangent_norm, self.tangent_constant)
        trig = as_trigflow(model, condition)(scaled, times)
        weight = moving / (sigma * t.tan()) if self.weighting == "inverse_tan" else moving
        loss = mean_per_sample(weight * (trig - trig.detach() - g).square())
        size = mean_per_sample(consistency_tangent(sample, frozen, tangent, slope, t, sigma, 1.0).abs() * moving)
        return ObjectiveResult(loss, flow_level(times), trig, {"tangent": size})

"""Per-frame samplers of Next-Frame Diffusion: Euler on a rectified flow, and few-step consistency sampling (TrigFlow).

The network always predicts the velocity `v = noise - x0` of a rectified flow at a noise level `s` in [0, 1]. TrigFlow
(Lu and Song, "Simplifying, stabilizing and scaling continuous-time consistency models", section 3) is another
parametrisation of the same path, and the change of variables is exact, so a flow teacher and its consistency student
are one architecture and differ in the sampler only.

Trigonometric time t runs over [0, pi/2]; `x_t = cos(t) x0 + sin(t) z` with `z ~ N(0, sigma_data^2)`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

TWO_STEP_MIDDLE = 1.3


def flow_level(t: torch.Tensor) -> torch.Tensor:
    """s = sin t / (sin t + cos t): the rectified-flow noise level of trigonometric time t."""
    return t.sin() / (t.sin() + t.cos())


def trig_time(level: torch.Tensor) -> torch.Tensor:
    """The inverse of `flow_level`: t = arctan(s / (1 - s)), pi/2 at s = 1."""
    return torch.atan2(level, 1.0 - level)


def flow_input(scaled: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """x_fm = D x_t / sigma_data with D = sqrt(s^2 + (1-s)^2): what the flow network is shown."""
    return scaled * (level.square() + (1.0 - level).square()).sqrt()


def trig_velocity(flow_sample: torch.Tensor, velocity: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """F = ((1 - 2s) x_fm + (1 - 2s + 2s^2) v) / D; sigma_data F is dx_t/dt of the TrigFlow ODE."""
    scale = (level.square() + (1.0 - level).square()).sqrt()
    return ((1.0 - 2.0 * level) * flow_sample + (1.0 - 2.0 * level + 2.0 * level.square()) * velocity) / scale


def consistency_sample(sample: torch.Tensor, trig: torch.Tensor, t: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """The estimate of x0: f = cos(t) x_t - sin(t) sigma_data F."""
    return t.cos() * sample - t.sin() * sigma_data * trig


@dataclass
class FrameSchedulerOutput(BaseOutput):
    """Result of one step.

    Attributes:
        prev_sample: the sample at the next, less noisy level.
        pred_original_sample: the estimate of the finished frame.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class _FrameScheduler(SchedulerMixin):
    """What both samplers share: which step a timestep is, and finishing."""

    order = 1
    init_noise_sigma = 1.0
    timesteps: torch.Tensor

    def _following(self, timestep: float | torch.Tensor) -> torch.Tensor | None:
        """The timestep after this one, or None after the last.

        Raises:
            ValueError: `timestep` is not one of `timesteps`.
        """
        distance = (self.timesteps - float(timestep)).abs()
        index = int(distance.argmin())
        if float(distance[index]) > 1e-4:
            raise ValueError(f"{float(timestep):g} is not a timestep of this schedule: call set_timesteps first")
        return self.timesteps[index + 1] if index + 1 < len(self.timesteps) else None

    def _finish(self, sample: torch.Tensor) -> torch.Tensor:
        return sample.clamp(-1.0, 1.0) if self.config.clip_sample else sample


def _check_steps(num_inference_steps: int) -> None:
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")


class FrameFlowScheduler(_FrameScheduler, ConfigMixin):
    """Euler steps of a rectified flow from s = 1 to s = 0; timesteps are noise levels.

    Args:
        clip_sample: clamp the finished sample to [-1, 1] (pixels).
    """

    @register_to_config
    def __init__(self, clip_sample: bool = True):
        self.set_timesteps(18)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Evenly spaced levels 1, 1 - 1/S, ..., 1/S."""
        _check_steps(num_inference_steps)
        self.timesteps = 1.0 - torch.arange(num_inference_steps, dtype=torch.float32) / num_inference_steps

    def noise_level(self, timestep: float | torch.Tensor) -> float:
        """The level that the network is told."""
        return float(timestep)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The sample as it is."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FrameSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """x_{s'} = x_s + (s' - s) v; `noise` is not used (the flow is deterministic)."""
        following = self._following(timestep)
        level = float(timestep)
        estimate = self._finish(sample - level * model_output)
        if following is None:
            result = FrameSchedulerOutput(estimate, estimate)
        else:
            result = FrameSchedulerOutput(sample + (float(following) - level) * model_output, estimate)
        return result if return_dict else (result.prev_sample, result.pred_original_sample)


class TrigFlowScheduler(_FrameScheduler, ConfigMixin):
    """Multistep consistency sampling; timesteps are trigonometric times.

    Args:
        sigma_data: standard deviation that the samples are divided by before the network sees them.
        clip_sample: clamp estimates of the finished sample to [-1, 1] (pixels).
        times: times that the network was distilled for, falling from pi/2; so many passes or fewer keep to them (the
            first, the last and evenly spread ones between). Empty: see `set_timesteps`.
    """

    @register_to_config
    def __init__(self, sigma_data: float = 1.0, clip_sample: bool = True, times: Sequence[float] = ()):
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.set_timesteps(2)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """The times the network was distilled for, or the ones given.

        Otherwise times from pi/2 down: pi/2 and 1.3 for two steps (SANA-Sprint's), evenly spaced for other numbers.

        Raises:
            ValueError: the given times do not fall from at most pi/2 to above 0.
        """
        learned = list(self.config.times)
        if timesteps is None and 1 <= (num_inference_steps or 0) <= len(learned):
            last = max(num_inference_steps - 1, 1)
            timesteps = [learned[round(i * (len(learned) - 1) / last)] for i in range(num_inference_steps)]
        if timesteps is not None:
            given = list(timesteps)
            falling = all(a > b for a, b in zip(given, given[1:], strict=False))
            if not given or not falling or given[0] > math.pi / 2 + 1e-4 or given[-1] <= 0:
                raise ValueError("timesteps must fall from at most pi/2 to above 0")
            given[0] = min(given[0], math.pi / 2)
        else:
            _check_steps(num_inference_steps or 0)
            given = [math.pi / 2 * (1 - i / num_inference_steps) for i in range(num_inference_steps)]
            if num_inference_steps == 2:
                given[1] = TWO_STEP_MIDDLE
        self.timesteps = torch.tensor(given, dtype=torch.float32)

    @staticmethod
    def _time(timestep: float | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(min(float(timestep), math.pi / 2), dtype=torch.float32)

    def noise_level(self, timestep: float | torch.Tensor) -> float:
        """The rectified-flow level that the network is told."""
        return float(flow_level(self._time(timestep)))

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """x_t in the coordinates of the rectified flow."""
        level = flow_level(self._time(timestep)).to(sample)
        return flow_input(sample / self.config.sigma_data, level)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FrameSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """x0 = cos(t) x - sin(t) sigma F, then noise again to the next time t': cos(t') x0 + sin(t') sigma z.

        Args:
            model_output: the network's flow velocity at `scale_model_input(sample, timestep)`.
            noise: standard normal z of the re-noising; not needed at the last step.

        Raises:
            ValueError: a further step follows and no noise is given.
        """
        sigma, following = self.config.sigma_data, self._following(timestep)
        t = self._time(timestep).to(sample)
        level = flow_level(t)
        trig = trig_velocity(flow_input(sample / sigma, level), model_output, level)
        estimate = self._finish(consistency_sample(sample, trig, t, sigma))
        if following is None:
            result = FrameSchedulerOutput(estimate, estimate)
        else:
            if noise is None:
                raise ValueError("a consistency step that is not the last needs noise")
            later = following.to(sample)
            result = FrameSchedulerOutput(later.cos() * estimate + later.sin() * sigma * noise, estimate)
        return result if return_dict else (result.prev_sample, result.pred_original_sample)

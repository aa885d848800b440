"""The EDM sampler of Karras et al. 2022 (algorithm 2) with its preconditioning, as a diffusers scheduler.

diffusers has EDM-Euler and a Heun solver without EDM's preconditioning and without noise injection before the first
evaluation; LEGO's networks need both together.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from dit_suite.schedulers.generators import randn_per_sample

Level = float | torch.Tensor


@dataclass
class EDMHeunSchedulerOutput(BaseOutput):
    """`prev_sample`: the state for the next evaluation; `pred_original_sample`: the denoised picture D(x; sigma)."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


def edm_scalings(sigma: Level, sigma_data: float) -> tuple[Level, Level, Level, Level]:
    """`(c_skip, c_out, c_in, c_noise)` of table 1: `D(x) = c_skip x + c_out F(c_in x, c_noise)`.

    `sigma` is a number, or a tensor of any shape, which all four then have.
    """
    sqrt, log = (torch.sqrt, torch.log) if isinstance(sigma, torch.Tensor) else (math.sqrt, math.log)
    total = sigma**2 + sigma_data**2
    root = sqrt(total)
    return sigma_data**2 / total, sigma * sigma_data / root, 1 / root, log(sigma) / 4


class EDMHeunScheduler(SchedulerMixin, ConfigMixin):
    """Heun's second-order solver on EDM's noise levels.

    `timesteps` has two entries per step except the last, which needs one evaluation: `[t0, t1, t1, t2, t2, ...]`, so
    the network runs `2 N - 1` times. They are what the network gets, `ln(sigma) / 4`. The loop is

        for t in scheduler.timesteps:
            sample = scheduler.churn(sample, generators)               # only when s_churn > 0
            output = network(scheduler.scale_model_input(sample, t), scheduler.model_timestep(t))
            sample = scheduler.step(output, t, sample).prev_sample

    and works with float64 samples, as the reference does.

    Args:
        sigma_min, sigma_max, rho: noise levels `(max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho`.
        sigma_data: standard deviation of the data in the preconditioning.
        s_churn, s_min, s_max, s_noise: noise injection; 0 makes the sampler deterministic.
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float = float("inf"),
        s_noise: float = 1.0,
    ):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min must lie between 0 and sigma_max, got {sigma_min} and {sigma_max}")
        self.num_inference_steps: int | None = None
        self.sigmas = torch.zeros(0, dtype=torch.float64)
        self.timesteps = torch.zeros(0)
        self._restart()

    def _restart(self) -> None:
        """Forgets the run under way."""
        self._evaluation = 0
        self._churned: float | None = None
        self._first: tuple[torch.Tensor, torch.Tensor, float] | None = None

    @property
    def init_noise_sigma(self) -> float:
        """The initial state is standard noise times this."""
        return self.config.sigma_max

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Fills `sigmas (N + 1,)`, descending to 0, and `timesteps (2 N - 1,)`, and starts a new run.

        Raises:
            ValueError: `num_inference_steps` is below 1.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        c = self.config
        ramp = torch.arange(num_inference_steps, dtype=torch.float64) / max(num_inference_steps - 1, 1)
        top, bottom = c.sigma_max ** (1 / c.rho), c.sigma_min ** (1 / c.rho)
        levels = (top + ramp * (bottom - top)) ** c.rho
        self.sigmas = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
        evaluations = torch.cat([levels[:1], levels[1:].repeat_interleave(2)])
        self.timesteps = (evaluations.log() / 4).float().to(device or "cpu")
        self.num_inference_steps = num_inference_steps
        self._restart()

    @property
    def step_index(self) -> int:
        """Step of the evaluation that comes next."""
        return self._evaluation // 2

    @property
    def current_sigma(self) -> float:
        """Noise level of the state at the evaluation that comes next (raised by `churn` where that ran)."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before sampling")
        if self._evaluation % 2:
            return float(self.sigmas[self.step_index + 1])
        return float(self.sigmas[self.step_index]) if self._churned is None else self._churned

    def churn(
        self,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        s_churn: float | None = None,
    ) -> torch.Tensor:
        """Adds fresh noise before the first evaluation of a step (algorithm 2, lines 4 to 6), nothing elsewhere.

        Args:
            sample: the state `(batch, ...)`.
            generator: one for the batch or one per sample.
            s_churn: overrides the configured amount.
        """
        c = self.config
        amount = c.s_churn if s_churn is None else s_churn
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before sampling")
        sigma = float(self.sigmas[self.step_index])
        if self._evaluation % 2 or amount <= 0 or not c.s_min <= sigma <= c.s_max:
            return sample
        self._churned = sigma * (1 + min(amount / self.num_inference_steps, math.sqrt(2) - 1))
        if isinstance(generator, list):
            noise = randn_per_sample(sample.shape[1:], generator, sample.device)
        else:
            source = sample.device if generator is None else generator.device
            noise = torch.randn(sample.shape, generator=generator, device=source).to(sample.device)
        return sample + math.sqrt(self._churned**2 - sigma**2) * c.s_noise * noise.to(sample.dtype)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """`c_in x`, what the network reads."""
        return edm_scalings(self.current_sigma, self.config.sigma_data)[2] * sample

    def model_timestep(self, timestep: torch.Tensor | float | None = None) -> float:
        """`c_noise`, what the network is told; it differs from `timestep` only where noise was injected."""
        return edm_scalings(self.current_sigma, self.config.sigma_data)[3]

    def denoise(self, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """`D(x; sigma) = c_skip x + c_out F` at the current noise level."""
        skip, out, _, _ = edm_scalings(self.current_sigma, self.config.sigma_data)
        return skip * sample + out * model_output.to(sample.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> EDMHeunSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Uses one evaluation F of the network at `sample`: an Euler step, or its correction (eq. 4 and 5).

        Args:
            model_output: F, same shape as `sample`.
            timestep: the entry of `timesteps`; the scheduler keeps count itself.
            sample: the state the network saw, before `scale_model_input`.
            generator: unused, noise enters in `churn`.
            return_dict: an output object or a tuple.

        Raises:
            ValueError: every evaluation of the run has been used.
        """
        if self.num_inference_steps is None or self._evaluation >= len(self.timesteps):
            raise ValueError("the run is over: call set_timesteps to start another")
        sigma = self.current_sigma
        denoised = self.denoise(model_output, sample)
        slope = (sample - denoised) / sigma
        target = float(self.sigmas[self.step_index + 1])
        if self._evaluation % 2 == 0:
            following = sample + (target - sigma) * slope
            self._first = (sample, slope, sigma)
        else:
            start, first_slope, first_sigma = self._first
            following = start + (target - first_sigma) * (first_slope + slope) / 2
            self._first = None
            self._churned = None
        self._evaluation += 1
        if not return_dict:
            return following, denoised
        return EDMHeunSchedulerOutput(prev_sample=following, pred_original_sample=denoised)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """`x + sigma n`; `sigmas` is `(batch,)`."""
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        return original_samples + sigmas.to(original_samples).reshape(shape) * noise

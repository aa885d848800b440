"""Training objectives: small pure functions with their equations, and frozen dataclasses that apply them.

An objective is an `Options` dataclass with `loss(model, batch) -> ObjectiveResult`; `objective_class(name)` finds it by
its short name or by `module:Class`. Everything random comes from `batch.draws`. x0 is a clean sample, n standard noise.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch

from dit_suite.data.draws import Draws, Stream
from dit_suite.options import Options, option
from dit_suite.registry import resolve, resolve_named
from dit_suite.schedulers.edm_heun import edm_scalings
from dit_suite.training.uncertainty import UncertaintyWeighting


@dataclass(frozen=True)
class TrainingBatch:
    """What an objective sees.

    Attributes:
        samples: clean data in [-1, 1], `(batch, channels, height, width)` or `(batch, channels, frames, height,
            width)`.
        condition: keyword arguments of the network (`class_labels`, `encoder_hidden_states`, `actions`, ...) with
            conditions already dropped for guidance.
        draws: the random numbers of these samples.
    """

    samples: torch.Tensor
    condition: Mapping[str, Any]
    draws: Draws


@dataclass(frozen=True)
class ObjectiveResult:
    """Loss per sample `(batch,)`, what to log per sample, the levels the network saw and what it returned."""

    loss: torch.Tensor
    timestep: torch.Tensor | None = None
    prediction: Any = None
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What the trainer needs. An objective may also have

    - `learned_weighting()`: a module that makes a scalar of losses and timesteps with parameters of its own, or None;
    - `check_network(network)`: raises `ValueError` before the first step for a network that it does not fit;
    - `observe(network, result)`: a tensor, or None. Its mean over the global batch goes to `after_step(network, mean)`
      when the optimizer has stepped.
    """

    def loss(self, model: Callable[..., Any], batch: TrainingBatch) -> ObjectiveResult:
        """Runs the network once (or more) and returns the loss of every sample."""
        ...


class AuxiliaryLoss(Protocol):
    """A further term of the loss; the config names it: `auxiliary: {name: module:Class, weight: ..., options: {...}}`.

    `attach` is called once with the bare network before it is wrapped; `loss` after every pass of the objective.
    """

    def attach(self, model: torch.nn.Module) -> None:
        """Registers hooks or remembers sub-modules."""
        ...

    def loss(self, batch: TrainingBatch, result: ObjectiveResult) -> torch.Tensor:
        """A scalar or `(batch,)`, differentiable."""
        ...


def mean_per_sample(values: torch.Tensor) -> torch.Tensor:
    """Mean over all but the first dimension, in float32: `(batch,)`."""
    return values.float().flatten(1).mean(dim=1)


def expand_to(levels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Levels `(batch,)`, or `(batch, frames)` for `(batch, channels, frames, height, width)`, made to broadcast."""
    if levels.ndim == 2:
        levels = levels[:, None]
    return levels.reshape(*levels.shape, *(1,) * (like.ndim - levels.ndim))


# Rectified flow


def interpolate(x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """x_s = (1 - s) x0 + s n (Liu et al., "Flow straight and fast", eq. 1, with s = 1 at the noise)."""
    level = expand_to(level, x0)
    return (1.0 - level) * x0 + level * noise


def velocity(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """dx_s / ds = n - x0."""
    return noise - x0


def logit_normal(normal: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    """s = sigmoid(mean + std z) (Esser et al. 2024, section 3.1)."""
    return torch.sigmoid(mean + std * normal)


def shift_level(level: torch.Tensor, shift: float) -> torch.Tensor:
    """s' = a s / (1 + (a - 1) s) (Esser et al. 2024, eq. 23)."""
    return shift * level / (1.0 + (shift - 1.0) * level)


@dataclass(frozen=True)
class RectifiedFlow(Options):
    """mean_i ||v(x_s, 1000 s) - (n - x0)||^2 with s uniform or logit-normal, one per sample or one per frame."""

    levels: str = option("uniform", "distribution of the noise level", choices=("uniform", "logit_normal"))
    mean: float = option(0.0, "mean of the normal under the sigmoid")
    std: float = option(1.0, "its standard deviation", minimum=1e-3)
    shift: float = option(1.0, "shift of the level towards noise", minimum=0.01)
    per: str = option("sample", "one level per sample or per frame", choices=("sample", "frame"))
    timestep_scale: float = option(1000.0, "the network sees this times the level", minimum=1e-6)

    def sample_levels(self, samples: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Levels `(batch,)` or `(batch, frames)` in (0, 1)."""
        shape = (samples.shape[2],) if self.per == "frame" else ()
        if self.levels == "uniform":
            levels = draws.uniform(Stream.TIMESTEP, shape)
        else:
            levels = logit_normal(draws.normal(Stream.TIMESTEP, shape), self.mean, self.std)
        return shift_level(levels, self.shift)

    def loss(self, model: Callable[..., Any], batch: TrainingBatch) -> ObjectiveResult:
        x0 = batch.samples
        level = self.sample_levels(x0, batch.draws)
        noise = batch.draws.normal(Stream.NOISE, x0.shape[1:])
        timestep = self.timestep_scale * level
        output = model(interpolate(x0, noise, level), timestep=timestep, **batch.condition)
        error = output[:, : x0.shape[1]].float() - velocity(x0, noise)
        return ObjectiveResult(mean_per_sample(error.square()), timestep, output)


# Denoising diffusion


@dataclass(frozen=True)
class DiffusionTables:
    """Tables of a discrete diffusion, float64 `(steps,)`: beta, abar = cumprod(1 - beta), and the posterior q."""

    betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    posterior_log_variance: torch.Tensor
    posterior_x0_weight: torch.Tensor
    posterior_xt_weight: torch.Tensor


def linear_betas(steps: int, first: float = 1e-4, last: float = 2e-2) -> torch.Tensor:
    """Ho et al. 2020: evenly spaced."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def cosine_betas(steps: int) -> torch.Tensor:
    """Nichol and Dhariwal 2021, eq. 17: beta_i = min(1 - f(i + 1) / f(i), 0.999).

    f(i) = cos^2((i / T + 0.008) / 1.008 pi / 2).
    """
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((grid + 0.008) / 1.008 * math.pi / 2).square()
    return (1.0 - f[1:] / f[:-1]).clamp(max=0.999)


def diffusion_tables(betas: torch.Tensor) -> DiffusionTables:
    """q(x_{t-1} | x_t, x0) of Ho et al. 2020, eq. 6 and 7; the first log variance borrows the second."""
    abar = torch.cumprod(1.0 - betas, dim=0)
    previous = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    variance = betas * (1.0 - previous) / (1.0 - abar)
    log_variance = torch.log(torch.cat([variance[1:2], variance[1:]]))
    x0_weight = betas * previous.sqrt() / (1.0 - abar)
    xt_weight = (1.0 - previous) * (1.0 - betas).sqrt() / (1.0 - abar)
    return DiffusionTables(betas, abar, log_variance, x0_weight, xt_weight)


@lru_cache(maxsize=8)
def named_tables(schedule: str, steps: int) -> DiffusionTables:
    """Tables of the "linear" or "cosine" schedule."""
    return diffusion_tables(linear_betas(steps) if schedule == "linear" else cosine_betas(steps))


def _at(table: torch.Tensor, timestep: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return expand_to(table.float().to(timestep.device)[timestep], like)


def signal_and_noise(
    tables: DiffusionTables, timestep: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), made to broadcast."""
    abar = tables.alphas_cumprod
    return _at(abar.sqrt(), timestep, like), _at((1.0 - abar).sqrt(), timestep, like)


def add_noise(tables: DiffusionTables, x0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) n."""
    signal, level = signal_and_noise(tables, timestep, x0)
    return signal * x0 + level * noise


def v_target(tables: DiffusionTables, x0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """v = sqrt(abar_t) n - sqrt(1 - abar_t) x0 (Salimans and Ho 2022, section 4)."""
    signal, level = signal_and_noise(tables, timestep, x0)
    return signal * noise - level * x0


def predicted_x0(
    tables: DiffusionTables, x_t: torch.Tensor, prediction: torch.Tensor, timestep: torch.Tensor, kind: str
) -> torch.Tensor:
    """x0 from an epsilon or a v prediction."""
    signal, level = signal_and_noise(tables, timestep, x_t)
    if kind == "v":
        return signal * x_t - level * prediction
    return (x_t - level * prediction) / signal


def learned_log_variance(tables: DiffusionTables, raw: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Nichol and Dhariwal 2021, eq. 15: f log beta_t + (1 - f) log beta~_t, f = (raw + 1) / 2, not clamped."""
    fraction = (raw + 1.0) / 2.0
    largest = _at(tables.betas.log(), timestep, raw)
    smallest = _at(tables.posterior_log_variance, timestep, raw)
    return fraction * largest + (1.0 - fraction) * smallest


def gaussian_kl(
    mean_q: torch.Tensor, log_var_q: torch.Tensor, mean_p: torch.Tensor, log_var_p: torch.Tensor
) -> torch.Tensor:
    """KL(q || p) in nats, element by element."""
    ratio = torch.exp(log_var_q - log_var_p)
    return 0.5 * (log_var_p - log_var_q - 1.0 + ratio + (mean_q - mean_p).square() * torch.exp(-log_var_p))


def discretized_log_likelihood(x0: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """log of the mass of the bin of half-width 1/255 around x0 under a Gaussian (tanh form of its distribution).

    Ho et al. 2020, eq. 13: the two edge bins, |x0| > 0.999, reach to infinity.
    """

    def cdf(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    upper = cdf((x0 - mean + 1.0 / 255.0) * torch.exp(-log_scale))
    lower = cdf((x0 - mean - 1.0 / 255.0) * torch.exp(-log_scale))
    middle = (upper - lower).clamp(min=1e-12).log()
    edges = torch.where(x0 < -0.999, upper.clamp(min=1e-12).log(), (1.0 - lower).clamp(min=1e-12).log())
    return torch.where(x0.abs() > 0.999, edges, middle)


def variational_bound(
    tables: DiffusionTables,
    x0: torch.Tensor,
    x_t: torch.Tensor,
    x0_estimate: torch.Tensor,
    log_variance: torch.Tensor,
    timestep: torch.Tensor,
) -> torch.Tensor:
    """One term of the bound in bits per dimension, `(batch,)`: a KL for t > 0, a discretised likelihood for t = 0."""
    x0_weight = _at(tables.posterior_x0_weight, timestep, x0)
    xt_weight = _at(tables.posterior_xt_weight, timestep, x0)
    mean_p = x0_weight * x0_estimate + xt_weight * x_t
    kl = gaussian_kl(
        x0_weight * x0 + xt_weight * x_t, _at(tables.posterior_log_variance, timestep, x0), mean_p, log_variance
    )
    first = -discretized_log_likelihood(x0, mean_p, 0.5 * log_variance)
    at_zero = expand_to(timestep == 0, x0)
    return mean_per_sample(torch.where(at_zero, first, kl)) / math.log(2.0)


def min_snr_weight(tables: DiffusionTables, timestep: torch.Tensor, gamma: float, kind: str) -> torch.Tensor:
    """Hang et al. 2023: min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v; `(batch,)`."""
    snr = tables.alphas_cumprod / (1.0 - tables.alphas_cumprod)
    weight = snr.clamp(max=gamma) / (snr + (1.0 if kind == "v" else 0.0))
    return weight.float().to(timestep.device)[timestep]


@dataclass(frozen=True)
class Diffusion(Options):
    """||eps - n||^2 or ||v - v_target||^2, plus the bound for a learned variance when the network has 2C channels.

    The bound sees the mean detached: only the variance channels get its gradient (Nichol and Dhariwal 2021).
    """

    prediction: str = option("epsilon", "what the network predicts", choices=("epsilon", "v"))
    schedule: str = option("linear", "beta schedule", choices=("linear", "cosine"))
    num_train_timesteps: int = option(1000, "steps of the discrete diffusion", minimum=2)
    min_snr_gamma: float = option(0.0, "min-SNR weight of the mean squared error; 0 turns it off", minimum=0.0)
    uncertainty_clusters: int = option(0, "timestep clusters with learned weights (ANT: 8); 0 turns it off", minimum=0)
    uncertainty_lr: float = option(0.025, "learning rate of those weights", minimum=0.0)
    per: str = option("sample", "one level per sample or per frame", choices=("sample", "frame"))

    def validate(self) -> None:
        if self.per == "frame" and (self.min_snr_gamma > 0 or self.uncertainty_clusters):
            raise ValueError("min_snr_gamma and uncertainty_clusters weigh whole samples: not with per: frame")
        if self.min_snr_gamma > 0 and self.uncertainty_clusters:
            raise ValueError("choose min_snr_gamma or uncertainty_clusters, not both")
        self.learned_weighting()

    def learned_weighting(self) -> UncertaintyWeighting | None:
        """A fresh learned weighting, or None."""
        if not self.uncertainty_clusters:
            return None
        return UncertaintyWeighting(self.uncertainty_clusters, self.num_train_timesteps, self.uncertainty_lr)

    def draw_timesteps(self, draws: Draws, shape: tuple[int, ...] = ()) -> torch.Tensor:
        """Uniform timesteps `(batch, *shape)`. With clusters, consecutive samples of the global batch come from
        consecutive clusters, so that every share of the batch holds them all equally often."""
        if not self.uncertainty_clusters:
            return draws.integers(Stream.TIMESTEP, self.num_train_timesteps, shape)
        size = self.num_train_timesteps // self.uncertainty_clusters
        return draws.samples % self.uncertainty_clusters * size + draws.integers(Stream.TIMESTEP, size)

    def terms(
        self, output: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`mse` and, for 2C output channels, `vb`; each `(batch,)`."""
        tables = named_tables(self.schedule, self.num_train_timesteps)
        channels = x0.shape[1]
        estimate = output[:, :channels].float()
        target = noise if self.prediction == "epsilon" else v_target(tables, x0, noise, timestep)
        mse = mean_per_sample((target - estimate).square())
        if self.min_snr_gamma > 0:
            mse = mse * min_snr_weight(tables, timestep, self.min_snr_gamma, self.prediction)
        if output.shape[1] == channels:
            return {"mse": mse}
        x0_estimate = predicted_x0(tables, x_t, estimate.detach(), timestep, self.prediction)
        log_variance = learned_log_variance(tables, output[:, channels:].float(), timestep)
        return {"mse": mse, "vb": variational_bound(tables, x0, x_t, x0_estimate, log_variance, timestep)}

    def loss(self, model: Callable[..., Any], batch: TrainingBatch) -> ObjectiveResult:
        x0 = batch.samples
        shape = (x0.shape[2],) if self.per == "frame" else ()
        timestep = self.draw_timesteps(batch.draws, shape)
        noise = batch.draws.normal(Stream.NOISE, x0.shape[1:])
        x_t = add_noise(named_tables(self.schedule, self.num_train_timesteps), x0, noise, timestep)
        output = model(x_t, timestep=timestep, **batch.condition)
        parts = self.terms(output, x0, noise, x_t, timestep)
        return ObjectiveResult(torch.stack(list(parts.values())).sum(dim=0), timestep, output, parts)


# EDM


def edm_weight(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, table 1)."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


@dataclass(frozen=True)
class EDM(Options):
    """w(sigma) ||D(x0 + sigma n; sigma) - x0||^2, averaged over the outputs when there are several (LEGO bricks)."""

    p_mean: float = option(-1.2, "mean of log sigma")
    p_std: float = option(1.2, "standard deviation of log sigma", minimum=1e-3)
    sigma_data: float = option(0.5, "standard deviation of the data", minimum=1e-3)
    outputs: str = option("all", "which of several outputs enter the loss", choices=("all", "last"))

    def loss(self, model: Callable[..., Any], batch: TrainingBatch) -> ObjectiveResult:
        x0 = batch.samples
        sigma = torch.exp(self.p_mean + self.p_std * batch.draws.normal(Stream.TIMESTEP))
        noise = batch.draws.normal(Stream.NOISE, x0.shape[1:])
        skip, out, scale, level = edm_scalings(sigma, self.sigma_data)
        noisy = x0 + expand_to(sigma, x0) * noise
        output = model(expand_to(scale, x0) * noisy, timestep=level, **batch.condition)
        raw = list(output) if isinstance(output, list | tuple) else [output]
        wanted = raw if self.outputs == "all" else raw[-1:]
        losses = []
        for each in wanted:
            denoised = expand_to(skip, x0) * noisy + expand_to(out, x0) * each.float()
            losses.append(mean_per_sample((denoised - x0).square()) * edm_weight(sigma, self.sigma_data))
        parts = {f"output_{k}": value for k, value in enumerate(losses)} if len(losses) > 1 else {}
        return ObjectiveResult(torch.stack(losses).mean(dim=0), level, output, parts)


# Normalizing flow


def flow_nll(latents: torch.Tensor, logdet: torch.Tensor) -> torch.Tensor:
    """0.5 mean(z^2) - logdet, nats per dimension, no Gaussian constant (TarFlow, eq. 4 over T D); `(batch,)`."""
    return 0.5 * mean_per_sample(latents.square()) - logdet.float()


@dataclass(frozen=True)
class FlowNLL(Options):
    """Maximum likelihood of a flow whose forward returns `(latents, logdet per dimension, ...)`."""

    noise: str = option("gaussian", "added to the pixels", choices=("gaussian", "uniform"))
    noise_std: float = option(0.05, "standard deviation of the Gaussian, in units of [-1, 1] pixels", minimum=0.0)

    def check_network(self, network: torch.nn.Module) -> None:
        """The network's `noise_std` is what its score step removes from samples: it must be what is added here.

        Raises:
            ValueError: it is not.
        """
        added = self.noise_std if self.noise == "gaussian" else 0.0
        removed = network.config.get("noise_std", added)
        if not math.isclose(added, removed):
            raise ValueError(
                f"flow_nll adds Gaussian noise of standard deviation {added:g}, but the model's noise_std is "
                f"{removed:g}: they must be equal (0 for uniform noise)"
            )

    def observe(self, network: torch.nn.Module, result: ObjectiveResult) -> torch.Tensor | None:
        """mean(z^2) over the batch, `(tokens, token_dim)`, where the variance of the prior is learned."""
        if not network.config.get("volume_preserving", False):
            return None
        return result.prediction[0].detach().float().square().mean(dim=0)

    def after_step(self, network: torch.nn.Module, mean_square: torch.Tensor) -> None:
        """Moves the prior of a volume-preserving flow."""
        network.update_prior(mean_square)

    def loss(self, model: Callable[..., Any], batch: TrainingBatch) -> ObjectiveResult:
        x0, precision = batch.samples, contextlib.nullcontext()
        if self.noise == "gaussian":
            noisy = x0 + self.noise_std * batch.draws.normal(Stream.NOISE, x0.shape[1:])
        else:
            # Exact likelihoods: half precision would see coarser steps than 1/128.
            grey = ((x0.float() + 1.0) * 127.5).round()
            noisy = (grey + batch.draws.uniform(Stream.NOISE, x0.shape[1:])) / 128.0 - 1.0
            precision = torch.autocast(x0.device.type, enabled=False)
        with precision:
            output = model(noisy, **batch.condition)
        latents, logdet = output[0], output[1]
        mean_square = mean_per_sample(latents.square())
        return ObjectiveResult(flow_nll(latents, logdet), None, output, {"latent_mean_square": mean_square})


OBJECTIVES: tuple[tuple[str, str], ...] = (
    ("rectified_flow", "dit_suite.training.objectives:RectifiedFlow"),
    ("distilled_flow", "dit_suite.training.velocity_distillation:DistilledFlow"),
    ("diffusion", "dit_suite.training.objectives:Diffusion"),
    ("edm", "dit_suite.training.objectives:EDM"),
    ("flow_nll", "dit_suite.training.objectives:FlowNLL"),
    ("block_diffusion", "dit_suite.training.block_diffusion:BlockDiffusion"),
)


def objective_class(name: str) -> type[Options]:
    """The objective called `name`, or the class `module:Class`.

    Raises:
        ValueError: no such objective.
    """
    for known, reference in OBJECTIVES:
        if known == name:
            return resolve(reference)
    if ":" not in name:
        names = ", ".join(known for known, _ in OBJECTIVES)
        raise ValueError(f"there is no objective {name!r}; the names are {names}, or module:Class")
    return resolve_named(name)

"""The objective of block-autoregressive diffusion (ACDiT): a noise level per block, clean blocks as context."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dit_suite.options import Options, option
from dit_suite.training.build import unwrap
from dit_suite.training.draws import Stream
from dit_suite.training.objectives import ObjectiveResult, TrainingBatch, mean_per_sample, named_tables


@dataclass(frozen=True)
class BlockDiffusion(Options):
    """||eps - n||^2 over all tokens of all blocks, t uniform per sample and block; the clean half is the data itself.

    The network must have `to_blocks(latents) -> (batch, blocks, tokens, channels)` and take `clean_hidden_states`.
    """

    schedule: str = option("linear", "beta schedule", choices=("linear", "cosine"))
    num_train_timesteps: int = option(1000, "steps of the discrete diffusion", minimum=2)

    def loss(self, model: Callable[..., Any], batch: TrainingBatch) -> ObjectiveResult:
        samples = batch.samples if batch.samples.ndim == 5 else batch.samples[:, :, None]
        clean = unwrap(model.module).to_blocks(samples)
        timestep = batch.draws.integers(Stream.TIMESTEP, self.num_train_timesteps, (clean.shape[1],))
        noise = batch.draws.normal(Stream.NOISE, clean.shape[1:])
        abar = named_tables(self.schedule, self.num_train_timesteps).alphas_cumprod
        signal, level = (table.to(timestep.device)[timestep].float() for table in (abar.sqrt(), (1.0 - abar).sqrt()))
        noisy = signal[..., None, None] * clean + level[..., None, None] * noise
        output = model(noisy, timestep=timestep, clean_hidden_states=clean, **batch.condition)
        return ObjectiveResult(mean_per_sample((output.float() - noise).square()), timestep, output)

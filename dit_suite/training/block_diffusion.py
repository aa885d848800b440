"""The ACDiT objective: noise prediction with an own timestep per block, given the clean blocks before it.

`x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) n` with linear betas and t uniform per sample and block (arXiv 2412.07720,
section 3); the clean half of the sequence is x0 itself. The loss is the mean over all tokens of all blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dit_suite.models.acdit import latents_to_blocks
from dit_suite.options import Options, option
from dit_suite.training.draws import Stream
from dit_suite.training.objectives import ObjectiveResult, TrainingBatch, mean_per_sample, named_tables


@dataclass(frozen=True)
class BlockDiffusion(Options):
    """mean ||eps(x_t, t, clean) - n||^2; sizes must be those of the network."""

    patch_size: int = option(2, "latent pixels per token side", minimum=1)
    block_size: int = option(16, "tokens per block", minimum=1)
    square_blocks: bool = option(True, "squares of tokens (pictures) or runs of tokens (clips)")
    train_steps: int = option(1000, "diffusion steps", minimum=1)

    def loss(self, model: Callable[..., Any], batch: TrainingBatch) -> ObjectiveResult:
        samples = batch.samples if batch.samples.ndim == 5 else batch.samples[:, :, None]
        clean = latents_to_blocks(samples, self.patch_size, self.block_size, self.square_blocks)
        tables = named_tables("linear", self.train_steps)
        timestep = batch.draws.integers(Stream.TIMESTEP, self.train_steps, (clean.shape[1],))
        abar = tables.alphas_cumprod.to(timestep.device)[timestep].float()[..., None, None]
        noise = batch.draws.normal(Stream.NOISE, clean.shape[1:])
        noisy = abar.sqrt() * clean + (1.0 - abar).sqrt() * noise
        output = model(noisy, timestep=timestep, clean_hidden_states=clean, **batch.condition)
        loss = mean_per_sample((output.float() - noise).square())
        return ObjectiveResult(loss, timestep, output)

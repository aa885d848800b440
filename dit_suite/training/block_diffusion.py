"""The ACDiT objective: denoising with an own timestep per block, given the clean blocks before it.

`x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) n` with linear betas and t uniform per sample and block (arXiv 2412.07720,
section 3); the clean half of the sequence is x0 itself. The paper predicts the noise n; the loss is the mean over all
tokens of all blocks.

`prediction: sample` is ours, for pixels in large patches: the network answers with x0, and the error counts as that of
the velocity `sqrt(abar_t) n - sqrt(1 - abar_t) x0`, which is the x0 error over `1 - abar_t`. A small network then need
not carry the noise of a whole patch through its hidden state, and at the noisiest timestep, where x0 is noise error
times 160, its samples stay pictures. Such a network is sampled with a scheduler of `prediction_type: sample`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dit_suite.data.draws import Stream
from dit_suite.models.acdit import latents_to_blocks
from dit_suite.options import Options, option
from dit_suite.training.objectives import ObjectiveResult, TrainingBatch, mean_per_sample, named_tables

LEAST_NOISE = 0.05


@dataclass(frozen=True)
class BlockDiffusion(Options):
    """mean ||eps(x_t, t, clean) - n||^2, or its twin on x0; sizes must be those of the network."""

    patch_size: int = option(2, "latent pixels per token side", minimum=1)
    block_size: int = option(16, "tokens per block", minimum=1)
    square_blocks: bool = option(True, "squares of tokens (pictures) or runs of tokens (clips)")
    train_steps: int = option(1000, "diffusion steps", minimum=1)
    prediction: str = option("epsilon", "what the network answers", choices=("epsilon", "sample"))

    def loss(self, model: Callable[..., Any], batch: TrainingBatch) -> ObjectiveResult:
        samples = batch.samples if batch.samples.ndim == 5 else batch.samples[:, :, None]
        clean = latents_to_blocks(samples, self.patch_size, self.block_size, self.square_blocks)
        tables = named_tables("linear", self.train_steps)
        timestep = batch.draws.integers(Stream.TIMESTEP, self.train_steps, (clean.shape[1],))
        abar = tables.alphas_cumprod.float().to(timestep.device)[timestep][..., None, None]
        noise = batch.draws.normal(Stream.NOISE, clean.shape[1:])
        noisy = abar.sqrt() * clean + (1.0 - abar).sqrt() * noise
        output = model(noisy, timestep=timestep, clean_hidden_states=clean, **batch.condition)
        if self.prediction == "epsilon":
            error = (output.float() - noise).square()
        else:
            error = (output.float() - clean).square() / (1.0 - abar).clamp(min=LEAST_NOISE)
        return ObjectiveResult(mean_per_sample(error), timestep, output)

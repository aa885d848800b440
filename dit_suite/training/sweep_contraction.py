"""Training a TarFlow block to be solved by sweeps: a term that rewards every sweep for shrinking the error.

An addition of ours to TarFlow and GS-Jacobi. Exact likelihood says nothing about how hard a block is to invert: one
whose errors grow along the sequence has to be solved token after token (docs/tarflow.md). With x the block's data, z(x)
its noise and S(y; z) = exp(a(y)) z + b(y) a sweep, whose fixed point is x, this term looks at an iterate y on the way:

    loss = log(1 + r),    r = |S(y; z(x)) - x|^2 / (|y - x|^2 + 1e-4),    |.|^2 the mean over tokens and their numbers

In one half of the samples y is what k sweeps leave of the guess zero, k = 0, 1, .. `sweeps` by turns; in the other half
y is x plus noise whose standard deviation is log-uniform in [0.03, 0.5]: far from the solution and close to it. No
gradient flows through y.
"""

import math
from dataclasses import dataclass

import torch

from dit_suite.data.draws import Stream
from dit_suite.models.tarflow import TarFlowBlock, TarFlowModel
from dit_suite.options import Options, option
from dit_suite.training.objectives import ObjectiveResult, TrainingBatch

_FLOOR = 1e-4
_NEAR, _FAR = 0.03, 0.5
_BOUND = 8.0
_LARGEST_LOG_SCALE = 6.0


def sweep(
    block: TarFlowBlock, tokens: torch.Tensor, latents: torch.Tensor, condition: torch.Tensor | None
) -> torch.Tensor:
    """All tokens from those before them, `(batch, tokens, token_dim)` in the block's order; token 0 is the latent's.

    Log-scales are cut at 6, so that an iterate far from any data can't overflow.
    """
    log_scale, shift = block.next_affine(tokens[:, :-1], condition)
    renewed = torch.exp(log_scale.clamp(max=_LARGEST_LOG_SCALE)) * latents[:, 1:] + shift
    return torch.cat([latents[:, :1], renewed], dim=1)


def contraction(swept: torch.Tensor, iterate: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """r of every sample, `(batch,)`, from S(y), y and x, each `(batch, tokens, token_dim)`."""
    left, before = (swept - solution).square().mean(dim=(1, 2)), (iterate - solution).square().mean(dim=(1, 2))
    return left / (before + _FLOOR)


@dataclass(frozen=True)
class SweepContraction(Options):
    """The term for the trainer, `auxiliary: {name: ..., weight: ..., options: {blocks: [5]}}`, beside `flow_nll`."""

    blocks: tuple[int, ...] = option((), "indices of the blocks to work on, in forward order; at least one, not 0")
    sweeps: int = option(6, "sweeps from the guess zero at most", minimum=0, maximum=64)

    def attach(self, model: torch.nn.Module) -> None:
        """Remembers the bare network.

        Raises:
            ValueError: it is no TarFlow, or does not have these blocks.
        """
        if not isinstance(model, TarFlowModel):
            raise ValueError(f"the sweep contraction needs a TarFlow, got {type(model).__name__}")
        last = len(model.blocks) - 1
        if not self.blocks or not all(1 <= index <= last for index in self.blocks):
            chosen = ", ".join(map(str, self.blocks)) or "none"
            raise ValueError(f"the sweep contraction needs blocks between 1 and {last}, got {chosen}")
        object.__setattr__(self, "_model", model)

    def loss(self, batch: TrainingBatch, result: ObjectiveResult) -> torch.Tensor:
        """The mean over the chosen blocks, `(batch,)`."""
        outputs, labels = result.prediction[2], batch.condition.get("class_labels")
        terms = []
        for index in self.blocks:
            block = self._model.blocks[index]
            solution = block.order(outputs[index - 1]).float()
            latents, condition = block.order(outputs[index]).float(), block.condition(labels)
            iterate = self._iterate(block, batch, solution, latents.detach(), condition)
            swept = sweep(block, iterate, latents, condition)
            terms.append(torch.log1p(contraction(swept, iterate, solution)))
        return torch.stack(terms).mean(dim=0)

    @torch.no_grad()
    def _iterate(
        self,
        block: TarFlowBlock,
        batch: TrainingBatch,
        solution: torch.Tensor,
        latents: torch.Tensor,
        condition: torch.Tensor | None,
    ) -> torch.Tensor:
        """y of every sample."""
        path = latents.clone()
        path[:, 1:] = 0.0
        for _ in range(batch.draws.step % (self.sweeps + 1)):
            path = sweep(block, path, latents, condition).clamp(-_BOUND, _BOUND)
        chance = batch.draws.uniform(Stream.AUXILIARY, (2,))
        deviation = torch.exp(math.log(_NEAR) + (math.log(_FAR) - math.log(_NEAR)) * chance[:, 1])
        near = solution + deviation[:, None, None] * batch.draws.normal(Stream.EXTRA_NOISE, solution.shape[1:])
        iterate = torch.where((chance[:, 0] < 0.5)[:, None, None], near, path)
        iterate[:, :1] = solution[:, :1]  # token 0 is known from the start
        return iterate

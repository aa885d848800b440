"""The triangular system of one TarFlow block: its equations for a batch, where solvers start, and what they report."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from diffusers.utils import BaseOutput

from dit_suite.models.tarflow import LayerCache, TarFlowBlock
from dit_suite.schedulers.tarflow_strategy import FlowGuidance

DIVERGED = 1e6
SLOWEST = 0.9


class FlowOverflow(FloatingPointError, ValueError):
    """A sample left the range of float32: what was asked for (mostly the guidance) is too much for the model."""


@dataclass
class BlockTrace(BaseOutput):
    """One solved block.

    Attributes:
        prev_sample: tokens `(batch, tokens, token_dim)` in image order, float32.
        block: index of the block.
        residuals: per sweep, `(batch,)` sums of squared changes of the tokens it covered; 0 for finished samples.
        modules: the module of every sweep.
        covered: the number of tokens that every sweep updated.
        sweeps: `(batch,)` sweeps that each sample took part in.
        calls: network calls (guidance runs both branches in one call).
        bfloat16_calls: how many of them ran in bfloat16.
        note: why none did, although the strategy asks for some; else empty.
        fallbacks: samples that diverged and were solved sequentially.
        interrupted: True when `should_stop` ended the solution early.
    """

    prev_sample: torch.Tensor
    block: int = 0
    residuals: list[torch.Tensor] = field(default_factory=list)
    modules: list[int] = field(default_factory=list)
    covered: list[int] = field(default_factory=list)
    sweeps: torch.Tensor | None = None
    calls: int = 0
    bfloat16_calls: int = 0
    note: str = ""
    fallbacks: tuple[int, ...] = ()
    interrupted: bool = False

    @property
    def tokens(self) -> torch.Tensor:
        return self.prev_sample

    def residual_norms(self) -> torch.Tensor:
        """Per sweep, the residual of the reference: Frobenius norm over the batch / (batch * token_dim)."""
        if not self.residuals:
            return torch.zeros(0)
        batch, _, token_dim = self.prev_sample.shape
        return torch.stack(self.residuals).sum(dim=1).sqrt() / (batch * token_dim)

    def residual_rms(self) -> torch.Tensor:
        """`(sweeps, batch)`: root mean square change of each sample per number covered."""
        counts = torch.tensor(self.covered, device=self.prev_sample.device) * self.prev_sample.shape[2]
        return (torch.stack(self.residuals) / counts[:, None]).sqrt()


class FlowSystem:
    """The equations of one block for one batch: block order, class vectors, guidance and caches.

    Args:
        block: the block.
        latents: `(batch, tokens, token_dim)` in image order.
        class_labels: `(batch,)` or None.
        guidance: off unless active and the two branches differ.
    """

    def __init__(
        self, block: TarFlowBlock, latents: torch.Tensor, class_labels: torch.Tensor | None, guidance: FlowGuidance
    ) -> None:
        self.block = block
        self.latents = block.order(latents.float()).contiguous()
        self.batch, self.length, _ = latents.shape
        self.positions = block.order(block.pos_embed, 0)
        self.condition = block.condition(class_labels)
        if self.condition is not None:
            self.condition = self.condition.expand(self.batch, -1, -1)
        labelled = self.condition is not None and class_labels is not None and bool((class_labels >= 0).any())
        self.guidance = guidance if guidance.active and (labelled or guidance.temperature != 1.0) else None
        self.weaker = None if self.condition is None else block.condition(None).expand(self.batch, -1, -1)

    def new_caches(self) -> list[LayerCache]:
        rows = self.batch * (1 if self.guidance is None else 2)
        # Not the weight's device: an offloaded one is elsewhere until its layer runs.
        dtype, device = self.block.proj_in.weight.dtype, self.latents.device
        shape = [(rows, layer.heads, self.length, layer.head_dim) for layer in self.block.layers]
        zeros = [[torch.zeros(s, dtype=dtype, device=device) for _ in range(2)] for s in shape]
        return [LayerCache(keys, values) for keys, values in zeros]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The rows of the caches that belong to the samples in `index`."""
        return index if self.guidance is None else torch.cat([index, index + self.batch])

    def update(
        self,
        tokens: torch.Tensor,
        start: int,
        caches: list[LayerCache] | None,
        index: torch.Tensor | None = None,
        bfloat16: bool = False,
    ) -> torch.Tensor:
        """New values of the tokens after each input: `(rows, length, token_dim)` float32.

        Args:
            tokens: inputs at `start ..`, `(rows, length, token_dim)`.
            caches: of these rows.
            index: the samples that the rows are; None for the whole batch.
            bfloat16: run the network's matrix products and attention in bfloat16. Autocast casts the weights where
                they are used, so that no copy of them can grow stale, stay behind or miss an offloading hook.
        """
        condition, weaker, latents = self.condition, self.weaker, self.latents
        if index is not None:
            latents = latents.index_select(0, index)
            condition = None if condition is None else condition.index_select(0, index)
            weaker = None if weaker is None else weaker.index_select(0, index)
        end = start + tokens.shape[1]
        device = latents.device.type
        with torch.autocast(device, torch.bfloat16, cache_enabled=False) if bfloat16 else nullcontext():
            if self.guidance is None:
                log_scale, shift = self.block.next_affine(tokens, condition, start, None, caches, self.positions)
            else:
                log_scale, shift = self._guided(tokens, condition, weaker, start, caches)
        return torch.exp(log_scale) * latents[:, start + 1 : end + 1] + shift

    def _guided(
        self,
        tokens: torch.Tensor,
        condition: torch.Tensor | None,
        weaker: torch.Tensor | None,
        start: int,
        caches: list[LayerCache] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        guidance, rows = self.guidance, tokens.shape[0]
        scale = torch.ones(2 * rows, 1, 1, 1, device=tokens.device)
        scale[rows:] = 1.0 / guidance.temperature
        both = None if condition is None else torch.cat([condition, weaker])
        log_scale, shift = self.block.next_affine(
            torch.cat([tokens, tokens]), both, start, scale, caches, self.positions
        )
        weight = guidance.scale
        if guidance.annealed:
            steps = torch.arange(start + 1, start + tokens.shape[1] + 1, device=tokens.device, dtype=torch.float32)
            weight = (guidance.scale / (self.length - 1)) * steps[:, None]
        result = []
        for name, value in (("a", log_scale), ("b", shift)):
            strong, weak = value.chunk(2)
            result.append(strong + weight * (strong - weak) if name in guidance.parameters else strong)
        return result[0], result[1]


def never() -> bool:
    """Nobody wants to stop."""
    return False


def ignore(calls: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Watch:
    """What runs between two network calls: progress and interruption."""

    progress: Callable[[int], None] = ignore
    should_stop: Callable[[], bool] = never


def why_not_bfloat16(device: torch.device, dtype: torch.dtype) -> str:
    """Why bfloat16 would not speed up a network with weights of `dtype` on `device`; empty where it does.

    On CPUs only tile units (AMX) count: without them bfloat16 loses, AVX512-BF16 included (docs/tarflow.md).
    """
    if dtype != torch.float32:
        return f"the weights are in {str(dtype).removeprefix('torch.')}, not float32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU has no bfloat16 units"
    if device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return "this processor has no bfloat16 matrix units (AMX)"
    return "" if device.type in ("cuda", "cpu") else f"bfloat16 sweeps are not known to pay on {device.type}"


def estimated_error(change: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
    """What is left after a sweep, judged by its change and that of the sweep before (Aitken's geometric estimate).

    If every sweep shrinks the error by r, the change c of a sweep leaves c * r / (1 - r). After a first sweep, which
    has no ratio (`previous` is None or negative), the change itself is returned: an upper bound as long as r is at most
    1/2.

    The rounding of a bfloat16 sweep is in no change before the next one, so that no sample may stop after it. The
    change of the float32 sweep that follows holds it: an error of the iterate before like any other, which this sweep
    shrank like any other. Where rounding is most of both changes the ratio comes near 1, and the sample goes on.
    """
    if previous is None:
        return change
    ratio = (change / previous.clamp(min=torch.finfo(change.dtype).tiny)).clamp(max=SLOWEST)
    return torch.where(previous < 0, change, change * ratio / (1.0 - ratio))


def first_iterate(system: FlowSystem, guess: str) -> torch.Tensor:
    """Where sweeps start, in the block's order; token 0 is always the latent's."""
    tokens = system.latents.clone()
    if guess == "zero":
        tokens[:, 1:] = 0.0
    elif guess == "linear":
        guessed = system.block.initial_guess(system.block.order(system.latents))
        tokens[:, 1:] = system.block.order(guessed)[:, 1:]
    return tokens

"""TarFlow: a normalizing flow on image patches whose blocks are causal transformers.

"Normalizing Flows are Capable Generative Models" (Zhai et al., arXiv 2412.06329). An image is cut into T tokens of D
numbers. Each block predicts, for every token, a log-scale a and a shift b from the tokens before it (in the block's own
order) and maps

    data -> noise    v_t = (u_t - b_t) * exp(-a_t)            one parallel pass            (`TarFlowBlock.forward`)
    noise -> data    x_t = exp(a_t(x_<t)) * z_t + b_t(x_<t)   a triangular system to solve (`dit_suite.schedulers`)

Token 0 of a block has a = b = 0. Odd blocks read the tokens in reverse. Training is exact maximum likelihood.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import BaseOutput
from torch import nn

LOG_2PI = math.log(2.0 * math.pi)
PRIOR_MOMENTUM = 0.1


@dataclass
class TarFlowOutput(BaseOutput):
    """Result of the data-to-noise pass.

    Attributes:
        latents: `(batch, tokens, token_dim)`, standard normal under the model.
        logdet: `(batch,)`, log|det dz/dx| divided by tokens * token_dim (nats per dimension).
        block_outputs: the tokens after every block, each `(batch, tokens, token_dim)` in image order.
        block_logdets: the share of `logdet` of every block, each `(batch,)`.
    """

    latents: torch.Tensor
    logdet: torch.Tensor
    block_outputs: tuple[torch.Tensor, ...]
    block_logdets: tuple[torch.Tensor, ...]


class LayerCache:
    """Keys and values of one layer for every position of the sequence, allocated once.

    Rows `(batch, heads, tokens, head_dim)`. A pass over positions `start .. start + length - 1` overwrites those
    positions and attends to everything up to `start + length - 1`.
    """

    __slots__ = ("keys", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        end = start + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def rows(self, index: torch.Tensor) -> "LayerCache":
        """A copy that holds only the samples in `index`."""
        return LayerCache(self.keys.index_select(0, index), self.values.index_select(0, index))


class TarFlowLayer(nn.Module):
    """Pre-norm causal attention and MLP (expansion 4, exact GELU)."""

    def __init__(self, hidden_size: int, head_dim: int) -> None:
        super().__init__()
        self.heads = hidden_size // head_dim
        self.head_dim = head_dim
        self.norm1 = FP32LayerNorm(hidden_size, eps=1e-5)
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.norm2 = FP32LayerNorm(hidden_size, eps=1e-5)
        self.ff_in = nn.Linear(hidden_size, 4 * hidden_size)
        self.ff_out = nn.Linear(4 * hidden_size, hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool = True,
        query_scale: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """One layer over `(batch, length, hidden_size)`.

        Args:
            attention_mask: bool `(length, start + length)`; None with `is_causal=False` means that every query sees
                every key.
            query_scale: `(batch, 1, 1, 1)` factor on the queries, the inverse attention temperature of each row.
            cache: keys and values of the positions before `start`; those of this pass are written into it.
            start: position of the first token.
        """
        batch, length, width = hidden_states.shape
        qkv = self.to_qkv(self.norm1(hidden_states)).view(batch, length, 3, self.heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if query_scale is not None:
            query = query * query_scale.to(query.dtype)
        if cache is not None:
            key, value = cache.write(start, key, value)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, is_causal=is_causal)
        hidden_states = hidden_states + self.to_out(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden_states + self.ff_out(F.gelu(self.ff_in(self.norm2(hidden_states))))


class TarFlowBlock(nn.Module):
    """One autoregressive affine map ("meta-block"): a causal transformer over the tokens in the block's own order.

    Args:
        tokens, token_dim: shape of the sequence.
        hidden_size, head_dim, num_layers: the transformer.
        num_classes: 0 for an unconditional model.
        volume_preserving: predict the shift only (a = 0).
        reverse: read the tokens last to first.
        guess_kernel: side of the neighbourhood that `initial_guess` reads, in tokens; 0 for none.
    """

    def __init__(
        self,
        tokens: int,
        token_dim: int,
        hidden_size: int,
        head_dim: int,
        num_layers: int,
        num_classes: int,
        volume_preserving: bool,
        reverse: bool,
        guess_kernel: int = 0,
    ) -> None:
        super().__init__()
        self.reverse = reverse
        self.volume_preserving = volume_preserving
        self.token_dim = token_dim
        self.proj_in = nn.Linear(token_dim, hidden_size)
        self.pos_embed = nn.Parameter(torch.randn(tokens, hidden_size) * 0.01)
        if num_classes > 0:
            self.class_embed = nn.Parameter(torch.randn(num_classes, 1, hidden_size) * 0.01)
        else:
            self.class_embed = None
        self.layers = nn.ModuleList(TarFlowLayer(hidden_size, head_dim) for _ in range(num_layers))
        self.proj_out = nn.Linear(hidden_size, token_dim if volume_preserving else 2 * token_dim)
        self.proj_out.weight.data.zero_()
        if guess_kernel:
            self.guess = nn.Conv2d(token_dim, token_dim, guess_kernel, padding=guess_kernel // 2)
            self.guess.weight.data.zero_()
            self.guess.bias.data.zero_()
        else:
            self.guess = None
        self.gradient_checkpointing = False

    def order(self, sequence: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Image order to the block's order, or back (a reversal is its own inverse)."""
        return sequence.flip(dim) if self.reverse else sequence

    def condition(self, class_labels: torch.Tensor | None) -> torch.Tensor | None:
        """The class vector added to every token: `(batch, 1, hidden)`, `(1, 1, hidden)` without labels, or None.

        Negative labels (dropped ones) and no labels stand for the mean of the table.
        """
        if self.class_embed is None:
            return None
        mean = self.class_embed.mean(dim=0, keepdim=True)
        if class_labels is None:
            return mean
        return torch.where((class_labels < 0)[:, None, None], mean, self.class_embed[class_labels.clamp(min=0)])

    def next_affine(
        self,
        tokens: torch.Tensor,
        condition: torch.Tensor | None,
        start: int = 0,
        query_scale: torch.Tensor | None = None,
        caches: list[LayerCache] | None = None,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-scale and shift of the token after each input token, in the block's order.

        Args:
            tokens: `(batch, length, token_dim)` at positions `start .. start + length - 1` of the block's order.
            condition: from `condition()`.
            query_scale, caches: see `TarFlowLayer.forward`; `start > 0` needs caches.
            positions: `(tokens, hidden)` position table in the block's order, if the caller has it at hand.

        Returns:
            a, b: each `(batch, length, token_dim)` in float32; entry i belongs to position `start + i + 1`.
        """
        length = tokens.shape[1]
        table = self.order(self.pos_embed, 0) if positions is None else positions
        hidden_states = self.proj_in(tokens.to(self.proj_in.weight.dtype)) + table[start : start + length]
        if condition is not None:
            hidden_states = hidden_states + condition
        causal, mask = start == 0 and length > 1, None
        if start > 0 and length > 1:
            mask = torch.ones(length, start + length, dtype=torch.bool, device=tokens.device).tril(start)
        for index, layer in enumerate(self.layers):
            cache = None if caches is None else caches[index]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    layer, hidden_states, mask, causal, query_scale, cache, start
                )
            else:
                hidden_states = layer(hidden_states, mask, causal, query_scale, cache, start)
        output = self.proj_out(hidden_states).float()
        if self.volume_preserving:
            return torch.zeros_like(output), output
        log_scale, shift = output.chunk(2, dim=-1)
        return log_scale, shift

    def affine(
        self, ordered: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-scale and shift of every token of a full sequence in the block's order; zero for token 0."""
        log_scale, shift = self.next_affine(ordered, self.condition(class_labels))
        return F.pad(log_scale[:, :-1], (0, 0, 1, 0)), F.pad(shift[:, :-1], (0, 0, 1, 0))

    def initial_guess(self, latents: torch.Tensor) -> torch.Tensor:
        """A linear prediction of the block's data from its noise: a convolution over the patch grid.

        Not part of the flow: only the iterative samplers start from it (`dit_suite.schedulers.tarflow_planner` fits it
        by least squares). `(batch, tokens, token_dim)` in image order, both.

        Raises:
            ValueError: the model has no such predictor.
        """
        if self.guess is None:
            raise ValueError('the guess "linear" needs a fitted model (guess_kernel > 0); run scripts/plan_tarflow.py')
        side = math.isqrt(latents.shape[1])
        grid = latents.to(self.guess.weight.dtype).transpose(1, 2).unflatten(2, (side, side))
        return self.guess(grid).flatten(2).transpose(1, 2).float()

    def forward(
        self,
        hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        solver: Callable[["TarFlowBlock", torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Data to noise: `(batch, tokens, token_dim)` in image order -> the same shape, and log-det `(batch,)`.

        With a `solver`, noise to data: what `solver(block, hidden_states, class_labels)` returns. It calls the network
        many times within this one forward, so that weights which a hook loads around a forward are there for all.
        """
        if solver is not None:
            return solver(self, hidden_states, class_labels)
        ordered = self.order(hidden_states)
        log_scale, shift = self.affine(ordered, class_labels)
        latents = (ordered.float() - shift) * torch.exp(-log_scale)
        return self.order(latents), -log_scale.mean(dim=(1, 2))

    def reverse_by_prefix(self, latents: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Noise to data, the slow obvious way: token t from a full pass over tokens 0 .. t-1. For tests."""
        ordered = self.order(latents.float())
        found = ordered[:, :1]
        condition = self.condition(class_labels)
        for position in range(1, ordered.shape[1]):
            log_scale, shift = self.next_affine(found, condition)
            token = torch.exp(log_scale[:, -1:]) * ordered[:, position : position + 1] + shift[:, -1:]
            found = torch.cat([found, token], dim=1)
        return self.order(found)


class TarFlowModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The whole flow on images `(batch, in_channels, sample_size, sample_size)` in [-1, 1].

    Args:
        sample_size: side of the image in pixels; a multiple of `patch_size`.
        in_channels: image channels.
        patch_size: side of a patch; a token is one patch, channel slowest, then row, then column.
        hidden_size: transformer width, a multiple of `head_dim`.
        num_blocks: number of affine maps.
        num_layers: transformer layers per block; a list gives every block its own depth (deep-shallow stacks as in
            STARFlow, the last entry being the block next to the noise).
        head_dim: width of an attention head.
        num_classes: 0 for an unconditional model.
        volume_preserving: shift only; the prior variance is then learned (`update_prior`).
        noise_std: standard deviation of the Gaussian noise added to the training images, in units of [-1, 1] pixels.
            0 means that the model was trained on uniformly dequantised pixels.
        guess_kernel: side, in tokens, of the linear first guess that the planner fits for iterative sampling; odd, or 0
            for a model without one. It takes no part in training or likelihood.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TarFlowBlock"]
    _repeated_blocks = ["TarFlowBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "class_embed", "proj_in", "norm", "var", "guess"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        patch_size: int = 4,
        hidden_size: int = 256,
        num_blocks: int = 6,
        num_layers: int | list[int] = 3,
        head_dim: int = 64,
        num_classes: int = 0,
        volume_preserving: bool = False,
        noise_std: float = 0.05,
        guess_kernel: int = 0,
    ) -> None:
        super().__init__()
        depths = [num_layers] * num_blocks if isinstance(num_layers, int) else list(num_layers)
        if sample_size % patch_size:
            raise ValueError(f"sample_size must be a multiple of patch_size, got {sample_size} and {patch_size}")
        if hidden_size % head_dim:
            raise ValueError(f"hidden_size must be a multiple of head_dim, got {hidden_size} and {head_dim}")
        if guess_kernel < 0 or (guess_kernel and guess_kernel % 2 == 0):
            raise ValueError(f"guess_kernel must be odd, or 0 for none, got {guess_kernel}")
        if len(depths) != num_blocks:
            raise ValueError(f"num_layers lists {len(depths)} depths for {num_blocks} blocks")
        self.num_tokens = (sample_size // patch_size) ** 2
        self.token_dim = in_channels * patch_size**2
        self.register_buffer("var", torch.ones(self.num_tokens, self.token_dim))
        self.blocks = nn.ModuleList(
            TarFlowBlock(
                self.num_tokens,
                self.token_dim,
                hidden_size,
                head_dim,
                depth,
                num_classes,
                volume_preserving,
                reverse=index % 2 == 1,
                guess_kernel=guess_kernel,
            )
            for index, depth in enumerate(depths)
        )
        self.gradient_checkpointing = False

    def patchify(self, sample: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, side, side)` -> `(batch, tokens, token_dim)`, row-major over the patch grid."""
        return F.pixel_unshuffle(sample, self.config.patch_size).flatten(2).transpose(1, 2)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `patchify`."""
        side = self.config.sample_size // self.config.patch_size
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))
        return F.pixel_shuffle(grid, self.config.patch_size)

    def scale_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """Standard normal tokens `(batch, tokens, token_dim)` -> tokens of the prior, float32: where sampling starts.

        A forward of its own, so that a hook which loads the whole model for a forward has loaded it for the blocks.
        """
        return self.forward(noise, solver=lambda tokens: tokens.float() * self.var.float().sqrt())

    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        solver: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> TarFlowOutput | tuple | torch.Tensor:
        """Data to noise.

        Args:
            sample: `(batch, channels, side, side)` in [-1, 1].
            class_labels: `(batch,)` int64; negative entries stand for "no class". None: no class for all.
            solver: runs in place of this pass, see `TarFlowBlock.forward` and `scale_noise`.

        Returns:
            `TarFlowOutput`, or the tuple of its fields; with a solver, `solver(sample)`.
        """
        if solver is not None:
            return solver(sample)
        hidden_states = self.patchify(sample)
        outputs, logdets = [], []
        for block in self.blocks:
            hidden_states, logdet = block(hidden_states, class_labels)
            outputs.append(hidden_states)
            logdets.append(logdet)
        total = torch.stack(logdets).sum(dim=0)
        if not return_dict:
            return hidden_states, total, tuple(outputs), tuple(logdets)
        return TarFlowOutput(hidden_states, total, tuple(outputs), tuple(logdets))

    def nll_loss(self, sample: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Training loss: negative log-likelihood in nats per dimension without the Gaussian constant, a scalar.

        `sample` is the already noised (or dequantised) image. Equation (4) of the paper divided by T * D.
        """
        latents, logdet, *_ = self(sample, class_labels, return_dict=False)
        return 0.5 * latents.float().square().mean() - logdet.mean()

    def log_likelihood(self, sample: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Exact log p(x | class) of every sample under the standard normal prior, in nats, `(batch,)`."""
        latents, logdet, *_ = self(sample, class_labels, return_dict=False)
        dims = self.num_tokens * self.token_dim
        return dims * (logdet - 0.5 * latents.float().square().mean(dim=(1, 2)) - 0.5 * LOG_2PI)

    def bits_per_dim(self, sample: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Bits per dimension of 8-bit images, `(batch,)`; `sample` is dequantised to [-1, 1] (`dequantize`)."""
        dims = self.num_tokens * self.token_dim
        nats = -self.log_likelihood(sample, class_labels) / dims + math.log(128.0)
        return nats / math.log(2.0)

    def denoise(
        self, sample: torch.Tensor, class_labels: torch.Tensor | None = None, strength: float = 1.0
    ) -> torch.Tensor:
        """Removes the training noise by one score step: x + strength * noise_std^2 * d/dx log p(x | class).

        `strength` 1 is Tweedie's formula. Rows are independent of each other. Works within `torch.inference_mode()`.
        """
        amount = strength * self.config.noise_std**2
        if amount == 0.0:
            return sample
        # Backward must see the weights of the forward, which offloading takes out of the parameters in between.
        loaded = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
        with torch.inference_mode(False), torch.enable_grad(), loaded:
            noisy = sample.detach().clone().requires_grad_(True)
            labels = None if class_labels is None else class_labels.clone()
            (score,) = torch.autograd.grad(self.log_likelihood(noisy, labels).sum(), noisy)
        return sample + amount * score.to(sample.dtype)

    @torch.no_grad()
    def update_prior(self, mean_square: torch.Tensor) -> None:
        """Moves the prior variance of a volume-preserving flow a tenth of the way to a training batch's mean(z^2).

        Args:
            mean_square: `(tokens, token_dim)`.
        """
        self.var.lerp_(mean_square.to(self.var.dtype), PRIOR_MOMENTUM)


def dequantize(pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Uint8 pixel values (any dtype, 0 .. 255) plus uniform noise in [0, 1) -> [-1, 1], for exact likelihoods."""
    return (pixels.to(torch.float32) + noise) / 128.0 - 1.0

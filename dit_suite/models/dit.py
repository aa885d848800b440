"""DiT: the class-conditional diffusion transformer, in the convention of its official weights.

"Scalable Diffusion Models with Transformers", section 3.2 (adaLN-Zero blocks). diffusers ships the same network as
`DiTTransformer2DModel`, with two small differences that make official weights give other outputs there: its timestep
frequencies divide by `half - 1` instead of `half`, and its second LayerNorm has eps 1e-5 instead of 1e-6. This class
keeps the official numbers, and one embedder instead of a copy in every block (75 million fewer parameters at XL/2).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from dit_suite.models.dit_blocks import (
    AdaLNFinalLayer,
    AdaLNZeroBlock,
    PatchEmbed,
    TimestepEmbedder,
    init_dit_weights,
    sincos_2d,
    unpatchify,
)

SIZES: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
)


def dit_config(name: str, sample_size: int = 32, **overrides: Any) -> dict[str, Any]:
    """Arguments of `DiTModel` for a published size.

    Args:
        name: "DiT-XL/2": a size among S, B, L, XL, and the patch side 2, 4 or 8.
        sample_size: side of the latent (image side / 8 with the usual VAE).

    Raises:
        ValueError: there is no such size.
    """
    family, _, rest = name.partition("-")
    size, _, patch = rest.partition("/")
    if family != "DiT" or size not in SIZES or patch not in ("2", "4", "8"):
        raise ValueError(f"there is no size {name!r}; the names are DiT-{{{','.join(SIZES)}}}/{{2,4,8}}")
    depth, width, heads = SIZES[size]
    shape = {"num_layers": depth, "num_attention_heads": heads, "attention_head_dim": width // heads}
    return {"sample_size": sample_size, "patch_size": int(patch), **shape, **overrides}


class LabelEmbedder(nn.Module):
    """Class labels `(batch,)` to `(batch, dim)`. With `has_null_class`, a last row holds the null class.

    Labels are dropped by whoever trains, by passing the null class or `force_drop_ids`: the network draws no random
    numbers, so that a training step is a function of its inputs.
    """

    def __init__(self, num_classes: int, hidden_size: int, has_null_class: bool):
        super().__init__()
        self.null_class = num_classes if has_null_class else None
        self.embedding_table = nn.Embedding(num_classes + int(has_null_class), hidden_size)

    def forward(self, labels: torch.Tensor, force_drop_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Embeds labels; those with `force_drop_ids (batch,)` equal to 1 become the null class first."""
        if force_drop_ids is not None and self.null_class is not None:
            labels = torch.where(force_drop_ids == 1, self.null_class, labels)
        return self.embedding_table(labels)


class DiTModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    """The official DiT network.

    Args:
        sample_size: side of the latent the position table is made for. Any grid is accepted in `forward`.
        patch_size: side of a patch.
        in_channels: latent channels C.
        num_layers, num_attention_heads, attention_head_dim: depth, heads and width per head.
        mlp_ratio: inner width of the feed-forward over the width.
        num_classes: number of classes K. The null class has index K and exists when `class_dropout_prob` > 0.
        class_dropout_prob: share of labels that training drops (the trainer does it); 0 means no null class.
        learn_sigma: the output has 2C channels, prediction then variance.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["AdaLNZeroBlock"]
    _repeated_blocks = ["AdaLNZeroBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "time_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is not a multiple of patch_size {patch_size}")
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.time_embed = TimestepEmbedder(width)
        self.label_embed = LabelEmbedder(num_classes, width, class_dropout_prob > 0)
        self.transformer_blocks = nn.ModuleList(
            [AdaLNZeroBlock(width, num_attention_heads, mlp_ratio) for _ in range(num_layers)]
        )
        self.final_layer = AdaLNFinalLayer(width, patch_size * patch_size * self.out_channels)
        side = sample_size // patch_size
        self.register_buffer("pos_embed", sincos_2d(side, side, width), persistent=False)
        self.gradient_checkpointing = False
        init_dit_weights(self)

    @property
    def null_class(self) -> int | None:
        """Label that means "no class", or None where the model was built without one."""
        return self.label_embed.null_class

    def _positions(self, height: int, width: int) -> torch.Tensor:
        side = self.config.sample_size // self.config.patch_size
        if (height, width) == (side, side):
            return self.pos_embed
        return sincos_2d(height, width, self.pos_embed.shape[-1], self.pos_embed.device)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        force_drop_ids: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the noise (and, with `learn_sigma`, the variance).

        Args:
            hidden_states: noisy latent `(batch, C, H, W)`, H and W multiples of the patch side.
            timestep: `(batch,)`, or one value for all; the original index 0..999 for the published weights.
            class_labels: `(batch,)` integers in 0..K-1, or K for the null class.
            force_drop_ids: `(batch,)`, 1 replaces that label by the null class (see `LabelEmbedder`).

        Returns:
            `.sample` of shape `(batch, C or 2C, H, W)`.
        """
        patch = self.config.patch_size
        height, width = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        tokens = self.patch_embed(hidden_states)
        tokens = tokens + self._positions(height, width).to(tokens.dtype)
        conditioning = self.time_embed(timestep.reshape(-1)).expand(tokens.shape[0], -1)
        conditioning = conditioning + self.label_embed(class_labels, force_drop_ids)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, conditioning)
            else:
                tokens = block(tokens, conditioning)
        sample = unpatchify(self.final_layer(tokens, conditioning), height, width, patch)
        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

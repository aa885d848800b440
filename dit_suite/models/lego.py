"""LEGO: a chain of small DiTs ("bricks") that each predict the whole picture from patches (arXiv 2310.06389).

Brick k cuts the canvas into non-overlapping r_k x r_k patches and runs a DiT on every patch alone: attention never
leaves a patch, so its cost is linear in the number of pixels. Its input is the previous brick's prediction, the noisy
picture and two coordinate channels. Every brick is trained on the same target, so the chain may stop after any of them.

The network is the raw one: EDM's preconditioning belongs to `dit_suite.schedulers.edm_heun`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput
from torch import nn

from dit_suite.models.dit_blocks import (
    AdaLNFinalLayer,
    AdaLNZeroBlock,
    PatchEmbed,
    TimestepEmbedder,
    from_windows,
    init_dit_weights,
    sincos_2d,
    to_windows,
    unpatchify,
)

COORDINATES = 2


@dataclass
class LegoOutput(BaseOutput):
    """`sample (batch, C, H, W)`, the last prediction, and the predictions of all bricks that ran, in order."""

    sample: torch.Tensor
    bricks: list[torch.Tensor] | None = None


class LegoBrick(nn.Module):
    """A DiT on r x r patches of the canvas.

    Args:
        in_channels: channels of the canvas it reads.
        out_channels: channels of the picture.
        hidden_size, num_heads, depth, mlp_ratio: the DiT.
        brick_size: r, side of a patch in pixels.
        patch_size: l, side of a token in pixels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_size: int,
        num_heads: int,
        depth: int,
        mlp_ratio: float,
        brick_size: int,
        patch_size: int,
    ):
        super().__init__()
        if brick_size % patch_size:
            raise ValueError(f"the brick size {brick_size} is not a multiple of its token patch {patch_size}")
        self.brick_size = brick_size
        self.patch_size = patch_size
        self.side = brick_size // patch_size
        self.patch_embed = PatchEmbed(in_channels, hidden_size, patch_size)
        self.blocks = nn.ModuleList(AdaLNZeroBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = AdaLNFinalLayer(hidden_size, patch_size * patch_size * out_channels)
        table = sincos_2d(self.side, self.side, hidden_size)
        self.register_buffer("pos_embed", table, persistent=False)
        self.gradient_checkpointing = False

    def forward(self, canvas: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """`canvas (batch, in_channels, H, W)`, `conditioning (batch, dim)`; returns `(batch, out_channels, H, W)`."""
        grid = (1, canvas.shape[-2] // self.patch_size, canvas.shape[-1] // self.patch_size)
        window = (1, self.side, self.side)
        span = self.side * self.side
        tokens = to_windows(self.patch_embed(canvas), grid, window)
        positions = self.pos_embed.to(tokens.dtype)
        tokens = (tokens.unflatten(1, (-1, span)) + positions).flatten(1, 2)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, conditioning, span)
            else:
                tokens = block(tokens, conditioning, span)
        tokens = from_windows(self.final_layer(tokens, conditioning), grid, window)
        return unpatchify(tokens, grid[1], grid[2], self.patch_size)


class LegoTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """The chain of bricks.

    Args:
        sample_size: side of the pictures (or latents) it is trained on, R.
        in_channels: picture channels C.
        brick_sizes: r of every brick in the order they run.
        patch_sizes: token side of every brick.
        brick_depths: blocks of every brick.
        num_attention_heads, attention_head_dim: heads and width per head, the same for all bricks.
        mlp_ratio: inner width of the feed-forward over the width.
        num_classes: number of classes K; label K is the null class. 0 means unconditional.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LegoBrick"]
    _repeated_blocks = ["AdaLNZeroBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "places", "norm", "time_embed"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        brick_sizes: Sequence[int] = (4, 16, 64),
        patch_sizes: Sequence[int] = (2, 8, 2),
        brick_depths: Sequence[int] = (2, 4, 6),
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
    ):
        super().__init__()
        if not len(brick_sizes) == len(patch_sizes) == len(brick_depths) or not brick_sizes:
            raise ValueError(
                "brick_sizes, patch_sizes and brick_depths need one entry per brick, got "
                f"{len(brick_sizes)}, {len(patch_sizes)} and {len(brick_depths)}"
            )
        width = num_attention_heads * attention_head_dim
        self.out_channels = in_channels
        self.time_embed = TimestepEmbedder(width)
        self.label_embed = nn.Linear(num_classes, width) if num_classes else None
        first = in_channels + COORDINATES
        self.bricks = nn.ModuleList(
            LegoBrick(
                first + (in_channels if index else 0),
                in_channels,
                width,
                num_attention_heads,
                depth,
                mlp_ratio,
                brick_size,
                patch_size,
            )
            for index, (brick_size, patch_size, depth) in enumerate(
                zip(brick_sizes, patch_sizes, brick_depths, strict=True)
            )
        )
        self.register_buffer("places", self.coordinates(sample_size, sample_size), persistent=False)
        self.gradient_checkpointing = False
        init_dit_weights(self)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)

    @property
    def skip_direction(self) -> str | None:
        """When the last brick may be skipped: "late" where patches grow (it draws the layout), "early" where they
        shrink (it draws detail), None for other stacks."""
        sizes = list(self.config.brick_sizes)
        if len(sizes) > 1 and sizes == sorted(set(sizes)):
            return "late"
        if len(sizes) > 1 and sizes == sorted(set(sizes), reverse=True):
            return "early"
        return None

    @staticmethod
    def coordinates(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
        """Row and column of every pixel of the whole canvas in [-1, 1]: `(2, height, width)`, float32."""
        axes = [torch.arange(n, device=device, dtype=torch.float32) / max(n - 1, 1) for n in (height, width)]
        row, column = (2 * (axis - 0.5) for axis in axes)
        return torch.stack([row[:, None].expand(height, width), column[None].expand(height, width)])

    def check_canvas(self, height: int, width: int) -> None:
        """Raises `ValueError` naming the accepted sizes when bricks do not tile a canvas of this many pixels."""
        for name, value in (("height", height), ("width", width)):
            wrong = [size for size in self.config.brick_sizes if value < 1 or value % size]
            if wrong:
                raise ValueError(
                    f"{name} {value} is not a multiple of the brick size {wrong[0]}; "
                    f"multiples of {max(self.config.brick_sizes)} fit every brick"
                )

    def embed_labels(self, class_labels: torch.Tensor | None, batch: int, like: torch.Tensor) -> torch.Tensor:
        """Label embedding `(batch, dim)`: one-hot times a table plus bias, all zeros for the null class."""
        count = self.config.num_classes
        if class_labels is None:
            one_hot = torch.zeros(1, count, device=like.device, dtype=like.dtype)
        elif class_labels.ndim == 2:
            one_hot = class_labels.to(like.dtype)
        else:
            one_hot = nn.functional.one_hot(class_labels.long(), count + 1)[:, :count].to(like.dtype)
        return self.label_embed(one_hot).expand(batch, -1)

    def bricks_to_run(self, stop_after: int | None, active_bricks: Sequence[bool] | None) -> list[int]:
        """Indices of the bricks that run; raises `ValueError` when none is left or an index is out of range."""
        count = len(self.bricks)
        if stop_after is not None and not 0 <= stop_after < count:
            raise ValueError(f"stop_after must be between 0 and {count - 1}, got {stop_after}")
        if active_bricks is not None and len(active_bricks) != count:
            raise ValueError(f"active_bricks needs {count} entries, got {len(active_bricks)}")
        last = count - 1 if stop_after is None else stop_after
        chosen = [k for k in range(last + 1) if active_bricks is None or active_bricks[k]]
        if not chosen:
            raise ValueError("at least one brick must run")
        if chosen[0] > 0 and not torch.compiler.is_compiling():
            warnings.warn(
                f"brick {chosen[0]} runs first and reads zeros for the prediction of the bricks before it, "
                "which it has not seen in training",
                stacklevel=3,
            )
        return chosen

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        stop_after: int | None = None,
        active_bricks: Sequence[bool] | None = None,
        output_bricks: bool = False,
        return_dict: bool = True,
    ) -> LegoOutput | tuple:
        """Raw predictions z of the chain.

        Args:
            hidden_states: scaled noisy pictures `(batch, C, H, W)` of any size that every brick tiles.
            timestep: EDM's `ln(sigma) / 4`, `(batch,)` or one value.
            class_labels: ids `(batch,)` with K for the null class, or weights `(batch, K)`; None is the null class.
            stop_after: index of the last brick that runs; the others do not execute.
            active_bricks: one flag per brick; a brick that is off passes the prediction on unchanged. Before the
                first one that runs that is zeros, which no brick was trained on: a warning says so.
            output_bricks: also return the prediction of every brick that ran.
            return_dict: a `LegoOutput`, or a tuple: `(sample,)`, and with `output_bricks` every brick's prediction.

        Raises:
            ValueError: the canvas does not fit the bricks, or no brick is left.
        """
        batch, _, height, width = hidden_states.shape
        self.check_canvas(height, width)
        chosen = self.bricks_to_run(stop_after, active_bricks)
        conditioning = self.time_embed(timestep.reshape(-1)).expand(batch, -1)
        if self.label_embed is not None:
            conditioning = conditioning + self.embed_labels(class_labels, batch, conditioning)
        places = self.places
        if places.shape[1:] != (height, width):
            places = self.coordinates(height, width, hidden_states.device)
        picture = [hidden_states, places.to(hidden_states).expand(batch, -1, -1, -1)]
        predictions = []
        previous = torch.zeros_like(hidden_states) if chosen[0] else None
        for index in chosen:
            canvas = torch.cat([previous, *picture] if index else picture, dim=1)
            previous = self.bricks[index](canvas, conditioning)
            predictions.append(previous)
        if not return_dict:
            return tuple(predictions) if output_bricks else (previous,)
        return LegoOutput(sample=previous, bricks=predictions if output_bricks else None)

"""NFD, Next-Frame Diffusion: an action-conditioned, block-causal video transformer (arXiv 2506.01380).

A frame is one autoregressive unit: its tokens are denoised together and read all tokens of the frames before. Every
frame has its own noise level and its own action, which drive adaLN-Zero. Time alignment, fixed once: frame i is
conditioned on the action taken after seeing frame i-1; the first frame has the null action (all zeros).

No official code or weights exist; where the paper is silent the choices are ours (see the docstrings).
"""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from dit_suite.models.block_causal import (
    NORM_EPS,
    BlockCausalAttention,
    block_causal_pattern,
    rope_tables,
    skip_causal_pattern,
    split_head_dim,
)
from dit_suite.models.frame_attention import FixedAttention, FixedInputs, FrameAttention
from dit_suite.models.frame_residual import shifted, velocity_from_residual, warp
from dit_suite.models.kv_cache import FrameCache

TIME_FEATURES = 128
SLOWEST, FASTEST = 0.25, 16.0


class NFDBlock(nn.Module):
    """adaLN-Zero transformer layer with one modulation per frame."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.attn = BlockCausalAttention(hidden_size, num_heads, head_dim)
        self.norm2 = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.ff = FeedForward(hidden_size, inner_dim=int(hidden_size * mlp_ratio), activation_fn="gelu-approximate")
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        attention: FrameAttention | FixedAttention,
        layer: int,
    ) -> torch.Tensor:
        """`hidden_states` `(batch, frames, tokens, hidden)`, `condition` `(batch, frames, hidden)` after SiLU."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, :, None].chunk(6, dim=-1)
        h = self.norm1(hidden_states) * (1 + scale1) + shift1
        out = self.attn.merge(attention(layer, self.attn.project(h.flatten(1, 2), tables)))
        hidden_states = hidden_states + gate1 * out.view_as(hidden_states)
        h = self.norm2(hidden_states) * (1 + scale2) + shift2
        return hidden_states + gate2 * self.ff(h)


class NFDTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts the rectified-flow velocity `noise - x0` of every frame from its own noise level and action.

    Args:
        in_channels: channels of a frame (pixels or latents).
        sample_height, sample_width: size of a frame.
        patch_size: pixels per token side.
        num_layers, num_attention_heads, attention_head_dim, mlp_ratio: of the transformer.
        num_actions: length of the action vector (one-hot or multi-hot; all zeros is the null action).
        window: frames that attention spans, the present one included.
        rope_split: channels of a head for (frame, row, column), in proportion.
        rope_theta: frequency base of all three axes.
        frame_std, change_std: root mean square of the data, and of its change from one frame to the next. Given, the
            network answers with the residual of `velocity_from_residual`: a start at "repeat the last frame", for
            short trainings. 0: it answers with the velocity itself, as in the paper.
        motion: the network also says where every patch came from, and the frame before is warped accordingly before it
            is repeated (needs `frame_std`).

    Raises:
        ValueError: the sizes do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["NFDBlock"]
    _repeated_blocks = ["NFDBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm"]
    _skip_keys = ["kv_cache"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_height: int = 48,
        sample_width: int = 64,
        patch_size: int = 8,
        num_layers: int = 6,
        num_attention_heads: int = 4,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_actions: int = 6,
        window: int = 8,
        rope_split: tuple[int, ...] = (2, 3, 3),
        rope_theta: float = 256.0,
        frame_std: float = 0.0,
        change_std: float = 0.0,
        motion: bool = False,
    ):
        super().__init__()
        if sample_height % patch_size or sample_width % patch_size:
            raise ValueError(f"patches of {patch_size} do not fit frames of {sample_height}x{sample_width}")
        if window < 1 or num_actions < 1:
            raise ValueError(f"window and num_actions must be at least 1, got {window} and {num_actions}")
        if min(frame_std, change_std) < 0 or (frame_std > 0) != (change_std > 0):
            raise ValueError(f"give frame_std and change_std both above 0 or neither, got {frame_std} and {change_std}")
        if motion and not frame_std:
            raise ValueError("motion warps the frame that frame_std and change_std make the network start from")
        self.grid = (sample_height // patch_size, sample_width // patch_size)
        self.tokens_per_frame = math.prod(self.grid)
        self.rope_dims = split_head_dim(attention_head_dim, tuple(rope_split))
        hidden = num_attention_heads * attention_head_dim
        token_channels = in_channels * patch_size**2
        self.patch_embed = nn.Linear(token_channels, hidden)
        self.time_embed = nn.Sequential(nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.action_embed = nn.Linear(num_actions, hidden, bias=False)
        self.transformer_blocks = nn.ModuleList(
            NFDBlock(hidden, num_attention_heads, attention_head_dim, mlp_ratio) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden, eps=NORM_EPS, elementwise_affine=False)
        self.modulation_out = nn.Linear(hidden, 2 * hidden)
        self.proj_out = nn.Linear(hidden, token_channels)
        self.proj_motion = nn.Linear(hidden, 2) if motion else None
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (*(block.modulation for block in self.transformer_blocks), self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.proj_motion is not None:
            nn.init.normal_(self.proj_motion.weight, std=0.005)  # zero would leave its input without a gradient

    def new_cache(self, batch_size: int, draft_frames: int = 1, scratch: int = 0) -> FrameCache:
        """An empty cache: the frames of the window before the present one, and room for frames written ahead.

        `scratch` frames of further room are for `fixed_pass`, which needs as many as a pass has frames.
        """
        config = self.config
        slots = config.window - 1 + max(1, draft_frames)
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        sizes = config.num_layers, batch_size, heads, head_dim, self.tokens_per_frame, slots
        cache = FrameCache(*sizes, self.device, self.dtype, scratch)
        if config.frame_std:
            cache.keep_frames((config.in_channels, config.sample_height, config.sample_width))
        return cache

    def _patchify(self, frames: torch.Tensor) -> torch.Tensor:
        batch, channels, num_frames = frames.shape[:3]
        p, (rows, columns) = self.config.patch_size, self.grid
        x = frames.reshape(batch, channels, num_frames, rows, p, columns, p).permute(0, 2, 3, 5, 4, 6, 1)
        return x.reshape(batch, num_frames, rows * columns, p * p * channels)

    def _unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, num_frames = tokens.shape[:2]
        p, (rows, columns), channels = self.config.patch_size, self.grid, self.config.in_channels
        x = tokens.reshape(batch, num_frames, rows, columns, p, p, channels).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(batch, channels, num_frames, rows * p, columns * p)

    def _positions(self, first_frame: int, num_frames: int, device: torch.device) -> torch.Tensor:
        axes = (
            torch.arange(first_frame, first_frame + num_frames, device=device),
            *(torch.arange(length, device=device) for length in self.grid),
        )
        return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])

    def _condition(self, timestep: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Time and action, `(batch, frames, hidden)`. Frequencies stay low so that the time derivative stays small."""
        span = torch.linspace(math.log(SLOWEST), math.log(FASTEST), TIME_FEATURES // 2, device=timestep.device)
        angles = timestep.float()[..., None] * span.exp()
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype)
        return nn.functional.silu(self.time_embed(features) + self.action_embed(actions.to(self.dtype)))

    def _velocity(
        self,
        tokens: torch.Tensor,
        frames: torch.Tensor,
        levels: torch.Tensor,
        before: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """The last layer of tokens read against the frame `before` each frame, and its level."""
        config, residual = self.config, self._unpatchify(self.proj_out(tokens))
        before_frames, before_levels = before
        if self.proj_motion is not None:
            motion = config.patch_size * self.proj_motion(tokens).float().unflatten(2, self.grid)
            before_frames = warp(before_frames, motion.permute(0, 1, 4, 2, 3))
        velocity = velocity_from_residual(
            residual, frames, levels, before_frames, before_levels, config.frame_std, config.change_std
        )
        return velocity.to(frames.dtype)

    def _run(
        self,
        frames: torch.Tensor,
        levels: torch.Tensor,
        actions: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        attention: FrameAttention | FixedAttention,
        before: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        condition = self._condition(levels, actions)
        h = self.patch_embed(self._patchify(frames))
        for layer, block in enumerate(self.transformer_blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, condition, tables, attention, layer)
            else:
                h = block(h, condition, tables, attention, layer)
        shift, scale = self.modulation_out(condition)[:, :, None].chunk(2, dim=-1)
        h = self.norm_out(h) * (1 + scale) + shift
        return (
            self._velocity(h, frames, levels, before) if self.config.frame_std else self._unpatchify(self.proj_out(h))
        )

    def tables(self, first_frame: int, num_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary tables of frames `first_frame ..`."""
        bases = (self.config.rope_theta,) * 3
        return rope_tables(self._positions(first_frame, num_frames, self.device), self.rope_dims, bases, "axial")

    def fixed_pass(
        self,
        frames: torch.Tensor,
        levels: torch.Tensor,
        actions: torch.Tensor,
        buffer: torch.Tensor,
        inputs: FixedInputs,
    ) -> torch.Tensor:
        """`forward` with a cache, in shapes that do not depend on the frame's index; for `torch.compile` and graphs.

        Args:
            frames, levels, actions: as in `forward`; levels `(batch, frames)`.
            buffer: of a cache with as much scratch room as the pass has frames.
            inputs: see `dit_suite.schedulers.fixed_pass`, which calls this.
        """
        attention = FixedAttention(buffer, self.tokens_per_frame, inputs)
        before = shifted(frames, levels, inputs.before, inputs.before_level)
        return self._run(frames, levels, actions, (inputs.cos, inputs.sin), attention, before)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        actions: torch.Tensor,
        first_frame: int = 0,
        kv_cache: FrameCache | None = None,
        num_written: int = 0,
        backend: str = "auto",
        context: torch.Tensor | None = None,
        context_timestep: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """One pass over consecutive frames.

        Args:
            hidden_states: noisy frames `(batch, channels, frames, height, width)`.
            timestep: noise levels in [0, 1], `(batch, frames)`, `(batch,)` or a scalar.
            actions: `(batch, frames, num_actions)`; the action that leads to each frame.
            first_frame: absolute index of the first frame given.
            kv_cache: frames before `first_frame`; its length must be `first_frame`.
            num_written: leading frames of this pass whose keys and values are stored.
            backend: see `attend`.
            context: for training, finished copies of all frames but the last `(batch, channels, frames - 1, height,
                width)` at the levels `context_timestep` `(batch, frames - 1)`: a noisy frame reads the finished ones
                before it and itself, as when sampling, and all frames of a clip are learned at once (ACDiT's layout).

        Returns:
            Velocity, shaped like `hidden_states`.

        Raises:
            ValueError: a shape does not fit, or the cache ends elsewhere.
        """
        batch, channels, frames, height, width = hidden_states.shape
        config = self.config
        if (channels, height, width) != (config.in_channels, config.sample_height, config.sample_width):
            wanted = (config.in_channels, config.sample_height, config.sample_width)
            raise ValueError(f"a frame must be {wanted} (channels, height, width), got {(channels, height, width)}")
        if actions.shape != (batch, frames, config.num_actions):
            wanted = (batch, frames, config.num_actions)
            raise ValueError(f"actions must be (batch, frames, num_actions) = {wanted}, got {tuple(actions.shape)}")
        if timestep.ndim < 2:
            timestep = timestep.reshape(-1, 1).expand(batch, frames)
        if context is not None:
            sample = self._with_context(hidden_states, timestep, actions, context, context_timestep, backend)
            return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
        first_past = first_frame
        if kv_cache is not None:
            if kv_cache.length != first_frame or num_written > frames:
                raise ValueError(
                    f"the cache ends before frame {kv_cache.length}, the pass starts at frame {first_frame}"
                    f" and writes {num_written} of {frames}"
                )
            first_past = max(kv_cache.oldest, first_frame - config.window + 1)
        num_past = first_frame - first_past
        pattern = block_causal_pattern(frames, self.tokens_per_frame, config.window, num_past)
        if kv_cache is not None and backend == "auto":
            backend = "index"
        attention = FrameAttention(pattern, backend, kv_cache, (first_past, first_frame, num_written))
        first = torch.zeros_like(hidden_states[:, :, 0]), torch.ones_like(timestep[:, 0])
        if kv_cache is not None and config.frame_std:
            first = kv_cache.last_frame(*first)
        before = shifted(hidden_states, timestep, *first)
        sample = self._run(hidden_states, timestep, actions, self.tables(first_frame, frames), attention, before)
        if kv_cache is not None:
            kv_cache.write_frames(hidden_states[:, :, :num_written], timestep[:, :num_written])
            kv_cache.advance(num_written)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _with_context(
        self,
        frames: torch.Tensor,
        levels: torch.Tensor,
        actions: torch.Tensor,
        context: torch.Tensor,
        context_levels: torch.Tensor,
        backend: str,
    ) -> torch.Tensor:
        """Velocity of noisy frames, each beside the finished ones before it: one pass over [finished | noisy]."""
        count, kept = frames.shape[2], frames.shape[2] - 1
        if count > self.config.window or context.shape[2] != kept:
            raise ValueError(
                f"{count} frames of a window of {self.config.window} need {kept} finished ones, got {context.shape[2]}"
            )
        pattern = skip_causal_pattern(count, self.tokens_per_frame, drop_last_clean=True)
        attention = FrameAttention(pattern, backend, None, (0, 0, 0))
        none = torch.zeros_like(frames[:, :, 0]), torch.ones_like(levels[:, 0])
        early = shifted(context, context_levels, *none)
        before = (
            torch.cat([early[0], none[0][:, :, None], context], 2),
            torch.cat([early[1], none[1][:, None], context_levels], 1),
        )
        tables = tuple(torch.cat([table[: kept * self.tokens_per_frame], table]) for table in self.tables(0, count))
        both = torch.cat([context, frames], 2), torch.cat([context_levels, levels], 1)
        return self._run(*both, torch.cat([actions[:, :kept], actions], 1), tables, attention, before)[:, :, kept:]


NFD_SIZES = {
    "toy": {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32},
    "cpu": {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 64},
    "base": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "130m": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "310m": {"num_layers": 16, "num_attention_heads": 16, "attention_head_dim": 64},
    "774m": {"num_layers": 18, "num_attention_heads": 24, "attention_head_dim": 64},
}

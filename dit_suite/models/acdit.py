"""ACDiT: autoregressive block-wise conditional diffusion transformer (arXiv 2412.07720).

A sample is cut in T blocks of B tokens. Every block is denoised by a diffusion model that sees the clean blocks before
it: `p(x) = prod_i p(x_i | x_<i)`. One transformer plays both roles. Clean tokens get neither timestep nor label, so
their keys and values can be cached and shared by both halves of guidance. T = 1 is a plain DiT.

The network works on block tokens `(batch, T, B, token channels)`; `to_blocks` and `from_blocks` translate latents.
"""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from dit_suite.models.block_causal import (
    NORM_EPS,
    BlockCausalAttention,
    attend,
    fused_pattern,
    rope_tables,
    skip_causal_pattern,
    split_head_dim,
)
from dit_suite.models.dit import LabelEmbedder
from dit_suite.models.kv_cache import BlockKVCache

TIME_FEATURES = 256
Tables = tuple[torch.Tensor, torch.Tensor]
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def partition(tokens: torch.Tensor, grid: tuple[int, int, int], block_size: int, square: bool) -> torch.Tensor:
    """Row-major tokens `(batch, f*h*w, ...)` to `(batch, T, B, ...)`.

    Square blocks lie in raster order with raster order inside; otherwise a block is the next B tokens.
    """
    if not square:
        return tokens.unflatten(1, (-1, block_size))
    _, height, width = grid
    side = math.isqrt(block_size)
    x = tokens.unflatten(1, (height // side, side, width // side, side))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def departition(blocks: torch.Tensor, grid: tuple[int, int, int], square: bool) -> torch.Tensor:
    """The inverse of `partition`: `(batch, T, B, ...)` to `(batch, f*h*w, ...)`."""
    if not square:
        return blocks.flatten(1, 2)
    _, height, width = grid
    side = math.isqrt(blocks.shape[2])
    x = blocks.unflatten(2, (side, side)).unflatten(1, (height // side, width // side))
    return x.transpose(2, 3).flatten(1, 4)


def latents_to_blocks(latents: torch.Tensor, patch_size: int, block_size: int, square: bool) -> torch.Tensor:
    """Latents `(batch, channels, frames, height, width)` to block tokens `(batch, T, B, p*p*channels)`.

    Inside a token the order is (row in patch, column in patch, channel).
    """
    batch, channels, frames, height, width = latents.shape
    p = patch_size
    grid = (frames, height // p, width // p)
    x = latents.reshape(batch, channels, frames, grid[1], p, grid[2], p).permute(0, 2, 3, 5, 4, 6, 1)
    return partition(x.reshape(batch, math.prod(grid), p * p * channels), grid, block_size, square)


class ACDiTBlock(nn.Module):
    """One layer. The noisy stream is modulated and gated by its block's condition; the clean stream is not."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.attn = BlockCausalAttention(hidden_size, num_heads, head_dim)
        self.norm2 = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        inner = int(hidden_size * mlp_ratio)
        self.ff = FeedForward(hidden_size, inner_dim=inner, activation_fn="gelu-approximate")
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(
        self,
        clean: torch.Tensor | None,
        noisy: torch.Tensor,
        condition: torch.Tensor,
        tables: tuple[Tables | None, Tables],
        attention: "MaskedAttention | CachedAttention",
        layer: int,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """
        Args:
            clean: `(batch, clean tokens, hidden)` or None.
            noisy: `(batch, T * B, hidden)`.
            condition: `(batch, T, hidden)`, already through SiLU.
            tables: rotary tables of the clean and of the noisy tokens.
            attention: how the two streams read each other.
            layer: index of this layer (for the cache).
        """
        num_blocks = condition.shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, :, None].chunk(6, dim=-1)

        def blocks(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(1, (num_blocks, -1))

        h = (blocks(self.norm1(noisy)) * (1 + scale1) + shift1).flatten(1, 2)
        heads_noisy = self.attn.project(h, tables[1])
        heads_clean = None if clean is None else self.attn.project(self.norm1(clean), tables[0])
        out_clean, out_noisy = attention(layer, heads_clean, heads_noisy)
        noisy = noisy + (gate1 * blocks(self.attn.merge(out_noisy))).flatten(1, 2)
        h = (blocks(self.norm2(noisy)) * (1 + scale2) + shift2).flatten(1, 2)
        noisy = noisy + (gate2 * blocks(self.ff(h))).flatten(1, 2)
        if clean is not None:
            clean = clean + self.attn.merge(out_clean)
            clean = clean + self.ff(self.norm2(clean))
        return clean, noisy


class MaskedAttention:
    """Training: both streams in one sequence under the skip-causal pattern."""

    def __init__(self, num_blocks: int, block_size: int, drop_last_clean: bool, backend: str):
        self.pattern = skip_causal_pattern(num_blocks, block_size, drop_last_clean)
        self.backend = backend

    def __call__(self, layer: int, clean: Heads | None, noisy: Heads) -> tuple[torch.Tensor | None, torch.Tensor]:
        if clean is None:
            return None, attend(*noisy, self.pattern, self.backend)
        length = clean[0].shape[2]
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(clean, noisy, strict=True))
        out = attend(query, key, value, self.pattern, self.backend)
        return out[:, :, :length], out[:, :, length:]


class CachedAttention:
    """Inference of one block: cached clean blocks, optionally new clean blocks that are written, one noisy block.

    The noisy batch may be a multiple of the cache's batch (guidance): both halves read the same clean keys.
    """

    def __init__(self, cache: BlockKVCache, block_index: int, num_clean: int, repeats: int):
        self.cache, self.first, self.num_clean = cache, block_index - num_clean, num_clean
        self.repeats = repeats
        self.pattern = fused_pattern(self.first, num_clean - 1, cache.block_size) if num_clean else None

    def __call__(self, layer: int, clean: Heads | None, noisy: Heads) -> tuple[torch.Tensor | None, torch.Tensor]:
        past = self.cache.read(layer, 0, self.first)
        keys, values = [k for k, _ in past], [v for _, v in past]
        out_clean = None
        if clean is not None:
            self.cache.write(layer, clean[1], clean[2])
            keys, values = [*keys, clean[1]], [*values, clean[2]]
            out_clean = attend(clean[0], torch.cat(keys, dim=2), torch.cat(values, dim=2), self.pattern, "index")
        query, key, value = noisy
        keys = [k.repeat(self.repeats, 1, 1, 1) for k in keys] + [key]
        values = [v.repeat(self.repeats, 1, 1, 1) for v in values] + [value]
        out = nn.functional.scaled_dot_product_attention(query, torch.cat(keys, dim=2), torch.cat(values, dim=2))
        return out_clean, out


class ACDiTTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """ACDiT for pictures (`num_frames=1`) and clips.

    Args:
        in_channels: latent channels.
        sample_height, sample_width, num_frames: size of the latent.
        patch_size: latent pixels per token side.
        block_size: default tokens per block. The weights do not depend on it.
        square_blocks: squares of tokens (one frame only) instead of runs of tokens; None: squares for pictures.
        num_layers, num_attention_heads, attention_head_dim, mlp_ratio: of the transformer.
        num_classes: labels `0 .. num_classes - 1`; the null label is `num_classes`.
        class_dropout_prob: share of labels that training drops (the trainer does it); 0: no null label, no guidance.
        rope_style: "axial", a true rotation per axis, or "reference", as in the released weights.
        rope_split: channels per position axis, in proportion; None: (1, 1) for pictures, (2, 3, 3) for clips.
        learned_positions: add a learned vector per place to both streams. Ours: rotary attention averages values, and
            tokens of pure noise have equal values on average, so without it a network learns only slowly where it is.

    Raises:
        ValueError: the sizes do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ACDiTBlock"]
    _repeated_blocks = ["ACDiTBlock"]
    _skip_layerwise_casting_patterns = ["token_embed", "position_embed", "norm"]
    _skip_keys = ["kv_cache"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_height: int = 32,
        sample_width: int = 32,
        num_frames: int = 1,
        patch_size: int = 1,
        block_size: int = 256,
        square_blocks: bool | None = None,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        rope_style: str = "axial",
        rope_split: tuple[int, ...] | None = None,
        learned_positions: bool = False,
    ):
        super().__init__()
        if sample_height % patch_size or sample_width % patch_size:
            raise ValueError(f"patches of {patch_size} do not fit a latent of {sample_height}x{sample_width}")
        if rope_style not in ("axial", "reference"):
            raise ValueError(f"rope_style must be axial or reference, got {rope_style!r}")
        self.grid = (num_frames, sample_height // patch_size, sample_width // patch_size)
        self.num_tokens = math.prod(self.grid)
        self.square_blocks = num_frames == 1 if square_blocks is None else square_blocks
        self.check_block_size(block_size)
        self.axes = self.grid[1:] if num_frames == 1 else self.grid
        default_split = (1, 1) if num_frames == 1 else (2, 3, 3)
        split = tuple(rope_split) if rope_split else default_split
        if len(split) != len(self.axes):
            raise ValueError(f"rope_split needs {len(self.axes)} numbers, got {len(split)}")
        self.rope_dims = split_head_dim(attention_head_dim, split)
        self.rope_bases = tuple(float((int(8 * length / math.pi) // 100 + 1) * 100) for length in self.axes)

        hidden = num_attention_heads * attention_head_dim
        token_channels = in_channels * patch_size**2
        self.token_embed = nn.Linear(token_channels, hidden, bias=False)
        self.position_embed = nn.Parameter(torch.empty(self.num_tokens, hidden)) if learned_positions else None
        self.time_features = Timesteps(TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(TIME_FEATURES, hidden)
        self.label_embed = LabelEmbedder(num_classes, hidden, class_dropout_prob > 0)
        self.transformer_blocks = nn.ModuleList(
            ACDiTBlock(hidden, num_attention_heads, attention_head_dim, mlp_ratio) for _ in range(num_layers)
        )
        self.norm_out = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.modulation_out = nn.Linear(hidden, 2 * hidden)
        self.proj_out = nn.Linear(hidden, token_channels)
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.position_embed is not None:
            nn.init.normal_(self.position_embed, std=0.5)
        nn.init.normal_(self.label_embed.embedding_table.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear_2.weight, std=0.02)
        for layer in (*(block.modulation for block in self.transformer_blocks), self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def check_block_size(self, block_size: int) -> None:
        """Raises `ValueError` when the token grid cannot be cut in blocks of `block_size` tokens."""
        frames, height, width = self.grid
        if block_size < 1 or self.num_tokens % block_size:
            raise ValueError(f"blocks of {block_size} tokens do not divide {self.num_tokens} tokens")
        if not self.square_blocks:
            return
        side = math.isqrt(block_size)
        if frames != 1:
            raise ValueError("square blocks need a single frame; clips are cut in runs of tokens")
        if side * side != block_size or height % side or width % side:
            raise ValueError(f"a {height}x{width} token grid cannot be cut in squares of {block_size} tokens")

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no label", or None when the model was built without one."""
        return self.config.num_classes if self.config.class_dropout_prob > 0 else None

    def to_blocks(self, latents: torch.Tensor, block_size: int | None = None) -> torch.Tensor:
        """See `latents_to_blocks`; raises `ValueError` for other sizes than the model's."""
        block_size = block_size or self.config.block_size
        self.check_block_size(block_size)
        frames, height, width = self.grid
        p, channels = self.config.patch_size, self.config.in_channels
        if latents.shape[1:] != (channels, frames, height * p, width * p):
            wanted = (channels, frames, height * p, width * p)
            raise ValueError(f"latents must be (batch, {', '.join(map(str, wanted))}), got {tuple(latents.shape)}")
        return latents_to_blocks(latents, p, block_size, self.square_blocks)

    def from_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """Block tokens `(batch, T, B, p*p*channels)` to latents `(batch, channels, frames, height, width)`."""
        frames, height, width = self.grid
        p, channels = self.config.patch_size, self.config.in_channels
        x = departition(blocks, self.grid, self.square_blocks)
        x = x.reshape(-1, frames, height, width, p, p, channels).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(-1, channels, frames, height * p, width * p)

    def position_ids(self, block_size: int | None = None, device: torch.device | None = None) -> torch.Tensor:
        """Positions `(axes, T * B)` in block order: (row, column) of pictures, (frame, row, column) of clips."""
        axes = torch.meshgrid(*(torch.arange(length, device=device) for length in self.axes), indexing="ij")
        ids = torch.stack([axis.flatten() for axis in axes], dim=-1)[None]
        blocks = partition(ids, self.grid, block_size or self.config.block_size, self.square_blocks)
        return blocks.flatten(0, 2).transpose(0, 1)

    def _embed(self, blocks: torch.Tensor, first_block: int) -> torch.Tensor:
        """Block tokens `(batch, T, B, channels)` from block `first_block` on to `(batch, T * B, hidden)`."""
        hidden = self.token_embed(blocks.flatten(1, 2))
        if self.position_embed is None:
            return hidden
        places = partition(self.position_embed[None], self.grid, blocks.shape[2], self.square_blocks)
        return hidden + places[:, first_block : first_block + blocks.shape[1]].flatten(1, 2)

    def new_cache(self, batch_size: int, block_size: int | None = None) -> BlockKVCache:
        """An empty cache for sampling: T - 1 clean blocks (the last one is never read)."""
        config, block_size = self.config, block_size or self.config.block_size
        slots = self.num_tokens // block_size - 1
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        return BlockKVCache(config.num_layers, batch_size, heads, head_dim, block_size, slots, self.device, self.dtype)

    def _condition(self, timestep: torch.Tensor, class_labels: torch.Tensor, num_blocks: int) -> torch.Tensor:
        batch = class_labels.shape[0]
        timestep = timestep.expand(batch) if timestep.ndim == 0 else timestep
        timestep = timestep[:, None].expand(batch, num_blocks) if timestep.ndim == 1 else timestep
        features = self.time_features(timestep.flatten()).to(self.dtype)
        time = self.time_embed(features).unflatten(0, (batch, num_blocks))
        label = self.label_embed(class_labels)[:, None]
        return nn.functional.silu(time + label)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        clean_hidden_states: torch.Tensor | None = None,
        kv_cache: BlockKVCache | None = None,
        block_index: int = 0,
        drop_last_clean: bool = True,
        backend: str = "auto",
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the noise of the noisy blocks.

        Without a cache this is the training pass over all blocks under the skip-causal mask. With a cache it is one
        step of block `block_index`; clean blocks given along are those just before it that are not cached yet, and they
        are written.

        Args:
            hidden_states: noisy block tokens, `(batch, T, B, channels)`; with a cache T is 1 and `batch` may be a
                multiple of the cache's (guidance halves share it).
            timestep: scalar, `(batch,)` or `(batch, T)`.
            class_labels: `(batch,)`.
            clean_hidden_states: training: all T clean blocks (not needed when T is 1); with a cache: the blocks to
                write, `(cache batch, P, B, channels)`, or None.
            drop_last_clean: leave out the last clean block, which nobody reads (same result, less work).
            backend: see `attend` (training pass only).

        Returns:
            Noise `(batch, T, B, channels)`.

        Raises:
            ValueError: the shapes do not fit, or blocks are missing in the cache.
        """
        batch, num_blocks, block_size, _ = hidden_states.shape
        positions = self.position_ids(block_size, hidden_states.device)
        if kv_cache is None:
            if num_blocks > 1 and clean_hidden_states is None:
                raise ValueError("without a cache, blocks after the first need clean_hidden_states")
            if num_blocks * block_size != self.num_tokens:
                raise ValueError(f"{num_blocks} blocks of {block_size} tokens are not the model's {self.num_tokens}")
            kept = 0 if clean_hidden_states is None else num_blocks - int(drop_last_clean)
            clean = clean_hidden_states[:, :kept] if kept else None
            first, noisy_positions = 0, positions
            drop = drop_last_clean or clean is None
            attention = MaskedAttention(num_blocks, block_size, drop, backend)
        else:
            clean = clean_hidden_states
            kept = 0 if clean is None else clean.shape[1]
            first = block_index - kept
            self._check_cache(kv_cache, batch, num_blocks, block_size, block_index, kept)
            noisy_positions = positions[:, block_index * block_size : (block_index + 1) * block_size]
            attention = CachedAttention(kv_cache, block_index, kept, batch // kv_cache.batch_size)
        clean_positions = positions[:, first * block_size : (first + kept) * block_size]

        rope = self.rope_dims, self.rope_bases, self.config.rope_style
        tables = rope_tables(clean_positions, *rope) if kept else None, rope_tables(noisy_positions, *rope)
        condition = self._condition(timestep, class_labels, num_blocks)
        noisy = self._embed(hidden_states, block_index if kv_cache is not None else 0)
        clean = self._embed(clean, first) if clean is not None else None
        for layer, block in enumerate(self.transformer_blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                args = (clean, noisy, condition, tables, attention, layer)
                clean, noisy = self._gradient_checkpointing_func(block, *args)
            else:
                clean, noisy = block(clean, noisy, condition, tables, attention, layer)
        if kv_cache is not None:
            kv_cache.advance(kept)
        shift, scale = self.modulation_out(condition)[:, :, None].chunk(2, dim=-1)
        out = self.norm_out(noisy).unflatten(1, (num_blocks, block_size)) * (1 + scale) + shift
        sample = self.proj_out(out)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @staticmethod
    def _check_cache(
        cache: BlockKVCache, batch: int, num_blocks: int, block_size: int, block_index: int, num_clean: int
    ) -> None:
        if num_blocks != 1 or block_size != cache.block_size:
            raise ValueError(f"a cached pass takes one block of {cache.block_size} tokens")
        if batch % cache.batch_size:
            raise ValueError(f"a batch of {batch} does not fit a cache for {cache.batch_size}")
        if cache.length + num_clean != block_index:
            raise ValueError(
                f"block {block_index} needs {block_index} clean blocks; {cache.length} are cached,"
                f" {num_clean} are given"
            )


ACDIT_SIZES = {
    "Ti": {"num_layers": 6, "num_attention_heads": 3},
    "S": {"num_layers": 12, "num_attention_heads": 6},
    "B": {"num_layers": 12, "num_attention_heads": 12},
    "L": {"num_layers": 24, "num_attention_heads": 16},
    "XL": {"num_layers": 28, "num_attention_heads": 18},
    "H": {"num_layers": 32, "num_attention_heads": 20},
}

"""PT-DiT: a diffusion transformer whose global attention runs between proxy tokens (arXiv 2409.04005).

Every block replaces full self-attention over N tokens by two cheap parts. The global information interaction module
(section 3.2, eq. 1) averages each window to a proxy token, lets the proxies attend to each other and then lets every
token read from all proxies. The texture complement module (eq. 2) is attention inside windows and inside shifted
windows. Text cross-attention, the feed-forward layer and adaLN-single are as in PixArt-alpha. An image is a video of
one frame: the token grid is always (frames, height, width).
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import nn

from dit_suite.models.dit_blocks import (
    NORM_EPS,
    Attention,
    CrossAttention,
    PatchEmbed,
    from_windows,
    modulate,
    sincos_1d,
    to_windows,
    unpatchify,
)
from dit_suite.models.pt_dit_lean import can_run_lean, lean_block
from dit_suite.models.shifted_windows import Reorder, WindowLayout, window_layout

PROXY_MODES = ("mean", "first", "center", "random")
PROXY_LAYOUTS = ("interleaved", "contiguous")
WINDOWS_PER_SIDE = 8
VIDEO_FRAMES_PER_WINDOW = 4
AXES = ("frames", "height", "width")

PT_DIT_SIZES = {
    "S": {"num_layers": 10, "num_attention_heads": 6, "attention_head_dim": 48},
    "B": {"num_layers": 12, "num_attention_heads": 10, "attention_head_dim": 64},
    "L": {"num_layers": 28, "num_attention_heads": 12, "attention_head_dim": 72},
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
    "H": {"num_layers": 30, "num_attention_heads": 20, "attention_head_dim": 72},
}


def pick_compress_ratios(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens per window along (frames, height, width) that make 8 x 8 windows of a frame (section 3.3).

    A 16 x 16 token grid (256 px) gives (1, 2, 2), 1024 px gives (1, 8, 8); videos take 4 frames to a window.

    Raises:
        ValueError: an axis of the token grid cannot be cut that way.
    """
    frames, *sides = grid
    for axis, size in zip(AXES[1:], sides, strict=True):
        if size % WINDOWS_PER_SIDE:
            raise ValueError(
                f"the token grid has {axis} {size}, which does not split into {WINDOWS_PER_SIDE} windows; "
                "pass compress_ratios or choose a size that does"
            )
    ratios = (1 if frames == 1 else VIDEO_FRAMES_PER_WINDOW, *(size // WINDOWS_PER_SIDE for size in sides))
    check_ratios(grid, ratios)
    return ratios


def check_ratios(grid: tuple[int, int, int], ratios: tuple[int, int, int]) -> None:
    """Raises `ValueError` naming the axis and the ratio when windows do not tile the token grid."""
    if len(ratios) != 3 or min(ratios) < 1:
        raise ValueError(f"compress_ratios must be three positive integers (frames, height, width), got {ratios}")
    for axis, size, ratio in zip(AXES, grid, ratios, strict=True):
        if size % ratio:
            raise ValueError(f"the token grid has {axis} {size}, which is not a multiple of the window ratio {ratio}")


def attention_mac_share(num_tokens: int, window_tokens: int, shift_window: bool = True) -> float:
    """Multiply-adds of PT-DiT's attention matrices over those of full attention: `1/p^2 + 1/p + 2p/N` (section 3.3)."""
    windows = (2 if shift_window else 1) * window_tokens / num_tokens
    return 1 / window_tokens**2 + 1 / window_tokens + windows


class PTDiTTransformerBlock(nn.Module):
    """One block: proxies, proxy attention, injection, window and shifted-window attention, text, feed-forward."""

    def __init__(
        self, hidden_size: int, num_heads: int, index: int, shift_window: bool, proxy_mode: str, contiguous: bool
    ):
        super().__init__()
        self.index = index
        self.shift_window = shift_window
        self.proxy_mode = proxy_mode
        self.contiguous = contiguous

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)

        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        self.norm_proxy, self.norm_visual, self.norm_injected = norm(), norm(), norm()
        self.proxy_attn1 = Attention(hidden_size, num_heads)
        self.pvisual_attn2 = CrossAttention(hidden_size, num_heads)
        self.linear_1_visual = nn.Linear(hidden_size, hidden_size)
        self.norm1 = norm()
        self.attn1 = Attention(hidden_size, num_heads)
        if shift_window:
            self.proxy_scale_shift_table = nn.Parameter(torch.randn(3, hidden_size) / hidden_size**0.5)
            self.norm_shift = norm()
            self.attn3 = Attention(hidden_size, num_heads)
            self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.attn2 = CrossAttention(hidden_size, num_heads)
        self.norm2 = norm()
        self.ff = FeedForward(hidden_size, activation_fn="gelu-approximate")

    def extract_proxies(
        self, hidden_states: torch.Tensor, window: tuple[int, int, int], proxy_window: tuple[int, int, int]
    ) -> torch.Tensor:
        """Window-major tokens `(batch, n, dim)` to proxies `(batch, n / p * proxies per window, dim)`.

        With `proxy_window` smaller than `window` a window has several proxies: in the interleaved layout proxy (a, b)
        takes the tokens whose coordinates leave remainders a and b (what the released code does), in the contiguous
        layout the sub-block (a, b). All frames of a window always share a proxy.
        """
        batch, _, dim = hidden_states.shape
        (pf, ph, pw), (_, qh, qw) = window, proxy_window
        rows, columns = ph // qh, pw // qw
        if self.contiguous:
            cut = hidden_states.reshape(-1, pf, rows, qh, columns, qw, dim).permute(0, 2, 4, 1, 3, 5, 6)
        else:
            cut = hidden_states.reshape(-1, pf, qh, rows, qw, columns, dim).permute(0, 3, 5, 1, 2, 4, 6)
        members = cut.reshape(batch, -1, pf * qh * qw, dim)
        center = ((pf // 2) * qh + qh // 2) * qw + qw // 2
        return self.pick_member(members, center)

    def pick_member(self, members: torch.Tensor, center: int) -> torch.Tensor:
        """One token per group: `(batch, groups, size, dim)` to `(batch, groups, dim)`, by the block's proxy mode."""
        batch, groups, size, dim = members.shape
        if self.proxy_mode == "mean":
            return members.mean(dim=2)
        if self.proxy_mode == "first":
            return members[:, :, 0]
        if self.proxy_mode == "center":
            return members[:, :, center]
        if self.training:
            chosen = torch.randint(size, (batch, groups), device=members.device)
        else:
            chosen = self.scattered_positions(groups, size, members.device).expand(batch, -1)
        return members.gather(2, chosen[:, :, None, None].expand(-1, -1, 1, dim)).squeeze(2)

    def scattered_positions(self, groups: int, size: int, device: torch.device) -> torch.Tensor:
        """Positions that look random but depend only on the group's number in its sample and the block's: an integer
        hash, so that a sample does not depend on its row, its batch or a generator's history."""
        value = torch.arange(groups, device=device, dtype=torch.long) + 7919 * (self.index + 1)
        for factor in (0x45D9F3B, 0x119DE1F3):
            value = ((value ^ (value >> 16)) * factor) & 0xFFFFFFFF
        return (value ^ (value >> 16)) % size

    def interact_globally(self, hidden_states: torch.Tensor, proxies: torch.Tensor) -> torch.Tensor:
        """Eq. 1: self-attention of the proxies, then every token reads from them."""
        proxies = proxies + self.proxy_attn1(self.norm_proxy(proxies))
        injected = self.pvisual_attn2(self.norm_visual(hidden_states), self.norm_injected(proxies))
        return hidden_states + self.linear_1_visual(injected)

    def attend_shifted(
        self, hidden_states: torch.Tensor, modulation: torch.Tensor, layout: WindowLayout
    ) -> torch.Tensor:
        """Eq. 2, second half: roll the grid by half a window, attend inside windows, roll back, gate, project."""
        batch, length, dim = hidden_states.shape
        normed = self.norm_shift(Reorder.apply(hidden_states, layout.order, layout.inverse))
        offset, scale, gate = (self.proxy_scale_shift_table + modulation[:, :3]).unbind(1)
        windows = modulate(normed, offset, scale).reshape(-1, layout.window_tokens, dim)
        masks = layout.mask[None].expand(batch, -1, -1, -1, -1).flatten(0, 1)
        out = self.attn3(windows, attention_mask=masks).reshape(batch, length, dim)
        return self.linear_2(gate[:, None] * Reorder.apply(out, layout.inverse, layout.order))

    def attend(self, hidden_states: torch.Tensor, modulation: torch.Tensor, layout: WindowLayout) -> torch.Tensor:
        """What stands for self-attention: eq. 1, then eq. 2."""
        shift, scale, gate = (self.scale_shift_table + modulation)[:, :3].unbind(1)
        proxies = self.extract_proxies(hidden_states, layout.window, layout.proxy_window)
        hidden_states = self.interact_globally(hidden_states, proxies)
        windows = modulate(self.norm1(hidden_states), shift, scale).unflatten(1, (-1, layout.window_tokens))
        attended = self.attn1(windows.flatten(0, 1)).reshape(hidden_states.shape)
        hidden_states = torch.addcmul(hidden_states, gate[:, None], attended)
        if self.shift_window:
            hidden_states = hidden_states + self.attend_shifted(hidden_states, modulation, layout)
        return hidden_states

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        layout: WindowLayout,
    ) -> torch.Tensor:
        """Args: window-major tokens `(batch, n, dim)`, modulation `(batch or 1, 6, dim)`, text `(batch, l, dim)` with
        its boolean mask `(batch, 1, 1, l)`. Returns tokens of the same shape."""
        hidden_states = self.attend(hidden_states, modulation, layout)
        hidden_states = hidden_states + self.attn2(hidden_states, encoder_hidden_states, encoder_attention_mask)
        shift, scale, gate = (self.scale_shift_table + modulation)[:, 3:].unbind(1)
        fed = self.ff(modulate(self.norm2(hidden_states), shift, scale))
        return torch.addcmul(hidden_states, gate[:, None], fed)


# diffusers' own block caches (FirstBlockCache and others) look a block up here.
TransformerBlockRegistry.register(
    PTDiTTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)


class PTDiTTransformer3DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    """PT-DiT for images and videos, conditioned on text.

    Args:
        num_attention_heads, attention_head_dim: their product is the width, a multiple of 16.
        in_channels, out_channels: channels of the input and of the prediction. Released weights have twice as many
            output channels as input channels; the first half is the prediction.
        num_layers: depth.
        caption_channels: width of the text features.
        sample_size: side of the latent the model was trained at; it sets the scale of the position table.
        patch_size: spatial patch; frames are not grouped.
        compress_ratios: tokens per window along (frames, height, width); None picks 8 x 8 windows for any size.
        proxy_compress_ratios: tokens per proxy, for every window ratio; None means one proxy per window.
        proxy_mode: "mean" (the paper's and the released model's), "first" (top-left token), "center" or "random"
            (a fresh token per forward in training, a fixed pseudo-random one in evaluation).
        proxy_layout: with several proxies per window, "interleaved" (released code) or "contiguous".
        shift_window: with or without the shifted-window branch; or one flag per block.
        shift_single_window: True rolls and masks an axis even when one window covers it (released code); False leaves
            such an axis alone, as Swin does.
        use_additional_conditions: PixArt's resolution and aspect-ratio embeddings (released 1024 px model).
        time_share: share of the position features that encode the frame. 0.25 is the released code's; a network for
            pictures only may use 0, which is PixArt's table.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PTDiTTransformerBlock"]
    _repeated_blocks = ["PTDiTTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "adaln_single"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        caption_channels: int = 4096,
        sample_size: int = 32,
        patch_size: int = 2,
        compress_ratios: tuple[int, int, int] | None = None,
        proxy_compress_ratios: tuple[int, int, int] | None = None,
        proxy_mode: str = "mean",
        proxy_layout: str = "interleaved",
        shift_window: bool | Sequence[bool] = True,
        shift_single_window: bool = True,
        use_additional_conditions: bool = False,
        time_share: float = 0.25,
    ):
        super().__init__()
        if proxy_mode not in PROXY_MODES:
            raise ValueError(f"proxy_mode must be one of {', '.join(PROXY_MODES)}, got {proxy_mode!r}")
        if proxy_layout not in PROXY_LAYOUTS:
            raise ValueError(f"proxy_layout must be one of {', '.join(PROXY_LAYOUTS)}, got {proxy_layout!r}")
        hidden_size = num_attention_heads * attention_head_dim
        if hidden_size % 16:
            raise ValueError(f"the width must be a multiple of 16, got {hidden_size}")
        if time_share not in (0.0, 0.25):
            raise ValueError(f"time_share must be 0 or 0.25, got {time_share}")
        shifted = [shift_window] * num_layers if isinstance(shift_window, bool) else list(shift_window)
        if len(shifted) != num_layers:
            raise ValueError(f"shift_window needs one flag per block, {num_layers}, got {len(shifted)}")
        self.patch_embed = PatchEmbed(in_channels, hidden_size, patch_size)
        self.adaln_single = AdaLayerNormSingle(hidden_size, use_additional_conditions=use_additional_conditions)
        self.caption_projection = PixArtAlphaTextProjection(in_features=caption_channels, hidden_size=hidden_size)
        self.transformer_blocks = nn.ModuleList(
            PTDiTTransformerBlock(
                hidden_size, num_attention_heads, index, shifts, proxy_mode, proxy_layout == "contiguous"
            )
            for index, shifts in enumerate(shifted)
        )
        self.norm_out = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.gradient_checkpointing = False
        self._tables: tuple[tuple, tuple[WindowLayout, torch.Tensor]] | None = None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier-uniform linears; zeros where a branch joins the residual stream from a new path (the proxy injection
        and the shifted window, as published; text and the output layer, as in PixArt-alpha)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        small = [self.adaln_single.linear, self.caption_projection.linear_1, self.caption_projection.linear_2]
        small += [module for module in self.adaln_single.emb.modules() if isinstance(module, nn.Linear)]
        for linear in small:
            nn.init.normal_(linear.weight, std=0.02)
        zeroed = [self.proj_out]
        for block in self.transformer_blocks:
            zeroed += [block.linear_1_visual, block.attn2.to_out[0]]
            zeroed += [block.linear_2] if block.shift_window else []
        if self.config.use_additional_conditions:
            zeroed += [self.adaln_single.emb.resolution_embedder.linear_2]
            zeroed += [self.adaln_single.emb.aspect_ratio_embedder.linear_2]
        for linear in zeroed:
            nn.init.zeros_(linear.weight)

    def position_table(self, grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
        """Fixed sin-cos positions `(f*h*w, dim)`: a share of the width for time, the rest for (column, row)."""
        frames, height, width = grid
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        scale = max(self.config.sample_size // 64, 1)
        time_dim = int(dim * self.config.time_share)
        time = sincos_1d(torch.arange(frames, device=device), time_dim)
        row = sincos_1d(torch.arange(height, device=device) / scale, (dim - time_dim) // 2)
        column = sincos_1d(torch.arange(width, device=device) / scale, (dim - time_dim) // 2)
        parts = (time[:, None, None], column[None, None], row[None, :, None])
        return torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).reshape(-1, dim)

    def grid_tables(
        self, grid: tuple[int, int, int], windows: tuple[tuple[int, int, int], ...], device: torch.device
    ) -> tuple[WindowLayout, torch.Tensor]:
        """Layout and positions of a grid with what `resolve_windows` gave. Inference keeps those of the last grid: the
        passes of a sampling run share them."""
        key = (grid, windows, device)
        keep = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if keep and self._tables is not None and self._tables[0] == key:
            return self._tables[1]
        tables = window_layout(grid, *windows, device), self.position_table(grid, device)
        if keep:
            self._tables = (key, tables)
        return tables

    def resolve_windows(
        self, grid: tuple[int, int, int], compress_ratios: tuple[int, int, int] | None
    ) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]:
        """(window, proxy window, shift) for a token grid; raises `ValueError` where they do not fit."""
        ratios = self.config.compress_ratios if compress_ratios is None else compress_ratios
        window = tuple(ratios) if ratios is not None else pick_compress_ratios(grid)
        check_ratios(grid, window)
        finer = self.config.proxy_compress_ratios
        proxy_window = (window[0], *finer[1:]) if finer else window
        if any(size % ratio for size, ratio in zip(window, proxy_window, strict=True)):
            raise ValueError(f"windows of {window} tokens are not made of proxies of {proxy_window} tokens")
        shift = tuple(ratio // 2 for ratio in window)
        if not self.config.shift_single_window:
            shift = tuple(0 if size == p else s for size, p, s in zip(grid, window, shift, strict=True))
        return window, proxy_window, shift

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        compress_ratios: tuple[int, int, int] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts for a batch of latents.

        Args:
            hidden_states: `(batch, channels, height, width)` for images or `(batch, channels, frames, height, width)`.
            encoder_hidden_states: text features `(batch, length, caption_channels)`.
            timestep: `(batch,)` or one value, in [0, 1000]; samples of a batch may differ.
            added_cond_kwargs: "resolution" and "aspect_ratio" where the model has additional conditions.
            encoder_attention_mask: `(batch, length)`, 1 or True = keep. A row without any token reads all of them, as
                the released code's additive mask does.
            compress_ratios: tokens per window for this call; default the configured ones or 8 x 8 windows.
            return_dict: an output object or a tuple.

        Returns:
            The prediction, shaped as the input with `out_channels` channels.

        Raises:
            ValueError: a size is not a multiple of the patch or of the window ratios.
        """
        is_image = hidden_states.ndim == 4
        video = hidden_states[:, :, None] if is_image else hidden_states
        batch, _, frames, height, width = video.shape
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"height and width must be multiples of the patch size {patch}, got {height} x {width}")
        grid = (frames, height // patch, width // patch)
        windows = self.resolve_windows(grid, compress_ratios)
        window = windows[0]
        layout, positions = self.grid_tables(grid, windows, video.device)

        tokens = self.patch_embed(video.transpose(1, 2).flatten(0, 1)).reshape(batch, frames * grid[1] * grid[2], -1)
        tokens = (tokens.float() + positions).to(tokens.dtype)
        tokens = to_windows(tokens, grid, window)
        times = timestep.reshape(-1)
        if self.config.use_additional_conditions:
            times = times.expand(batch)
        elif times.stride() == (0,):  # one level, expanded: the batch shares one modulation
            times = times[:1]
        modulation, embedded = self.adaln_single(
            times, added_cond_kwargs, batch_size=len(times), hidden_dtype=tokens.dtype
        )
        modulation = modulation.reshape(len(times), 6, -1)
        text = self.caption_projection(encoder_hidden_states)
        text_mask = None
        if encoder_attention_mask is not None:
            keep = encoder_attention_mask.bool()
            text_mask = (keep | ~keep.any(dim=1, keepdim=True))[:, None, None]

        lean = can_run_lean(self.transformer_blocks, tokens)
        for block in self.transformer_blocks:
            arguments = (tokens, modulation, text, text_mask, layout)
            if lean:
                tokens = lean_block(block, *arguments)
            elif torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, *arguments)
            else:
                tokens = block(*arguments)

        shift_out, scale_out = (self.scale_shift_table + embedded[:, None]).unbind(1)
        tokens = self.proj_out(modulate(self.norm_out(tokens), shift_out, scale_out))
        tokens = from_windows(tokens, grid, window).reshape(batch * frames, grid[1] * grid[2], -1)
        sample = unpatchify(tokens, grid[1], grid[2], patch)
        sample = sample.reshape(batch, frames, -1, height, width).transpose(1, 2)
        sample = sample[:, :, 0] if is_image else sample
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

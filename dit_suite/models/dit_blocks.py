"""Pieces that the class-conditional DiT family shares: patches, windows, embedders, the adaLN-Zero block.

Conventions of the official DiT, which differ from the ones of diffusers' own DiT class: the timestep frequencies are
`10000^(-i / half)` with `half` (not `half - 1`) in the denominator, LayerNorm has eps 1e-6, and the last label of the
table is the null class.
"""

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

TIME_FEATURES = 256
NORM_EPS = 1e-6


def sincos_1d(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """`[sin | cos]` features `(n, dim)` of positions `(n,)` with frequencies `10000^(-i / (dim/2))`, float32."""
    exponent = torch.arange(dim // 2, device=positions.device, dtype=torch.float32) / (dim / 2)
    angles = positions.float()[:, None] * torch.pow(10000.0, -exponent)[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(height: int, width: int, dim: int, device: torch.device | None = None) -> torch.Tensor:
    """Position table `(height * width, dim)`, row-major: the first half encodes the column, the second the row.

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width that is a multiple of 4, got {dim}")
    column = sincos_1d(torch.arange(width, device=device), dim // 2)[None].expand(height, width, -1)
    row = sincos_1d(torch.arange(height, device=device), dim // 2)[:, None].expand(height, width, -1)
    return torch.cat([column, row], dim=-1).reshape(height * width, dim)


def to_windows(tokens: torch.Tensor, grid: tuple[int, int, int], window: tuple[int, int, int]) -> torch.Tensor:
    """Row-major tokens `(batch, f*h*w, dim)` to window-major `(batch, f*h*w, dim)`.

    Windows are ordered (frame, row, column) row-major and so are the tokens inside a window. The exact inverse is
    `from_windows` with the same arguments.
    """
    if window == grid:
        return tokens
    (f, h, w), (pf, ph, pw) = grid, window
    batch, _, dim = tokens.shape
    x = tokens.reshape(batch, f // pf, pf, h // ph, ph, w // pw, pw, dim)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, f * h * w, dim)


def from_windows(tokens: torch.Tensor, grid: tuple[int, int, int], window: tuple[int, int, int]) -> torch.Tensor:
    """Window-major tokens `(batch, f*h*w, dim)` back to row-major order."""
    if window == grid:
        return tokens
    (f, h, w), (pf, ph, pw) = grid, window
    batch, _, dim = tokens.shape
    x = tokens.reshape(batch, f // pf, h // ph, w // pw, pf, ph, pw, dim)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, f * h * w, dim)


def unpatchify(tokens: torch.Tensor, height: int, width: int, patch_size: int) -> torch.Tensor:
    """Row-major tokens `(batch, height*width, p*p*channels)` to `(batch, channels, height*p, width*p)`.

    Inside a token the order is (row in patch, column in patch, channel), the channel fastest.
    """
    batch, p = tokens.shape[0], patch_size
    x = tokens.reshape(batch, height, width, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, -1, height * p, width * p)


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, run as one matrix product on cut patches: a fraction of the time where
    pictures are small. The result is in channels-last memory."""

    def __init__(self, in_channels: int, out_channels: int, patch_size: int):
        super().__init__(in_channels, out_channels, patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        p = self.kernel_size[0]
        cut = images.unflatten(-1, (-1, p)).unflatten(-3, (-1, p)).permute(0, 2, 4, 1, 3, 5)
        return nn.functional.linear(cut.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: `(batch, channels, H, W)` to row-major `(batch, n, dim)`."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchConv2d(in_channels, hidden_size, patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps `(batch,)` (int or float, any scale) to `(batch, dim)`: 256 features `[cos | sin]`, then an MLP."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(TIME_FEATURES, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        features = get_timestep_embedding(timestep, TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.linear_2(nn.functional.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))


class AttentionProcessor:
    """Projections, then diffusers' attention dispatcher, so that `set_attention_backend` works."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "Attention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        query, key, value = (x.unflatten(-1, (attn.heads, attn.head_dim)) for x in (query, key, value))
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](out.flatten(2))


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with separate projections. The computation lives in the processor, which plug-ins swap."""

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]
    is_cross_attention = False
    use_bias = True

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        self.heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])
        self.set_processor(AttentionProcessor())

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends from `hidden_states (batch, n, dim)` to `encoder_hidden_states (batch, m, dim)` or to itself.

        `attention_mask` is boolean (True = keep) and broadcasts to `(batch, heads, n, m)`.
        """
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)


class CrossAttention(Attention):
    """Attention whose keys and values come from another sequence; its projections are never fused."""

    is_cross_attention = True
    _supports_qkv_fusion = False


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x * (1 + scale) + shift` with `x (batch, n, dim)` and shift, scale `(batch, dim)`."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class AdaLNZeroBlock(nn.Module):
    """The DiT block (adaLN-Zero): the conditioning shifts, scales and gates both branches.

    `span` cuts the sequence into groups of that many consecutive tokens which attend only to each other (LEGO's
    bricks); the other layers act per token, so one modulation per sample serves all groups.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        inner = int(hidden_size * mlp_ratio)
        self.ff = FeedForward(hidden_size, activation_fn="gelu-approximate", inner_dim=inner)
        self.adaln = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, span: int | None = None) -> torch.Tensor:
        """Args: `hidden_states (batch, n, dim)`, `conditioning (batch, dim)` before its SiLU."""
        modulation = self.adaln(nn.functional.silu(conditioning)).chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation
        batch, length, dim = hidden_states.shape
        normed = modulate(self.norm1(hidden_states), shift_attn, scale_attn)
        attended = self.attn(normed.reshape(-1, span or length, dim)).reshape(batch, length, dim)
        hidden_states = torch.addcmul(hidden_states, gate_attn[:, None], attended)
        normed = modulate(self.norm2(hidden_states), shift_ff, scale_ff)
        return torch.addcmul(hidden_states, gate_ff[:, None], self.ff(normed))


# diffusers' own block caches (FirstBlockCache and others) look a block up here.
TransformerBlockRegistry.register(
    AdaLNZeroBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
)


class AdaLNFinalLayer(nn.Module):
    """LayerNorm, shift and scale from the conditioning, projection to `out_features` per token."""

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.adaln = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, out_features)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaln(nn.functional.silu(conditioning)).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(hidden_states), shift, scale))


@torch.no_grad()
def init_dit_weights(model: nn.Module) -> None:
    """Initialisation of the official DiT: xavier-uniform linears and patch convolutions, small embedders, and zeros
    in every adaLN projection and in the last layer, so that a fresh network outputs exactly zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, TimestepEmbedder):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
        elif isinstance(module, AdaLNZeroBlock):
            nn.init.zeros_(module.adaln.weight)
        elif isinstance(module, AdaLNFinalLayer):
            nn.init.zeros_(module.adaln.weight)
            nn.init.zeros_(module.linear.weight)

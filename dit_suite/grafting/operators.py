"""The operators that grafting puts in the place of attention or of an MLP.

Source: "Exploring Diffusion Transformer Designs via Grafting" (arXiv 2506.05340). Every operator maps (batch, tokens,
width) to the same shape and takes no condition. Tokens come in raster order; the published operators are
one-dimensional over that order. Parameter names are those of the published checkpoints. Kinds ending in "_2d" are
additions of this project that see the picture's grid.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dit_suite.models.operator import Operator

CONV_TAPS = 4


def causal_conv(x: torch.Tensor, conv: nn.Conv1d) -> torch.Tensor:
    """Depthwise convolution over the last axis of `x` (batch, channels, length), zeros on the left, same length."""
    taps = conv.kernel_size[0]
    return F.conv1d(x, conv.weight, conv.bias, padding=taps - 1, groups=conv.groups)[..., : x.shape[-1]]


def depthwise(channels: int) -> nn.Conv1d:
    """The four-tap depthwise filter of the Hyena family."""
    return nn.Conv1d(channels, channels, CONV_TAPS, groups=channels)


def _identity_filter(conv: nn.Conv1d) -> nn.Conv1d:
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[..., -1] = 1.0
        conv.bias.zero_()
    return conv


class MultiHeadAttention(Operator):
    """Full attention (the self-graft control), with fused projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def window_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Token i attends to tokens i - window .. i + window: (batch, heads, tokens, head_dim), cost linear in tokens."""
    tokens = q.shape[-2]
    if window >= tokens - 1:
        return F.scaled_dot_product_attention(q, k, v)
    padded_k, padded_v = (F.pad(t, (0, 0, window, window)) for t in (k, v))
    index = torch.arange(tokens, device=q.device)[:, None] + torch.arange(2 * window + 1, device=q.device)
    real = (index >= window) & (index < tokens + window)
    scores = torch.einsum("bhnd,bhnwd->bhnw", q, padded_k[:, :, index]) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~real, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhnw,bhnwd->bhnd", weights, padded_v[:, :, index])


class SlidingWindowAttention(Operator):
    """Attention within `window` tokens to either side in raster order."""

    def __init__(self, dim: int, heads: int, window: int = 4) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.Wqkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return self.Wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self._heads(x)
        return self.out_proj(window_attention(q, k, v, self.window).transpose(1, 2).flatten(2))


class SlidingWindowAttention2D(SlidingWindowAttention):
    """Ours: attention to the tokens within `window` rows and columns of the (square) grid."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self._heads(x)
        side = grid_side(x.shape[1])
        place = torch.arange(side, device=x.device)
        near = (place[:, None] - place[None]).abs() <= self.window
        mask = (near[:, None, :, None] & near[None, :, None, :]).reshape(side * side, side * side)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def grid_side(tokens: int) -> int:
    """Side of the square grid; `ValueError` where the tokens form none."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"a 2-D operator needs a square grid of tokens, got {tokens}")
    return side


class PooledAttention2D(Operator):
    """Ours: every token attends to the grid at half its resolution (keys and values of learned 2 x 2 averages).

    A quarter of the keys: the attention itself costs a quarter, the key and value projections too, and every token
    still sees the whole picture. Starts as the plain mean of each square.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.Wq = nn.Linear(dim, dim)
        self.Wkv = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.squares = nn.Parameter(torch.full((4, dim), 0.25))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        side = grid_side(x.shape[1])
        if side % 2:
            raise ValueError(f"pooling needs a grid of even side, got {side} x {side} tokens")
        grid = x.unflatten(1, (side // 2, 2, side // 2, 2))
        corners = (grid[:, :, i, :, j] for i in (0, 1) for j in (0, 1))
        pooled = sum(corner * weight for corner, weight in zip(corners, self.squares, strict=True)).flatten(1, 2)
        q = self.Wq(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.Wkv(pooled).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Hyena(Operator):
    """Hyena-SE, -X and -Y: cubic gating around short causal filters (y = q * filter(k * v)).

    SE filters the projections and the product, X only the projections, Y only the product.
    """

    def __init__(self, dim: int, short: bool, inner: bool) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        if short:
            self.short_filter = self._filter(3 * dim)
        if inner:
            self.inner_filter = self._identity(dim)
        self.short, self.inner = short, inner

    def _filter(self, channels: int) -> nn.Module:
        return depthwise(channels)

    def _identity(self, channels: int) -> nn.Module:
        return _identity_filter(depthwise(channels))

    def _convolve(self, x: torch.Tensor, conv: Any) -> torch.Tensor:
        return causal_conv(x, conv)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        z = self.in_proj(x).transpose(1, 2)
        if self.short:
            z = self._convolve(z, self.short_filter)
        q, k, v = z.chunk(3, dim=1)
        v = k * v
        if self.inner:
            v = self._convolve(v, self.inner_filter)
        return self.out_proj((q * v).transpose(1, 2))


class Hyena2D(Hyena):
    """Ours: the filters are 3 x 3 on the grid and look to all sides."""

    def _filter(self, channels: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def _identity(self, channels: int) -> nn.Module:
        conv = self._filter(channels)
        with torch.no_grad():
            conv.weight.zero_()
            conv.weight[..., 1, 1] = 1.0
            conv.bias.zero_()
        return conv

    def _convolve(self, x: torch.Tensor, conv: Any) -> torch.Tensor:
        side = grid_side(x.shape[-1])
        return conv(x.unflatten(-1, (side, side))).flatten(2)


def decayed_scan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, chunk: int = 32
) -> torch.Tensor:
    """y_t = q_t h_t with h_t = exp(log_decay_t) h_{t-1} + k_t v_t^T, chunk by chunk (all exponents stay below zero).

    Args:
        q, k: (batch, heads, tokens, key width); v: (batch, heads, tokens, value width).
        log_decay: (batch, heads, tokens, key width or 1), at most 0.
    """
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    pieces = []
    for qc, kc, vc, dc in zip(*(t.split(chunk, dim=2) for t in (q, k, v, log_decay)), strict=True):
        total = dc.cumsum(dim=2)
        length = qc.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        between = (total[:, :, :, None] - total[:, :, None]).masked_fill(~causal[:, :, None], -torch.inf).exp()
        if between.shape[-1] == 1:
            scores = (qc @ kc.transpose(-1, -2)) * between[..., 0]
        else:
            scores = torch.einsum("bhid,bhjd,bhijd->bhij", qc, kc, between)
        pieces.append(scores @ vc + (qc * total.exp()) @ state)
        last = total[:, :, -1:]
        state = last.exp().transpose(-1, -2) * state + (kc * (last - total).exp()).transpose(-1, -2) @ vc
    return torch.cat(pieces, dim=2)


class GatedRMSNorm(nn.Module):
    """RMS norm of x * SiLU(z)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x * F.silu(z), (x.shape[-1],), self.weight, self.eps)


class Mamba2(Operator):
    """Mamba-2, one direction, one group: the paper's "linear attention"."""

    def __init__(self, dim: int, d_state: int = 64, head_dim: int = 16, expand: int = 2) -> None:
        super().__init__()
        inner = expand * dim
        if inner % head_dim:
            raise ValueError(f"the inner width {inner} is not a multiple of the head width {head_dim}")
        self.inner, self.d_state, self.head_dim = inner, d_state, head_dim
        heads = inner // head_dim
        self.in_proj = nn.Linear(dim, 2 * inner + 2 * d_state + heads, bias=False)
        self.conv1d = depthwise(inner + 2 * d_state)
        step = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp_min(1e-4)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1.0, 16.0).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        z, mixed, dt = self.in_proj(x).split([self.inner, self.inner + 2 * self.d_state, len(self.D)], dim=-1)
        mixed = F.silu(causal_conv(mixed.transpose(1, 2), self.conv1d)).transpose(1, 2)
        values, b, c = mixed.split([self.inner, self.d_state, self.d_state], dim=-1)
        values = values.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        dt = F.softplus(dt + self.dt_bias).transpose(1, 2)[..., None]
        decay = -self.A_log.exp()[:, None, None] * dt
        heads = len(self.D)
        keys, queries = (t[:, None].expand(-1, heads, -1, -1) for t in (b, c))
        y = decayed_scan(queries, keys, dt * values, decay) + self.D[:, None, None] * values
        return self.out_proj(self.norm(y.transpose(1, 2).flatten(2), z))


class GatedLinearAttention(Operator):
    """Gated linear attention (Yang et al., arXiv 2312.06635), one direction: the state decays per key channel."""

    def __init__(self, dim: int, heads: int, rank: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.qkvg = nn.Linear(dim, 4 * dim)
        self.decay = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim))
        self.norm = nn.RMSNorm(dim // heads, eps=1e-5)
        self.out_proj = nn.Linear(dim, dim)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, gate = self.qkvg(x).unflatten(-1, (4, self.heads, -1)).permute(2, 0, 3, 1, 4)
        decay = F.logsigmoid(self.decay(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2) / 16.0
        y = decayed_scan(q / math.sqrt(q.shape[-1]), k, v, decay, chunk=16)
        return self.out_proj((self.norm(y) * F.silu(gate)).transpose(1, 2).flatten(2))


class Mlp(Operator):
    """Linear, GELU (tanh), Linear with a hidden width of `ratio` times the width."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(ratio * dim))
        self.fc2 = nn.Linear(int(ratio * dim), dim)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class MlpHyenaX(Operator):
    """Hyena-X as an MLP: the filter slides along the features, and every token position has its own."""

    def __init__(self, dim: int, num_tokens: int, ratio: float = 2.0) -> None:
        super().__init__()
        hidden = int(ratio * dim)
        self.in_proj = nn.Linear(dim, 3 * hidden)
        self.short_filter = depthwise(num_tokens)
        self.out_proj = nn.Linear(hidden, dim)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.short_filter.in_channels
        if x.shape[1] != tokens:
            raise ValueError(f"this MLP Hyena-X was made for {tokens} tokens and got {x.shape[1]}")
        q, k, v = causal_conv(self.in_proj(x), self.short_filter).chunk(3, dim=-1)
        return self.out_proj(q * (k * v))

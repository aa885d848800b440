"""Shifted windows over a token grid (Swin), as PT-DiT uses them: order of tokens, way back, attention mask."""

from dataclasses import dataclass

import torch

from dit_suite.models.dit_blocks import to_windows


def shift_region_mask(
    grid: tuple[int, int, int], window: tuple[int, int, int], shift: tuple[int, int, int], device: torch.device
) -> torch.Tensor:
    """Which tokens of a shifted window may attend to each other: `(windows, 1, p, p)`, True = same region.

    Rolling the grid wraps its border round; as in Swin each shifted axis of length n falls in the regions `[0, n - p)`,
    `[n - p, n - s)` and `[n - s, n)`, and attention stays inside a region. An axis with shift 0 is one region.
    """
    region = torch.zeros((1, 1, 1), dtype=torch.long, device=device)
    for axis, (size, ratio, offset) in enumerate(zip(grid, window, shift, strict=True)):
        position = torch.arange(size, device=device)
        split = (position >= size - ratio).long() + (position >= size - offset).long() if offset else 0 * position
        region = 3 * region + split.view([-1 if a == axis else 1 for a in range(3)])
    tokens = region.expand(grid).reshape(1, -1, 1)
    regions = to_windows(tokens, grid, window).reshape(-1, window[0] * window[1] * window[2])
    return (regions[:, :, None] == regions[:, None, :])[:, None]


class Reorder(torch.autograd.Function):
    """Tokens in another order. The gradient is the inverse gather, not a scatter with additions."""

    @staticmethod
    def forward(tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return tokens.index_select(1, order)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, _, inverse = inputs
        ctx.save_for_backward(inverse)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(1, inverse), None, None


@dataclass(frozen=True)
class WindowLayout:
    """Where tokens are and which attend to each other: made once per forward, shared by the blocks.

    Attributes:
        window: tokens of a window along (frames, height, width).
        proxy_window: tokens of a proxy.
        order: for window-major tokens, the order that puts them into windows shifted by half a window, `(n,)`.
        inverse: the way back.
        mask: attention inside shifted windows, `(windows, 1, p, p)`.
    """

    window: tuple[int, int, int]
    proxy_window: tuple[int, int, int]
    order: torch.Tensor
    inverse: torch.Tensor
    mask: torch.Tensor

    @property
    def window_tokens(self) -> int:
        return self.window[0] * self.window[1] * self.window[2]


def window_layout(
    grid: tuple[int, int, int],
    window: tuple[int, int, int],
    proxy_window: tuple[int, int, int],
    shift: tuple[int, int, int],
    device: torch.device,
) -> WindowLayout:
    """The layout of a token grid."""
    places = torch.arange(grid[0] * grid[1] * grid[2], device=device).reshape(*grid)
    rolled = torch.roll(places, tuple(-s for s in shift), dims=(0, 1, 2))
    plain, shifted = (to_windows(p.reshape(1, -1, 1), grid, window).flatten() for p in (places, rolled))
    order = plain.argsort()[shifted]
    return WindowLayout(window, proxy_window, order, order.argsort(), shift_region_mask(grid, window, shift, device))

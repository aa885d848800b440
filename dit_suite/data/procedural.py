"""Data sets made of arithmetic: coloured shapes with labels and captions, and bouncing sprites. They need no files."""

import torch

SHAPES = ("circle", "square", "triangle", "ring")
COLORS = ("red", "green", "blue", "yellow")
_RGB = ((0.85, 0.15, 0.15), (0.15, 0.65, 0.2), (0.15, 0.3, 0.85), (0.9, 0.8, 0.1))


def _coverage(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Soft masks (count, size, size) of shapes by index, for offsets x, y from their centres in pixels."""
    distance = torch.sqrt(x.square() + y.square())
    signed = torch.stack(
        [
            radius - distance,
            radius * 0.85 - torch.maximum(x.abs(), y.abs()),
            torch.minimum(0.8 * radius - y, (y + radius) - 2.0 * x.abs()),
            0.3 * radius - (distance - 0.75 * radius).abs(),
        ]
    )
    chosen = signed.gather(0, shape[None].expand(1, *signed.shape[1:]))[0]
    return (chosen + 0.5).clamp(0, 1)


def draw_shapes(
    shape: torch.Tensor, color: torch.Tensor, center: torch.Tensor, radius: torch.Tensor, size: int
) -> torch.Tensor:
    """Coloured shapes on white, uint8 (count, 3, size, size).

    Args:
        shape, color: int64 (count,), indices into `SHAPES` and `COLORS`.
        center: (count, 2), row and column in pixels.
        radius: (count,) in pixels.
        size: side in pixels.
    """
    grid = torch.arange(size, dtype=torch.float32)
    y = grid[None, :, None] - center[:, 0, None, None]
    x = grid[None, None, :] - center[:, 1, None, None]
    x, y = torch.broadcast_tensors(x, y)
    mask = _coverage(shape[:, None, None].expand_as(x), x, y, radius[:, None, None])[:, None]
    paint = torch.tensor(_RGB)[color][:, :, None, None]
    return ((mask * paint + (1.0 - mask)) * 255.0).round().to(torch.uint8)


def shapes_set(count: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pictures uint8 (count, 3, size, size), labels int64 (count,) = shape * 4 + color, and captions "red circle"."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % (len(SHAPES) * len(COLORS))
    shape, color = labels // len(COLORS), labels % len(COLORS)
    radius = size * (0.22 + 0.13 * torch.rand(count, generator=generator))
    center = size / 2 + size * 0.12 * (2 * torch.rand(count, 2, generator=generator) - 1)
    pictures = draw_shapes(shape, color, center, radius, size)
    captions = [f"{COLORS[c]} {SHAPES[s]}" for s, c in zip(shape.tolist(), color.tolist(), strict=True)]
    return pictures, labels, captions


def sprites_set(count: int, frames: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Clips of one shape that bounces off the walls: uint8 (count, frames, 3, size, size), labels and captions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % (len(SHAPES) * len(COLORS))
    shape, color = labels // len(COLORS), labels % len(COLORS)
    radius = torch.full((count,), size * 0.18)
    span = size - 2.0 * radius[0]
    start = span * torch.rand(count, 2, generator=generator)
    speed = size * 0.12 * (2 * torch.rand(count, 2, generator=generator) - 1)
    clips = []
    for frame in range(frames):
        folded = (start + speed * frame).remainder(2 * span)
        center = radius[0] + torch.where(folded > span, 2 * span - folded, folded)
        clips.append(draw_shapes(shape, color, center, radius, size))
    captions = [f"{COLORS[c]} {SHAPES[s]}" for s, c in zip(shape.tolist(), color.tolist(), strict=True)]
    return torch.stack(clips, dim=1), labels, captions

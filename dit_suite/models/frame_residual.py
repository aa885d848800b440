"""What is known of a frame before a network has said anything, and how the network's answer is read against it.

An option of ours for short trainings of Next-Frame Diffusion: the network starts at "repeat the last frame", its target
has unit size at every noise level, and with motion the last frame is first moved to where it should be.
"""

import torch
import torch.nn.functional as F


def velocity_from_residual(
    residual: torch.Tensor,
    sample: torch.Tensor,
    level: torch.Tensor,
    before: torch.Tensor,
    before_level: torch.Tensor,
    frame_std: float,
    change_std: float,
) -> torch.Tensor:
    """Velocity of a network that answers with what two noisy looks at a frame leave open, in units of what is left.

    A frame x0 is seen twice: in `sample = (1-s) x0 + s n`, and in the frame before it, which differs from x0 by a
    change of standard deviation tau and is itself noisy, at level s'. With a prior of standard deviation sigma they add
    up to a Gaussian of mean m and deviation d; the answer r means x0 = m + d r (Karras et al., "Elucidating the design
    space", section 5, with a second look). As a velocity `(sample - x0) / s` every term is finite for s = 0 .. 1:

        u = (1-s') / (tau^2 (1-s')^2 + s'^2),  w = (1-s') u + 1 / sigma^2,  e = (1-s)^2 + s^2 w
        v = ((s w - (1-s)) sample - s u before) / e - r / sqrt(e)

    Args:
        residual: r, like `sample`.
        sample: noisy frames `(batch, channels, frames, height, width)` at `level` s `(batch, frames)`.
        before: the frame before each, as noisy as it is seen, at `before_level` s' (1 where there is none).
        frame_std, change_std: sigma and tau.
    """
    s, t = (value.float()[:, None, :, None, None] for value in (level, before_level))
    look = (1 - t) / (change_std**2 * (1 - t).square() + t.square())
    weight = (1 - t) * look + frame_std**-2
    total = (1 - s).square() + s.square() * weight
    known = (s * weight - (1 - s)) * sample - s * look * before
    return known / total - residual / total.sqrt()


def shifted(
    frames: torch.Tensor, levels: torch.Tensor, first: torch.Tensor, first_level: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The frame before each of `frames`, `first` for the first one, and its level."""
    before = torch.cat([first[:, :, None], frames[:, :, :-1]], dim=2)
    return before, torch.cat([first_level[:, None], levels[:, :-1]], dim=1)


def warp(frames: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """Moves pixels: the result at (y, x) is `frames` at (y, x) + motion, between pixels by bilinear interpolation.

    Args:
        frames: `(batch, channels, frames, height, width)`; beyond the border its pixels go on.
        motion: `(batch, frames, 2, rows, columns)` in pixels, vertical then horizontal, on a coarser grid.
    """
    batch, channels, count, height, width = frames.shape
    motion = F.interpolate(motion.flatten(0, 1), size=(height, width), mode="bilinear", align_corners=False)
    rows = torch.arange(height, device=frames.device)[:, None]
    columns = torch.arange(width, device=frames.device)[None]
    y = (rows + motion[:, 0]).clamp(0, height - 1)
    x = (columns + motion[:, 1]).clamp(0, width - 1)
    top, left = y.detach().floor(), x.detach().floor()
    down, right = (y - top)[:, None], (x - left)[:, None]
    flat = frames.transpose(1, 2).flatten(0, 1).flatten(2)

    def pixels(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        place = row.clamp(max=height - 1).long() * width + column.clamp(max=width - 1).long()
        found = flat.gather(2, place.flatten(1)[:, None].expand(-1, channels, -1))
        return found.unflatten(2, (height, width))

    upper = pixels(top, left) * (1 - right) + pixels(top, left + 1) * right
    lower = pixels(top + 1, left) * (1 - right) + pixels(top + 1, left + 1) * right
    moved = upper * (1 - down) + lower * down
    return moved.unflatten(0, (batch, count)).transpose(1, 2)

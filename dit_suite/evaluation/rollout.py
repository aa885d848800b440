"""How far a world model's rollout is from the real game under the same actions, and whether it follows the actions.

Closeness is measured per rollout step against recorded frames. Action following is judged by a small inverse-dynamics
network that reads the action off two consecutive frames; it must reach 90 % on real held-out frames before it may judge
anything.

Some actions leave no trace in two frames: walking against a wall looks like standing, and a walker who lets go glides
on. In first-person play only the turn is always visible, so there the judge is asked for that (`turn_classes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_suite.evaluation.pairs import psnr, ssim
from dit_suite.options import Options, option
from dit_suite.schedulers.speculative import MODES

REQUIRED_ACCURACY = 0.9


@dataclass(frozen=True)
class RolloutOptions(Options):
    """What is rolled out and where it is looked at."""

    steps: tuple[int, ...] = option((1, 8, 32, 128), "rollout steps that are compared", minimum=1)
    context_frames: int = option(1, "real frames before the rollout", minimum=1, maximum=64)
    num_inference_steps: int | None = option(None, "denoising passes per frame (default: as trained)", minimum=1)
    speculation: str = option("off", "draft frames for the present action", choices=MODES)
    draft_length: int = option(3, "frames in a draft", minimum=1, maximum=16)
    batch_size: int = option(8, "clips at once", minimum=1)
    seed: int = option(0, "clip i draws its noise from seed + i", minimum=0)


def to_bytes(samples: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to uint8, rounding to nearest."""
    return ((samples + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def roll_out(pipe: Any, video: torch.Tensor, actions: torch.Tensor, options: RolloutOptions) -> torch.Tensor:
    """The model's frames after the context, `(clips, 3, frames, height, width)` in [-1, 1].

    Args:
        pipe: an `NFDPipeline`.
        video: real clips `(clips, 3, frames, height, width)` in [-1, 1].
        actions: `(clips, frames, num_actions)`; row t leads to frame t.

    Raises:
        ValueError: the clips are shorter than the last step asks for.
    """
    from dit_suite.schedulers.generators import sample_generators

    first, length = options.context_frames, options.context_frames + max(options.steps)
    if video.shape[2] < length:
        raise ValueError(f"step {max(options.steps)} needs clips of {length} frames, got {video.shape[2]}")
    pieces = []
    for start in range(0, len(video), options.batch_size):
        rows = slice(start, min(start + options.batch_size, len(video)))
        frames = pipe(
            actions[rows, first:length],
            image=video[rows, :, :first],
            num_inference_steps=options.num_inference_steps,
            speculation=options.speculation,
            draft_length=options.draft_length,
            generator=sample_generators(options.seed, range(rows.start, rows.stop)),
            output_type="pt",
        ).frames
        pieces.append(frames.transpose(1, 2)[:, :, first:] * 2.0 - 1.0)
    return torch.cat(pieces)


def closeness(predicted: torch.Tensor, real: torch.Tensor, steps: Sequence[int]) -> list[dict[str, float]]:
    """PSNR (dB), SSIM and L1 (grey levels of 255) per rollout step.

    SSIM and L1 are means over clips. PSNR is that of the mean squared error over all clips: a mean of decibels would be
    ruled by clips in which nothing moves.

    Args:
        predicted, real: `(clips, 3, frames, height, width)` in [-1, 1], both starting at step 1.
    """
    rows = []
    for step in steps:
        one, other = to_bytes(predicted[:, :, step - 1]), to_bytes(real[:, :, step - 1])
        rows.append(
            {
                "step": step,
                "psnr": float(psnr(one.flatten(0, 1)[None], other.flatten(0, 1)[None])),
                "ssim": float(ssim(one, other).mean()),
                "l1": float((one.double() - other.double()).abs().mean()),
            }
        )
    return rows


class JudgeError(ValueError):
    """The inverse-dynamics network is not good enough to judge."""


class InverseDynamics(nn.Module):
    """Reads the action off two consecutive frames: by convolutions, and by how well the frames match when shifted.

    Args:
        num_actions: classes that it tells apart.
        width: channels of the first layer.
        reach: horizontal shifts in pixels that are compared, in each of `bands` bands of rows; 0: none. A turn in
            first-person play moves the picture further than a small network of convolutions sees.
    """

    def __init__(self, num_actions: int, width: int = 32, reach: int = 0, bands: int = 6):
        super().__init__()
        self.reach, self.bands = reach, bands
        self.body = nn.Sequential(
            nn.Conv2d(9, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        features = 4 * width
        if reach:
            self.shifts = nn.Sequential(nn.Linear(bands * (2 * reach + 1), 4 * width), nn.ReLU())
            features += 4 * width
        self.head = nn.Linear(features, num_actions)

    def shift_errors(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Mean absolute difference of the overlap for every shift, relative to the mean over shifts:
        `(batch, bands * (2 reach + 1))`."""
        width, errors = before.shape[-1], []
        for shift in range(-self.reach, self.reach + 1):
            later = after[..., max(0, shift) : width + min(0, shift)]
            earlier = before[..., max(0, -shift) : width + min(0, -shift)]
            error = (later - earlier).abs().mean(dim=(1, 3))
            errors.append(nn.functional.adaptive_avg_pool1d(error, self.bands))
        volume = torch.stack(errors, dim=-1)
        return (volume / (volume.mean(-1, keepdim=True) + 1e-2)).flatten(1)

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Frames `(batch, 3, height, width)` in [-1, 1] to logits `(batch, num_actions)`."""
        maps = self.body(torch.cat([before, after, after - before], dim=1))
        features = [maps.mean((2, 3)), maps.amax((2, 3))]
        if self.reach:
            features.append(self.shifts(self.shift_errors(before, after)))
        return self.head(torch.cat(features, dim=1))


def transitions(video: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All consecutive frame pairs and the action index between them; pairs after a null action are left out."""
    before, after = video[:, :, :-1].transpose(1, 2).flatten(0, 1), video[:, :, 1:].transpose(1, 2).flatten(0, 1)
    vectors = actions[:, 1:].flatten(0, 1)
    known = vectors.sum(-1) > 0
    return before[known], after[known], vectors[known].argmax(-1)


def turn_classes(action_names: Sequence[str]) -> tuple[tuple[str, ...], torch.Tensor]:
    """What every action does to the direction of view: names (straight, left, right) and a class per action, int64.

    Raises:
        ValueError: no action turns.
    """
    names = ("straight", "left", "right")
    classes = [next((i for i in (1, 2) if names[i] in name.lower()), 0) for name in action_names]
    if not {1, 2} <= set(classes):
        raise ValueError(f"none of the actions {', '.join(action_names)} turns left or right")
    return names, torch.tensor(classes)


def visible(before: torch.Tensor, after: torch.Tensor, action: torch.Tensor, still_action: int) -> torch.Tensor:
    """Pairs whose action can be seen: something changed, or the action is the one that changes nothing.

    A step into a wall looks like standing still and says nothing about following.
    """
    changed = (before - after).abs().flatten(1).amax(1) > 1e-3
    return changed | (action == still_action)


def train_inverse_dynamics(
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    num_actions: int,
    steps: int = 400,
    batch_size: int = 128,
    seed: int = 0,
    width: int = 32,
    reach: int = 0,
) -> InverseDynamics:
    """Trains the judge on real frame pairs `(before, after, action)`."""
    before, after, action = pairs
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = InverseDynamics(num_actions, width, reach).to(before.device)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(action), (batch_size,), generator=generator).to(before.device)
        loss = nn.functional.cross_entropy(network(before[rows], after[rows]), action[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: InverseDynamics, pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    """Share of pairs whose action is recognised."""
    before, after, action = pairs
    hits = [network(b, a).argmax(-1) == y for b, a, y in zip(*(t.split(512) for t in pairs), strict=True)]
    return float(torch.cat(hits).float().mean()) if len(action) else 0.0


def action_following(
    network: InverseDynamics,
    held_out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    generated: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> dict[str, float]:
    """Share of generated transitions in which the judge sees the commanded action, with the judge's own accuracy.

    Raises:
        JudgeError: the judge does not reach 90 % on real held-out frames.
    """
    judge = accuracy(network, held_out)
    if judge < REQUIRED_ACCURACY:
        raise JudgeError(f"the inverse-dynamics network reaches {judge:.1%} on real held-out frames; it needs 90%")
    return {"judge_accuracy": judge, "action_following": accuracy(network, generated)}

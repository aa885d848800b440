"""The official DiT samplers' choice of timesteps, for any count.

diffusers reproduces it for the counts that divide 1000 (DDIM "leading") and for the usual DDPM counts ("linspace"). For
the others, a diffusers scheduler made with the respaced betas takes the same steps.
"""

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler


def space_timesteps(num_train_timesteps: int, spec: str) -> list[int]:
    """Which of the original timesteps a sampler visits, ascending.

    Args:
        num_train_timesteps: length of the training schedule.
        spec: "N" (N steps, first and last included), "a,b,c" (equal sections with that many steps each), or "ddimN"
            (every s-th step from 0, s the smallest stride that gives N of them).

    Raises:
        ValueError: no stride gives N steps, or a section is shorter than its count.
    """
    if spec.startswith("ddim"):
        count = int(spec[4:])
        for stride in range(1, num_train_timesteps + 1):
            if len(range(0, num_train_timesteps, stride)) == count:
                return list(range(0, num_train_timesteps, stride))
        raise ValueError(f"no stride over {num_train_timesteps} timesteps gives {count} steps")
    counts = [int(part) for part in spec.split(",")]
    size, longer = divmod(num_train_timesteps, len(counts))
    start, steps = 0, []
    for index, count in enumerate(counts):
        length = size + (index < longer)
        if not 1 <= count <= length:
            raise ValueError(f"a section of {length} timesteps can't give {count} steps")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += length
    return steps


def respaced_betas(alphas_cumprod: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
    """Betas `1 - abar_i / abar_{i-1}` of the shortened chain whose cumulative products are those at `timesteps`."""
    kept = alphas_cumprod[timesteps]
    previous = torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
    return 1.0 - kept / previous


def respaced_scheduler(kind: str, alphas_cumprod: torch.Tensor, timesteps: list[int]) -> Any:
    """A diffusers scheduler over the shortened chain: its timestep i stands for the original `timesteps[i]`.

    The products are set directly: made from float32 betas, a cosine schedule would lose its last steps, where
    abar is about 1e-9. They are not part of the scheduler's config, so such a scheduler is built anew, not saved.

    Args:
        kind: "ddpm" (learned variance range) or "ddim".
        alphas_cumprod: products of the full schedule, float64.
        timesteps: ascending, as from `space_timesteps`.
    """
    betas = respaced_betas(alphas_cumprod, timesteps)
    shared = {"num_train_timesteps": len(betas), "trained_betas": betas.tolist(), "clip_sample": False}
    if kind == "ddim":
        scheduler = DDIMScheduler(**shared, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0)
    else:
        scheduler = DDPMScheduler(**shared, variance_type="learned_range", timestep_spacing="leading")
    scheduler.alphas_cumprod = alphas_cumprod[timesteps].float()
    scheduler.set_timesteps(len(betas))
    return scheduler

"""The noise levels of the released PT-DiT text-to-image sampler: linear ones under a resolution-dependent warp.

With shift r = `resolution_warp(...)` it is diffusers' `FlowMatchEulerDiscreteScheduler(shift=r)` whose sigmas start at
1 and fall by 1/N before the warp `r u / (1 + (r - 1) u)`, which is what `flow_sigmas` gives for its `sigmas` argument.
"""

import math


def resolution_warp(height: int, width: int, num_frames: int = 1) -> float:
    """How far sampling leans to high noise: 1 for one 512 x 512 picture, 2 for 1024 x 1024 (sizes in pixels)."""
    latent_frames = 1 if num_frames == 1 else num_frames // 17 * 5
    return math.sqrt(height * width / 512**2) * math.sqrt(latent_frames)


def flow_sigmas(num_inference_steps: int) -> list[float]:
    """Noise levels 1, 1 - 1/N, ..., 1/N before the warp."""
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    return [1 - i / num_inference_steps for i in range(num_inference_steps)]

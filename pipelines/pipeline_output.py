"""Output classes of the video pipelines (pictures use diffusers' own `ImagePipelineOutput`)."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class VideoPipelineOutput(BaseOutput):
    """Clips.

    Attributes:
        frames: one list of PIL frames per clip, or an array `(B, T, H, W, 3)` in [0, 1], or a tensor
            `(B, T, 3, H, W)` in [0, 1], or latents.
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor

"""Bits per dimension: the exact likelihood of 8-bit pictures under a normalizing flow.

Pictures are dequantised with uniform noise from a generator per picture, so the number does not depend on batches. A
flow trained on Gaussian-noised pictures (`noise_std` > 0) is measured all the same, but it models another density.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_suite.models.tarflow import TarFlowModel, dequantize


@dataclass(frozen=True)
class BitsPerDim:
    """Mean over pictures, its standard error (nan for one picture), and the number of pictures."""

    mean: float
    standard_error: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        return {"bpd": self.mean, "bpd_standard_error": self.standard_error, "bpd_samples": self.count}


def _batches(pictures: Iterable[np.ndarray], size: int) -> Iterable[tuple[int, np.ndarray]]:
    """Stacks single pictures `(H, W, C)` into batches with the index of their first one."""
    batch: list[np.ndarray] = []
    first = 0
    for picture in pictures:
        batch.append(np.asarray(picture))
        if len(batch) == size:
            yield first, np.stack(batch)
            first, batch = first + size, []
    if batch:
        yield first, np.stack(batch)


@torch.no_grad()
def bits_per_dim(
    model: TarFlowModel,
    pictures: Iterable[np.ndarray],
    class_labels: list[int] | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> BitsPerDim:
    """Bits per dimension of uint8 pictures.

    Args:
        model: the flow, in float32 (likelihoods in half precision are not exact).
        pictures: uint8 `(H, W, C)` each, of the model's size and channels.
        class_labels: one per picture, or None for no class.
        batch_size: pictures per pass.
        seed: picture i is dequantised with `manual_seed(seed + i)`.

    Raises:
        ValueError: no pictures, a wrong size or type, labels that do not match, or a model that is not float32.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"bits per dimension need a float32 model, this one is {model.dtype}")
    config, values = model.config, []
    shape = (config.sample_size, config.sample_size, config.in_channels)
    for first, batch in _batches(pictures, batch_size):
        if batch.dtype != np.uint8 or batch.shape[1:] != shape:
            raise ValueError(
                f"bits per dimension need uint8 pictures of shape {shape}, got {batch.dtype} {batch.shape[1:]}"
            )
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2)
        noise = [
            torch.rand(pixels.shape[1:], generator=torch.Generator().manual_seed(seed + first + i))
            for i in range(len(batch))
        ]
        sample = dequantize(pixels, torch.stack(noise)).to(model.device)
        labels = None
        if class_labels is not None:
            rows = class_labels[first : first + len(batch)]
            if len(rows) < len(batch):
                raise ValueError(f"{len(class_labels)} class labels were given for more pictures")
            labels = torch.tensor(rows, device=model.device)
        values.append(model.bits_per_dim(sample, labels).cpu().double())
    if not values:
        raise ValueError("bits per dimension need at least one picture")
    every = torch.cat(values)
    error = float(every.std() / math.sqrt(len(every))) if len(every) > 1 else math.nan
    return BitsPerDim(float(every.mean()), error, len(every))

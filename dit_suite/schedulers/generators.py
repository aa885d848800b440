"""Random numbers of a sample: one generator per sample drives its initial noise and every later draw."""

from collections.abc import Iterable, Sequence

import torch


def sample_generators(seed: int, indices: Iterable[int], device: str | torch.device = "cpu") -> list[torch.Generator]:
    """One generator per sample: sample `i` draws everything from `manual_seed(seed + i)`.

    The same index therefore gives the same picture whatever the batch size, the number of processes or the order.

    Raises:
        ValueError: `seed` is negative or too large for a 64-bit generator.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2**63 - 1, got {seed}")
    return [torch.Generator(device).manual_seed(seed + int(index)) for index in indices]


def randn_per_sample(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normal noise `(len(generators), *shape)`; row i comes from generator i alone.

    Drawn in float32 on each generator's own device, then moved and cast, so that a CPU generator gives the same noise
    on every machine and for every dtype.
    """
    rows = [torch.randn(tuple(shape), generator=g, device=g.device, dtype=torch.float32) for g in generators]
    return torch.stack([row.to(device) for row in rows]).to(dtype)

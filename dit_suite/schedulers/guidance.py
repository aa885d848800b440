"""Classifier-free guidance as a function of the two predictions."""

from collections.abc import Mapping

import torch


def guide(uncond: torch.Tensor, cond: torch.Tensor, scale: float, channels: int | None = None) -> torch.Tensor:
    """`uncond + scale * (cond - uncond)` on the first `channels` channels; the others are those of `cond`.

    "Classifier-Free Diffusion Guidance", equation 6, with `scale` = 1 + w there. The official DiT sampler guides three
    of its four latent channels (`channels=3`), which its published numbers rest on.

    Args:
        uncond, cond: `(batch, C, ...)`.
        channels: None guides all of them.
    """
    count = cond.shape[1] if channels is None else channels
    guided = uncond[:, :count] + scale * (cond[:, :count] - uncond[:, :count])
    return torch.cat([guided, cond[:, count:]], dim=1)


def guide_branches(outputs: Mapping[str, torch.Tensor], scale: float, channels: int | None = None) -> torch.Tensor:
    """`guide` on the outputs of a step by branch, as `StepContext` names them; "none" is passed on as it is."""
    if "none" in outputs:
        return outputs["none"]
    uncond, cond = outputs["batched"].chunk(2) if "batched" in outputs else (outputs["uncond"], outputs["cond"])
    return guide(uncond, cond, scale, channels)

"""What a network that turns samples into feature vectors is; `extractors` and `clips` hold the networks."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dit_suite.evaluation.statistics import ExtractorTag


@dataclass(frozen=True)
class Extracted:
    """Features `(B, d)`; class logits `(B, classes)` and spatial features `(B, s)` where the network has them."""

    features: torch.Tensor
    logits: torch.Tensor | None = None
    spatial: torch.Tensor | None = None


class FeatureExtractor(nn.Module):
    """A frozen network from uint8 pictures `(B, 3, H, W)` to `Extracted`.

    `tag` says what made the features, `suffix` is appended to every metric's name (`fd_enet_lite0`).
    """

    tag: ExtractorTag
    has_logits = False
    has_spatial = False
    takes_clips = False

    @property
    def suffix(self) -> str:
        return self.tag.name.replace("-", "_")

    @property
    def is_inception(self) -> bool:
        """True only for the standard weights: then, and only then, a distance may be called FID."""
        return self.tag.name == "inception-2015-12-05"

    def freeze(self) -> None:
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, images: torch.Tensor) -> Extracted:
        """uint8 `(B, 3, H, W)`, or clips `(B, T, H, W, 3)` where `takes_clips`."""
        raise TypeError(f"{type(self).__name__} does not define forward")


def load_torchscript(path: str | Path) -> torch.jit.ScriptModule:
    """Loads a scripted module onto the CPU; a missing or damaged file gives one sentence."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no TorchScript file {path}")
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is not a TorchScript file: {str(error).splitlines()[0]}") from error

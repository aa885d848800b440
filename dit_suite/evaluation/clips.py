"""Clip features for FVD: a user-given I3D network in TorchScript (Unterthiner et al. 2018).

No package carries the Kinetics-400 I3D weights, so the file is the user's. FVD depends on clip length, stride, frame
size and codec; only runs that share them may be compared.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from dit_suite.evaluation.feature_extractor import Extracted, FeatureExtractor, load_torchscript
from dit_suite.evaluation.statistics import ExtractorTag
from dit_suite.hashing import sha256_of

SIZE = 224
FEWEST_FRAMES = 10


class ClipNetwork(FeatureExtractor):
    """A scripted network from float clips `(B, 3, T, 224, 224)` in [-1, 1] to features `(B, d)`.

    Networks whose `forward` takes `rescale`, `resize` and `return_features` (the common I3D file does) are called with
    False, False and True, since scaling and the bilinear resize are done here.
    """

    takes_clips = True

    def __init__(self, path: str | Path):
        super().__init__()
        self.network = load_torchscript(path)
        known = {argument.name for argument in self.network.forward.schema.arguments}
        wanted = {"rescale": False, "resize": False, "return_features": True}
        self.arguments = {name: value for name, value in wanted.items() if name in known}
        self.register_buffer("anchor", torch.zeros(1))
        self.freeze()
        digest = sha256_of(path)
        with torch.inference_mode():
            dimension = self._features(torch.zeros(1, 16, SIZE, SIZE, 3, dtype=torch.uint8)).shape[1]
        self.tag = ExtractorTag(f"i3d-{digest[:8]}", digest, "bilinear", SIZE, dimension, f"torch {torch.__version__}")

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def _features(self, clips: torch.Tensor) -> torch.Tensor:
        batch, frames = clips.shape[:2]
        pictures = clips.flatten(0, 1).permute(0, 3, 1, 2).float()
        resized = F.interpolate(pictures, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        resized = resized.unflatten(0, (batch, frames)).transpose(1, 2) / 127.5 - 1
        return self.network(resized.contiguous(), **self.arguments).float()

    def forward(self, clips: torch.Tensor) -> Extracted:
        """uint8 `(B, T, H, W, 3)`; raises `ValueError` for pictures and for clips too short for I3D's pooling."""
        if clips.ndim != 5:
            raise ValueError("FVD needs clips, and these samples are pictures")
        if clips.shape[1] < FEWEST_FRAMES:
            raise ValueError(f"FVD needs clips of at least {FEWEST_FRAMES} frames, got {clips.shape[1]}")
        return Extracted(self._features(clips))

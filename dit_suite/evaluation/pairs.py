"""Per-pair closeness of a run to another run of the same seeds: PSNR, SSIM and a perceptual distance.

Sample i is compared with sample i. For clips the frames are compared and averaged.
"""

import urllib.error
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dit_suite.evaluation.extraction import as_pictures
from dit_suite.evaluation.extractors import EfficientNetLite0
from dit_suite.evaluation.sources import Source

MAX_PSNR = 100.0


def _exact(pictures: torch.Tensor) -> torch.Tensor:
    """The pictures in float64, on the CPU where the device has none."""
    return (pictures.cpu() if pictures.device.type == "mps" else pictures).double()


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of uint8 `(B, 3, H, W)` pairs: `(B,)`. Identical pictures count as 100 dB."""
    values = peak_signal_noise_ratio(_exact(images), _exact(others), data_range=255.0, reduction="none", dim=(1, 2, 3))
    return values.clamp_max(MAX_PSNR)


def ssim(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Structural similarity (11 x 11 Gaussian window, sigma 1.5) of uint8 `(B, 3, H, W)` pairs: `(B,)`."""
    values = structural_similarity_index_measure(_exact(images), _exact(others), data_range=255.0, reduction="none")
    return values.reshape(len(images))


class PerceptualDistance(nn.Module):
    """An LPIPS-like distance on EfficientNet-Lite0: channel-normalised stage activations, squared, averaged, summed.

    All weights are one, not fitted to people's judgements as in LPIPS (Zhang et al. 2018), hence the other name.
    """

    def __init__(self, extractor: EfficientNetLite0):
        super().__init__()
        self.extractor = extractor

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """uint8 `(B, 3, H, W)` pairs to `(B,)`, 0 for identical pictures."""
        total = torch.zeros(len(images), device=self.extractor.device)
        pairs = zip(self.extractor.stages(images), self.extractor.stages(others), strict=True)
        for one, other in pairs:
            normalised = [nn.functional.normalize(side, dim=1, eps=1e-8) for side in (one, other)]
            total = total + (normalised[0] - normalised[1]).square().sum(1).mean((1, 2))
        return total


class Lpips(nn.Module):
    """LPIPS with AlexNet through torchmetrics; torchvision fetches the backbone once, or finds it in torch's hub cache.

    Raises:
        FileNotFoundError: the backbone is neither in the cache nor reachable.
    """

    def __init__(self):
        super().__init__()
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            self.metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="none", normalize=True)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"LPIPS needs torchvision's AlexNet weights and they could not be fetched ({error}): put "
                f"alexnet-owt-7be5be79.pth into {torch.hub.get_dir()}/checkpoints, or ask for perceptual instead"
            ) from error

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """uint8 `(B, 3, H, W)` pairs to `(B,)`."""
        return self.metric.net(images.float() / 255, others.float() / 255, normalize=True).reshape(len(images))


def summary(values: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Mean, median and the worst-side 5 % quantile of per-pair values, by metric."""
    found = {}
    for name, rows in values.items():
        rows = rows.double()
        tail = 0.05 if name in ("psnr", "ssim") else 0.95
        found[name] = {
            "mean": float(rows.mean()),
            "median": float(rows.median()),
            "worst_5_percent": float(torch.quantile(rows, tail)),
        }
    return found


def pair_metric(kind: str, extractor: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function of `kind` ("psnr", "ssim", "perceptual" or "lpips") from uint8 pairs to `(B,)`."""
    if kind == "perceptual":
        network = extractor if isinstance(extractor, EfficientNetLite0) else EfficientNetLite0()
        return PerceptualDistance(network.to(extractor.device))
    if kind == "lpips":
        return Lpips().to(extractor.device)
    return {"psnr": psnr, "ssim": ssim}[kind]


class PairObserver:
    """Compares every sample with the sample of the same index in another source, during the one pass over the samples.

    Args:
        baseline: the other source, of the same length.
        metrics: name to function of uint8 picture pairs.
        device: where the functions run.
    """

    def __init__(self, baseline: Source, metrics: Mapping[str, Callable], device: torch.device):
        self.baseline, self.metrics, self.device = baseline, metrics, device

    def __call__(self, indices: range, samples: torch.Tensor) -> dict[str, torch.Tensor]:
        others = self.baseline.read(indices)
        if others.shape != tuple(samples.shape):
            raise ValueError(f"samples {tuple(samples.shape[1:])} can't be paired with {others.shape[1:]}")
        mine, theirs = as_pictures(samples.numpy(), self.device), as_pictures(others, self.device)
        with torch.inference_mode():
            found = {name: metric(mine, theirs).cpu().double() for name, metric in self.metrics.items()}
        return {name: values.reshape(len(samples), -1).mean(1) for name, values in found.items()}

"""The options of every pipeline call. Field names equal keyword names of the pipeline's `__call__`.

The per-sample condition (a prompt, a class label, a list of actions) is not an option: each class names it in
`condition`, and scripts and the app pass one value per sample. Nothing here imports torch, so that `--help` is quick.
"""

from dataclasses import dataclass
from typing import ClassVar

from dit_suite.options import Options, option


@dataclass(frozen=True)
class TextToImageOptions(Options):
    """Options of `TextToImagePipeline`."""

    condition: ClassVar[str] = "prompt"

    negative_prompt: str = option("", "what the picture should not show (used when guidance is on)")
    num_inference_steps: int = option(20, "denoising steps", minimum=1, maximum=1000)
    guidance_scale: float = option(4.0, "classifier-free guidance; 1 or less turns it off", minimum=0.0, maximum=30.0)
    height: int | None = option(None, "pixels (default: the model's size)", minimum=8, maximum=4096, advanced=True)
    width: int | None = option(None, "pixels (default: the model's size)", minimum=8, maximum=4096, advanced=True)


@dataclass(frozen=True)
class ClassToImageOptions(Options):
    """Options of `ClassToImagePipeline`."""

    condition: ClassVar[str] = "class_labels"

    num_inference_steps: int = option(50, "denoising steps", minimum=1, maximum=1000)
    guidance_scale: float = option(4.0, "classifier-free guidance; 1 or less turns it off", minimum=0.0, maximum=30.0)
    guidance_channels: int | None = option(
        None, "guide the first N latent channels only (3: the published DiT numbers)", minimum=1, advanced=True
    )
    eta: float = option(0.0, "noise of the DDIM sampler", minimum=0.0, maximum=1.0, advanced=True)
    height: int | None = option(None, "pixels (default: the model's size)", minimum=1, maximum=4096, advanced=True)
    width: int | None = option(None, "pixels (default: the model's size)", minimum=1, maximum=4096, advanced=True)

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
    num_inference_steps: int = option(20, "denoising steps: fewer are faster", minimum=1, maximum=1000, label="Steps")
    guidance_scale: float = option(
        4.0,
        "how strictly it follows prompt or class (classifier-free guidance); 1 or less turns it off",
        minimum=0.0,
        maximum=30.0,
        label="Guidance",
    )
    height: int | None = option(None, "pixels (default: the model's size)", minimum=8, maximum=4096, advanced=True)
    width: int | None = option(None, "pixels (default: the model's size)", minimum=8, maximum=4096, advanced=True)
    levels: str = option(
        "scheduler",
        "noise levels: the scheduler's own, or 1 - i/N shifted by the resolution (released PT-DiT)",
        choices=("scheduler", "resolution"),
        advanced=True,
    )
    shift: float | None = option(
        None,
        "how far the noise levels lean to high noise (default: the schedule's)",
        minimum=0.01,
        maximum=100.0,
        advanced=True,
    )


@dataclass(frozen=True)
class PTDiTOptions(TextToImageOptions):
    """Options of `TextToImagePipeline` with a PT-DiT network."""

    compress_ratios: tuple[int, ...] | None = option(
        None, "tokens per window: frames, height, width (default: the model's)", minimum=1, advanced=True
    )


@dataclass(frozen=True)
class ClassToImageOptions(Options):
    """Options of `ClassToImagePipeline`."""

    condition: ClassVar[str] = "class_labels"

    num_inference_steps: int = option(50, "denoising steps: fewer are faster", minimum=1, maximum=1000, label="Steps")
    guidance_scale: float = option(
        4.0,
        "how strictly it follows prompt or class (classifier-free guidance); 1 or less turns it off",
        minimum=0.0,
        maximum=30.0,
        label="Guidance",
    )
    guidance_channels: int | None = option(
        None, "guide the first N latent channels only (3: the published DiT numbers)", minimum=1, advanced=True
    )
    eta: float = option(0.0, "noise of the DDIM sampler", minimum=0.0, maximum=1.0, advanced=True)
    height: int | None = option(None, "pixels (default: the model's size)", minimum=1, maximum=4096, advanced=True)
    width: int | None = option(None, "pixels (default: the model's size)", minimum=1, maximum=4096, advanced=True)


@dataclass(frozen=True)
class TarFlowOptions(Options):
    """Options of `TarFlowPipeline`."""

    condition: ClassVar[str] = "class_labels"

    guidance_scale: float = option(
        1.0, "how strictly it follows the class; 1 or less turns it off", minimum=0.0, maximum=10.0, label="Guidance"
    )
    denoise_strength: float = option(
        1.0, "share of the training noise that the final score step removes; 0 skips it", minimum=0.0, maximum=2.0
    )
    strategy: str = option(
        "planned",
        "how blocks are inverted: the plan of the checkpoint, token by token, or the same sweeps for every block",
        choices=("planned", "sequential", "jacobi", "gauss-seidel"),
    )
    sweeps: int = option(16, "most sweeps per module (jacobi, gauss-seidel)", minimum=1, maximum=4096, advanced=True)
    modules: int = option(8, "modules per block (gauss-seidel)", minimum=1, maximum=4096, advanced=True)
    tolerance: float = option(
        0.0,
        "estimated rms error at which a sample leaves a module (jacobi, gauss-seidel)",
        minimum=0.0,
        advanced=True,
    )
    guess: str = option(
        "latent",
        "where sweeps start (jacobi, gauss-seidel): the noise, zero, or the linear guess of a planned checkpoint",
        choices=("latent", "zero", "linear"),
        advanced=True,
    )
    bfloat16_sweeps: int | None = option(
        None,
        "first sweeps of a module that run in bfloat16 where that is faster (default: as planned, else none)",
        minimum=0,
        maximum=4096,
        advanced=True,
    )
    cuda_graphs: bool = option(
        False, "solve blocks by recorded CUDA graphs on a GPU (no effect elsewhere)", advanced=True, label="CUDA graphs"
    )
    guidance_parameters: str = option(
        "ab", "what guidance moves: a log-scale, b shift", choices=("ab", "a", "b"), advanced=True
    )
    attention_temperature: float = option(
        1.0, "attention temperature of the weaker guidance branch", minimum=0.05, maximum=10.0, advanced=True
    )
    annealed_guidance: bool = option(True, "guidance grows over the tokens of a block", advanced=True)


@dataclass(frozen=True)
class TextToVideoOptions(Options):
    """Options of `TextToVideoPipeline`."""

    condition: ClassVar[str] = "prompt"

    negative_prompt: str = option("", "what the clip should not show (used when guidance is on)")
    num_inference_steps: int = option(30, "denoising steps: fewer are faster", minimum=1, maximum=1000, label="Steps")
    guidance_scale: float = option(
        4.0,
        "how strictly it follows prompt or class (classifier-free guidance); 1 or less turns it off",
        minimum=0.0,
        maximum=30.0,
        label="Guidance",
    )
    num_frames: int | None = option(
        None, "frames (default: the model's number)", minimum=1, maximum=1024, label="Frames"
    )
    fps: int = option(8, "frames per second of the file", minimum=1, maximum=120, label="Frames per second")
    height: int | None = option(None, "pixels (default: the model's size)", minimum=8, maximum=4096, advanced=True)
    width: int | None = option(None, "pixels (default: the model's size)", minimum=8, maximum=4096, advanced=True)
    batched_guidance: bool = option(False, "both guidance halves in one batch (needs more memory)", advanced=True)


@dataclass(frozen=True)
class ACDiTOptions(Options):
    """Options of `ACDiTPipeline`."""

    condition: ClassVar[str] = "class_labels"

    num_inference_steps: int = option(25, "denoising steps per block", minimum=1, maximum=1000, label="Steps")
    guidance_scale: float = option(
        1.5,
        "how strictly it follows prompt or class (classifier-free guidance); 1 or less turns it off",
        minimum=0.0,
        maximum=30.0,
        label="Guidance",
    )
    block_size: int | None = option(None, "tokens per block (default: as trained)", minimum=1, advanced=True)
    fps: int = option(8, "frames per second of a clip's file", minimum=1, maximum=60, advanced=True)


@dataclass(frozen=True)
class NFDOptions(Options):
    """Options of `NFDPipeline`."""

    condition: ClassVar[str] = "actions"

    num_inference_steps: int | None = option(
        None, "denoising passes per frame (default: as trained)", minimum=1, maximum=1000
    )
    start_frame: int | None = option(None, "start frame of the checkpoint (default: the model dreams one)", minimum=0)
    speculation: str = option(
        "off",
        "draft frames ahead: together (joint), each a pass later (staggered), or one by one",
        choices=("off", "joint", "staggered", "run_ahead"),
    )
    draft_length: int = option(3, "frames per draft", minimum=1, maximum=16)
    adaptive_draft: bool = option(False, "draft length follows how long actions are held", advanced=True)
    context_noise: float | None = option(
        None, "noise level of finished frames (default: as trained)", minimum=0.0, maximum=0.5, advanced=True
    )
    context_mode: str = option(
        "rolling", "how the past is kept", choices=("rolling", "recompute", "none"), advanced=True
    )
    fixed_passes: str = option(
        "off",
        "passes of one shape: off, eager, or compiled (a CUDA graph on a GPU)",
        choices=("off", "eager", "compiled"),
        advanced=True,
    )
    fps: int = option(8, "frames per second of the file", minimum=1, maximum=60, advanced=True)


@dataclass(frozen=True)
class LegoOptions(Options):
    """Options of `LegoPipeline`."""

    condition: ClassVar[str] = "class_labels"

    num_inference_steps: int = option(
        18, "Heun steps; the network runs 2 N - 1 times", minimum=1, maximum=1000, label="Steps"
    )
    guidance_scale: float | None = option(
        None,
        "classifier-free guidance; 1 or less turns it off (default: 1.5 with classes)",
        minimum=0.0,
        maximum=30.0,
        label="Guidance",
    )
    t_break: float = option(
        0.0,
        "share of the steps that leave out the last brick: more is faster",
        minimum=0.0,
        maximum=1.0,
        label="Skipping (t_break)",
    )
    skip_direction: str = option("auto", "which steps leave it out", choices=("auto", "early", "late"), advanced=True)
    s_churn: float | None = option(
        None,
        "fresh noise per step; 0 is deterministic (default: the scheduler's)",
        minimum=0.0,
        maximum=100.0,
        advanced=True,
    )
    height: int | None = option(None, "pixels (default: the model's size)", minimum=8, maximum=4096)
    width: int | None = option(None, "pixels (default: the model's size)", minimum=8, maximum=4096)
    canvas: str = option(
        "auto", "how larger canvases are covered", choices=("auto", "grid", "overlap", "drift"), advanced=True
    )

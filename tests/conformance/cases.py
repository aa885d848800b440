"""The table of the conformance suite. A network joins with one `ModelCase`, a pipeline with one `PipelineCase`.

The checks themselves are in `test_models.py` and `test_pipelines.py`; they know nothing about any technique.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from dit_suite.registry import resolve

BATCH = 2


@dataclass(frozen=True)
class ModelCase:
    """A network at a tiny size.

    Attributes:
        name: what pytest prints.
        model: `module:Class`.
        config: arguments of the class.
        inputs: makes the keyword arguments of `forward` for a batch of `BATCH`, seeded.
        no_gradient: parameters that this forward pass leaves out (parts of their names).
        fullgraph: compiles without a graph break.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]
    no_gradient: tuple[str, ...] = ()
    fullgraph: bool = True

    def build(self) -> torch.nn.Module:
        """The network in eval mode, with every parameter moved away from its initial value (zeros hide mistakes)."""
        torch.manual_seed(0)
        return moved(resolve(self.model)(**self.config))


@dataclass(frozen=True)
class PipelineCase:
    """A pipeline of tiny parts and one call of it.

    Attributes:
        name: what pytest prints.
        pipeline: `module:Class`.
        parts: makes the components.
        condition: keyword of the per-sample condition.
        values: `BATCH` conditions.
        call: other keyword arguments; `num_inference_steps` must be there if the call takes it.
        settings: constructor arguments that are no components.
        optional: components that may be None, with the arguments the call then needs.
        guided: takes `guidance_scale`.
        latent: accepts `output_type="latent"`.
        network: name of the component that is evaluated.
        batch_tolerance: largest difference in [0, 1] pixels between a batch and its samples alone.
    """

    name: str
    pipeline: str
    parts: Callable[[], dict[str, Any]]
    condition: str
    values: tuple[Any, ...]
    call: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    guided: bool = True
    latent: bool = True
    network: str = "transformer"
    batch_tolerance: float = 1e-4

    def build(self, **replaced: Any) -> Any:
        """The pipeline, silent."""
        parts = {**self.parts(), **replaced}
        pipe = resolve(self.pipeline)(**parts, **self.settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, rows: tuple[int, ...] = tuple(range(BATCH)), **changes: Any) -> dict[str, Any]:
        """Arguments of a call for some of the samples, each with its own generator."""
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        given = {self.condition: [self.values[row] for row in rows], "generator": generators}
        return {**given, "output_type": "np", **self.call, **changes}


def moved(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Adds noise to every parameter and sets eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def noise(*shape: int) -> torch.Tensor:
    """Seeded noise for inputs."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def tiny_vae() -> AutoencoderKL:
    """A random VAE with 4 latent channels that doubles each side."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


def class_inputs(channels: int = 4) -> dict[str, Any]:
    """Inputs of the DiT interface."""
    labels = torch.tensor([1, 4])
    return {"hidden_states": noise(BATCH, channels, 8, 8), "timestep": torch.tensor([17, 900]), "class_labels": labels}


def text_inputs() -> dict[str, Any]:
    """Inputs of PixArt's interface."""
    return {
        "hidden_states": noise(BATCH, 3, 16, 16),
        "encoder_hidden_states": noise(BATCH, 5, 12),
        "timestep": torch.tensor([17.0, 900.0]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }


_DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 4, "sample_size": 8}
_PT_DIT = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 3, "num_layers": 2,
    "caption_channels": 12, "sample_size": 16, "compress_ratios": (1, 2, 2),
}  # fmt: skip
_CLASS_PIPELINE = "dit_suite.pipelines.pipeline_class_to_image:ClassToImagePipeline"

MODELS: tuple[ModelCase, ...] = (
    ModelCase("dit", "dit_suite.models.dit:DiTModel", _DIT, class_inputs),
    ModelCase("switch-dit", "dit_suite.models.switch_dit:SwitchDiTTransformer2DModel", _DIT, class_inputs),
    ModelCase(
        "dtr", "dit_suite.models.switch_dit:SwitchDiTTransformer2DModel", {**_DIT, "routing": "channels"}, class_inputs
    ),
    ModelCase("pt-dit", "dit_suite.models.pt_dit:PTDiTTransformer3DModel", _PT_DIT, text_inputs),
)


def _model(name: str, **changes: Any) -> torch.nn.Module:
    case = next(case for case in MODELS if case.name == name)
    torch.manual_seed(0)
    return moved(resolve(case.model)(**{**case.config, **changes}))


def _class_parts(name: str, scheduler: Callable[[], Any], **changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"transformer": _model(name, **changes), "scheduler": scheduler(), "vae": tiny_vae()}


def _ddpm() -> DDPMScheduler:
    return DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False)


_CLASS_CALL = {"num_inference_steps": 3, "guidance_scale": 2.0}
_NO_VAE = {"vae": {"output_type": "latent"}}

PIPELINES: tuple[PipelineCase, ...] = (
    PipelineCase(
        "dit",
        _CLASS_PIPELINE,
        _class_parts("dit", _ddpm),
        "class_labels",
        ("goldfish", 3),
        _CLASS_CALL,
        settings={"id2label": {"0": "tench", "1": "goldfish"}},
        optional=_NO_VAE,
    ),  # fmt: skip
    PipelineCase(
        "switch-dit",
        _CLASS_PIPELINE,
        _class_parts("switch-dit", _ddim),
        "class_labels",
        (1, 3),
        _CLASS_CALL,
        optional=_NO_VAE,
    ),  # fmt: skip
    PipelineCase(
        "dit-flow",
        _CLASS_PIPELINE,
        _class_parts("dit", FlowMatchEulerDiscreteScheduler, learn_sigma=False),
        "class_labels",
        (1, 3),
        _CLASS_CALL,
        optional=_NO_VAE,
    ),  # fmt: skip
)

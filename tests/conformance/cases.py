"""The table of the conformance suite. A network joins with one `ModelCase`, a pipeline with one `PipelineCase`.

The checks themselves are in `test_models.py` and `test_pipelines.py`; they know nothing about any technique.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from dit_suite.registry import resolve
from dit_suite.schedulers.edm_heun import EDMHeunScheduler
from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler
from dit_suite.schedulers.trigflow import TrigFlowScheduler
from dit_suite.step_plan import current_step
from tests.tiny import tiny_pixart, tiny_text_encoder, tiny_tokenizer, tiny_vae

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
        float32_output: the output stays float32 whatever the weights are (a flow's state, for one).
        fullgraph: compiles without a graph break.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]
    no_gradient: tuple[str, ...] = ()
    float32_output: bool = False
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
        evaluated: the modules whose calls count as evaluations; default: that component.
        trajectories: denoising trajectories per call, each a `Run` of its own (blocks or frames one after another).
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
    evaluated: Callable[[Any], list[torch.nn.Module]] | None = None
    trajectories: int = 1
    batch_tolerance: float = 1e-4

    def build(self, **replaced: Any) -> Any:
        """The pipeline, silent."""
        parts = {**self.parts(), **replaced}
        pipe = resolve(self.pipeline)(**parts, **self.settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def evaluations(self, pipe: Any) -> list:
        """A list that grows by the current step at every evaluation of the network."""
        seen: list = []
        for module in self.evaluated(pipe) if self.evaluated else [getattr(pipe, self.network)]:
            module.register_forward_pre_hook(lambda *_: seen.append(current_step()))
        return seen

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


def block_inputs() -> dict[str, Any]:
    """Training inputs of ACDiT: four blocks of four tokens, noisy and clean."""
    return {
        "hidden_states": noise(BATCH, 4, 4, 12),
        "clean_hidden_states": noise(BATCH, 4, 4, 12).flip(0),
        "timestep": torch.tensor([17, 900]),
        "class_labels": torch.tensor([0, 2]),
    }


def game_inputs() -> dict[str, Any]:
    """Inputs of NFD: three frames of 8 x 8 pixels, each with its own level and action."""
    return {
        "hidden_states": noise(BATCH, 3, 3, 8, 8),
        "timestep": torch.tensor([[0.1, 0.4, 0.9], [0.8, 0.2, 0.3]]),
        "actions": torch.eye(3).expand(BATCH, 3, 3).clone(),
    }


def flow_inputs() -> dict[str, Any]:
    """Inputs of TarFlow."""
    return {"sample": noise(BATCH, 3, 8, 8), "class_labels": torch.tensor([0, 2])}


def edm_inputs() -> dict[str, Any]:
    """Inputs of LEGO."""
    labels = torch.tensor([1, 4])
    return {"hidden_states": noise(BATCH, 3, 8, 8), "timestep": torch.tensor([-0.8, 0.9]), "class_labels": labels}


_DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 4, "sample_size": 8}
_PT_DIT = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 3, "num_layers": 2,
    "caption_channels": 12, "sample_size": 16, "compress_ratios": (1, 2, 2),
}  # fmt: skip
_GRAFT_PLAN = {"attention": {"0": {"kind": "hyena_y"}}, "mlp": {"1": {"kind": "mlp_hyena_x"}}}
_GRAFTED = {**_DIT, "graft_plan": _GRAFT_PLAN}
_ACDIT = {
    "in_channels": 3, "sample_height": 8, "sample_width": 8, "patch_size": 2, "block_size": 4, "num_layers": 2,
    "num_attention_heads": 1, "attention_head_dim": 16, "num_classes": 3,
}  # fmt: skip
_NFD = {
    "in_channels": 3, "sample_height": 8, "sample_width": 8, "patch_size": 4, "num_layers": 2, "num_attention_heads": 1,
    "attention_head_dim": 16, "num_actions": 3, "window": 4,
}  # fmt: skip
_TARFLOW = {
    "sample_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 16, "num_blocks": 2, "num_layers": 2,
    "head_dim": 8, "num_classes": 3,
}  # fmt: skip
_LEGO = {
    "sample_size": 8, "brick_sizes": (4, 8), "patch_sizes": (2, 4), "brick_depths": (1, 2), "num_attention_heads": 2,
    "attention_head_dim": 8, "num_classes": 4,
}  # fmt: skip
_CLASS_PIPELINE = "dit_suite.pipelines.pipeline_class_to_image:ClassToImagePipeline"

MODELS: tuple[ModelCase, ...] = (
    ModelCase("dit", "dit_suite.models.dit:DiTModel", _DIT, class_inputs),
    ModelCase("switch-dit", "dit_suite.models.switch_dit:SwitchDiTTransformer2DModel", _DIT, class_inputs),
    ModelCase(
        "dtr", "dit_suite.models.switch_dit:SwitchDiTTransformer2DModel", {**_DIT, "routing": "channels"}, class_inputs
    ),
    ModelCase("grafted-dit", "dit_suite.grafting.models:GraftedDiTModel", _GRAFTED, class_inputs),
    ModelCase("pt-dit", "dit_suite.models.pt_dit:PTDiTTransformer3DModel", _PT_DIT, text_inputs),
    ModelCase("lego", "dit_suite.models.lego:LegoTransformer2DModel", _LEGO, edm_inputs),
    ModelCase("tarflow", "dit_suite.models.tarflow:TarFlowModel", _TARFLOW, flow_inputs, float32_output=True),
    ModelCase("acdit", "dit_suite.models.acdit:ACDiTTransformer3DModel", _ACDIT, block_inputs),
    ModelCase("nfd", "dit_suite.models.nfd:NFDTransformer3DModel", _NFD, game_inputs),
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


def _text_parts(transformer: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    def parts() -> dict[str, Any]:
        text = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
        return {"transformer": transformer(), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": None, **text}

    return parts


def _wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return moved(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )
    )  # fmt: skip


_CLASS_CALL = {"num_inference_steps": 3, "guidance_scale": 2.0}
_EMBEDS = {
    "prompt": None,
    "prompt_embeds": noise(BATCH, 8, 16),
    "prompt_attention_mask": torch.ones(BATCH, 8),
    "negative_prompt_embeds": noise(BATCH, 8, 16).flip(0),
    "negative_prompt_attention_mask": torch.ones(BATCH, 8),
}
_TEXT_OPTIONAL = {"vae": {}, "text_encoder": _EMBEDS, "tokenizer": _EMBEDS}
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
    ),
    PipelineCase(
        "switch-dit",
        _CLASS_PIPELINE,
        _class_parts("switch-dit", _ddim),
        "class_labels",
        (1, 3),
        _CLASS_CALL,
        optional=_NO_VAE,
    ),
    PipelineCase(
        "dit-flow",
        _CLASS_PIPELINE,
        _class_parts("dit", FlowMatchEulerDiscreteScheduler, learn_sigma=False),
        "class_labels",
        (1, 3),
        _CLASS_CALL,
        optional=_NO_VAE,
    ),
    PipelineCase(
        "pixart", "dit_suite.pipelines.pipeline_text_to_image:TextToImagePipeline", _text_parts(tiny_pixart),
        "prompt", ("red apple", "green cat"), {"num_inference_steps": 3, "guidance_scale": 2.0},
        settings={"prediction_type": "flow_prediction", "max_sequence_length": 8}, optional=_TEXT_OPTIONAL,
    ),
    PipelineCase(
        "pt-dit", "dit_suite.pipelines.pipeline_text_to_image:TextToImagePipeline",
        _text_parts(lambda: _model("pt-dit", caption_channels=16)),
        "prompt", ("red apple", "green cat"), {"num_inference_steps": 2, "guidance_scale": 2.0},
        settings={"prediction_type": "flow_prediction", "max_sequence_length": 8},
    ),
    PipelineCase(
        "wan", "dit_suite.pipelines.pipeline_text_to_video:TextToVideoPipeline",
        lambda: {**_text_parts(_wan)(), "transformer_2": None},
        "prompt", ("red apple", "green cat"), {"num_inference_steps": 2, "guidance_scale": 2.0},
        settings={"sample_size": (4, 8, 12), "max_sequence_length": 8},
    ),
    PipelineCase(
        "lego", "dit_suite.pipelines.pipeline_lego:LegoPipeline",
        lambda: {"transformer": _model("lego"), "scheduler": EDMHeunScheduler(), "vae": None},
        "class_labels", (1, 3), {"num_inference_steps": 3, "guidance_scale": 2.0},
    ),
    PipelineCase(
        "tarflow", "dit_suite.pipelines.pipeline_tarflow:TarFlowPipeline",
        lambda: {"transformer": _model("tarflow"), "scheduler": GSJacobiScheduler([0, 1], [1, 3])},
        "class_labels", (1, 2), {"guidance_scale": 1.5, "denoise_strength": 0.0},
        evaluated=lambda pipe: [block.layers[0] for block in pipe.transformer.blocks],
    ),
    PipelineCase(
        "acdit", "dit_suite.pipelines.pipeline_acdit:ACDiTPipeline",
        lambda: {"transformer": _model("acdit"), "scheduler": _ddim(), "vae": None},
        "class_labels", (1, 2), {"num_inference_steps": 2, "guidance_scale": 2.0}, latent=False,
        trajectories=4,
    ),
    PipelineCase(
        "nfd", "dit_suite.pipelines.pipeline_nfd:NFDPipeline",
        lambda: {"transformer": _model("nfd"), "scheduler": TrigFlowScheduler(), "vae": None},
        "actions", ([0, 1, 2], [2, 2, 0]), {"num_inference_steps": 2}, guided=False, latent=False,
        trajectories=4,
    ),
)  # fmt: skip

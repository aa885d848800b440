"""Tiny random transformers of diffusers and of this suite, each with the arguments of one forward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from dit_suite.models.dit import DiTModel
from dit_suite.models.pt_dit import PTDiTTransformer3DModel
from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel


@dataclass(frozen=True)
class Case:
    """One model class: how to build it, what to feed it, and what the plug-in should find."""

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    grid: tuple[int, int, int]
    layers: int
    route: str


def _rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan(**changes):
    config = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    return diffusers.WanTransformer3DModel(**(config | changes))


def wan_inputs(batch=1, seed=0):
    return {
        "hidden_states": _rand(batch, 4, 4, 8, 8, seed=seed),
        "encoder_hidden_states": _rand(batch, 6, 8, seed=1),
        "timestep": torch.full((batch,), 500.0),
    }


def hunyuan():
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )


def hunyuan_inputs(batch=1):
    mask = torch.ones(batch, 6)
    mask[0, 4:] = 0
    return {
        "hidden_states": _rand(batch, 4, 4, 8, 8),
        "encoder_hidden_states": _rand(batch, 6, 16, seed=1),
        "encoder_attention_mask": mask,
        "pooled_projections": _rand(batch, 8, seed=2),
        "guidance": torch.full((batch,), 6000.0),
        "timestep": torch.full((batch,), 500.0),
    }


def ltx():
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )


def ltx_inputs(batch=1):
    return {
        "hidden_states": _rand(batch, 64, 8),
        "encoder_hidden_states": _rand(batch, 6, 16, seed=1),
        "encoder_attention_mask": torch.ones(batch, 6, dtype=torch.bool),
        "num_frames": 4,
        "height": 4,
        "width": 4,
        "timestep": torch.full((batch,), 500.0),
    }


def cogvideox(num_layers=2):
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=num_layers,
        sample_width=8,
        sample_height=8,
        sample_frames=13,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
    )


def cogvideox_inputs(batch=1):
    return {
        "hidden_states": _rand(batch, 4, 4, 8, 8),
        "encoder_hidden_states": _rand(batch, 6, 8, seed=1),
        "timestep": torch.full((batch,), 500.0),
    }


def mochi():
    return diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=16,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )


def mochi_inputs(batch=1):
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[0, 4:] = False
    return {
        "hidden_states": _rand(batch, 12, 4, 8, 8),
        "encoder_hidden_states": _rand(batch, 6, 16, seed=1),
        "encoder_attention_mask": mask,
        "timestep": torch.full((batch,), 500.0),
    }


def flux():
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


def flux_inputs(batch=1):
    ids = torch.zeros(64, 3)
    ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    return {
        "hidden_states": _rand(batch, 64, 4),
        "encoder_hidden_states": _rand(batch, 6, 16, seed=1),
        "pooled_projections": _rand(batch, 8, seed=2),
        "img_ids": ids,
        "txt_ids": torch.zeros(6, 3),
        "timestep": torch.full((batch,), 0.5),
    }


def pixart():
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=16,
        caption_channels=16,
        norm_num_groups=1,
    )


def dit(num_layers=3):
    return DiTModel(
        sample_size=16, in_channels=4, num_layers=num_layers, num_attention_heads=2, attention_head_dim=8, num_classes=5
    )


def switch_dit():
    return SwitchDiTTransformer2DModel(
        sample_size=16, in_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=5
    )


def pt_dit():
    return PTDiTTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        caption_channels=16,
        compress_ratios=(1, 2, 2),
        time_share=0.25,
    )


def picture_inputs(batch=1):
    return {
        "hidden_states": _rand(batch, 4, 16, 16),
        "class_labels": torch.arange(batch) % 5,
        "timestep": torch.full((batch,), 500.0),
    }


def captioned_picture_inputs(batch=1):
    return {
        "hidden_states": _rand(batch, 4, 16, 16),
        "encoder_hidden_states": _rand(batch, 6, 16, seed=1),
        "timestep": torch.full((batch,), 500.0),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def pt_dit_inputs(batch=1):
    return {
        "hidden_states": _rand(batch, 4, 4, 16, 16),
        "encoder_hidden_states": _rand(batch, 6, 16, seed=1),
        "timestep": torch.full((batch,), 500.0),
    }


OWN_CASES = {
    "pixart": Case(pixart, captioned_picture_inputs, (1, 8, 8), 2, "module"),
    "dit": Case(dit, picture_inputs, (1, 8, 8), 3, "dispatcher"),
    "switch_dit": Case(switch_dit, picture_inputs, (1, 8, 8), 2, "dispatcher"),
    "pt_dit": Case(pt_dit, pt_dit_inputs, (4, 4, 4), 2, "dispatcher"),
}
CASES = {
    "wan": Case(wan, wan_inputs, (4, 4, 4), 3, "dispatcher"),
    "hunyuan": Case(hunyuan, hunyuan_inputs, (4, 4, 4), 3, "dispatcher"),
    "ltx": Case(ltx, ltx_inputs, (4, 4, 4), 2, "dispatcher"),
    "cogvideox": Case(cogvideox, cogvideox_inputs, (4, 4, 4), 2, "module"),
    "mochi": Case(mochi, mochi_inputs, (4, 4, 4), 3, "module"),
    "flux": Case(flux, flux_inputs, (1, 8, 8), 2, "dispatcher"),
}


def build(name: str) -> torch.nn.Module:
    """The model of a case, in eval mode, with attention sharp enough that dropping blocks shows."""
    torch.manual_seed(0)
    model = (CASES | OWN_CASES)[name].build().eval()
    for path, parameter in model.named_parameters():
        if parameter.ndim == 2 and any(part in path for part in ("to_q", "to_k", "add_q", "add_k")):
            parameter.data.mul_(4.0)
        if "scale_shift_table" in path or "proj_out" in path:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return model


@torch.no_grad()
def forward(model: torch.nn.Module, given: dict[str, Any]) -> torch.Tensor:
    """One forward pass."""
    return model(**given, return_dict=False)[0]

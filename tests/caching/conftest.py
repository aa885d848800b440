"""Tiny random diffusers transformers and a sampling loop for them."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _dit() -> tuple[Any, torch.Tensor, dict[str, Any]]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, _noise(2, 4, 8, 8), {"class_labels": torch.tensor([1, 2])}


def _pixart() -> tuple[Any, torch.Tensor, dict[str, Any]]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    extra = {"encoder_hidden_states": _noise(2, 5, 12, seed=1), "added_cond_kwargs": {}}
    return model, _noise(2, 4, 8, 8), extra | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _sd3() -> tuple[Any, torch.Tensor, dict[str, Any]]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    return model, _noise(2, 4, 8, 8), {
        "encoder_hidden_states": _noise(2, 5, 16, seed=1), "pooled_projections": _noise(2, 16, seed=2)
    }  # fmt: skip


def _flux() -> tuple[Any, torch.Tensor, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, _noise(2, 16, 4), {
        "encoder_hidden_states": _noise(2, 5, 16, seed=1), "pooled_projections": _noise(2, 16, seed=2),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def _wan() -> tuple[Any, torch.Tensor, dict[str, Any]]:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2,
    )  # fmt: skip
    return model, _noise(2, 4, 2, 8, 8), {"encoder_hidden_states": _noise(2, 5, 16, seed=1)}


def _hunyuan() -> tuple[Any, torch.Tensor, dict[str, Any]]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return model, _noise(2, 4, 2, 8, 8), {
        "encoder_hidden_states": _noise(2, 5, 16, seed=1), "pooled_projections": _noise(2, 8, seed=2),
        "encoder_attention_mask": torch.ones(2, 5), "guidance": torch.tensor([1000.0, 1000.0]),
    }  # fmt: skip


def _cogvideox() -> tuple[Any, torch.Tensor, dict[str, Any]]:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=8, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=8,
    )  # fmt: skip
    return model, _noise(2, 2, 4, 8, 8), {"encoder_hidden_states": _noise(2, 8, 8, seed=1)}


def _ltx() -> tuple[Any, torch.Tensor, dict[str, Any]]:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=2, caption_channels=16,
    )  # fmt: skip
    return model, _noise(2, 32, 4), {
        "encoder_hidden_states": _noise(2, 5, 16, seed=1), "encoder_attention_mask": torch.ones(2, 5),
        "num_frames": 2, "height": 4, "width": 4,
    }  # fmt: skip


def _latte() -> tuple[Any, torch.Tensor, dict[str, Any]]:
    model = diffusers.LatteTransformer3DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=8,
        video_length=2,
        in_channels=4, cross_attention_dim=16, out_channels=4, num_embeds_ada_norm=1000, attention_bias=True,
        activation_fn="gelu-approximate", norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    return model, _noise(2, 4, 2, 8, 8), {"encoder_hidden_states": _noise(2, 5, 8, seed=1)}


BUILDERS: dict[str, Callable] = {
    "dit": _dit, "pixart": _pixart, "sd3": _sd3, "flux": _flux, "wan": _wan, "hunyuan": _hunyuan,
    "cogvideox": _cogvideox, "ltx": _ltx, "latte": _latte,
}  # fmt: skip


class Case:
    """A tiny model with every parameter random (zero-initialised gates would hide errors), and a loop over it."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model, self.start, self.extra = BUILDERS[name]()
        generator = torch.Generator().manual_seed(3)
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
        self.model.eval()

    def call(self, hidden_states: torch.Tensor, time: float) -> torch.Tensor:
        integer = self.name in ("dit", "pixart", "cogvideox", "latte")
        timestep = torch.full((2,), time, dtype=torch.long if integer else torch.float32)
        return self.model(hidden_states, timestep=timestep, return_dict=False, **self.extra)[0]

    @torch.no_grad()
    def sample(self, num_steps: int = 5, shift: float = 0.0) -> list[torch.Tensor]:
        """The network outputs of a short sampling loop; a call starts a new run because its timestep jumps back up."""
        hidden_states, outputs = self.start + shift, []
        for k in range(num_steps):
            output = self.call(hidden_states, 900.0 - 150.0 * k)
            hidden_states = hidden_states - 0.2 * output
            outputs.append(output)
        return outputs


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """The tiny model whose name the test is parametrised with."""
    return Case(request.param)


@pytest.fixture
def pixart() -> Case:
    """A tiny PixArt."""
    return Case("pixart")

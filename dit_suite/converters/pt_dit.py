"""Released Qihoo-T2X text-to-image weights (PT-DiT, original key layout) to `PTDiTTransformer3DModel`.

The released network predicts x0 - noise; this suite and diffusers' flow schedulers take noise - x0. The converter turns
the sign of the prediction, so that the result is a "flow_prediction" network like any other. The released sampler is
`TextToImagePipeline` with `levels="resolution"`.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from dit_suite.converters import ConversionError, build_strict, read_checkpoint
from dit_suite.models.pt_dit import PTDiTTransformer3DModel

NAME = "pt_dit"
ABOUT = "PT-DiT / Qihoo-T2X text-to-image checkpoint (.pt), as a network folder"

_POSITIONS = "pos_embed.pos_embed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the shapes do not tell; the defaults are those of the released 1024 px model."""
    parser.add_argument("--heads", type=int, default=16, help="attention heads (default: %(default)s)")
    parser.add_argument("--sample-size", type=int, default=128, help="latent side of training (default: %(default)s)")


def convert_keys(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original names to ours. The position table is a function of the size and is left out; nothing else is. The rows
    of the output layer that make the prediction change their sign; those of the unused variance stay."""
    renamed = {}
    _, channels, patch, _ = tensors["pos_embed.proj.weight"].shape
    for key, value in tensors.items():
        if key.startswith("proj_out."):
            value = value.unflatten(0, (patch * patch, -1)).clone()
            value[:, :channels] *= -1
            value = value.flatten(0, 1)
        if key != _POSITIONS:
            renamed["patch_embed." + key[len("pos_embed.") :] if key.startswith("pos_embed.proj.") else key] = value
    return renamed


def config_from(tensors: Mapping[str, torch.Tensor], heads: int, sample_size: int) -> dict:
    """Constructor arguments that follow from the shapes of the original tensors."""
    if "pos_embed.proj.weight" not in tensors or "proj_out.weight" not in tensors:
        raise ConversionError("the file is not a PT-DiT checkpoint: pos_embed.proj.weight or proj_out.weight is absent")
    width, channels, patch, _ = tensors["pos_embed.proj.weight"].shape
    if width % heads:
        raise ConversionError(f"the width {width} is not a multiple of {heads} heads")
    layers = {int(key.split(".")[1]) for key in tensors if key.startswith("transformer_blocks.")}
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": tensors["proj_out.weight"].shape[0] // patch**2,
        "num_layers": len(layers),
        "caption_channels": tensors["caption_projection.linear_1.weight"].shape[1],
        "sample_size": sample_size,
        "patch_size": patch,
        "shift_window": any(".attn3." in key for key in tensors),
        "use_additional_conditions": any("resolution_embedder" in key for key in tensors),
    }


def convert(source: Path, arguments: argparse.Namespace) -> PTDiTTransformer3DModel:
    """The network of a released checkpoint; windows follow the size (8 x 8 of them), as the released config has at
    1024 px. Raises `ConversionError` naming missing, unexpected or misshapen keys."""
    tensors = read_checkpoint(source)
    config = config_from(tensors, arguments.heads, arguments.sample_size)
    return build_strict(PTDiTTransformer3DModel, config, convert_keys(tensors))

"""LEGO-Diffusion weights in their original key layout to `LegoTransformer2DModel`.

The published files are pickles of whole objects, which run code when they are opened. Extract `ema.state_dict()` in a
sandbox with the reference code and save it as safetensors; that file is what this converter reads.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dit_suite.converters import ConversionError, build_strict, read_checkpoint
from dit_suite.converters.dit import rename_from_official
from dit_suite.models.dit_blocks import sincos_2d
from dit_suite.models.lego import COORDINATES, LegoTransformer2DModel

NAME = "lego"
ABOUT = "LEGO-Diffusion state dict (.safetensors, extracted from the published pickle), as a network folder"

_POSITION_TOLERANCE = 1e-5
_LABELS = "y_embedder.embedding_table."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the shapes do not tell."""
    parser.add_argument("--heads", type=int, required=True, help="attention heads (S 6, L 16, XL 16)")
    parser.add_argument("--sample-size", type=int, default=64, help="side in pixels or latents (default: %(default)s)")


def _bare(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the preconditioning wrapper's prefix."""
    prefix = "model."
    if all(key.startswith(prefix) for key in tensors) and any(key.startswith("model.t_embedder") for key in tensors):
        return {key[len(prefix) :]: value for key, value in tensors.items()}
    return dict(tensors)


def convert_keys(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original names to ours; position tables are a function of the sizes and are left out."""
    renamed = {}
    for key, value in _bare(tensors).items():
        brick = re.fullmatch(r"model\.(\d+)\.(.+)", key)
        if key.startswith(_LABELS):
            renamed["label_embed." + key[len(_LABELS) :]] = value
            continue
        if brick is None:
            renamed |= rename_from_official({key: value})
            continue
        for name, part in rename_from_official({brick[2]: value}).items():
            renamed[f"bricks.{brick[1]}.{name.replace('transformer_blocks.', 'blocks.')}"] = part
    return renamed


def config_from(tensors: Mapping[str, torch.Tensor], heads: int, sample_size: int) -> dict[str, Any]:
    """Constructor arguments from the shapes; a brick's size follows from its position table.

    Raises:
        ConversionError: not this layout, or a position table that is not the computed one.
    """
    bare = _bare(tensors)
    bricks = sorted({int(key.split(".")[1]) for key in bare if key.startswith("model.")})
    if not bricks or "model.0.final_layer.linear.weight" not in bare:
        raise ConversionError("the file is not a LEGO checkpoint: model.0.final_layer.linear.weight is absent")
    width, channels, patch, _ = bare["model.0.x_embedder.proj.weight"].shape
    if width % heads:
        raise ConversionError(f"the width {width} is not a multiple of {heads} heads")
    patches = [bare[f"model.{k}.x_embedder.proj.weight"].shape[-1] for k in bricks]
    sizes = [_brick_size(bare[f"model.{k}.pos_embed"], patch, k) for k, patch in zip(bricks, patches, strict=True)]
    labels = bare.get("y_embedder.embedding_table.weight")
    return {
        "sample_size": sample_size,
        "in_channels": channels - COORDINATES,
        "brick_sizes": sizes,
        "patch_sizes": patches,
        "brick_depths": [_depth(bare, k) for k in bricks],
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_classes": 0 if labels is None else labels.shape[1],
    }


def _brick_size(table: torch.Tensor, patch: int, index: int) -> int:
    side = round(table.shape[1] ** 0.5)
    expected = sincos_2d(side, side, table.shape[2])
    if side * side != table.shape[1] or (table[0] - expected).abs().max() > _POSITION_TOLERANCE:
        raise ConversionError(f"model.{index}.pos_embed is not the sin-cos table this network computes")
    return side * patch


def _depth(tensors: Mapping[str, torch.Tensor], brick: int) -> int:
    prefix = f"model.{brick}.blocks."
    return len({key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)})


def convert(source: Path, arguments: argparse.Namespace) -> LegoTransformer2DModel:
    """The network of a checkpoint. Raises `ConversionError` naming missing, unexpected or misshapen keys."""
    tensors = read_checkpoint(source)
    config = config_from(tensors, arguments.heads, arguments.sample_size)
    return build_strict(LegoTransformer2DModel, config, convert_keys(tensors))

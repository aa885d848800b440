"""Official Switch-DiT and DTR checkpoints to `SwitchDiTTransformer2DModel`; a plain DiT file can warm-start one."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dit_suite.converters import ConversionError, build_strict, read_checkpoint
from dit_suite.converters.dit import rename_from_official
from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel, sliding_window

NAME = "switch_dit"
ABOUT = "official Switch-DiT, DTR or DiT checkpoint (.pt), as a Switch-DiT network folder"

_ROUTER = {
    "f_gate.1.weight": "gate.weight",
    "f_gate.1.bias": "gate.bias",
    "experts.w": "expert_weight",
    "experts.b": "expert_bias",
}
_PRIOR = "prior._unit_mapping"
_MASK = "_unit_mapping"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the shapes do not tell."""
    parser.add_argument("--heads", type=int, required=True, help="attention heads (S 6, B 12, L 16, XL 16)")
    parser.add_argument("--sample-size", type=int, default=32, help="latent side (default: %(default)s)")
    parser.add_argument("--experts-per-timestep", type=int, default=2, help="k (default: %(default)s)")
    parser.add_argument("--warm-start", action="store_true", help="make a plain DiT file a Switch-DiT of zero experts")


def convert_keys(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official names to ours. Fixed tables (`full_time`, the prior, DTR's masks, positions) are left out."""
    kept = {}
    routers = {}
    for key, value in tensors.items():
        router = re.fullmatch(r"routers\.(\d+)\.(.+)", key)
        if key in ("full_time", _PRIOR) or (router and router[2] == _MASK):
            continue
        if router and router[2] in _ROUTER:
            routers[f"routers.{router[1]}.{_ROUTER[router[2]]}"] = value
        else:
            kept[key] = value
    return rename_from_official(kept) | routers


def config_from(tensors: Mapping[str, torch.Tensor], heads: int, sample_size: int, active: int) -> dict[str, Any]:
    """Constructor arguments from the shapes.

    Raises:
        ConversionError: not this layout, or a stored routing table that is not the published one.
    """
    needed = ("x_embedder.proj.weight", "final_layer.linear.weight", "y_embedder.embedding_table.weight")
    absent = [key for key in needed if key not in tensors]
    if absent:
        raise ConversionError(f"the file is not a Switch-DiT or DiT checkpoint: {absent[0]} is absent")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    rows = tensors["y_embedder.embedding_table.weight"].shape[0]
    layers = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    if width % heads:
        raise ConversionError(f"the width {width} is not a multiple of {heads} heads")
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_classes": max(rows - 1, 1),
        "class_dropout_prob": 0.1 if rows > 1 else 0.0,
        "learn_sigma": tensors["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
        "routing": "none",
    }
    if "routers.0.experts.w" in tensors:
        experts = tensors["routers.0.experts.w"].shape[0]
        config |= {"routing": "experts", "num_experts": experts, "experts_per_timestep": active}
        stored = tensors.get(_PRIOR)
        if stored is not None:
            expected = sliding_window(len(stored), layers * experts, layers * active)
            _same_table(stored, expected, "the stored prior", "--experts-per-timestep")
            config["num_timesteps"] = len(stored)
    elif f"routers.0.{_MASK}" in tensors:
        stored = tensors[f"routers.0.{_MASK}"]
        on = int(stored[0].sum())
        _same_table(stored, sliding_window(len(stored), width, on), "the stored channel table", "the exponent")
        config |= {"routing": "channels", "channel_share": on / width, "num_timesteps": len(stored)}
        if int(width * config["channel_share"]) != on:
            config["channel_share"] = (on + 0.5) / width
    return config


def _same_table(stored: torch.Tensor, expected: torch.Tensor, what: str, suspect: str) -> None:
    if stored.shape != expected.shape or not torch.equal(stored.float(), expected):
        raise ConversionError(f"{what} is not the sliding window this network uses; check {suspect}")


def convert(source: Path, arguments: argparse.Namespace) -> SwitchDiTTransformer2DModel:
    """The network of a checkpoint. Raises `ConversionError` naming missing, unexpected or misshapen keys."""
    tensors = read_checkpoint(source)
    config = config_from(tensors, arguments.heads, arguments.sample_size, arguments.experts_per_timestep)
    weights = convert_keys(tensors)
    if arguments.warm_start and config["routing"] == "none":
        config |= {"routing": "experts", "experts_per_timestep": arguments.experts_per_timestep}
        fresh = SwitchDiTTransformer2DModel(**config).routers.state_dict()
        weights |= {f"routers.{key}": value for key, value in fresh.items()}
    return build_strict(SwitchDiTTransformer2DModel, config, weights)

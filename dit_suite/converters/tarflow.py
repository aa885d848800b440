"""Apple's TarFlow state dict (also the layout of the GS-Jacobi authors) to and from `TarFlowModel`, strictly.

A source is one file (`.pth`, `.safetensors`) or a folder of safetensors shards with an optional `config.json`. Shapes
tell the architecture; the head width, which no shape tells, is 64 unless `config.json` or a flag says otherwise.
"""

import argparse
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dit_suite.converters import ConversionError, build_strict, read_checkpoint
from dit_suite.data.labels import LabelTable
from dit_suite.models.tarflow import TarFlowModel

NAME = "tarflow"
ABOUT = "official TarFlow checkpoint (.pth), or a folder of safetensors with the same keys"

# original name inside `attn_blocks.{j}` -> name inside `layers.{j}`
LAYER_KEYS = {
    "attention.norm": "norm1",
    "attention.qkv": "to_qkv",
    "attention.proj": "to_out",
    "mlp.norm": "norm2",
    "mlp.main.0": "ff_in",
    "mlp.main.2": "ff_out",
}
# original `config.json` name -> argument of `TarFlowModel`
CONFIG_KEYS = {
    "in_channels": "in_channels",
    "img_size": "sample_size",
    "patch_size": "patch_size",
    "channels": "hidden_size",
    "num_blocks": "num_blocks",
    "layers_per_block": "num_layers",
    "head_dim": "head_dim",
    "num_classes": "num_classes",
    "noise_std": "noise_std",
    "sigma": "noise_std",
}
_LAYER = re.compile(r"^(blocks\.\d+\.)attn_blocks\.(\d+)\.(.+)\.(weight|bias)$")
_OUR_LAYER = re.compile(r"^(blocks\.\d+\.)layers\.(\d+)\.(\w+)\.(weight|bias)$")
_FILE_NAME = re.compile(r"_model_\d+_\d+_\d+_\d+_(\d+\.\d+|uniform)$")


def to_diffusers_keys(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original names to ours; the redundant `attn_mask` buffers are dropped."""
    renamed = {}
    for key, value in state_dict.items():
        if key.endswith(".attn_mask"):
            continue
        match = _LAYER.match(key)
        if match:
            block, layer, name, kind = match.groups()
            if name not in LAYER_KEYS:
                raise ConversionError(f"{key} is not a weight of a TarFlow layer")
            key = f"{block}layers.{layer}.{LAYER_KEYS[name]}.{kind}"
        renamed[key] = value
    return renamed


def to_original_keys(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `to_diffusers_keys`; `attn_mask` (rebuilt by both codebases) and fitted guesses are left out."""
    back = {ours: theirs for theirs, ours in LAYER_KEYS.items()}
    renamed = {}
    for key, value in state_dict.items():
        if ".guess." in key:
            continue
        match = _OUR_LAYER.match(key)
        if match:
            block, layer, name, kind = match.groups()
            key = f"{block}attn_blocks.{layer}.{back[name]}.{kind}"
        renamed[key] = value
    return renamed


def _layers(state_dict: Mapping[str, torch.Tensor]) -> dict[int, set[int]]:
    """Block number to the numbers of its layers."""
    found: dict[int, set[int]] = {}
    for match in filter(None, map(_LAYER.match, state_dict)):
        found.setdefault(int(match.group(1).split(".")[1]), set()).add(int(match.group(2)))
    return found


def infer_config(state_dict: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The `TarFlowModel` arguments that the original state dict's shapes tell, overridden by `given`.

    Raises:
        ConversionError: the shapes do not describe a TarFlow, or contradict `given`.
    """
    blocks = sorted({int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")})
    if blocks != list(range(len(blocks))) or not blocks or "blocks.0.proj_in.weight" not in state_dict:
        raise ConversionError("the state dict is not a TarFlow: it has no complete run of blocks.N.proj_in")
    layers = _layers(state_dict)
    missing = [name for name in ("pos_embed", "proj_out.weight") if f"blocks.0.{name}" not in state_dict]
    missing += [f"attn_blocks of block {block}" for block in blocks if block not in layers]
    if missing:
        raise ConversionError(f"the state dict is not a whole TarFlow: {missing[0]} is missing")
    hidden_size, token_dim = state_dict["blocks.0.proj_in.weight"].shape
    tokens = state_dict["blocks.0.pos_embed"].shape[0]
    depths = [1 + max(layers[block]) for block in blocks]
    in_channels = given.get("in_channels") or (3 if token_dim % 3 == 0 else 1)
    patch_size = math.isqrt(token_dim // in_channels)
    classes = state_dict.get("blocks.0.class_embed")
    found = {
        "in_channels": in_channels,
        "patch_size": patch_size,
        "sample_size": patch_size * math.isqrt(tokens),
        "hidden_size": hidden_size,
        "num_blocks": len(blocks),
        "num_layers": depths[0] if len(set(depths)) == 1 else depths,
        "num_classes": 0 if classes is None else classes.shape[0],
        "volume_preserving": state_dict["blocks.0.proj_out.weight"].shape[0] == token_dim,
        "head_dim": 64,
        "noise_std": 0.0,
    }
    if in_channels * patch_size**2 != token_dim or math.isqrt(tokens) ** 2 != tokens:
        raise ConversionError(f"{tokens} tokens of {token_dim} numbers are no square image of {in_channels} channels")
    for name in ("head_dim", "noise_std"):
        found[name] = given.get(name, found[name])
    wrong = [name for name, value in given.items() if name in found and found[name] != value]
    if wrong:
        name = wrong[0]
        raise ConversionError(f"the weights have {name} {found[name]}, but {given[name]} was given")
    return found


def build_model(state_dict: Mapping[str, torch.Tensor], given: Mapping[str, Any] | None = None) -> TarFlowModel:
    """A `TarFlowModel` in eval mode that holds exactly the original `state_dict`, in its dtype.

    Args:
        given: `TarFlowModel` arguments that shapes cannot tell (`head_dim`, `noise_std`, `in_channels`).

    Raises:
        ConversionError: a key is missing, unexpected or misshapen.
    """
    config = infer_config(state_dict, dict(given or {}))
    return build_strict(TarFlowModel, config, to_diffusers_keys(state_dict))


def from_original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Names of an original `config.json` to arguments of `TarFlowModel`; other entries are left out."""
    known = {CONFIG_KEYS[name]: value for name, value in config.items() if name in CONFIG_KEYS}
    if "nvp" in config:
        known["volume_preserving"] = not config["nvp"]
    return known


def read_source(source: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and original config of a file or folder. The official file name tells the training noise.

    Raises:
        FileNotFoundError: nothing is there.
        ConversionError: it cannot be read, the folder holds no safetensors file, or shards share a key.
    """
    source = Path(source)
    if not source.is_dir():
        match = _FILE_NAME.search(source.stem)
        noise = 0.0 if match is None or match.group(1) == "uniform" else float(match.group(1))
        return read_checkpoint(source), {"noise_std": noise} if match else {}
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise ConversionError(f"{source.name} holds no .safetensors file")
    merged: dict[str, torch.Tensor] = {}
    for shard in shards:
        part = read_checkpoint(shard)
        shared = merged.keys() & part.keys()
        if shared:
            raise ConversionError(f"{shard.name} repeats the key {min(shared)}")
        merged.update(part)
    config_file = source / "config.json"
    return merged, json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}


def label_names(config: Mapping[str, Any]) -> dict[int, str] | None:
    """`{id: "style/group"}` where the config lists styles and groups."""
    if "styles" not in config or "groups" not in config:
        return None
    return LabelTable(tuple(config["styles"]), tuple(config["groups"])).names()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dim", type=int, help="width of an attention head (default: 64)")
    parser.add_argument("--noise-std", type=float, help="training noise in [-1, 1] units (default: from the file name)")
    parser.add_argument("--in-channels", type=int, help="image channels (default: 3 where the token width allows)")


def convert(source: Path, arguments: argparse.Namespace) -> Any:
    """The pipeline that `scripts/convert.py` saves; it samples sequentially until a strategy is planned.

    Raises:
        ConversionError: wrong keys or shapes, flags that contradict the weights, or nothing tells the training noise.
    """
    from dit_suite.pipelines.pipeline_tarflow import TarFlowPipeline
    from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler

    state_dict, config = read_source(source)
    flags = {name: getattr(arguments, name, None) for name in ("head_dim", "noise_std", "in_channels")}
    given = from_original_config(config) | {name: value for name, value in flags.items() if value is not None}
    if "noise_std" not in given:
        raise ConversionError(
            f"nothing tells the training noise of {source.name}, which the score step has to remove: give --noise-std "
            "in units of [-1, 1] pixels (0 for a model of uniform noise)"
        )
    model = build_model(state_dict, given)
    return TarFlowPipeline(model, GSJacobiScheduler(), id2label=label_names(config))

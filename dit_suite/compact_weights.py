"""Weights in one byte: every matrix as int8 with one scale per row, for bundles that have to be small.

A row w becomes round(w / s) with s = max|w| / 127, so that no weight moves by more than s / 2; everything that is no
matrix (biases, norms, tables) stays in float16. Networks compute in the usual dtypes: this is a way to store, not to
run. `compact_weights.py FOLDER` makes one from any pipeline folder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dit_suite.files import write_atomically, write_json

FILE_NAME = "weights.int8.safetensors"
SCALE = ".int8_scale"


def to_int8(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is stored: int8 matrices `name` with `(rows,)` float32 scales `name.int8_scale`, the rest as float16.

    Raises:
        ValueError: a matrix is not finite.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if not value.is_floating_point():
            stored[name] = value.contiguous()
            continue
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} is not finite and can't be stored")
        if value.ndim < 2:
            stored[name] = value.half().contiguous()
            continue
        rows = value.float().flatten(1)
        scale = (rows.abs().amax(dim=1) / 127.0).clamp(min=torch.finfo(torch.float32).tiny)
        stored[name] = (rows / scale[:, None]).round().to(torch.int8).reshape(value.shape)
        stored[name + SCALE] = scale
    return stored


def from_int8(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict that `to_int8` stored, float32 where it was a floating-point tensor."""
    tensors = {}
    for name, value in stored.items():
        if name.endswith(SCALE):
            continue
        scale = stored.get(name + SCALE)
        if scale is not None:
            value = value.float() * scale.reshape(-1, *(1,) * (value.ndim - 1))
        tensors[name] = value.float() if value.is_floating_point() else value
    return tensors


def is_compact(folder: Path) -> bool:
    """Whether a network's folder holds its weights in this form."""
    return (folder / FILE_NAME).is_file()


def save_compact(network: Any, folder: Path) -> None:
    """Writes `config.json` and the weights of a diffusers model."""
    folder.mkdir(parents=True, exist_ok=True)
    network.save_config(folder)
    path = folder / network.config_name
    config = json.loads(path.read_text("utf-8"))
    write_json({key: value for key, value in config.items() if key != "_name_or_path"}, path)
    stored = to_int8(network.state_dict())
    write_atomically(folder / FILE_NAME, lambda temporary: save_file(stored, temporary, metadata={"format": "pt"}))
    (folder / FILE_NAME).chmod(0o644)


def load_network(cls: type, folder: Path) -> torch.nn.Module:
    """A diffusers model in evaluation mode from its folder, in this form or in the usual one.

    Raises:
        ValueError: the stored weights are not exactly those of the class.
        OSError: there are none.
    """
    if not is_compact(folder):
        return cls.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    network = cls.from_config(cls.load_config(folder))
    tensors = from_int8(load_file(folder / FILE_NAME))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} do not fit {cls.__name__}: {error}") from None
    return network.eval()

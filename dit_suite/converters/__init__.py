"""Converters: checkpoints in their original key layout become diffusers-layout folders, strictly.

Each module of this package is one converter and is found by its `NAME`:

    NAME = "tarflow"
    ABOUT = "official TarFlow checkpoint (.pth)"
    def add_arguments(parser): ...                        # optional: what the weights' shapes do not tell
    def convert(source: Path, arguments) -> DiffusionPipeline | ModelMixin: ...

`convert` reads the file with `read_checkpoint`, renames every key, and builds the network with `build_strict`, so that
no tensor is dropped or left at its random start without an error. `scripts/convert.py` saves what it returns.
"""

import argparse
import importlib
import pickle
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file

_CONTAINERS = ("ema", "model_ema", "ema_state_dict", "model", "state_dict", "module")
_WRAPPERS = ("module.", "_orig_mod.")


class ConversionError(ValueError):
    """The checkpoint does not fit the network: the message names the keys."""


@dataclass(frozen=True)
class Converter:
    """One row of the table of converters."""

    name: str
    about: str
    convert: Callable[[Path, argparse.Namespace], Any]
    add_arguments: Callable[[argparse.ArgumentParser], None]


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """A converter whose checkpoints need no flags."""


def discover() -> dict[str, Converter]:
    """Every converter of this package by name."""
    found = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "NAME"):
            add = getattr(module, "add_arguments", _no_arguments)
            found[module.NAME] = Converter(module.NAME, module.ABOUT, module.convert, add)
    return found


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a `.pt`, `.pth`, `.bin` or `.safetensors` file, by their original names, on the CPU.

    A training checkpoint may nest them: the averaged weights (`ema`) are preferred, then `model` or `state_dict`. A
    prefix that a wrapper (DDP, torch.compile) put before every key is removed. Pickles are read with `weights_only`, so
    a file cannot run code; argparse's Namespace, which official training scripts save, is the one extra type let in.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: it cannot be read safely, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        elif path.suffix in (".pt", ".pth", ".bin"):
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=_may_map(path))
        else:
            raise ConversionError(f"{path.name} must be a .pt, .pth, .bin or .safetensors file")
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(f"{path.name} cannot be read as plain weights: {reason}") from error
    return _unwrap(content, path.name)


def _may_map(path: Path) -> bool:
    """True for the zip format of torch.save, which can be mapped instead of read."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unwrap(content: Any, name: str) -> dict[str, torch.Tensor]:
    while isinstance(content, Mapping):
        inner = next((key for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{name} holds no state dict")
    strange = [key for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ConversionError(f"{name} holds {strange[0]!r}, which is not a tensor")
    tensors = dict(content)
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key[len(prefix) :]: value for key, value in tensors.items()}
    return tensors


def check_keys(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises `ConversionError` naming the keys unless both lists are empty."""
    problems = []
    for word, keys in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            problems.append(f"{len(keys)} {word}: {', '.join(keys[:5])}{more}")
    if problems:
        raise ConversionError("the keys do not fit the network; " + "; ".join(problems))


def build_strict(
    model_class: type[torch.nn.Module], config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> torch.nn.Module:
    """Builds `model_class(**config)` with exactly these weights, in eval mode.

    The parameters are created without memory and replaced by the given tensors (no copy, their dtype kept), so a
    full-size model needs its own size once.

    Args:
        tensors: one tensor per entry of the model's state dict, under the model's own names.

    Raises:
        ConversionError: a key is missing or unexpected, or a shape differs.
    """
    with init_empty_weights(include_buffers=False):
        model = model_class(**config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_keys(set(expected) - set(tensors), set(tensors) - set(expected))
    wrong = [name for name, shape in expected.items() if tuple(tensors[name].shape) != shape]
    if wrong:
        name = wrong[0]
        raise ConversionError(
            f"{name} has shape {tuple(tensors[name].shape)}, the network needs {expected[name]}"
            f" ({len(wrong)} tensors differ)"
        )
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    return model.requires_grad_(True).eval()

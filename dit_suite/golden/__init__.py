"""Golden fixtures: recorded inputs and outputs that this code must reproduce.

A fixture is one safetensors file. Its tensors are named `state_dict.<original key>`, `input.<name>` and
`output.<name>`; its metadata holds `config` (JSON) and `about`. Which code checks a file follows from the file's name:
each module of this package is one family and names the prefixes it answers for:

    FAMILY = "tarflow"
    PREFIXES = ("tarflow_",)
    def check(tensors, config) -> list[Result]: ...

`check` takes any file of its family: sizes, depths, seeds and partitions come from `config` and from the tensors.
"""

import importlib
import json
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Result:
    """One compared output: the largest error found and the largest one accepted."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """False also where the error is not a number."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Family:
    """The code that answers for the fixtures of one technique."""

    name: str
    prefixes: tuple[str, ...]
    check: Callable[[Tensors, dict[str, Any]], list[Result]]


def read_fixture(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (under their full names) and the decoded `config` of a fixture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a fixture (not safetensors, no `config`, no `output.*`).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no fixture {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        config = json.loads(metadata["config"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is not a golden fixture: {error!r}") from error
    if not section(tensors, "output"):
        raise ValueError(f"{path.name} is not a golden fixture: it holds no output.* tensor")
    return tensors, config


def section(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors below `prefix`, e.g. `section(tensors, "state_dict")`, with `prefix.` removed from their names."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}


def compare(
    name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float, *, relative: bool = False
) -> Result:
    """Compares two tensors of one shape by their largest absolute difference.

    Args:
        tolerance: the largest difference accepted; integer and bool tensors are counted exactly, so use 0 for them.
        relative: divides the difference by the largest magnitude in `expected`.

    A difference in shape, or a value that is not finite in one tensor and not equal in the other, is an infinite error.
    """
    if tuple(actual.shape) != tuple(expected.shape):
        return Result(f"{name} (shape {tuple(actual.shape)}, expected {tuple(expected.shape)})", math.inf, tolerance)
    if expected.numel() == 0:
        return Result(name, 0.0, tolerance)
    got, want = actual.detach().to(torch.float64), expected.detach().to(torch.float64)
    difference = torch.where(got == want, 0.0, (got - want).abs())
    error = float(torch.nan_to_num(difference, nan=math.inf, posinf=math.inf).max())
    if relative:
        error /= max(float(want.abs().max()), torch.finfo(torch.float32).tiny)
    return Result(name, error, tolerance)


def discover() -> tuple[Family, ...]:
    """Every family module of this package, by name."""
    found = []
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "FAMILY"):
            found.append(Family(module.FAMILY, tuple(module.PREFIXES), module.check))
    return tuple(found)


def family_of(path: str | Path, families: tuple[Family, ...] | None = None) -> Family | None:
    """The family whose prefix the file's name starts with (the longest prefix wins), or None."""
    name = Path(path).name
    matches = [(prefix, family) for family in families or discover() for prefix in family.prefixes]
    matches = [(prefix, family) for prefix, family in matches if name.startswith(prefix)]
    return max(matches, key=lambda match: len(match[0]))[1] if matches else None

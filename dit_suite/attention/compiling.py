"""Torch's compiler as attention kernels use it: whole graphs, fixed shapes, an error instead of a silent eager run."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

# Every shape, dtype and table width is a variant of its own; torch would give up after 8.
VARIANTS = 256


@functools.lru_cache(maxsize=1)
def _compiled_probe() -> Callable:
    return torch.compile(lambda x: x + int(torch.compiler.is_dynamo_compiling()), backend="eager")


def compilation_is_off() -> bool:
    """Whether torch runs compiled functions eagerly now (`TORCH_COMPILE_DISABLE=1`, a forced eager stance)."""
    return bool(torch._dynamo.config.disable) or not bool(_compiled_probe()(torch.zeros(())))


def compiler_missing() -> str | None:
    """Why nothing can be compiled for a CUDA device; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "no Triton compiler is installed"
    return "torch's compilation is switched off" if compilation_is_off() else None


@functools.lru_cache(maxsize=16)
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def run_compiled(function: Callable, *args: Any, **options: Any) -> Any:
    """Calls a function of a module in its compiled form, which is made once per variant of its arguments."""
    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        return _compiled(function)(*args, **options)

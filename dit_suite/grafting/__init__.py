"""Grafting: exchanging operators of a trained diffusion transformer and repairing it by distillation.

Public names are imported when they are first used.
"""

import importlib
from typing import Any

_PUBLIC = {
    "AttentionLocality": "locality",
    "DistillConfig": "distill",
    "Distiller": "distill",
    "GraftPlan": "plan",
    "OperatorSpec": "plan",
    "band_locality": "plan",
    "detect_operators": "plan",
    "graft": "models",
    "interleaved": "plan",
    "most_local": "plan",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Benchmarks: one module each, run by `scripts/benchmark.py NAME`.

A module has `NAME`, `add_arguments(parser)` and `run(args) -> dict`, whose `rows` are the dictionaries of the table.
"""

import importlib
import pkgutil
from types import ModuleType


def discover() -> dict[str, ModuleType]:
    """The benchmark modules by `NAME`."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {module.NAME: module for module in modules if hasattr(module, "NAME")}

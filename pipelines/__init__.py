"""One pipeline per task, importable as `dit_suite.pipelines`.

In a checkout this folder can also be imported by its short name. It then stands for `dit_suite.pipelines`, so that
every class exists once.
"""

import importlib
import pkgutil
import sys

if __name__ == "pipelines":
    _package = importlib.import_module("dit_suite.pipelines")
    for _module in pkgutil.iter_modules(_package.__path__):
        sys.modules[f"pipelines.{_module.name}"] = importlib.import_module(f"dit_suite.pipelines.{_module.name}")
    sys.modules["pipelines"] = _package

"""dit_suite: efficient diffusion transformers behind one diffusers-style interface.

Public names are imported when they are first used, so that `import dit_suite` stays quick.
"""

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AdaSpaConfig": "dit_suite.attention.adaspa",
    "VMoBAConfig": "dit_suite.attention.vmoba",
    "apply_adaspa": "dit_suite.attention.plugin",
    "apply_vmoba": "dit_suite.attention.plugin",
    "block_sparse_attention": "dit_suite.attention.block_sparse",
    "BACConfig": "dit_suite.caching.plan",
    "ProfileRecorder": "dit_suite.caching.recorder",
    "SimilarityProfile": "dit_suite.caching.profile",
    "apply_bac": "dit_suite.caching.bac",
    "GraftPlan": "dit_suite.grafting.plan",
    "graft": "dit_suite.grafting.models",
    "load_pipeline": "dit_suite.checkpoints",
    "sample_generators": "dit_suite.schedulers.generators",
}

__all__ = ["__version__", *_PUBLIC]

# In a checkout the package `dit_suite.pipelines` is the top-level folder `pipelines/`; a wheel carries it inside.
_package = Path(__file__).resolve().parent
if not (_package / "pipelines").is_dir() and (_package.parent / "pipelines" / "__init__.py").is_file():
    __path__.append(str(_package.parent))


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dit_suite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

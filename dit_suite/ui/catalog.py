"""Which checkpoints the app offers, and what it can tell of them without opening the network."""

import json
from dataclasses import dataclass
from typing import Any

from dit_suite.checkpoints import bundled_index, find_checkpoint
from dit_suite.registry import TECHNIQUES, Technique


@dataclass(frozen=True)
class Offer:
    """One checkpoint on offer: its name, technique, and label names for class-conditional models."""

    name: str
    technique: Technique
    labels: tuple[str, ...]


def _labels(model_index: dict[str, Any]) -> tuple[str, ...]:
    table = model_index.get("id2label") or {}
    return tuple(table[key] for key in sorted(table, key=int))


def offers(extra: tuple[str, ...] = ()) -> list[Offer]:
    """Bundled checkpoints that are present, the registry's first, then the extra ones.

    Raises:
        ValueError, FileNotFoundError: an extra checkpoint can't be opened.
    """
    found = []
    first = [row.bundled for row in TECHNIQUES if row.bundled in bundled_index()]
    others = [name for name in bundled_index() if name not in first]
    for name in (*first, *others, *extra):
        try:
            checkpoint = find_checkpoint(name)
        except FileNotFoundError:
            if name in extra:
                raise
            continue
        model_index = json.loads((checkpoint.folder / "model_index.json").read_text("utf-8"))
        found.append(Offer(name, checkpoint.technique, _labels(model_index)))
    return found

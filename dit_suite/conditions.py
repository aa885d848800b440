"""Class labels and actions: what a network knows, and the one sentence for what it does not.

Both are told from a checkpoint's JSON files, so that a request is refused before the network is opened. Nothing here
imports torch.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ClassLabels:
    """The classes of a network.

    Attributes:
        count: number of classes, the null class not counted; 0 for an unconditional network.
        null: the id that means "no class", or None where the network has none.
        names: class id (as text) to name, or to a comma list of names; None for no names.
    """

    count: int
    null: int | None
    names: Mapping[str, str] | None = None

    @property
    def by_name(self) -> dict[str, tuple[int, ...]]:
        """Class ids by name (lower case); in ImageNet a few names belong to two classes."""
        found: dict[str, tuple[int, ...]] = {}
        for key, names in (self.names or {}).items():
            for name in names.split(","):
                name = name.strip().lower()
                found[name] = (*found.get(name, ()), int(key))
        return found

    def ids(self, labels: Any) -> list[int]:
        """Class ids of names or ids; None is the null class where the network has one.

        Raises:
            ValueError: a name is unknown or belongs to several classes, an id is out of range, or nothing was given.
        """
        given = labels if isinstance(labels, (list, tuple)) else [labels]
        if not given:
            raise ValueError("class_labels must name at least one class")
        return [self._id(label) for label in given]

    def _id(self, label: int | str | None) -> int:
        if label is None:
            if self.null is None:
                raise ValueError("class_labels must be ids or names, got None (this network has no null class)")
            return self.null
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise ValueError(f"class_labels must be ids or names, got {label!r}")
        if not self.count:
            raise ValueError(f"this network is unconditional: class_labels must be None, got {label!r}")
        if isinstance(label, str) and not label.strip().isdecimal():
            return self._named(label)
        value = int(label)
        if not (0 <= value < self.count or value == self.null):
            raise ValueError(f"class_labels must lie between 0 and {self.count - 1}, got {value}")
        return value

    def _named(self, label: str) -> int:
        names = self.by_name
        ids = names.get(label.strip().lower(), ())
        if len(ids) > 1:
            raise ValueError(f"{label!r} is the name of the classes {', '.join(map(str, ids))}: give the id")
        if not ids:
            close = difflib.get_close_matches(label.strip().lower(), names, n=3)
            hint = f"; close names: {', '.join(close)}" if close else "; this model has no names"
            if names and not close:
                hint = f"; the names begin with {', '.join(list(names)[:5])}"
            raise ValueError(f"there is no class {label!r}{hint}")
        return ids[0]


def action_ids(actions: Sequence[int | str], names: Sequence[str]) -> list[int]:
    """Indices of actions given by index or name.

    Raises:
        ValueError: an action does not exist.
    """
    found = [names.index(action) if isinstance(action, str) and action in names else action for action in actions]
    for value in found:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(names):
            raise ValueError(f"there is no action {value!r}; they are 0..{len(names) - 1}: {', '.join(names)}")
    return found


def check_conditions(kind: str, conditions: Sequence[Any], folder: Path) -> None:
    """Refuses conditions that the checkpoint in `folder` does not know. Prompts are never refused here.

    Args:
        kind: "prompt", "class_labels" or "actions".
        conditions: one per sample.
        folder: a pipeline folder.

    Raises:
        ValueError: a class or an action does not exist.
    """
    if kind == "prompt":
        return
    config, pipeline = (
        json.loads((folder / name).read_text("utf-8")) for name in ("transformer/config.json", "model_index.json")
    )
    if kind == "class_labels":
        count = config.get("num_classes", config.get("num_embeds_ada_norm")) or 0
        has_null = config.get("class_dropout_prob", 0.1) > 0
        ClassLabels(count, count if has_null else None, pipeline.get("id2label")).ids(list(conditions))
    else:
        for actions in conditions:
            action_ids(actions, pipeline["action_names"])

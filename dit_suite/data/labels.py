"""The class labels of a picture set: one saved table, style x group."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_suite.files import write_json

FILE_NAME = "labels.json"


@dataclass(frozen=True)
class LabelTable:
    """Class id = styles.index(style) * len(groups) + groups.index(group)."""

    styles: tuple[str, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.styles) * len(self.groups)

    def id_of(self, style: str, group: str) -> int:
        """The class of a picture; `ValueError` for a style or group that is not in the table."""
        for value, known, kind in ((style, self.styles, "style"), (group, self.groups, "group")):
            if value not in known:
                raise ValueError(f"the label table has no {kind} {value!r}; it has {', '.join(known)}")
        return self.styles.index(style) * len(self.groups) + self.groups.index(group)

    def narrowed(self, styles: Sequence[str] = (), groups: Sequence[str] = ()) -> "LabelTable":
        """The table of some styles and groups (none named: all), in this table's order; the ids are counted anew.

        Raises:
            ValueError: a style or group that the table does not have.
        """
        for values, known, kind in ((styles, self.styles, "style"), (groups, self.groups, "group")):
            for value in values:
                if value not in known:
                    raise ValueError(f"the label table has no {kind} {value!r}; it has {', '.join(known)}")
        return LabelTable(
            tuple(name for name in self.styles if not styles or name in styles),
            tuple(name for name in self.groups if not groups or name in groups),
        )

    def names(self) -> dict[int, str]:
        """`{id: "style/group"}`, the form that pipelines keep as `id2label`."""
        pairs = [(style, group) for style in self.styles for group in self.groups]
        return {index: f"{style}/{group}" for index, (style, group) in enumerate(pairs)}

    def to_dict(self) -> dict[str, Any]:
        rule = "styles.index(style) * len(groups) + groups.index(group)"
        return {"styles": list(self.styles), "groups": list(self.groups), "rule": rule}

    def save(self, folder: Path) -> None:
        """Writes `labels.json` into a data set or a checkpoint folder."""
        write_json(self.to_dict(), folder / FILE_NAME)

    @classmethod
    def load(cls, folder: Path) -> "LabelTable":
        """Reads `labels.json`; `FileNotFoundError` when the folder has none."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {FILE_NAME}; build the data set with scripts/prepare_data.py")
        stored = json.loads(path.read_text("utf-8"))
        return cls(tuple(stored["styles"]), tuple(stored["groups"]))

"""Rows of a data set that `prepare_data.py` wrote, chosen on the command line.

`FILE.parquet` is all rows, `FILE.parquet:heldout+pairs` those of two splits, and
`FILE.parquet:heldout,style=noto+fluent-3d` adds a choice by another column. `size=32` chooses no rows: it makes the
pictures as small as a model that was trained with `data.size: 32` saw them.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

SEPARATOR = ".parquet:"
SIZE = "size"


def parse_dataset(text: str) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """The parquet file and the accepted values by column; `ValueError` for a filter that cannot be read."""
    file, separator, filters = text.partition(SEPARATOR)
    if not separator:
        return Path(text), {}
    where: dict[str, tuple[str, ...]] = {}
    for part in filters.split(","):
        column, equals, values = part.partition("=")
        if not equals:
            column, values = "split", part
        if not column or not values:
            raise ValueError(f"{text!r} can't be read: expected FILE.parquet:SPLIT[+SPLIT][,COLUMN=VALUE[+VALUE]]")
        where[column.strip()] = tuple(value.strip() for value in values.split("+"))
    return Path(f"{file}.parquet"), where


def split_size(where: Mapping[str, Sequence[str]]) -> tuple[dict[str, Sequence[str]], int]:
    """The choice of rows without `size`, and that size in pixels (0: as stored).

    Raises:
        ValueError: the size is no whole number from 1 to 4096.
    """
    rows = {column: values for column, values in where.items() if column != SIZE}
    text = "+".join(where.get(SIZE, ("0",)))
    if not text.isdecimal() or int(text) > 4096 or (SIZE in where and int(text) < 1):
        raise ValueError(f"size={text} is no side in pixels")
    return rows, int(text)


def read_dataset(path: Path, where: Mapping[str, Sequence[str]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The chosen rows with at least `columns`, in file order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unreadable file, an absent column, a value that no row has, or no rows left.
    """
    from dit_suite.data.tables import read_rows

    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    rows = read_rows(path, list(dict.fromkeys([*columns, *where])))
    for column, values in where.items():
        known = {str(row[column]) for row in rows}
        for value in values:
            if value not in known:
                raise ValueError(f"{path} has no {column} {value!r}; it has {', '.join(sorted(known)[:20])}")
    kept = [row for row in rows if all(str(row[column]) in values for column, values in where.items())]
    if not kept:
        raise ValueError(f"{path} holds no rows" + (" of that choice" if where else ""))
    return kept


def _shuffled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: sha256(f"{row['label']}/{row['style']}".encode()).digest())


def conditions_of(text: str, kind: str) -> tuple[str, ...]:
    """What a model should be asked for to match the chosen rows, one condition a row.

    The order is a fixed shuffle (by hash), so that the first N are a fair draw from all rows.

    Args:
        text: see `parse_dataset`.
        kind: "prompt" gives captions with the style in words, "class_labels" gives `style/group` names.

    Raises:
        ValueError: another kind, or see `read_dataset`.
    """
    from dit_suite.data.captions import captions_of

    path, chosen = parse_dataset(text)
    where, _ = split_size(chosen)
    if kind == "prompt":
        rows = _shuffled(read_dataset(path, where, ("label", "style")))
        return tuple(captions_of(row)[1] for row in rows)
    if kind == "class_labels":
        rows = _shuffled(read_dataset(path, where, ("label", "style", "group")))
        return tuple(f"{row['style']}/{row['group']}" for row in rows)
    raise ValueError(f"conditions from a data set are prompts or class labels, not {kind}")

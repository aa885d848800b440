"""Parquet files that appear whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dit_suite.files import write_atomically


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, about: Mapping[str, str]) -> None:
    """Writes rows as one zstd parquet file; `about` goes into the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata(dict(about)))
    write_atomically(path, lambda part: pq.write_table(table, part, compression="zstd", row_group_size=512))


def table_metadata(path: Path) -> dict[str, str]:
    """The `about` of a file that `write_table` wrote."""
    stored = pq.read_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in stored.items() if not key.startswith(b"ARROW")}


def read_rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """All rows, or the chosen columns of them.

    Raises:
        ValueError: not a readable parquet file, or a column is absent.
    """
    try:
        present = pq.read_schema(path).names
        absent = [name for name in columns or () if name not in present]
        if absent:
            raise ValueError(f"{path} has no column {absent[0]!r}; it holds {', '.join(present)}")
        return pq.read_table(path, columns=None if columns is None else list(columns)).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None

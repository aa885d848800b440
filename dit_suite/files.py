"""Files are written whole or not at all: under a temporary name beside the target, then renamed."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Any) -> None:
    """Calls `write(temporary path)` beside `path`, then renames: the file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value: Any, path: Path) -> None:
    """Writes JSON whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))

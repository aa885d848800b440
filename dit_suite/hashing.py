"""The hash by which files are recognised."""

import hashlib
from pathlib import Path


def sha256_of(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

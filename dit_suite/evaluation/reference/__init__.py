"""Reference statistics that come with the package, by name."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def bundled_references() -> dict[str, Path]:
    """Name (`emoji64-heldout`, ...) to statistics file."""
    return {path.stem.replace("_", "-"): path for path in sorted(FOLDER.glob("*.npz"))}

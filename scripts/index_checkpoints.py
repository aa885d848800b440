"""Rewrites `checkpoints/index.json` from the bundled folders: sha256 of the weights, size, licence and source.

    python scripts/index_checkpoints.py

Licence and source are read from the front matter of each model card (`license:` and `source:`).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.checkpoints import weights_sha256
from dit_suite.files import write_json


def read_card(path: Path) -> dict[str, str]:
    """The `key: value` lines between the two `---` lines at the top of a model card."""
    lines = path.read_text("utf-8").splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        raise ValueError(f"{path} has no front matter")
    front = lines[1 : lines.index("---", 1)]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in front)}


def describe(folder: Path) -> dict[str, object]:
    """One row of the index."""
    card = read_card(folder / "README.md")
    for key in ("license", "source"):
        if key not in card:
            raise ValueError(f"{folder / 'README.md'} does not state its {key}")
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return {
        "sha256": weights_sha256(folder),
        "size_bytes": size,
        "licence": card["license"],
        "source": card["source"],
        "hub_id": card.get("hub_id") or None,
        "hub_revision": card.get("hub_revision") or None,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after one sentence about a bad card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parent.parent / "checkpoints"
    parser.add_argument("--root", type=Path, default=root, help="folder that holds the bundles")
    args = parser.parse_args(argv)
    try:
        rows = {path.parent.name: describe(path.parent) for path in sorted(args.root.glob("*/model_index.json"))}
    except (ValueError, OSError) as error:
        print(f"index_checkpoints.py: {error}", file=sys.stderr)
        return 2
    write_json({"checkpoints": rows}, args.root / "index.json")
    print("\n".join(f"{name}: {row['size_bytes'] / 1e6:.1f} MB, {row['licence']}" for name, row in rows.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

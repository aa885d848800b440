"""Writes a pipeline folder again with its network's weights in one byte each: a quarter of float32's size.

    python scripts/compact_weights.py outputs/grafted/stage2/checkpoint --output checkpoints/my-model

`load_pipeline` opens the result like any other folder. Prints how far the weights moved.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after one sentence about the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder that load_pipeline opens, or a bundled name")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    args = parser.parse_args(argv)
    from dit_suite.checkpoints import find_checkpoint, open_pipeline
    from dit_suite.compact_weights import from_int8, save_compact, to_int8
    from dit_suite.files import replacing_folder

    try:
        if args.output.exists():
            raise ValueError(f"{args.output} exists already; choose another --output")
        checkpoint = find_checkpoint(args.folder)
        network = open_pipeline(checkpoint).transformer
        with replacing_folder(args.output) as folder:
            left = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "bac", "*.pt")
            shutil.copytree(checkpoint.folder, folder, ignore=left, dirs_exist_ok=True)
            save_compact(network, folder / "transformer")
    except (ValueError, OSError) as error:
        print(f"compact_weights.py: {error}", file=sys.stderr)
        return 2
    before = network.state_dict()
    moved = sum((value - before[key]).square().sum() for key, value in from_int8(to_int8(before)).items())
    relative = (moved / sum(value.square().sum() for value in before.values())).sqrt()
    size = sum(path.stat().st_size for path in args.output.rglob("*.safetensors"))
    print(f"{args.output}: {size / 1e6:.1f} MB, relative change of the weights {relative:.2e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

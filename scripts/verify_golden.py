"""Recomputes golden fixtures with this project's code and prints the largest error of every output.

    python scripts/verify_golden.py tests/golden/dit_forward.safetensors ...

The family is chosen by the file's name. Exit status: 0 when every output is within tolerance, 1 when one is not, 2 when
a file cannot be read or belongs to no family.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.golden import discover, family_of, read_fixture

OUTSIDE, UNREADABLE = 1, 2


def verify(path: Path, families: tuple) -> int:
    """Checks one file, prints one line per output, and returns its exit status."""
    family = family_of(path, families)
    if family is None:
        known = ", ".join(prefix for entry in families for prefix in entry.prefixes)
        print(f"{path}: no family checks this name; known prefixes: {known}", file=sys.stderr)
        return UNREADABLE
    try:
        tensors, config = read_fixture(path)
    except (OSError, ValueError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return UNREADABLE
    results = family.check(tensors, config)
    print(f"{path} ({family.name})")
    for result in results:
        verdict = "ok" if result.passed else "FAILED"
        print(f"  {verdict:6} {result.name:48} error {result.error:.3g}  tolerance {result.tolerance:.3g}")
    if not results:
        print("  FAILED nothing was compared")
    return 0 if results and all(result.passed for result in results) else OUTSIDE


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="golden fixture (.safetensors)")
    arguments = parser.parse_args(argv)
    families = discover()
    return max(verify(path, families) for path in arguments.files)


if __name__ == "__main__":
    sys.exit(main())

"""Measures a technique beside its baseline in one run on this machine.

    python scripts/benchmark.py NAME [options] [--output FOLDER]
    python scripts/benchmark.py --all --output outputs/benchmarks

Prints a table, and writes NAME.json with the hardware, the versions and every row.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.benchmarks import discover
from dit_suite.files import write_json
from dit_suite.metadata import versions


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    found = {"machine": platform.machine(), "cpu_count": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in [columns, *cells]]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_one(module: Any, args: argparse.Namespace, output: Path | None) -> None:
    """Runs one benchmark, prints its table and writes its JSON."""
    result = {"benchmark": module.NAME, "hardware": hardware(), "software": versions()} | module.run(args)
    print(f"\n{module.NAME} on {json.dumps(result['hardware'])}\n{table(result['rows'])}")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(result, output / f"{module.NAME}.json")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after one sentence about a bad input."""
    modules = discover()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="run every benchmark that does not take hours")
    parser.add_argument("--output", type=Path, help="folder for the JSON files")
    commands = parser.add_subparsers(dest="name", metavar="NAME")
    parsers = {}
    for name, module in modules.items():
        parsers[name] = commands.add_parser(name, help=(module.__doc__ or "").strip().splitlines()[0])
        module.add_arguments(parsers[name])
        parsers[name].add_argument("--output", type=Path, default=argparse.SUPPRESS, help="folder for the JSON file")
    args = parser.parse_args(argv)
    if args.all == (args.name is not None):
        parser.error("give either the name of a benchmark or --all")
    try:
        short = [name for name, module in modules.items() if not getattr(module, "LONG", False)]
        for name in short if args.all else [args.name]:
            run_one(modules[name], parsers[name].parse_args([]) if args.all else args, args.output)
    except (ValueError, FileNotFoundError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

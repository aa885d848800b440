"""Turns an original checkpoint into a diffusers-layout folder.

    python scripts/convert.py --from dit DiT-XL-2-256x256.pt my-dit --vae path/to/sd-vae-ft-ema
    python scripts/convert.py --list

Every key is accounted for: a missing or unexpected one, or a wrong shape, ends with exit status 1 and no output folder.
The folder appears whole or not at all.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.converters import ConversionError, Converter, discover
from dit_suite.files import replacing_folder


def _parse(argv: Sequence[str] | None, converters: dict[str, Converter]) -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--from", dest="layout", choices=sorted(converters))
    known, _ = first.parse_known_args(argv)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="layout", choices=sorted(converters), help="layout of the source")
    parser.add_argument("--list", action="store_true", help="list the layouts and exit")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: %(default)s)")
    parser.add_argument("source", type=Path, nargs="?", help=".pt, .pth or .safetensors file, or a folder")
    parser.add_argument("output", type=Path, nargs="?", help="folder to create")
    if known.layout:
        converters[known.layout].add_arguments(parser.add_argument_group(f"options of --from {known.layout}"))
    arguments = parser.parse_args(argv)
    if not arguments.list and not (arguments.layout and arguments.source and arguments.output):
        parser.error("give --from LAYOUT, the source and the output folder")
    return arguments


def save_whole(product: Any, output: Path, max_shard_size: str = "5GB") -> None:
    """Saves a pipeline or a model next to `output` and renames it into place.

    Raises:
        FileExistsError: `output` is a file or a folder that is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already and is not an empty folder")
    with replacing_folder(output) as part:
        product.save_pretrained(part, max_shard_size=max_shard_size)


def main(argv: Sequence[str] | None = None) -> int:
    converters = discover()
    arguments = _parse(argv, converters)
    if arguments.list:
        for converter in converters.values():
            print(f"{converter.name:16} {converter.about}")
        return 0
    try:
        product = converters[arguments.layout].convert(arguments.source, arguments)
        save_whole(product, arguments.output, arguments.max_shard_size)
    except (ConversionError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

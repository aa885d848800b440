"""Builds a data set: `python scripts/prepare_data.py {emoji64,anim64,freedoom,folder,captions} ...`.

    python scripts/prepare_data.py emoji64 --output data/emoji64 --download
    python scripts/prepare_data.py captions --data data/emoji64
    python scripts/prepare_data.py anim64 --output data/anim64 --download
    python scripts/prepare_data.py freedoom --output data/freedoom
    python scripts/prepare_data.py folder --source my_pictures --output data/mine

Every builder is deterministic, goes on where it was interrupted, checks licences and writes a data card.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.data.anim64 import AnimationOptions, build_anim64
from dit_suite.data.emoji64 import EmojiOptions, build_emoji64
from dit_suite.data.folder import FolderOptions, build_folder
from dit_suite.data.freedoom import FreedoomOptions, build_freedoom


def _say(line: str) -> None:
    print(line, flush=True)


def _emoji64(arguments: argparse.Namespace) -> Path:
    return build_emoji64(
        arguments.output,
        EmojiOptions.from_namespace(arguments),
        cache=arguments.cache,
        download=arguments.download,
        workers=arguments.workers,
        report=_say,
    )


def _anim64(arguments: argparse.Namespace) -> Path:
    return build_anim64(
        arguments.output,
        AnimationOptions.from_namespace(arguments),
        cache=arguments.cache,
        download=arguments.download,
        workers=arguments.workers,
        report=_say,
    )


def _freedoom(arguments: argparse.Namespace) -> Path:
    return build_freedoom(arguments.output, FreedoomOptions.from_namespace(arguments), report=_say)


def _folder(arguments: argparse.Namespace) -> Path:
    return build_folder(arguments.source, arguments.output, FolderOptions.from_namespace(arguments), report=_say)


def _captions(arguments: argparse.Namespace) -> Path:
    from dit_suite.data.captions import FILE_NAME, all_captions, encode_captions, save_states
    from dit_suite.data.tables import read_rows
    from dit_suite.text_encoders import TextEncoderSource, load_text_encoder

    tables = [path for name in ("images.parquet", "clips.parquet") if (path := arguments.data / name).is_file()]
    if not tables:
        raise FileNotFoundError(f"{arguments.data} holds no images.parquet and no clips.parquet")
    rows = read_rows(tables[0])
    wanted = [row for row in rows if arguments.split == "all" or (row.get("split") or "train") == arguments.split]
    captions = all_captions(wanted, arguments.tags)
    _say(f"{len(captions)} captions of {len(wanted)} rows")
    states = encode_captions(captions, load_text_encoder(TextEncoderSource()), arguments.max_length)
    target = arguments.data / FILE_NAME
    save_states(target, captions, states, arguments.storage)
    _say(f"{target.stat().st_size / 1e6:.1f} MB")
    return target


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], Path], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        return command

    for name, run, options, about in (
        ("emoji64", _emoji64, EmojiOptions, "emoji art of several styles (npm packages)"),
        ("anim64", _anim64, AnimationOptions, "animated emoji as clips (npm packages, 730 MB)"),
    ):
        command = add(name, run, about)
        command.add_argument("--output", type=Path, default=Path("data") / name, help="folder of the data set")
        command.add_argument("--cache", type=Path, default=Path("data/cache"), help="folder of `npm pack` files")
        command.add_argument("--download", action="store_true", help="let npm fetch what the cache lacks")
        command.add_argument("--workers", type=int, help="processes (default: one per core)")
        options.add_arguments(command)
    command = add("freedoom", _freedoom, "recorded play on Freedoom levels (pip install vizdoom==1.3.2)")
    command.add_argument("--output", type=Path, default=Path("data/freedoom"), help="folder of the data set")
    FreedoomOptions.add_arguments(command)
    command = add("folder", _folder, "your own pictures or videos")
    command.add_argument("--source", type=Path, required=True, help="folder with class sub-folders or captions.jsonl")
    command.add_argument("--output", type=Path, required=True, help="folder of the data set")
    FolderOptions.add_arguments(command)
    command = add("captions", _captions, "encode the captions of a set once, so that training needs no text encoder")
    command.add_argument("--data", type=Path, required=True, help="folder of the data set")
    command.add_argument("--split", default="train", help="rows whose captions are encoded, or all")
    command.add_argument("--tags", action="store_true", help="also captions with tags (a larger file)")
    command.add_argument("--max-length", type=int, default=24, help="longest caption in tokens")
    command.add_argument("--storage", choices=("int8", "float16"), default="int8", help="float16 doubles the file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 on bad input."""
    arguments = build_parser().parse_args(argv)
    try:
        _say(str(arguments.run(arguments)))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

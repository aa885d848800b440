"""Samples a model into a folder: pictures or clips with metadata and, on request, an ADM-layout npz.

    python scripts/sample.py --pipeline pixart --prompts "red apple, flat style" --num-samples 4 --output outputs/apple
    accelerate launch --num_processes 8 scripts/sample.py --pipeline pixart --prompts-file prompts.txt ...   (GPUs)
    torchrun --nproc-per-node 2 scripts/sample.py --pipeline pixart --prompts-file prompts.txt ...           (CPU)
    python scripts/sample.py --from-image outputs/apple/000000.png --output outputs/again

A run that was stopped goes on when the same command is given again. `--pipeline NAME --help` or `--model NAME --help`
lists the options of NAME. An option that is not given has the value that the checkpoint recommends (its sampling.json),
else that of the pipeline.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.checkpoints import Checkpoint, find_checkpoint
from dit_suite.metadata import read_record
from dit_suite.options import Options
from dit_suite.registry import ACCELERATIONS, TECHNIQUES, technique
from dit_suite.sample_files import SampleFolder, distributed_state
from dit_suite.sampling import SamplingJob, StartImage, job_of_record, parse_acceleration


def build_parser(pipeline: str | None, defaults: Options | None = None) -> argparse.ArgumentParser:
    """The parser, with the options of `pipeline` and their defaults if they are known already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in TECHNIQUES]
    parser.add_argument("--pipeline", choices=names, help="technique; default: the one the checkpoint belongs to")
    parser.add_argument("--model", help="bundled name, folder, or owner/name@revision (default: the bundled one)")
    conditions = parser.add_mutually_exclusive_group()
    conditions.add_argument("--prompts", nargs="+", metavar="TEXT", help="sample i uses prompt i modulo their number")
    conditions.add_argument("--prompts-file", type=Path, help="a text file, one prompt a line")
    conditions.add_argument("--class-labels", nargs="+", metavar="LABEL", help="ids or names, used in turn")
    conditions.add_argument("--actions-file", type=Path, help="JSON: a list of action lists (numbers or names)")
    conditions.add_argument("--from-image", type=Path, help="make the sample in this file again, from its metadata")
    parser.add_argument(
        "--start-image", type=Path, metavar="FILE", help="first frame of every clip, for video models that take one"
    )
    parser.add_argument("--num-samples", type=int, help="default: one per prompt")
    parser.add_argument("--seed", type=int, default=0, help="sample i draws everything from seed + i (default: 0)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True, help="folder for the samples")
    parser.add_argument("--npz", action="store_true", help="also write samples_NxHxWx3.npz (key arr_0)")
    parser.add_argument("--sheet", action="store_true", help="also write sheet.png, the pictures side by side")
    parser.add_argument("--clip-format", default="mp4", choices=("mp4", "gif"), help="file type of clips")
    parser.add_argument("--frames", action="store_true", help="also write the frames of clips as PNGs")
    parser.add_argument("--no-metadata", action="store_true", help="write nothing but pixels into the files")
    parser.add_argument("--scheduler", help="flow-euler, flow-heun, ddim, ddpm, dpm-solver or unipc")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", help="default: the GPU of this process, if there is one")
    plugins = ", ".join(row.name for row in ACCELERATIONS) or "none"
    parser.add_argument(
        "--accelerate", action="append", default=[], metavar="NAME[:key=value,...]", help=f"plug-in: {plugins}"
    )
    if pipeline is not None:
        options = parser.add_argument_group(f"options of {pipeline}")
        technique(pipeline).options_class().add_arguments(options, defaults)
    return parser


def chosen_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that `--model` names, else the bundled one of `--pipeline`.

    Raises:
        ValueError, FileNotFoundError: neither is given, they do not belong together, or there is no such checkpoint.
    """
    if args.model is not None:
        checkpoint = find_checkpoint(args.model)
        if args.pipeline not in (None, checkpoint.technique.name):
            raise ValueError(f"{args.model} belongs to {checkpoint.technique.name}, not to {args.pipeline}")
        return checkpoint
    if args.pipeline is None:
        raise ValueError("give --pipeline or --model")
    bundled = technique(args.pipeline).bundled
    if bundled is None:
        raise ValueError(f"{args.pipeline} has no bundled checkpoint; give --model")
    return find_checkpoint(bundled)


def read_lines(path: Path) -> tuple[str, ...]:
    """Non-empty lines of a text file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise ValueError(f"{path} holds no prompt")
    return lines


def read_actions(path: Path) -> tuple[tuple[int | str, ...], ...]:
    """Action lists from a JSON file: a list of lists of numbers or names."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        lists = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from None
    if not (isinstance(lists, list) and lists and all(isinstance(row, list) and row for row in lists)):
        raise ValueError(f"{path} must hold a list of non-empty action lists")
    if not all(type(action) in (int, str) for row in lists for action in row):
        raise ValueError(f"the actions in {path} must be numbers or names")
    return tuple(map(tuple, lists))


def read_conditions(args: argparse.Namespace, kind: str) -> tuple[Any, ...]:
    """The per-sample conditions of the kind that the pipeline takes."""
    given = {
        "prompt": args.prompts or args.prompts_file,
        "class_labels": args.class_labels,
        "actions": args.actions_file,
    }
    flags = {"prompt": "--prompts or --prompts-file", "class_labels": "--class-labels", "actions": "--actions-file"}
    if given[kind] is None:
        raise ValueError(f"this pipeline needs {flags[kind]}")
    if kind == "prompt":
        return read_lines(args.prompts_file) if args.prompts_file else tuple(args.prompts)
    if kind == "class_labels":
        return tuple(int(label) if label.isdigit() else label for label in args.class_labels)
    return read_actions(args.actions_file)


def read_accelerations(texts: list[str]) -> dict[str, Any]:
    """Plug-ins by name with their options, each named once."""
    found: dict[str, Any] = {}
    for text in texts:
        name, config = parse_acceleration(text)
        if name in found:
            raise ValueError(
                f"--accelerate names {name} twice; give its settings together, as {name}:key=value,key=value"
            )
        found[name] = config
    return found


def refuse_settings(args: argparse.Namespace) -> None:
    """`--from-image` takes its settings from the file: those of the command line would be lost without a word."""
    lost = ("start_image", "num_samples", "seed", "batch_size", "scheduler", "dtype", "accelerate", "npz", "sheet")
    for name in lost:
        if getattr(args, name) != build_parser(None).get_default(name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"--from-image makes the very sample again, with the settings in the file: leave out {flag}"
            )


def job_from_arguments(argv: list[str]) -> tuple[argparse.Namespace, SamplingJob, list[int] | None]:
    """Parses the command line into the job and, for `--from-image`, the indices of the batch to make again."""
    first, _ = build_parser(None).parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if first.from_image is not None:
        args = build_parser(None).parse_args(argv)
        refuse_settings(args)
        record = read_record(args.from_image)
        job, indices = job_of_record(record, model=args.model)
        return args, job, indices
    if first.model is None and first.pipeline is None:
        build_parser(None).parse_args(argv)  # a flag that no pipeline has is told first
    checkpoint = chosen_checkpoint(first)
    row = checkpoint.technique
    args = build_parser(row.name, checkpoint.defaults).parse_args(argv)
    options_class = row.options_class()
    job = SamplingJob(
        technique=row.name,
        model=args.model or row.bundled,
        weights_sha256=checkpoint.weights_sha256,
        conditions=read_conditions(args, options_class.condition),
        options=options_class.from_namespace(args, checkpoint.defaults),
        seed=args.seed,
        batch_size=args.batch_size,
        scheduler=args.scheduler,
        dtype=args.dtype,
        accelerations=read_accelerations(args.accelerate),
        start_image=StartImage.of_file(args.start_image) if args.start_image else None,
    )
    return args, job, None


def print_help(argv: list[str]) -> None:
    """The help, with the options of the checkpoint that the flags name; those of `--pipeline` if it is not here."""
    argv = [text for text in argv if text not in ("-h", "--help")]
    args, _ = build_parser(None).parse_known_args([*argv, "--output=."])
    if args.model is None and args.pipeline is None:
        build_parser(None).print_help()
        return
    try:
        checkpoint = chosen_checkpoint(args)
    except FileNotFoundError:
        build_parser(args.pipeline).print_help()
        return
    build_parser(checkpoint.technique.name, checkpoint.defaults).print_help()


def quiet_loading() -> None:
    """One progress bar is enough: the libraries' own bars for loading shards are turned off."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after one sentence about a bad input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if "--help" in argv or "-h" in argv:
            print_help(argv)
            return 0
        args, job, indices = job_from_arguments(argv)
        quiet_loading()
        num_samples = args.num_samples if args.num_samples is not None else len(job.conditions)
        folder = SampleFolder(
            args.output,
            job,
            with_metadata=not args.no_metadata,
            clip_format=args.clip_format,
            with_frames=args.frames,
        )
        if indices is not None:
            print(folder.make_again(read_record(args.from_image)["index"], indices, device=args.device))
            return 0
        folder.run(num_samples, npz=args.npz, sheet=args.sheet, device=args.device)
        if distributed_state().is_main_process:
            print(f"samples 0 to {num_samples - 1}: {args.output}")
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sample.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

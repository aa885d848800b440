"""Scores samples against real ones: one JSON line, with N, intervals and the real-versus-real floor.

    python scripts/evaluate.py --samples outputs/run --reference emoji64-heldout --metrics fd,kid
    python scripts/evaluate.py --samples fast --baseline slow --reference emoji64-heldout --metrics fd,kid,psnr,ssim
    python scripts/evaluate.py --samples a.npz --reference b.npz --metrics fid50k,is --features inception
    torchrun --nproc-per-node 2 scripts/evaluate.py --generate --pipeline pixart \\
        --conditions-from DATA.parquet:heldout+pairs --reference emoji64-heldout --metrics kid
    python scripts/evaluate.py --samples DATA.parquet:train --save-statistics train.npz --compact

Each side is a folder of pictures, an npz with `arr_0`, DATA.parquet[:SPLIT[+SPLIT][,COLUMN=VALUE[+VALUE]]], or a
statistics file (which has no pictures, so no per-pair metrics). With --generate, flags that are not listed here go to
sample.py's parser.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.evaluation.options import EvaluationOptions

SHARED_FLAGS = ("num_samples", "device")


def build_parser() -> argparse.ArgumentParser:
    """The parser of everything but sample.py's own flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    sides = parser.add_argument_group("what is compared")
    sides.add_argument("--samples", help="the run to score")
    sides.add_argument("--generate", action="store_true", help="make the samples now, with sample.py's flags")
    sides.add_argument("--conditions-from", metavar="DATA.parquet[:SPLIT]",
                       help="with --generate: sample i asks for the caption or class of row i")  # fmt: skip
    sides.add_argument("--reference", help="real samples, or the name of bundled statistics (--list-references)")
    sides.add_argument("--baseline", help="another run of the same seeds: per-pair metrics and a paired verdict")
    sides.add_argument("--train-set", help="training samples: nearest-neighbour distances (memorisation)")
    sides.add_argument("--floor", default="auto", help="auto (split the reference), none, or other real samples")
    sides.add_argument("--num-samples", type=int, help="samples to make, or the number the run must hold")
    sides.add_argument("--clips", action="store_true", help="folders hold clips instead of pictures")
    sides.add_argument("--list-references", action="store_true", help="print the bundled statistics and stop")
    how = parser.add_argument_group("how")
    how.add_argument("--metrics", help="fd/fid/fvd sfd/sfid is kid precision recall density coverage "
                     "mmd/cmmd psnr ssim perceptual lpips, comma-separated "
                     "(default: fd,kid where there is a reference)")  # fmt: skip
    how.add_argument("--features", default="enet-lite0", help="enet-lite0 (default), inception, dinov2:PATH, "
                     "clip:PATH, torchscript:FILE, i3d:FILE, random-conv")  # fmt: skip
    how.add_argument(
        "--inception-weights", help="weights-inception-2015-12-05-6726825d.pth; nothing is downloaded then"
    )
    how.add_argument("--foreign-statistics", type=int, metavar="N",
                     help="accept a mu/sigma file without provenance, made from N images")  # fmt: skip
    how.add_argument("--device", help="default: the GPU of this process, if there is one")
    how.add_argument("--bpd", metavar="CHECKPOINT",
                     help="bits per dimension of the samples under a TarFlow")  # fmt: skip
    how.add_argument("--bpd-class-labels", nargs="+", metavar="LABEL",
                     help="ids or names for --bpd, used in turn (default: no class)")  # fmt: skip
    EvaluationOptions.add_arguments(parser.add_argument_group("settings"))
    out = parser.add_argument_group("output")
    out.add_argument("--output", type=Path, metavar="FILE.jsonl", help="also append the JSON line to this file")
    out.add_argument("--save-statistics", type=Path, metavar="FILE.npz", help="write the statistics of the samples")
    out.add_argument("--compact", action="store_true", help="small statistics: features in float16, else float32")
    out.add_argument("--without-features", action="store_true", help="save mean and covariance only")
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, Any]:
    """The evaluation's arguments and, with --generate, the sampling job."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if not args.generate:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)} (sampling flags need --generate)")
        return args, None
    if args.samples:
        raise ValueError("give --samples or --generate, not both")
    shared = [part for name in SHARED_FLAGS if getattr(args, name) is not None
              for part in ("--" + name.replace("_", "-"), str(getattr(args, name)))]  # fmt: skip
    from scripts.sample import job_from_arguments

    asked = [] if args.conditions_from is None else conditions_from(args.conditions_from, rest)
    _, job, indices = job_from_arguments([*rest, *asked, *shared, f"--output={os.devnull}"])
    if indices is not None:
        raise ValueError("--from-image belongs to sample.py, not to --generate")
    args.num_samples = args.num_samples if args.num_samples is not None else len(job.conditions)
    return args, job


def conditions_from(text: str, rest: list[str]) -> list[str]:
    """The flags that ask for one sample per row of a data set, in the words that the model takes."""
    from dit_suite.checkpoints import find_checkpoint
    from dit_suite.evaluation.datasets import conditions_of
    from dit_suite.registry import technique
    from scripts.sample import build_parser as sample_parser

    known, _ = sample_parser(None).parse_known_args([*rest, f"--output={os.devnull}"])
    if known.pipeline is None and known.model is None:
        raise ValueError("give --pipeline or --model")
    row = technique(known.pipeline) if known.pipeline else find_checkpoint(known.model).technique
    kind = row.options_class().condition
    flag = {"prompt": "--prompts", "class_labels": "--class-labels"}.get(kind, "")
    return [flag, *conditions_of(text, kind)]


def open_side(text: str | None, args: argparse.Namespace, expected: int | None = None) -> Any:
    """A source or a feature set from what the user wrote; None stays None."""
    from dit_suite.evaluation.reference import bundled_references
    from dit_suite.evaluation.sources import is_statistics_file, open_source
    from dit_suite.evaluation.statistics import load_feature_set

    if text is None:
        return None
    bundled = bundled_references()
    if re.fullmatch(r"[\w-]+", text) and text not in bundled and not Path(text).exists():
        raise ValueError(f"{text} is no folder here, nor are there statistics of that name ({', '.join(bundled)})")
    path = bundled[text] if text in bundled and not Path(text).exists() else text
    if is_statistics_file(path):
        foreign = args.foreign_statistics
        return load_feature_set(path, accept_foreign=foreign is not None, foreign_count=foreign)
    return open_source(path, expected, args.clips)


def open_inputs(args: argparse.Namespace, job: Any, state: Any) -> Any:
    """Every side that the arguments name, checked."""
    from dit_suite.evaluation.runner import Inputs
    from dit_suite.evaluation.sources import GeneratedSource

    reference, baseline = open_side(args.reference, args), open_side(args.baseline, args)
    train = open_side(args.train_set, args)
    floor = None if args.floor in ("auto", "none") else open_side(args.floor, args)
    if job is not None:
        from dit_suite.sampling import open_job

        pipe = open_job(job, device=args.device or state.device)
        pipe.set_progress_bar_config(disable=True)
        samples = GeneratedSource(pipe, job, args.num_samples)
    else:
        samples = open_side(args.samples, args, args.num_samples)
    return Inputs(samples, reference, baseline, train, floor, with_floor=args.floor != "none")


def open_flow(checkpoint: str, labels: list[str] | None, samples: Any, device: Any) -> tuple[Any, list[int] | None]:
    """The flow that bits per dimension are measured with, and the class of every sample."""
    from dit_suite.checkpoints import load_pipeline
    from dit_suite.evaluation.statistics import FeatureSet
    from dit_suite.models.tarflow import TarFlowModel

    if isinstance(samples, FeatureSet):
        raise ValueError("bits per dimension need the samples themselves, not a statistics file")
    pipe = load_pipeline(checkpoint, device=device)
    if not isinstance(pipe.transformer, TarFlowModel):
        raise ValueError(f"--bpd needs a TarFlow checkpoint, {checkpoint} holds {type(pipe.transformer).__name__}")
    if labels is None:
        return pipe.transformer, None
    ids = pipe.get_label_ids([int(label) if label.isdigit() else label for label in labels])
    return pipe.transformer, [ids[index % len(ids)] for index in range(len(samples))]


def add_bits_per_dim(report: Any, args: argparse.Namespace, model: Any, labels: list[int] | None, samples: Any) -> None:
    """Puts the exact likelihood of the samples under a flow into the report."""
    from dit_suite.evaluation.bpd import bits_per_dim

    found = bits_per_dim(model, (samples.read([index])[0] for index in range(len(samples))), labels)
    report.metrics["bpd"] = found.mean
    report.details["bpd"] = {
        "standard_error": found.standard_error,
        "checkpoint": args.bpd,
        "class_labels": args.bpd_class_labels or "none",
    }


def only_likelihood(inputs: Any, state: Any) -> Any:
    """A report without any features, on the main process."""
    from dit_suite.evaluation.report import Report

    if state is not None and not state.is_main_process:
        return None
    return Report(None, {**inputs.samples.describe(), "samples": len(inputs.samples)}, None)


def run(args: argparse.Namespace, job: Any) -> None:
    """Evaluates and prints: the line on stdout, words on stderr."""
    from dit_suite.checkpoints import check_device
    from dit_suite.evaluation.extractors import load_extractor
    from dit_suite.evaluation.metric_names import parse_metrics
    from dit_suite.evaluation.report import append_line
    from dit_suite.evaluation.runner import Evaluation
    from dit_suite.evaluation.statistics import save_feature_set
    from dit_suite.files import check_folder
    from dit_suite.sample_files import distributed_state

    options = EvaluationOptions.from_namespace(args)
    metrics = args.metrics or ("fd,kid" if args.reference is not None else "")
    if args.bpd_class_labels is not None and args.bpd is None:
        raise ValueError("--bpd-class-labels belongs to --bpd")
    if not metrics and args.save_statistics is None and args.bpd is None:
        raise ValueError("give --reference, --metrics, --bpd or --save-statistics: nothing was asked for")
    requests = parse_metrics(metrics) if metrics else ()
    if args.device is not None:
        check_device(args.device)
    for target in filter(None, (args.output, args.save_statistics)):
        check_folder(target.parent)
        if target.is_dir():
            raise ValueError(f"{target} is a folder; name a file in it")
    state = distributed_state()
    inputs = open_inputs(args, job, state)
    device = args.device or state.device
    if args.save_statistics is not None:
        args.save_statistics.parent.mkdir(parents=True, exist_ok=True)
    if args.bpd is not None:
        flow, labels = open_flow(args.bpd, args.bpd_class_labels, inputs.samples, device)
    if requests or args.save_statistics is not None or args.train_set is not None:
        extractor = load_extractor(args.features, inception_weights=args.inception_weights, device=device)
        evaluation = Evaluation(
            inputs, extractor, requests, options, state, keep_everything=args.save_statistics is not None
        )
        report = evaluation.run()
    else:
        report = only_likelihood(inputs, state)
    if report is None:
        return
    if args.bpd is not None:
        add_bits_per_dim(report, args, flow, labels, inputs.samples)
    if args.save_statistics is not None:
        found, keep = evaluation.feature_set, not args.without_features
        save_feature_set(args.save_statistics, found, compact=args.compact, keep_features=keep)
        print(f"statistics of {evaluation.feature_set.count} samples: {args.save_statistics}", file=sys.stderr)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for line in report.lines():
        print(line, file=sys.stderr)
    if report.metrics or report.pairs:
        print(report.to_json_line())
        if args.output is not None:
            append_line(args.output, report.to_json_line())


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after one sentence about a bad input."""
    try:
        args, job = parse(sys.argv[1:] if argv is None else argv)
        if args.list_references:
            from dit_suite.evaluation.reference import bundled_references

            print("\n".join(bundled_references()))
            return 0
        if not args.generate and not args.samples:
            raise ValueError("give --samples, or --generate with sample.py's flags")
        run(args, job)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Grafts a trained transformer: exchanges operators by a plan, distils them (stage 1), and saves a pipeline folder.

    python scripts/graft.py --model emoji-pixart-64 --plan configs/grafts/hyena_x_2d_50.yaml \\
        --prompts-file prompts.txt --num-inference-steps 20 --epochs 4 --output outputs/grafted

Stage 1 needs no data set: the original samples the prompts, and every new operator learns from the activations that
pass by. A run that was stopped goes on when the same command is given again. Stage 2 is the ordinary trainer on the
folder that this writes:

    python scripts/train.py --config configs/graft_stage2.yaml model.from=outputs/grafted --max-minutes 30
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.checkpoints import Checkpoint, find_checkpoint
from dit_suite.grafting.distill import DistillConfig


def build_parser(checkpoint: Checkpoint | None) -> argparse.ArgumentParser:
    """The parser, with the options of the checkpoint's pipeline if it is known already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundled name, folder, or owner/name@revision")
    parser.add_argument("--plan", type=Path, required=True, help="YAML or JSON graft plan")
    conditions = parser.add_mutually_exclusive_group()
    conditions.add_argument("--prompts", nargs="+", metavar="TEXT")
    conditions.add_argument("--prompts-file", type=Path, help="a text file, one prompt a line")
    conditions.add_argument("--class-labels", nargs="+", type=int)
    parser.add_argument(
        "--epochs", type=int, default=1, help="passes over the prompts, each with new noise (default: 1)"
    )
    parser.add_argument("--max-minutes", type=float, help="stop stage 1 after this time and save")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, required=True, help="folder for the grafted pipeline")
    if checkpoint is not None:
        options = parser.add_argument_group(f"options of {checkpoint.technique.name}")
        checkpoint.technique.options_class().add_arguments(options, checkpoint.defaults)
    DistillConfig.add_arguments(parser.add_argument_group("stage 1"))
    return parser


def _conditions(args: argparse.Namespace) -> tuple[Any, ...]:
    if args.prompts_file is not None:
        if not args.prompts_file.is_file():
            raise ValueError(f"there is no file {args.prompts_file}")
        return tuple(line.strip() for line in args.prompts_file.read_text("utf-8").splitlines() if line.strip())
    return tuple(args.prompts or args.class_labels or ())


def run(args: argparse.Namespace, checkpoint: Any) -> int:
    """Grafts as the arguments say."""
    from dit_suite.grafting.stage1 import graft_checkpoint
    from dit_suite.sampling import SamplingJob

    row, config = checkpoint.technique, DistillConfig.from_namespace(args)
    job = SamplingJob(
        technique=row.name, model=args.model, weights_sha256=checkpoint.weights_sha256,
        conditions=_conditions(args) or ("",), seed=config.seed, batch_size=args.batch_size,
        options=row.options_class().from_namespace(args, checkpoint.defaults),
    )  # fmt: skip
    deadline = None if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
    facts = graft_checkpoint(
        checkpoint, args.plan, job, config, args.output, epochs=args.epochs, device=args.device, deadline=deadline,
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    for entry in facts["operators"]:
        print(f"{entry['operator']}: {entry['steps']} steps, relative error {entry['relative_error']:.3f}")
    print(f"wrote {args.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after one sentence about a bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--model")
    model = first.parse_known_args(argv)[0].model
    try:
        checkpoint = find_checkpoint(model) if model else None
        args = build_parser(checkpoint).parse_args(argv)
        return run(args, checkpoint)
    except (ValueError, FileNotFoundError) as error:
        print(f"graft.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

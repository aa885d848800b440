"""Grafts a trained transformer: exchanges operators by a plan, distils them (stage 1), and saves a pipeline folder.

    python scripts/graft.py --model emoji-pixart-64 --plan configs/grafts/hyena_x_2d_50.yaml \\
        --prompts-file prompts.txt --num-inference-steps 20 --epochs 4 --output outputs/grafted

Stage 1 needs no data set: the original samples the prompts, and every new operator learns from the activations that
pass by. A run that was stopped goes on when the same command is given again. Stage 2 is the ordinary trainer
(`scripts/train.py`) on the folder that this writes; a plan that only pairs blocks has nothing to distil in stage 1.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.checkpoints import find_checkpoint
from dit_suite.grafting.distill import DistillConfig
from dit_suite.registry import technique


def build_parser(pipeline: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of `pipeline` if it is known already."""
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
    if pipeline is not None:
        technique(pipeline).options_class().add_arguments(parser.add_argument_group(f"options of {pipeline}"))
    DistillConfig.add_arguments(parser.add_argument_group("stage 1"))
    return parser


def _conditions(args: argparse.Namespace) -> tuple[Any, ...]:
    if args.prompts_file is not None:
        if not args.prompts_file.is_file():
            raise ValueError(f"there is no file {args.prompts_file}")
        return tuple(line.strip() for line in args.prompts_file.read_text("utf-8").splitlines() if line.strip())
    return tuple(args.prompts or args.class_labels or ())


def distil(pipe: Any, distiller: Any, job: Any, epochs: int, state: Path, deadline: float | None) -> int:
    """Samples every batch of every epoch that is not done yet; returns the number done in all."""
    from dit_suite.sampling import batches, sample_batch

    count = len(job.conditions)
    todo = [range(e * count + part.start, e * count + part.stop) for e in range(epochs)
            for part in batches(count, job.batch_size)]  # fmt: skip
    done = distiller.load(state) if state.is_file() else 0
    with distiller:
        for number, indices in enumerate(todo[done:], start=done + 1):
            if deadline is not None and time.monotonic() > deadline:
                break
            sample_batch(pipe, job, indices)
            distiller.save(state, number)
            done = number
            mean = sum(row["relative_error"] for row in distiller.report()) / max(1, len(distiller.students))
            print(f"batch {number} of {len(todo)}: mean relative error {mean:.3f}", flush=True)
    return done


def run(args: argparse.Namespace, checkpoint: Any) -> int:
    """Grafts as the arguments say."""
    import torch

    from dit_suite.grafting.distill import Distiller
    from dit_suite.grafting.models import graft
    from dit_suite.grafting.plan import GraftPlan, count_parameters
    from dit_suite.grafting.surgery import block_list
    from dit_suite.sampling import SamplingJob, open_job

    row, config = checkpoint.technique, DistillConfig.from_namespace(args)
    conditions = _conditions(args)
    job = SamplingJob(
        technique=row.name, model=args.model, weights_sha256=checkpoint.weights_sha256, conditions=conditions or ("",),
        options=row.options_class().from_namespace(args), seed=config.seed, batch_size=args.batch_size,
    )  # fmt: skip
    pipe = open_job(job, device=args.device, checkpoint=checkpoint)
    pipe.set_progress_bar_config(disable=True)
    teacher = pipe.transformer
    plan = GraftPlan.load(args.plan, len(block_list(teacher)))
    torch.manual_seed(config.seed)
    grafted = graft(teacher, plan)
    print(f"{count_parameters(teacher):,} parameters before, {count_parameters(grafted):,} after")
    distiller = Distiller(teacher, grafted, plan, config)
    if distiller.students and not conditions:
        raise ValueError(
            "stage 1 learns from samples of the original; give --prompts, --prompts-file or --class-labels"
        )
    done = 0
    if distiller.students:
        deadline = None if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
        done = distil(pipe, distiller, job, args.epochs, args.output / "stage1.pt", deadline)
    pipe.transformer = grafted
    if pipe.config.get("text_encoder_source"):
        pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(args.output, max_shard_size="9MB")
    report = {
        "plan": plan.to_dict(),
        "distillation": config.to_dict(),
        "batches": done,
        "operators": distiller.report(),
    }
    (args.output / "stage1.json").write_text(json.dumps(report, indent=1) + "\n")
    for entry in distiller.report():
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
        args = build_parser(checkpoint.technique.name if checkpoint else None).parse_args(argv)
        return run(args, checkpoint)
    except (ValueError, FileNotFoundError) as error:
        print(f"graft.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Calibrates BAC caching: samples without a cache, and writes the likeness profile and the schedule made from it.

    python scripts/calibrate_bac.py --model emoji-pixart-64 --prompts "red apple" "burger" --num-inference-steps 40 \\
        --output checkpoints/emoji-pixart-64/bac
    ... --psnr 30                searches the smallest budget that reaches 30 dB: each try samples once more
    ... --measure 8 10 13 20     samples with schedules of these budgets and stores their PSNR (for BACConfig(psnr=...))

Writes profile-STEPS.safetensors and schedule-STEPS.json into the folder. The flags of the pipeline (guidance, steps)
and those of BACConfig (budget, granularity, predictor, ...) are listed by --help once --model is given.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.caching.plan import BACConfig
from dit_suite.checkpoints import Checkpoint, find_checkpoint


def build_parser(checkpoint: Checkpoint | None) -> argparse.ArgumentParser:
    """The parser, with the options of the checkpoint's pipeline if it is known already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundled name, folder, or owner/name@revision")
    conditions = parser.add_mutually_exclusive_group(required=True)
    conditions.add_argument("--prompts", nargs="+", metavar="TEXT")
    conditions.add_argument("--prompts-file", type=Path, help="a text file, one prompt a line")
    conditions.add_argument("--class-labels", nargs="+", type=int)
    parser.add_argument("--seed", type=int, default=0, help="prompt i is sampled with seed + i (default: 0)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--scheduler", help="calibrate with this scheduler instead of the checkpoint's own")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device")
    parser.add_argument("--max-elements", type=int, default=65536, help="values kept of every output (default: 65536)")
    parser.add_argument("--measure", nargs="+", type=int, default=[], metavar="BUDGET", help="budgets to sample with")
    parser.add_argument("--output", type=Path, required=True, help="folder for the profile and the schedule")
    if checkpoint is not None:
        options = parser.add_argument_group(f"options of {checkpoint.technique.name}")
        checkpoint.technique.options_class().add_arguments(options, checkpoint.defaults)
    BACConfig.add_arguments(parser.add_argument_group("the schedule"))
    return parser


def _conditions(args: argparse.Namespace) -> tuple[Any, ...]:
    if args.prompts_file is not None:
        if not args.prompts_file.is_file():
            raise ValueError(f"there is no file {args.prompts_file}")
        return tuple(line.strip() for line in args.prompts_file.read_text("utf-8").splitlines() if line.strip())
    return tuple(args.prompts or args.class_labels)


def _sample_all(pipe: Any, job: Any) -> list[Any]:
    from dit_suite.sampling import batches, sample_batch

    return [row for part in batches(len(job.conditions), job.batch_size) for row in sample_batch(pipe, job, part)]


def _psnr(pictures: list[Any], reference: list[Any]) -> list[float]:
    import numpy as np

    errors = [np.mean((a.astype(float) - b.astype(float)) ** 2) for a, b in zip(pictures, reference, strict=True)]
    return [float(10 * np.log10(255**2 / max(error, 1e-6))) for error in errors]


def measure(pipe: Any, job: Any, profile: Any, config: BACConfig, budgets: list[int], reference: list[Any]) -> Any:
    """The profile with measured (recipe, budget, flop_fraction, psnr) rows added for `budgets`."""
    from dit_suite.caching.bac import apply_bac
    from dit_suite.caching.plan import build_schedule

    rows = [row for row in profile.quality if row["recipe"] != config.recipe() or row["budget"] not in budgets]
    for budget in budgets:
        schedule = build_schedule(profile, dataclasses.replace(config, budget=budget, flop_fraction=None, psnr=None))
        with apply_bac(pipe, schedule):
            values = _psnr(_sample_all(pipe, job), reference)
        mean = sum(values) / len(values)
        facts = {"budget": budget, "flop_fraction": schedule.compute_fraction, "psnr": mean, "psnr_min": min(values)}
        rows.append({"recipe": config.recipe(), **facts, "pictures": len(values)})
        print(
            f"budget {budget}: {schedule.compute_fraction:.3f} of the FLOPs, PSNR {mean:.2f} dB (min {min(values):.2f})"
        )
    return dataclasses.replace(profile, quality=tuple(rows))


def search(pipe: Any, job: Any, profile: Any, config: BACConfig, reference: list[Any]) -> Any:
    """The profile with measured rows added until they hold the smallest budget that reaches `config.psnr`."""
    from dit_suite.caching.schedule import smallest_budget

    def quality(budget: int) -> float:
        nonlocal profile
        known = {row["budget"] for row in profile.quality if row["recipe"] == config.recipe()}
        if budget not in known:
            profile = measure(pipe, job, profile, config, [budget], reference)
        rows = (row for row in profile.quality if row["recipe"] == config.recipe() and row["budget"] == budget)
        return next(rows)["psnr"]

    smallest_budget(quality, profile.num_evaluations, config.psnr)
    return profile


def run(args: argparse.Namespace, checkpoint: Any) -> int:
    """Calibrates as the arguments say."""
    from dit_suite.caching.plan import build_schedule
    from dit_suite.caching.recorder import ProfileRecorder
    from dit_suite.sampling import SamplingJob, open_job

    row = checkpoint.technique
    config = BACConfig.from_namespace(args)
    job = SamplingJob(
        technique=row.name,
        model=args.model,
        weights_sha256=checkpoint.weights_sha256,
        conditions=_conditions(args),
        options=row.options_class().from_namespace(args, checkpoint.defaults),
        seed=args.seed,
        batch_size=args.batch_size,
        scheduler=args.scheduler,
        dtype=args.dtype,
    )
    pipe = open_job(job, device=args.device, checkpoint=checkpoint)
    pipe.set_progress_bar_config(disable=True)
    start = time.monotonic()
    with ProfileRecorder(pipe, max_elements=args.max_elements) as recorder:
        reference = _sample_all(pipe, job)
    notes = {"conditions": list(job.conditions), "options": job.options.to_dict(), "seed": args.seed}
    profile = recorder.profile(notes)
    print(f"calibrated on {len(job.conditions)} samples in {time.monotonic() - start:.0f} s")
    if args.measure:
        profile = measure(pipe, job, profile, config, args.measure, reference)
    if config.psnr is not None:
        profile = search(pipe, job, profile, config, reference)
    schedule = build_schedule(profile, config)
    steps = profile.num_inference_steps
    print(f"wrote {profile.save(args.output / f'profile-{steps}.safetensors')}")
    print(
        f"wrote {schedule.save(args.output / f'schedule-{steps}.json')}: {schedule.compute_fraction:.3f} of the FLOPs"
    )
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
        print(f"calibrate_bac.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Plans how a TarFlow checkpoint is sampled: per block the solver, its first guess and its sweeps.

    python scripts/plan_tarflow.py emoji-tarflow-64 planned-checkpoint --psnr 36 --batch-size 8

Measures on samples of the model itself, fits the linear first guesses, and writes a copy of the checkpoint whose
scheduler config is the strategy. The pipeline uses it by default.
"""

import argparse
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors import safe_open

from dit_suite.checkpoints import SHARD_SIZE, find_checkpoint, open_pipeline
from dit_suite.compact_weights import is_compact, save_compact
from dit_suite.files import replacing_folder
from dit_suite.schedulers.generators import randn_per_sample, sample_generators
from dit_suite.schedulers.gs_jacobi import FlowGuidance
from dit_suite.schedulers.tarflow_planner import Planner, calibrate, fit_guesses, without_guesses

DEFAULT_KERNEL = 3


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the first floating-point weight on the disk.

    Raises:
        ValueError: there is none.
    """
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                dtype = file.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype
    raise ValueError(f"{folder} holds no floating-point weights")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or bundled name")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument(
        "--psnr", type=float, default=36.0, help="dB to the sequential picture that the worst of many must keep"
    )
    parser.add_argument("--max-seconds", type=float, help="plan for this time per batch instead of a PSNR")
    parser.add_argument("--batch-size", type=int, default=8, help="batch that times are measured for")
    parser.add_argument(
        "--samples", type=int, default=128, help="calibration samples, a quarter of them for the last check"
    )
    parser.add_argument(
        "--kernel",
        type=int,
        help="side of the linear guess to fit, in tokens; 0: none (default: the checkpoint's own guess, or one of 3)",
    )
    parser.add_argument("--refit", action="store_true", help="fit the linear guess again, as after a training")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="guidance that the plan is for")
    parser.add_argument("--seed", type=int, default=1_000_000, help="first seed of the calibration samples")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.samples < 8 or arguments.samples // 4 < arguments.batch_size:
        parser.error("--samples must be at least 8 and four times the batch size")
    if arguments.kernel and (arguments.kernel < 0 or arguments.kernel % 2 == 0):
        parser.error("--kernel must be odd, or 0")
    return arguments


@torch.no_grad()
def make_plan(arguments: argparse.Namespace) -> tuple:
    """The planned pipeline and the plan."""
    checkpoint = find_checkpoint(arguments.model)
    dtype = torch.float32 if is_compact(checkpoint.folder / "transformer") else stored_dtype(checkpoint.folder)
    pipe = open_pipeline(checkpoint, device=arguments.device)
    if not hasattr(pipe.transformer, "num_tokens") or not hasattr(pipe.scheduler, "strategy_of"):
        raise ValueError(f"{arguments.model} is not a TarFlow checkpoint")
    model = pipe.transformer.requires_grad_(False)
    if arguments.refit:
        model = without_guesses(model)
    if arguments.kernel is not None and model.config.guess_kernel:
        raise ValueError(
            f"{arguments.model} has a linear guess already (guess_kernel {model.config.guess_kernel}), which is kept: "
            "leave out --kernel, or give --refit"
        )
    kernel = DEFAULT_KERNEL if arguments.kernel is None else arguments.kernel
    generators = sample_generators(arguments.seed, range(arguments.samples))
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    noise = model.patchify(randn_per_sample(shape, generators, arguments.device))
    labels = None
    if model.config.num_classes:
        labels = torch.tensor([int(torch.randint(model.config.num_classes, (1,), generator=g)) for g in generators])
        labels = labels.to(arguments.device)
    guidance = FlowGuidance(arguments.guidance_scale - 1.0, annealed=True)
    print(f"solving {arguments.samples} samples sequentially", flush=True)
    calibration = calibrate(model, noise, labels, guidance)
    unseen = arguments.samples // 4
    chosen_by = arguments.samples
    if kernel and not model.config.guess_kernel:
        chosen_by -= unseen
        model = fit_guesses(model, calibration.rows(slice(chosen_by, None)), kernel)
    planner = Planner(
        model,
        calibration.rows(slice(unseen, chosen_by)),
        calibration.rows(slice(0, unseen)),
        guidance,
        arguments.batch_size,
        say=lambda line: print(line, flush=True),
    )
    plan = planner.plan(arguments.psnr, arguments.max_seconds)
    record = {
        "target_psnr": arguments.psnr,
        "batch_size": arguments.batch_size,
        "guidance_scale": arguments.guidance_scale,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.machine(),
    }
    model.to(dtype)
    # A new pipeline, so that the folder it came from is not recorded in the new one.
    model.register_to_config(_name_or_path="")
    planned = type(pipe)(model, plan.scheduler(record), id2label=pipe.config.id2label)
    return planned, plan, checkpoint


def save(pipe, source: Path, output: Path) -> None:
    """Writes the checkpoint and the texts that lie beside it, whole or not at all; compact weights stay compact."""
    if output.exists():
        raise FileExistsError(f"{output} exists already")
    with replacing_folder(output) as part:
        pipe.save_pretrained(part, max_shard_size=SHARD_SIZE)
        if is_compact(source / "transformer"):
            shutil.rmtree(part / "transformer")
            save_compact(pipe.transformer, part / "transformer")
        for text in source.iterdir():
            if text.is_file() and not (part / text.name).exists():
                shutil.copyfile(text, part / text.name)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.output.exists():
            raise FileExistsError(f"{arguments.output} exists already")
        pipe, plan, checkpoint = make_plan(arguments)
        save(pipe, checkpoint.folder, arguments.output)
    except (ValueError, OSError) as error:
        print(f"plan_tarflow: {error}", file=sys.stderr)
        return 2
    for number, strategy in enumerate(plan.strategies):
        print(f"block {len(plan.strategies) - 1 - number}: {strategy}")
    print(
        f"{plan.sequential_seconds / plan.seconds:.2f}x ({plan.sequential_seconds:.3f} s -> {plan.seconds:.3f} s; best "
        f"fixed strategy {plan.fixed[-1]['seconds']:.3f} s), PSNR on {len(plan.psnr)} unseen pictures: "
        f"worst {float(plan.psnr.min()):.1f} dB, mean {float(plan.psnr.mean()):.1f} dB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

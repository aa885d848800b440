"""Grafting: what a cheaper design costs in quality, before and after stage 2, cell by cell on one trained model.

A cell is a graft plan. Its parts are stage1 (distillation on samples of the original), speed, before (pictures for
held-out captions), stage2 (fine-tune through the trainer, in CPU minutes of this process) and after. Every part is
written when it is done and pictures, distillation and training go on where they were stopped, so the command can be
given again until the table is whole. The cell `original` is the model as it is: it has no stage 1 and, since stage 2
only teaches what the original does, no stage 2 either.
"""

import argparse
import contextlib
import functools
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_suite.benchmarks.held_out import HeldOut, distance_cells, save_sheet
from dit_suite.checkpoints import Checkpoint, find_checkpoint
from dit_suite.files import write_json, write_text

NAME = "grafting"
LONG = True

CONTROL = "original"
CELLS = (
    CONTROL, "mlp_r2_50", "mlp_r2_100", "pool_2d_50", "pool_2d_100", "self_attention", "depth_to_width",
    "pool_2d_mlp_r2_100",
)  # fmt: skip
PARTS = ("stage1", "speed", "before", "stage2", "after")
_TIMED_STEPS, _MARGIN = 4, 1.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--model", default="emoji-pixart-64", help="a text- or class-to-image checkpoint")
    parser.add_argument("--data", type=Path, default=Path("data/emoji64"), help="folder of prepare_data.py emoji64")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), help="plans by file name, and original")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--plans", type=Path, default=Path("configs/grafts"), help="folder of the plans")
    parser.add_argument("--stage1-prompts", type=int, default=48, help="training captions that stage 1 samples")
    parser.add_argument("--stage1-epochs", type=int, default=2)
    parser.add_argument("--stage1-batch", type=int, default=2)
    parser.add_argument("--stage2-config", type=Path, default=Path("configs/graft_stage2.yaml"))
    parser.add_argument("--stage2-minutes", type=float, default=30.0, help="CPU minutes of this process")
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--num-inference-steps", type=int, default=10)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the pictures, and of stage 2's autocast; bfloat16 pays on processors with AMX or AVX512-BF16",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--features", default="enet-lite0", help="feature network, as in evaluate.py")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="what the speed is measured with")
    parser.add_argument("--operators", action="store_true", help="only time every operator at the model's size")
    parser.add_argument("--redo", action="store_true", help="do the named parts again where they are there already")


class Stopped(Exception):
    """A signal asked for an end; everything is saved."""


@dataclass
class Cell:
    """One plan in its folder. `record` is what `cell.json` holds."""

    name: str
    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.record = json.loads(self.path.read_text("utf-8"))

    @property
    def path(self) -> Path:
        return self.folder / "cell.json"

    @property
    def is_control(self) -> bool:
        return self.name == CONTROL

    def keep(self, **facts: Any) -> None:
        """Adds to the record and writes it."""
        self.record.update(facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.record, self.path)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Refuses (`ValueError`) results that were made with other settings."""
        known = self.record.setdefault("settings", settings)
        different = [key for key in settings if known.get(key) != settings[key]]
        if different:
            key = different[0]
            raise ValueError(f"{self.folder} was begun with {key} {known.get(key)!r}; choose another --output")


@dataclass
class Bench:
    """What all cells share."""

    args: argparse.Namespace
    original: Checkpoint
    held_out: HeldOut

    def options(self) -> Any:
        """How every picture is made."""
        return self.original.technique.options_class()(
            num_inference_steps=self.args.num_inference_steps, guidance_scale=self.args.guidance_scale
        )

    def job(self, checkpoint: Checkpoint, captions: tuple[str, ...], batch_size: int, dtype: str = "float32") -> Any:
        """A sampling job for these captions."""
        from dit_suite.sampling import SamplingJob

        return SamplingJob(
            technique=checkpoint.technique.name, model=str(checkpoint.folder),
            weights_sha256=checkpoint.weights_sha256, conditions=captions, options=self.options(),
            seed=self.args.seed, batch_size=batch_size, dtype=dtype,
        )  # fmt: skip

    def start(self, cell: Cell) -> Checkpoint:
        """What stage 2 starts from: the original, or the cell's grafted folder."""
        return self.original if cell.is_control else find_checkpoint(cell.folder / "grafted")

    def finished(self, cell: Cell) -> Checkpoint:
        """The model after stage 2."""
        return find_checkpoint(cell.folder / "stage2" / "checkpoint")


def _stage1(bench: Bench, cell: Cell) -> None:
    from dit_suite.grafting.distill import DistillConfig
    from dit_suite.grafting.stage1 import graft_checkpoint

    if cell.is_control:
        cell.keep(stage1={"operators": [], "cpu_minutes": 0.0})
        return
    args = bench.args
    job = bench.job(bench.original, bench.held_out.captions("train", args.stage1_prompts), args.stage1_batch)
    began, before = time.process_time(), cell.record.get("stage1_seconds", 0.0)

    def report(line: str) -> None:
        cell.keep(stage1_seconds=before + time.process_time() - began)
        print(f"{cell.name}: {line}", flush=True)

    plan = args.plans / f"{cell.name}.yaml"
    facts = graft_checkpoint(
        bench.original, plan, job, DistillConfig(), cell.folder / "grafted", epochs=args.stage1_epochs, report=report
    )
    minutes = (before + time.process_time() - began) / 60
    cell.keep(stage1={**facts, "cpu_minutes": minutes, "epochs": args.stage1_epochs, "prompts": args.stage1_prompts})


def _recorded_call(pipe: Any, captions: tuple[str, ...], guidance_scale: float) -> Callable[[Any], Any]:
    """The first network evaluation of a pipeline call, as a function of the network."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        pipe(list(captions), num_inference_steps=1, guidance_scale=guidance_scale, output_type="latent")
    finally:
        handle.remove()
    args, kwargs = calls[0]
    return lambda network: network(*args, **kwargs)


def _speed(bench: Bench, cell: Cell) -> None:
    """Time and FLOPs of one evaluation beside the original's, in turns; batches of 1 and 16 guided pictures."""
    from dit_suite.caching.recorder import FlopMeter
    from dit_suite.checkpoints import open_pipeline

    clock = time.process_time if bench.args.clock == "cpu" else time.perf_counter
    pipe = open_pipeline(bench.original)
    pipe.set_progress_bar_config(disable=True)
    networks = [pipe.transformer, open_pipeline(bench.start(cell)).transformer]
    facts: dict[str, Any] = {"clock": bench.args.clock, "threads": torch.get_num_threads()}
    with torch.no_grad():
        for pictures, rounds in ((1, 21), (16, 7)):
            call = _recorded_call(pipe, bench.held_out.captions()[:pictures], bench.args.guidance_scale)
            seconds: list[list[float]] = [[], []]
            for _ in range(rounds):
                for times, network in zip(seconds, networks, strict=True):
                    began = clock()
                    call(network)
                    times.append(clock() - began)
            ratios = [a / b for a, b in zip(*seconds, strict=True)]
            facts[f"{pictures}"] = {
                "original_ms": 1e3 * statistics.median(seconds[0]),
                "grafted_ms": 1e3 * statistics.median(seconds[1]),
                "speedup": statistics.median(ratios[1:]),
            }
        counts = []
        for network in networks:
            with FlopMeter() as meter:
                call(network)
            counts.append(meter.total)
    facts["flops"] = counts[1] / counts[0]
    facts["parameters"] = [sum(p.numel() for p in network.parameters()) for network in networks]
    cell.keep(speed=facts)


def operator_times(model: Any, clock: str, pictures: int = 16, rounds: int = 9) -> list[dict[str, Any]]:
    """Milliseconds of every operator per sequence at a model's size, in turns; full attention and the MLP lead."""
    from dit_suite.grafting.plan import ATTENTION_KINDS, OperatorSpec, build_operator, count_parameters

    config, now = model.config, time.process_time if clock == "cpu" else time.perf_counter
    heads, dim = config.num_attention_heads, config.num_attention_heads * config.attention_head_dim
    tokens = (config.sample_size // config.patch_size) ** 2
    specs = {kind: OperatorSpec(kind=kind) for kind in ATTENTION_KINDS}
    specs |= {f"mlp, ratio {ratio}": OperatorSpec(kind="mlp", ratio=float(ratio)) for ratio in (4, 3, 2, 1)}
    specs["mlp_hyena_x"] = OperatorSpec(kind="mlp_hyena_x")
    operators = {name: build_operator(spec, dim, tokens, heads) for name, spec in specs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in operators}
    x = torch.randn(pictures, tokens, dim)
    with torch.no_grad():
        for _ in range(rounds):
            for name, operator in operators.items():
                began = now()
                operator(x)
                seconds[name].append(now() - began)
    return [
        {"operator": name, "parameters": count_parameters(operator), "ms": 1e3 * statistics.median(times) / pictures}
        for (name, operator), times in zip(operators.items(), seconds.values(), strict=True)
    ]


def _pictures(bench: Bench, cell: Cell, part: str) -> None:
    from dit_suite.checkpoints import open_pipeline

    checkpoint = bench.start(cell) if part == "before" else bench.finished(cell)
    folder, began = cell.folder / part, time.process_time()
    dtype = bench.args.dtype
    pipe = open_pipeline(checkpoint, dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    job = bench.job(checkpoint, bench.held_out.captions(), bench.args.batch_size, dtype)
    bench.held_out.make(folder, job, pipe)
    seconds = time.process_time() - began
    save_sheet(folder, cell.folder / f"{part}.png")
    baseline = bench.args.output / CONTROL / "before"
    own = cell.is_control and part == "before"
    score = bench.held_out.score(folder, None if own or not (baseline / "features.npz").is_file() else baseline)
    cell.keep(**{part: {**score, "cpu_seconds": seconds}})


def _planned_steps(bench: Bench, overrides: list[str]) -> tuple[int, float]:
    """How many optimiser steps fill the CPU minutes, from a few timed ones of a trainer that is thrown away."""
    from dit_suite.training.config import load_config
    from dit_suite.training.trainer import Trainer

    trainer = Trainer(load_config(bench.args.stage2_config, overrides))
    trainer.step(0, 100)
    began = time.process_time()
    for step in range(1, 1 + _TIMED_STEPS):
        trainer.step(step, 100)
    per_step = (time.process_time() - began) / _TIMED_STEPS
    return max(1, round(_MARGIN * 60 * bench.args.stage2_minutes / per_step)), per_step


def _stage2(bench: Bench, cell: Cell) -> None:
    from dit_suite.training.config import load_config
    from dit_suite.training.trainer import Trainer

    run = cell.folder / "stage2"
    overrides = [f"model.from={bench.start(cell).folder}", f"data.path={bench.args.data}", f"run.output={run}",
                 f"run.seed={bench.args.seed}",
                 f"run.precision={'bf16' if bench.args.dtype == 'bfloat16' else 'no'}"]  # fmt: skip
    planned = cell.record.get("stage2_plan")
    if planned is None:
        steps, per_step = _planned_steps(bench, overrides)
        planned = {"steps": steps, "seconds_per_step": per_step, "cpu_seconds": 0.0}
        cell.keep(stage2_plan=planned)
    config = load_config(bench.args.stage2_config, [*overrides, f"run.max_steps={planned['steps']}"])
    began, before = time.process_time(), planned["cpu_seconds"]

    def report(line: str) -> None:
        planned["cpu_seconds"] = before + time.process_time() - began
        cell.keep(stage2_plan=planned)
        print(f"{cell.name}: {line}", flush=True)

    trainer = Trainer(config, report)
    with _stopping(trainer):
        finished = trainer.run()
    report("stage 2 ended")
    if finished is None:
        raise Stopped
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    cell.keep(
        stage2={
            "steps": planned["steps"], "cpu_minutes": planned["cpu_seconds"] / 60, "losses": losses,
            "batch_size": config.run.batch_size, "lr": config.optimizer.lr,
        }
    )  # fmt: skip


@contextlib.contextmanager
def _stopping(trainer: Any) -> Iterator[None]:
    """While active, SIGTERM and SIGINT ask the trainer to save and stop."""
    names = (signal.SIGTERM, signal.SIGINT)
    kept = [signal.signal(name, lambda *_: trainer.request_stop()) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, kept, strict=True):
            signal.signal(name, handler)


def _do(bench: Bench, cell: Cell, part: str) -> None:
    parts = {
        "stage1": _stage1,
        "speed": _speed,
        "before": functools.partial(_pictures, part="before"),
        "stage2": _stage2,
        "after": functools.partial(_pictures, part="after"),
    }
    parts[part](bench, cell)


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    """A cell's record as a row of the table; parts that are not done yet are None."""
    stage1, speed, stage2 = (record.get(part) or {} for part in ("stage1", "speed", "stage2"))
    errors = [entry["relative_error"] for entry in stage1.get("operators", ())]
    before, after = distance_cells(record.get("before")), distance_cells(record.get("after"))
    one = speed.get("1", {})
    return {
        "cell": record["cell"],
        "parameters": (speed.get("parameters") or [None, None])[1],
        "flops": speed.get("flops"),
        "ms": one.get("grafted_ms"),
        "speedup": one.get("speedup"),
        "stage1_error": statistics.mean(errors) if errors else None,
        "fd_before": before["fd"],
        "kid_before": before["kid"],
        "stage2_minutes": stage2.get("cpu_minutes"),
        "stage2_steps": stage2.get("steps"),
        "fd_after": after["fd"],
        "kid_after": after["kid"],
    }


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(records: list[dict[str, Any]]) -> str:
    """The table of all cells, and under it the error of every operator after stage 1."""
    lines = [
        "| graft | parameters | FLOPs | ms a step (times faster) | error after stage 1 | FD, KID before stage 2 "
        "| stage 2 | FD, KID after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        row = row_of(record)
        minutes = _number(row["stage2_minutes"], ".1f")
        stage2 = "-" if row["stage2_steps"] is None else f"{row['stage2_steps']} steps, {minutes} min"
        lines.append(
            f"| {row['cell']} | {_number(row['parameters'], ',')} | {_number(row['flops'], '.3f')} "
            f"| {_number(row['ms'], '.1f')} ({_number(row['speedup'], '.2f')}x) "
            f"| {_number(row['stage1_error'], '.3f')} "
            f"| {row['fd_before']}, {row['kid_before']} | {stage2} | {row['fd_after']}, {row['kid_after']} |"
        )
    lines += ["", "Relative error of every operator after stage 1 (running mean over its last steps):", ""]
    for record in records:
        operators = (record.get("stage1") or {}).get("operators", ())
        if operators:
            errors = ", ".join(
                f"{entry['operator'].split('blocks.')[-1]} {entry['relative_error']:.3f}" for entry in operators
            )
            lines.append(f"* {record['cell']}: {errors} ({operators[0]['steps']} steps)")
    for record in records:
        for part in ("before", "after"):
            for verdict in (record.get(part) or {}).get("comparison", ()):
                difference = verdict["difference"]
                lines.append(
                    f"* {record['cell']}, {part} stage 2, against the original, {verdict['metric']}: "
                    f"{difference['value']:+.4g} [{difference['low']:+.4g}, {difference['high']:+.4g}], "
                    f"{verdict['verdict']}"
                )
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does what is missing of the named cells and returns the rows of all cells in the folder."""
    if args.operators:
        from dit_suite.checkpoints import open_pipeline

        rows = operator_times(open_pipeline(find_checkpoint(args.model)).transformer, args.clock)
        return {"settings": {"model": args.model, "clock": args.clock}, "rows": rows}
    if getattr(args, "output", None) is None:
        raise ValueError("grafting writes pictures and checkpoints: give --output FOLDER")
    for name in args.cells:
        if name != CONTROL and not (args.plans / f"{name}.yaml").is_file():
            raise ValueError(f"there is no plan {name}.yaml in {args.plans}")
    original = find_checkpoint(args.model)
    held_out = HeldOut.of_checkpoint(original, args.data, args.output, args.num_samples, args.features)
    bench = Bench(args, original, held_out)
    bench.held_out.captions()
    free = ("cells", "parts", "redo", "output", "data", "plans", "clock", "operators", "name", "all")
    settings = {key: value for key, value in vars(args).items() if key not in free}
    settings = json.loads(json.dumps({**settings, "weights": original.weights_sha256}, default=str))
    try:
        for name in args.cells:
            cell = Cell(name, args.output / name)
            cell.check_settings(settings)
            cell.keep(cell=name)
            for part in PARTS[:3] if cell.is_control else PARTS:
                if part in args.parts and (args.redo or part not in cell.record):
                    print(f"{name}: {part}", flush=True)
                    _do(bench, cell, part)
    except Stopped:
        print("stopped; the same command goes on", flush=True)
    known = [name for name in (*CELLS, *args.cells) if (args.output / name / "cell.json").is_file()]
    records = [Cell(name, args.output / name).record for name in dict.fromkeys(known)]
    text = markdown(records)
    write_text(args.output / "grafting.md", text)
    return {"settings": settings, "rows": [row_of(record) for record in records]}

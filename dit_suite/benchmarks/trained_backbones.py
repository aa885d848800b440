"""The part `trained` of the backbones benchmark: checkpoints by what they saw and how far they are from real pictures.

Every checkpoint makes one picture for each of the first N held-out rows of its own training domain (the styles and
groups in its `training.json`), in the same number of network evaluations. `images_seen` is steps times batch size; rows
with the same domain and the same number of images seen had an equal training budget. `evaluation_gflops` (by torch's
counter) and `evaluation_s` (median of `--pairs` rounds) are those of the first network evaluation of one picture,
guidance included; a step of a second-order solver has two evaluations.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_suite.benchmarks.clock import interleaved
from dit_suite.checkpoints import Checkpoint, find_checkpoint
from dit_suite.evaluation.datasets import conditions_of
from dit_suite.evaluation.extractors import load_extractor
from dit_suite.evaluation.feature_extractor import FeatureExtractor
from dit_suite.evaluation.metric_names import parse_metrics
from dit_suite.evaluation.options import EvaluationOptions
from dit_suite.evaluation.runner import Evaluation, Inputs
from dit_suite.evaluation.sources import GeneratedSource, open_source
from dit_suite.sampling import SamplingJob, open_job, sample_batch

DATA = "data/emoji64/images.parquet"
HELD_OUT = "heldout+pairs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this part."""
    parser.add_argument("--trained", nargs="*", default=[], metavar="CHECKPOINT", help="part trained: names or folders")
    parser.add_argument("--data", type=Path, default=Path(DATA), help="part trained: pictures")
    parser.add_argument("--samples", type=int, default=150, help="part trained: pictures per checkpoint, at most")
    parser.add_argument("--evaluations", type=int, default=15, help="part trained: network evaluations per picture")
    parser.add_argument("--guidance", type=float, default=2.0, help="part trained: classifier-free guidance")


def training_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """`training.json` of a checkpoint; empty when it has none."""
    path = checkpoint.folder / "training.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def held_out_rows(record: dict[str, Any], data: Path) -> str:
    """The held-out rows of the domain that a checkpoint was trained on, as the evaluation writes a choice of rows."""
    section = record.get("config", {}).get("data", {})
    chosen = {"style": section.get("styles"), "group": section.get("groups")}
    parts = [HELD_OUT, *(f"{column}={'+'.join(values)}" for column, values in chosen.items() if values)]
    return f"{data}:{','.join(parts)}"


def images_seen(record: dict[str, Any]) -> int | None:
    """Optimizer steps times batch size; None where nothing was recorded."""
    return record["steps"] * record["config"]["run"]["batch_size"] if record else None


def sampling_job(checkpoint: Checkpoint, name: str, rows: str, guidance: float) -> SamplingJob:
    """One picture per held-out row."""
    options = checkpoint.technique.options_class()
    return SamplingJob(
        technique=checkpoint.technique.name,
        model=name,
        weights_sha256=checkpoint.weights_sha256,
        conditions=conditions_of(rows, options.condition),
        options=options(guidance_scale=guidance),
        batch_size=8,
    )


def steps_of(evaluations: int, order: int) -> int:
    """Steps that take this many evaluations: a second-order solver takes two a step, but one in the last."""
    return evaluations if order == 1 else (evaluations + 1) // order


def evaluation_cost(network: torch.nn.Module, sample: Callable[[], Any], rounds: int, device: str) -> dict[str, float]:
    """GFLOP and median seconds of the first evaluation of `network` that `sample()` asks for.

    FLOPs are counted with attention as its two products, for the counter knows no fused attention on a CPU.
    """
    seen: list[tuple[tuple, dict[str, Any]]] = []
    handle = network.register_forward_pre_hook(lambda module, *given: seen.append(given), with_kwargs=True)
    try:
        sample()
    finally:
        handle.remove()
    args, kwargs = seen[0]

    @torch.no_grad()
    def evaluate() -> Any:
        return network(*args, **kwargs)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        evaluate()
    (times,) = interleaved([evaluate], rounds, device)
    return {
        "evaluation_gflops": counter.get_total_flops() / 1e9,
        "evaluation_s": statistics.median(wall for wall, _ in times),
    }


def trained_row(name: str, extractor: FeatureExtractor, args: argparse.Namespace) -> dict[str, Any]:
    """Size, training and distance of one checkpoint."""
    checkpoint = find_checkpoint(name)
    record = training_record(checkpoint)
    rows = held_out_rows(record, args.data)
    job = sampling_job(checkpoint, name, rows, args.guidance)
    pipe = open_job(job, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    steps = steps_of(args.evaluations, pipe.scheduler.order)
    job = replace(job, options=replace(job.options, num_inference_steps=steps))
    count = min(args.samples, len(job.conditions))
    inputs = Inputs(GeneratedSource(pipe, job, count), open_source(rows))
    options = EvaluationOptions(bootstrap=100)
    report = Evaluation(inputs, extractor, parse_metrics("fd,kid"), options).run()
    found = dict(report.metrics)
    for metric, interval in report.intervals.items():
        found[f"{metric}_low"], found[f"{metric}_high"] = interval["low"], interval["high"]
    for metric, floor in report.floor.items():
        found[f"{metric}_floor"], found["floor_n"] = floor["value"], floor["n"]
    return {
        "network": name,
        "baseline": "held-out pictures",
        "setting": f"{rows.partition(':')[2]}, {args.evaluations} evaluations, guidance {args.guidance:g}",
        "params_m": sum(p.numel() for p in pipe.transformer.parameters()) / 1e6,
        **evaluation_cost(pipe.transformer, lambda: sample_batch(pipe, job, [0]), args.pairs, args.device),
        "images_seen": images_seen(record),
        "last_loss": record.get("last_loss"),
        "samples": count,
        "reference": len(inputs.reference),
        **found,
    }


def trained_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per checkpoint.

    Raises:
        ValueError: no checkpoint was named.
        FileNotFoundError: a checkpoint or the data set is absent.
    """
    if not args.trained:
        raise ValueError("part trained needs --trained with names or folders of checkpoints")
    extractor = load_extractor("enet-lite0", device=args.device)
    return [trained_row(name, extractor, args) for name in args.trained]

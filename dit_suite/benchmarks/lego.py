"""LEGO: what brick skipping does to the pictures of a checkpoint, and seams of canvases wider than it was trained on.

Pictures for held-out classes are made with the same seeds for every `t_break`; each run is compared with the unskipped
one (PSNR, SSIM, paired verdict of the Frechet distance) and with held-out pictures. Seconds are wall time per picture
of the whole pipeline. A panorama's seam ratio is the mean jump between neighbouring pixels across the columns where
windows of the canvas begin or end, over that across the other borders of the second brick's patches: 1 means that no
seam shows. Drifting windows lie elsewhere in every step, and the columns of all steps count. The end ratio is the mean
jump across the patch borders of the outer half windows, which stay where they are, over that across all columns.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_suite.benchmarks.trained_backbones import DATA, held_out_rows, sampling_job, training_record
from dit_suite.checkpoints import find_checkpoint
from dit_suite.evaluation.extractors import load_extractor
from dit_suite.evaluation.metric_names import parse_metrics
from dit_suite.evaluation.options import EvaluationOptions
from dit_suite.evaluation.runner import Evaluation, Inputs
from dit_suite.evaluation.sources import open_source
from dit_suite.pipelines.pipeline_lego import window_offset, window_starts
from dit_suite.sampling import SamplingJob, batches, open_job, sample_batch

NAME = "lego"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--model", default="emoji-lego-64", help="LEGO checkpoint: bundled name or folder")
    parser.add_argument("--data", type=Path, default=Path(DATA), help="held-out pictures")
    parser.add_argument("--breaks", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="values of t_break")
    parser.add_argument("--samples", type=int, default=64, help="pictures per run")
    parser.add_argument("--steps", type=int, default=8, help="Heun steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance")
    parser.add_argument("--panoramas", type=int, default=16, help="pictures of the panorama row; 0 leaves it out")
    parser.add_argument("--panorama-width", type=int, default=160, help="pixels")
    parser.add_argument("--canvases", nargs="+", choices=("overlap", "drift"), default=["overlap", "drift"])
    parser.add_argument("--device", default="cpu")


@dataclass(frozen=True)
class Pictures:
    """uint8 pictures `(n, height, width, 3)` as a source of the evaluation."""

    samples: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.samples.shape[1:]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return self.samples[list(indices)]

    def describe(self) -> dict[str, Any]:
        return {"kind": "pictures", "shape": list(self.shape)}


def make(pipe: Any, job: SamplingJob, count: int) -> tuple[np.ndarray, float]:
    """Pictures `(count, height, width, 3)` and seconds per picture."""
    began = time.perf_counter()
    made = np.concatenate([sample_batch(pipe, job, indices) for indices in batches(count, job.batch_size)])
    return made, (time.perf_counter() - began) / count


def seam_ratio(pictures: np.ndarray, seams: Sequence[int], inside: Sequence[int]) -> float:
    """Mean jump across the column borders `seams` over that across `inside`; border c lies left of column c.

    Args:
        pictures: `(n, height, width, channels)`.
        seams, inside: column numbers, 1 to width - 1.
    """
    jumps = np.abs(np.diff(pictures.astype(np.float64), axis=2)).mean(axis=(0, 1, 3))
    return float(jumps[np.array(seams) - 1].mean() / jumps[np.array(inside) - 1].mean())


def borders(width: int, window: int, patch: int, offset: int = 0) -> tuple[list[int], list[int]]:
    """Columns where the windows of a step begin or end, and the other borders of patches inside them."""
    starts = window_starts(width, window, offset)
    seams = {start + side for start in starts for side in (0, window)} - {0, width}
    inside = {start + place for start in starts for place in range(patch, window, patch)} - seams
    return sorted(seams), sorted(inside)


def canvas_borders(width: int, window: int, patch: int, canvas: str, steps: int) -> tuple[list[int], list[int]]:
    """`borders` of all steps of a sampling run, one after the other: drifting windows have others in every step."""
    offsets = [window_offset(step, window) if canvas == "drift" else 0 for step in range(steps)]
    found = [borders(width, window, patch, offset) for offset in offsets]
    return [c for seams, _ in found for c in seams], [c for _, inside in found for c in inside]


def end_columns(width: int, window: int, patch: int) -> list[int]:
    """Patch borders up to half a window from either end."""
    outer = range(patch, window // 2 + 1, patch)
    return sorted({*outer, *(width - column for column in outer)})


def panorama_row(pipe: Any, job: SamplingJob, canvas: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seams of wide canvases. `border_ratio` is the mean jump across all borders over that across all columns."""
    config = pipe.transformer.config
    side, patch = config.sample_size, sorted(config.brick_sizes)[-2]
    wide = replace(job, options=replace(job.options, height=side, width=args.panorama_width, canvas=canvas))
    made, seconds = make(pipe, replace(wide, batch_size=2), args.panoramas)
    seams, inside = canvas_borders(args.panorama_width, side, patch, canvas, args.steps)
    columns = range(1, args.panorama_width)
    return {
        "setting": f"{side} x {args.panorama_width} panorama, {canvas}",
        "samples": args.panoramas,
        "seconds": seconds,
        "seam_ratio": seam_ratio(made, seams, inside),
        "border_ratio": seam_ratio(made, seams + inside, columns),
        "end_ratio": seam_ratio(made, end_columns(args.panorama_width, side, patch), columns),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One row per `t_break`, one per kind of panorama."""
    checkpoint = find_checkpoint(args.model)
    rows_text = held_out_rows(training_record(checkpoint), args.data)
    job = sampling_job(checkpoint, args.model, rows_text, args.guidance)
    job = replace(job, options=replace(job.options, num_inference_steps=args.steps))
    pipe = open_job(job, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    extractor, reference = load_extractor("enet-lite0", device=args.device), open_source(rows_text)
    count = args.samples
    rows, unskipped = [], None
    for t_break in (0.0, *args.breaks):
        made, seconds = make(pipe, replace(job, options=replace(job.options, t_break=t_break)), count)
        asked = "fd,kid" if unskipped is None else "fd,kid,psnr,ssim"
        inputs = Inputs(Pictures(made), reference, unskipped)
        report = Evaluation(inputs, extractor, parse_metrics(asked), EvaluationOptions()).run()
        row = {"setting": f"t_break {t_break:g}", "samples": count, "reference": len(reference), "seconds": seconds}
        row |= report.metrics | {f"{name}_median": pair["median"] for name, pair in report.pairs.items()}
        row |= {f"{verdict['metric']}_verdict": verdict["verdict"] for verdict in report.comparison}
        row |= {f"{name}_floor": floor["value"] for name, floor in report.floor.items()}
        if unskipped is None:
            unskipped, first = Pictures(made), seconds
            side = pipe.transformer.config.sample_size
            _, inside = borders(side, side, sorted(pipe.transformer.config.brick_sizes)[-2])
            middle = side // 2
            row["seam_ratio"] = seam_ratio(made, [middle], [column for column in inside if column != middle])
            row["border_ratio"] = seam_ratio(made, inside, range(1, side))
        row["speedup"] = first / seconds
        rows.append(row)
    if args.panoramas:
        rows += [panorama_row(pipe, job, canvas, args) for canvas in args.canvases]
    settings = {key: str(value) if key == "data" else value for key, value in vars(args).items() if key != "output"}
    return {"settings": settings, "rows": rows}

"""TarFlow solvers: sequential decoding with a preallocated KV cache beside Jacobi, GS-Jacobi and the planned strategy.

Every method inverts the same noise in turn, batch by batch, so that a busy machine slows all of them alike; one batch
warms up and is not timed. `speedup` is the median over batches of the ratio of wall times to the sequential sampler,
`cpu_speedup` that of CPU times. PSNR is to the sequential pictures, before the score step, which is the same for all
methods and is timed in a row of its own; `with_denoise` is the ratio when both sides pay for it.

`sweeps` is the mean number of sweeps of a sample over the blocks solved by sweeps, `network_calls` counts calls of a
block's network, and `passes` what they computed for a sample, in whole sequences of one block, samples that diverged
and were solved again token by token included. `bfloat16` counts the calls among them that ran in bfloat16; where the
plan has such sweeps, a second row takes it without them. `rms` is the error of the pictures in [-1, 1].
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_suite.schedulers.generators import randn_per_sample, sample_generators
from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler
from dit_suite.schedulers.tarflow_strategy import BlockStrategy, FlowGuidance

NAME = "tarflow"


@dataclass
class Method:
    """One row: the strategy of every block in sampling order, and what was measured."""

    name: str
    strategies: list[BlockStrategy]
    tolerance: float | None = None
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    bfloat16: list[int] = field(default_factory=list)
    token_passes: list[float] = field(default_factory=list)
    sweeps: list[float] = field(default_factory=list)
    pictures: list[torch.Tensor] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--model", default="emoji-tarflow-64", help="a planned TarFlow checkpoint")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-samples", type=int, default=64, help="pictures compared (a multiple of the batch size)")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="the planner used seeds from 1000000 on")
    parser.add_argument("--methods", choices=("all", "fixed", "planned"), default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cuda-graphs", action="store_true", help="loops and sweeps as CUDA graphs, on all sides")
    parser.add_argument("--tf32", action="store_true", help="float32 products of a GPU in TF32, on both sides")
    parser.add_argument("--features", choices=("enet-lite0", "random-conv", "none"), default="none")


def methods(pipe: Any, chosen: str) -> list[Method]:
    """The sequential sampler first, then its rivals."""
    count = len(pipe.transformer.blocks)
    rows = [
        Method("sequential", [BlockStrategy()] * count),
        Method("planned", pipe.block_strategies("planned", 1, 1)),
    ]
    if any(each.bfloat16_sweeps for each in rows[1].strategies):
        rows.append(Method("planned, all in float32", [each.in_float32() for each in rows[1].strategies]))
    if chosen in ("all", "fixed"):
        for sweeps in (2, 3, 4):
            rows.append(
                Method(
                    f"first sequential, rest Jacobi x{sweeps}",
                    [BlockStrategy()] + [BlockStrategy(1, sweeps)] * (count - 1),
                )
            )
    if chosen == "all":
        rows.append(
            Method("first GS 8x32, rest Jacobi x10", [BlockStrategy(8, 32)] + [BlockStrategy(1, 10)] * (count - 1))
        )
        rows.append(Method("Jacobi until rms 0.01, at most 48", [BlockStrategy(1, 48)] * count, tolerance=0.01))
    return rows


def _sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@dataclass
class Bench:
    """The flow and one way to invert it."""

    pipe: Any
    guidance: FlowGuidance
    device: str
    scheduler: GSJacobiScheduler = field(default_factory=GSJacobiScheduler)

    def sample(self, method: Method, noise: torch.Tensor, labels: torch.Tensor | None, keep: bool = True) -> None:
        """Inverts one batch of tokens and books what it took."""
        model, tokens = self.pipe.transformer, self.pipe.transformer.scale_noise(noise)
        scheduler, count = self.scheduler, len(self.pipe.transformer.blocks)
        calls, bfloat16, passes, sweeps = 0, 0, 0.0, []
        _sync(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        for index, strategy in enumerate(method.strategies):
            block = count - 1 - index
            trace = scheduler.step(
                model.blocks[block], block, tokens, labels, self.guidance, strategy, method.tolerance
            )
            tokens = trace.prev_sample
            calls += trace.calls
            bfloat16 += trace.bfloat16_calls
            if strategy.is_sequential(model.num_tokens):
                passes += trace.calls / model.num_tokens
            else:
                sweeps.append(float(trace.sweeps.float().mean()))
                passes += sweeps[-1] / strategy.modules
                again = len(trace.fallbacks) / len(noise)
                passes += again * (model.num_tokens - 1) / model.num_tokens
        _sync(self.device)
        if keep:
            method.wall.append(time.perf_counter() - wall)
            method.cpu.append(time.process_time() - cpu)
            method.calls.append(calls)
            method.bfloat16.append(bfloat16)
            method.token_passes.append(passes)
            method.sweeps.append(statistics.mean(sweeps) if sweeps else 0.0)
            method.pictures.append(model.unpatchify(tokens).clamp(-1, 1))

    def denoise(self, pictures: torch.Tensor, labels: torch.Tensor | None) -> tuple[float, float]:
        """Wall and CPU seconds of the score step."""
        _sync(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        self.pipe.denoise(pictures, labels, 1.0)
        _sync(self.device)
        return time.perf_counter() - wall, time.process_time() - cpu


def _ratio(top: list[float], bottom: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


def _frechet(rows: list[Method], name: str, device: str) -> dict[str, float]:
    """Frechet distance of every method's pictures to the sequential ones, by method name."""
    from dit_suite.evaluation.distances import frechet_distance
    from dit_suite.evaluation.extractors import load_extractor

    extractor = load_extractor(name, device=device)
    moments = {}
    for row in rows:
        pixels = ((torch.cat(row.pictures) + 1.0) * 127.5).round().to(torch.uint8)
        with torch.no_grad():
            features = torch.cat([extractor(part).features.double() for part in pixels.split(32)])
        moments[row.name] = (features.mean(dim=0), torch.cov(features.T))
    reference = moments[rows[0].name]
    return {name: frechet_distance(*values, *reference) for name, values in moments.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all methods.

    Raises:
        ValueError: the checkpoint is no planned TarFlow, or the numbers of samples do not fit.
    """
    from dit_suite.checkpoints import load_pipeline
    from dit_suite.schedulers.tarflow_planner import psnr

    if args.batch_size < 1 or args.num_samples % args.batch_size or args.num_samples < args.batch_size:
        raise ValueError("--num-samples must be a multiple of --batch-size")
    pipe = load_pipeline(args.model, device=args.device)
    if not isinstance(getattr(pipe, "scheduler", None), GSJacobiScheduler) or not pipe.scheduler.strategies:
        raise ValueError(f"{args.model} is not a planned TarFlow: run scripts/plan_tarflow.py on it first")
    config = pipe.transformer.config
    bench = Bench(pipe, FlowGuidance(args.guidance_scale - 1.0, annealed=True), args.device)
    bench.scheduler.set_cuda_graphs(args.cuda_graphs)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    rows, denoise = methods(pipe, args.methods), []
    for start in range(0, args.num_samples, args.batch_size):
        indices = range(start, start + args.batch_size)
        generators = sample_generators(args.seed, indices)
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = pipe.transformer.patchify(randn_per_sample(shape, generators, args.device))
        labels = None
        if config.num_classes:
            labels = torch.tensor([index % config.num_classes for index in indices], device=args.device)
        if start == 0:
            for row in rows:
                bench.sample(row, noise, labels, keep=False)
        turn = (start // args.batch_size) % len(rows)
        for row in rows[turn:] + rows[:turn]:
            bench.sample(row, noise, labels)
        denoise.append(bench.denoise(rows[0].pictures[-1], labels))
    base = rows[0]
    distances = _frechet(rows, args.features, args.device) if args.features != "none" else {}
    score_wall, score_cpu = [w for w, _ in denoise], [c for _, c in denoise]
    table = []
    for row in rows:
        error = torch.cat(row.pictures) - torch.cat(base.pictures)
        quality = psnr(torch.cat(row.pictures), torch.cat(base.pictures))
        total_base = [a + b for a, b in zip(base.wall, score_wall, strict=True)]
        total = [a + b for a, b in zip(row.wall, score_wall, strict=True)]
        entry = {
            "method": row.name,
            "seconds": statistics.median(row.wall),
            "cpu_seconds": statistics.median(row.cpu),
            "speedup": _ratio(base.wall, row.wall),
            "cpu_speedup": _ratio(base.cpu, row.cpu),
            "with_denoise": _ratio(total_base, total),
            "sweeps": statistics.mean(row.sweeps),
            "network_calls": statistics.median(row.calls),
            "bfloat16": statistics.median(row.bfloat16),
            "passes": statistics.median(row.token_passes),
            "rms": float(error.square().mean().sqrt()),
            "psnr_min": None if row is base else float(quality.min()),
            "psnr_mean": None if row is base else float(quality.mean()),
        }
        if distances:
            entry[f"fd_{args.features}_to_sequential"] = distances[row.name]
        table.append(entry)
    table.append(
        {
            "method": "score step (all)",
            "seconds": statistics.median(score_wall),
            "cpu_seconds": statistics.median(score_cpu),
        }
    )
    settings = {
        name: getattr(args, name)
        for name in ("batch_size", "num_samples", "guidance_scale", "seed", "device", "cuda_graphs", "tf32")
    }
    return {"rows": table, "settings": settings, "strategies": [str(s) for s in rows[1].strategies]}

"""Frames per second of Next-Frame Diffusion: without cache, with cache, with cache and speculation.

All variants of a row group are timed in turns in one run, so that a loaded machine slows them alike; reported are
medians per frame, in a speculative game of each kind of frame (a hit, or a draft that writes m frames). Its player
repeats the last action with probability p, and it is compared with `A(p, N) c(1) / c(N)`. As a draft writes the frames
that the one before it brought, c(N) is the mean of the times of drafts over m as such a player makes them;
`predicted_from_drafts` puts the frames per draft of that very game in the place of A(p, N), which a finite game meets
only roughly.

On a GPU: `--shape 310m --steps 4 --dtype bfloat16 --device cuda --fixed-passes compiled` (not run yet on any).
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dit_suite.models.nfd import NFD_SIZES, NFDTransformer3DModel
from dit_suite.schedulers.frame_sampler import FIXED_PASSES, FrameSampler, FrameSamplerOptions
from dit_suite.schedulers.speculative import SpeculationStats, SpeculativeOptions, SpeculativeSampler, accepted_frames
from dit_suite.schedulers.trigflow import TrigFlowScheduler

NAME = "next-frame"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmark."""
    parser.add_argument("--model", default="moving-square-nfd", help="bundled name or folder (not used with --shape)")
    parser.add_argument("--shape", choices=tuple(NFD_SIZES), help="time this size with random weights instead")
    parser.add_argument("--frame", type=int, nargs=3, default=(16, 14, 24), metavar=("C", "H", "W"), help="of --shape")
    parser.add_argument("--window", type=int, default=32, help="frames of the window of --shape")
    parser.add_argument("--patch-size", type=int, default=1, help="of --shape")
    parser.add_argument("--steps", type=int, nargs="+", default=[18, 4, 2], help="passes per frame")
    parser.add_argument("--persistence", type=float, nargs="+", default=[0.5, 0.9, 0.97])
    parser.add_argument("--draft-length", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument(
        "--frames", type=int, default=24, help="frames timed per variant; games have five times as many"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which all variants take turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--fixed-passes", choices=("off", *FIXED_PASSES), default="off", help="of the rows with a cache (see FixedPass)"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of this process (a busy machine, no GPU)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))


def open_network(args: argparse.Namespace) -> tuple[NFDTransformer3DModel, Any, str]:
    """The network, its autoencoder or None, and what to call it."""
    dtype = getattr(torch, args.dtype)
    if args.shape is None:
        import dit_suite

        pipe = dit_suite.load_pipeline(args.model, dtype=dtype, device=args.device)
        return pipe.transformer, pipe.vae, args.model
    channels, height, width = args.frame
    torch.manual_seed(0)
    size = NFD_SIZES[args.shape]
    model = NFDTransformer3DModel(channels, height, width, args.patch_size, num_actions=8, window=args.window, **size)
    return model.to(args.device, dtype).eval(), None, f"{args.shape} (random weights)"


def _seconds(work: Callable[..., Any], args: argparse.Namespace, *inputs: Any) -> float:
    """Time of `work(*inputs)` on the chosen clock."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    begin = clock()
    work(*inputs)
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - begin


def filled_sampler(
    network: NFDTransformer3DModel, options: FrameSamplerOptions, ahead: int = 1, frames: int | None = None
) -> FrameSampler:
    """A sampler whose window is full (or holds `frames` frames)."""
    config = network.config
    sampler = FrameSampler(network, TrigFlowScheduler(), options, [0], ahead)
    count = config.window - 1 if frames is None else frames
    shape = (1, config.in_channels, max(count, 1), config.sample_height, config.sample_width)
    start = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sampler.extend(start, torch.zeros(1, shape[2], config.num_actions))
    return sampler


def action_stream(num_actions: int, length: int, persistence: float, seed: int = 0) -> list[tuple[float, ...]]:
    """Actions of a player who keeps the action with exactly this probability, else takes another one."""
    rng = np.random.default_rng(seed)
    actions = [int(rng.integers(num_actions))]
    while len(actions) < length:
        keep = rng.random() < persistence
        actions.append(actions[-1] if keep else int((actions[-1] + rng.integers(1, num_actions)) % num_actions))
    return [tuple(float(i == a) for i in range(num_actions)) for a in actions]


def settings(steps: int, args: argparse.Namespace, mode: str = "rolling") -> FrameSamplerOptions:
    """How frames are sampled in a row."""
    fixed = args.fixed_passes if mode == "rolling" else "off"
    return FrameSamplerOptions(num_inference_steps=steps, context_mode=mode, fixed_passes=fixed)


def time_plain(network: NFDTransformer3DModel, steps: int, mode: str, args: argparse.Namespace) -> float:
    """Seconds per frame of plain sampling (median over frames)."""
    sampler = filled_sampler(network, settings(steps, args, mode))
    action = torch.eye(network.config.num_actions)[:1]
    seconds = []
    for _ in range(max(4, args.frames // (4 if mode == "none" else 1))):
        seconds.append(_seconds(_one_frame, args, sampler, action))
    return statistics.median(seconds[2:])


def _one_frame(sampler: FrameSampler, action: torch.Tensor) -> None:
    sampler.append(sampler.draft(action[:, None])[:, :, 0], action)


def time_draft(
    network: NFDTransformer3DModel, steps: int, length: int, written: int, args: argparse.Namespace
) -> float:
    """Seconds of one joint draft of `length` frames whose first pass also writes `written` frames (median)."""
    sampler = filled_sampler(network, settings(steps, args), length)
    action = torch.eye(network.config.num_actions)[:1]
    actions = action[:, None].expand(-1, length, -1)
    seconds = []
    for _ in range(max(5, args.frames // 2)):
        seconds.append(_seconds(sampler.draft, args, actions))
        for _ in range(written):
            sampler.append(torch.zeros(1, *sampler.noise.frame_shape), action)
    return statistics.median(seconds[2:])


def draft_seconds(
    network: NFDTransformer3DModel, steps: int, length: int, persistence: float, args: argparse.Namespace
) -> float:
    """c(N): the mean time of a draft over how many frames of the one before it were used."""
    shares = [persistence ** (m - 1) * (1 - persistence) for m in range(1, length)] + [persistence ** (length - 1)]
    times = [time_draft(network, steps, length, m, args) for m in range(1, length + 1)]
    return sum(share * seconds for share, seconds in zip(shares, times, strict=True))


def time_speculative(
    network: NFDTransformer3DModel, steps: int, length: int, persistence: float, args: argparse.Namespace, seed: int
) -> tuple[float, dict[str, float]]:
    """Seconds per frame of a speculative game, and its counts."""
    options = SpeculativeOptions(speculation="joint", draft_length=length)
    sampler = filled_sampler(network, settings(steps, args), options.num_ahead)
    machine = SpeculativeSampler(sampler, options)
    stream = action_stream(network.config.num_actions, args.frames * 5, persistence, seed)
    for action in (stream[0], stream[-1]):  # both kinds of passes run once before the clock does
        machine.tick(action)
    machine.stats = SpeculationStats()
    kinds: dict[tuple[bool, int], list[float]] = {}
    for action in stream:
        drafts, unwritten = machine.stats.drafts, sampler.num_frames - sampler.cache.length
        seconds = _seconds(machine.tick, args, action)
        drafted = machine.stats.drafts > drafts
        kinds.setdefault((drafted, unwritten if drafted else 0), []).append(seconds)
    stats, total = machine.stats, sum(len(values) * statistics.median(values) for values in kinds.values())
    counts = {"hit_rate": stats.hit_rate, "discard_rate": stats.discard_rate, "drafts": stats.drafts / stats.frames}
    return total / len(stream), counts


def _plain_rows(network: NFDTransformer3DModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(args.rounds):
        for steps in args.steps:
            for mode in ("none", "rolling"):
                times.setdefault((steps, mode), []).append(time_plain(network, steps, mode, args))
    rows = []
    for (steps, mode), values in times.items():
        baseline = times[(steps, "none")]
        speedups = [b / v for b, v in zip(baseline, values, strict=True)]
        seconds = statistics.median(values)
        rows.append(
            {
                "variant": "no cache" if mode == "none" else "cache",
                "steps": steps,
                "ms_per_frame": 1000 * seconds,
                "fps": 1 / seconds,
                "speedup_vs_no_cache": statistics.median(speedups),
            }
        )
    return rows


def _speculative_row(
    network: NFDTransformer3DModel, steps: int, persistence: float, length: int, args: argparse.Namespace
) -> dict[str, Any]:
    ratios, predictions, realised, spent, counts = [], [], [], [], {}
    for round_index in range(args.rounds):
        plain = time_plain(network, steps, "rolling", args)
        single, joint = (draft_seconds(network, steps, n, persistence, args) for n in (1, length))
        seconds, counts = time_speculative(network, steps, length, persistence, args, round_index)
        again = time_plain(network, steps, "rolling", args)
        ratios.append((plain + again) / 2 / seconds)
        predictions.append(accepted_frames(persistence, length) * single / joint)
        realised.append(single / joint / counts["drafts"])
        spent.append(seconds)
    return {
        "variant": f"cache + speculation N={length}",
        "steps": steps,
        "persistence": persistence,
        "ms_per_frame": 1000 * statistics.median(spent),
        "fps": 1 / statistics.median(spent),
        "speedup_vs_cache": statistics.median(ratios),
        "predicted_speedup": statistics.median(predictions),
        "predicted_from_drafts": statistics.median(realised),
        **counts,
    }


def _speculative_rows(network: NFDTransformer3DModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    cases = itertools.product(args.steps, args.persistence, args.draft_length)
    return [_speculative_row(network, *case, args) for case in cases]


def _cache_length_rows(network: NFDTransformer3DModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    window, rows = network.config.window, []
    action = torch.eye(network.config.num_actions)[:1, None]
    for steps, frames in itertools.product(args.steps, sorted({1, window // 2, window - 1} - {0})):
        sampler = filled_sampler(network, settings(steps, args), frames=frames)
        values = []
        for _ in range(max(4, args.frames // 2)):
            values.append(_seconds(sampler.draft, args, action))
            sampler.cache.truncate(sampler.num_frames - 1)
        rows.append(
            {
                "variant": f"context of {frames} frames",
                "steps": steps,
                "ms_per_frame": 1000 * statistics.median(values[1:]),
                "fps": 1 / statistics.median(values[1:]),
            }
        )
    return rows


def _decode_row(network: NFDTransformer3DModel, vae: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Pixels from a finished frame: the autoencoder where there is one, else scaling to bytes."""
    config = network.config
    frame = torch.rand(1, config.in_channels, config.sample_height, config.sample_width, device=network.device)

    def decode() -> Any:
        pixels = frame if vae is None else vae.decode(frame.to(vae.dtype)).sample
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    values = [_seconds(decode, args) for _ in range(max(5, args.frames))]
    return {"variant": "decode one frame", "ms_per_frame": 1000 * statistics.median(values[1:])}


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Times everything; `rows` is the table. Frame times leave decoding out, which has its own row."""
    network, vae, name = open_network(args)
    rows = [*_plain_rows(network, args), *_speculative_rows(network, args), *_cache_length_rows(network, args)]
    rows.append(_decode_row(network, vae, args))
    return {
        "model": name,
        "parameters": sum(p.numel() for p in network.parameters()),
        "tokens_per_frame": network.tokens_per_frame,
        "window": network.config.window,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "fixed_passes": args.fixed_passes,
        "rows": [{"model": name, **row} for row in rows],
    }

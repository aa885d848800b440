"""AdaSpa, VMoBA and rivals on a trained video model: clips compared pair by pair, single steps timed in turn."""

import argparse
from typing import Any

import torch

from dit_suite.benchmarks.sparse_clips import make_clips
from dit_suite.benchmarks.sparse_contenders import contenders
from dit_suite.benchmarks.sparse_steps import time_steps

_TIMINGS = ("step_speedup", "step_cpu_speedup", "dense_step_s", "search_s_per_layer", "run_speedup", "search_share")


def _load(args: argparse.Namespace) -> Any:
    from dit_suite.checkpoints import load_pipeline

    device = "cuda" if torch.cuda.is_available() else None
    pipe = load_pipeline(args.model, dtype=getattr(torch, args.dtype), device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bundle_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per method and setting."""
    rows = contenders(args)
    pipe = _load(args)
    if not args.skip_timing:
        time_steps(pipe, rows, args)
    if not args.skip_clips:
        make_clips(pipe, rows, args)
    return [
        {
            "part": "bundle",
            "method": row.name,
            "setting": row.setting,
            "density": row.mean("density"),
            **{name: row.facts.get(name) for name in _TIMINGS},
            "recall": row.mean("recall"),
            "psnr_mean": row.mean("psnr"),
            "ssim_mean": row.mean("ssim"),
            "clip_s": row.mean("seconds"),
            "clips": len(row.clips),
        }
        for row in rows
    ]


def length_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per clip size and method: from which length on a method gains (`min_tokens` is not applied)."""
    pipe = _load(args)
    patch = pipe.transformer.config.patch_size
    found = []
    for text in args.sizes:
        size = _size(text)
        tokens = 1
        for side, part in zip(pipe._latent_shape(1, *size)[2:], patch, strict=True):
            tokens *= side // part
        rows = contenders(args)
        time_steps(pipe, rows, args, size)
        for row in rows:
            facts = {name: row.facts.get(name) for name in _TIMINGS}
            found.append({"part": "lengths", "tokens": tokens, "method": row.name, "setting": row.setting, **facts})
    return found


def _size(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ValueError(f"a size is FRAMESxHEIGHTxWIDTH, such as 16x64x64, got {text!r}")
    return tuple(int(part) for part in parts)

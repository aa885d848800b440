"""Sparse attention: kernels against dense attention, and AdaSpa and VMoBA beside rivals on a trained video model.

`--part kernels` times every backend at several densities and lengths and checks it against the dense mask. `--part
bundle` takes the bundled clip generator: each method makes the same clip (same prompt, same noise) as the dense model
(PSNR, SSIM, exact recall at probed steps), and single steps are timed in turn with the dense step, so that a busy
machine slows all alike (`step_speedup` is the median ratio of wall times, `step_cpu_speedup` of CPU times; a search is
timed apart, per layer; `run_speedup` puts dense steps, searches and sparse steps together). `--part lengths` times
steps of shorter clips, which shows from which length on a method gains. `--part gpu` times full-width layers of Wan 2.1
1.3B and HunyuanVideo with random weights against cuDNN dense attention and needs a CUDA device.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from dit_suite.benchmarks.sparse_bundle import bundle_rows, length_rows
from dit_suite.benchmarks.sparse_gpu import SHAPES, gpu_rows
from dit_suite.benchmarks.sparse_kernels import kernel_rows

NAME = "sparse-attention"
PARTS = ("kernels", "bundle", "lengths", "gpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--model", default="emoji-wan-16x64", help="a text-to-video checkpoint for --part bundle")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of --model")
    parser.add_argument("--prompts", nargs="+", default=["red heart", "grinning face"])
    parser.add_argument("--num-inference-steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--rival-sparsity", type=float, nargs="*", default=[0.8], help="of the rivals; nothing: none")
    parser.add_argument(
        "--methods", nargs="+", default=["all"], help="rows of the bundle part, by name or name:sparsity"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions of a step or kernel")
    parser.add_argument("--skip-clips", action="store_true", help="time single steps only, make no clips")
    parser.add_argument("--skip-timing", action="store_true", help="make clips only, time no steps")
    parser.add_argument(
        "--clips-file", type=Path, help="JSON lines: a row per clip is added; clips in it are not redone"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="sequence lengths for --part kernels")
    sizes = ["8x32x32", "16x32x32", "16x32x64", "16x64x64"]
    parser.add_argument("--sizes", nargs="+", default=sizes, help="FRAMESxHEIGHTxWIDTH of clips for --part lengths")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    names = [name for name, _, _ in SHAPES]
    parser.add_argument("--gpu-shapes", nargs="+", choices=names, default=names, help="of --part gpu")
    parser.add_argument("--gpu-rows", nargs="+", choices=("layer", "model"), default=["layer", "model"])
    parser.add_argument("--gpu-layers", type=int, default=2, help="full-width layers built for --part gpu")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the chosen parts; each row names its part."""
    rows: list[dict[str, Any]] = []
    if args.part in ("all", "kernels"):
        rows += kernel_rows(args.lengths, args.densities, args.repeats)
    if args.part in ("all", "bundle"):
        rows += bundle_rows(args)
    if args.part == "lengths":
        rows += length_rows(args)
    if args.part == "gpu" and not torch.cuda.is_available():
        raise ValueError("--part gpu needs a CUDA device")
    if args.part in ("all", "gpu") and torch.cuda.is_available():
        rows += gpu_rows(args.gpu_shapes, args.gpu_rows, args.gpu_layers, args.repeats)
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "output"}
    return {"rows": rows, "arguments": given}

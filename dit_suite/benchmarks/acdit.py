"""Cost of ACDiT by block size, against full-sequence diffusion (one block) with the same weights.

FLOPs are counted by torch's counter over the whole sampling loop, with attention as plain matrix products (the counter
does not know the fused attention of the CPU); times of all block sizes are taken in turns in one
run. `predicted_flops` is the paper's cost model (section 4.4) with the extra clean passes counted.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_suite.models.acdit import ACDIT_SIZES, ACDiTTransformer3DModel

NAME = "acdit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmark."""
    parser.add_argument("--size", choices=tuple(ACDIT_SIZES), default="Ti", help="shape (random weights)")
    parser.add_argument("--grid", type=int, default=16, help="tokens per side of the picture")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[256, 64, 16, 4], help="tokens per block")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps per block")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of this process (a busy machine, no GPU)"
    )


def sample(model: ACDiTTransformer3DModel, batch_size: int, block_size: int, steps: int) -> int:
    """The passes of one sampling run (the scheduler's arithmetic left out); returns the cache's bytes."""
    noise = torch.zeros(batch_size, model.config.in_channels, 1, *model.grid[1:], device=model.device)
    blocks, cache = model.to_blocks(noise, block_size), model.new_cache(batch_size, block_size)
    labels = torch.zeros(batch_size, dtype=torch.long, device=model.device)
    for index in range(blocks.shape[1]):
        clean = blocks[:, index - 1 : index] if index else None
        for _ in range(steps):
            model(blocks[:, index : index + 1], torch.tensor(500.0, device=model.device), labels, clean, cache, index)
            clean = None
    return cache.nbytes


def predicted_flops(model: ACDiTTransformer3DModel, batch_size: int, block_size: int, steps: int) -> float:
    """2 theta per token in the linear layers, 4 h per query-key pair in attention, over all layers and passes."""
    config, tokens = model.config, model.num_tokens
    hidden = config.num_attention_heads * config.attention_head_dim
    layer = (4 + 2 * config.mlp_ratio) * hidden**2
    num_blocks = tokens // block_size
    noisy_tokens = steps * tokens
    clean_tokens = (num_blocks - 1) * block_size
    pairs = sum(steps * block_size * (i + 1) * block_size for i in range(num_blocks))
    pairs += sum(block_size * (i + 1) * block_size for i in range(num_blocks - 1))
    per_layer = 2 * (noisy_tokens + clean_tokens) * layer + 4 * hidden * pairs
    modulation = 2 * 6 * hidden**2 * steps * num_blocks
    return batch_size * config.num_layers * (per_layer + modulation)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Counts and times every block size."""
    torch.manual_seed(0)
    model = ACDiTTransformer3DModel(
        4, args.grid, args.grid, block_size=args.grid**2, num_classes=10, **ACDIT_SIZES[args.size]
    )
    model = model.to(args.device).eval()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    flops, cache_bytes = {}, {}
    for block_size in args.block_sizes:
        model.check_block_size(block_size)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            cache_bytes[block_size] = sample(model, args.batch_size, block_size, args.steps)
        flops[block_size] = counter.get_total_flops()
    seconds: dict[int, list[float]] = {size: [] for size in args.block_sizes}
    for _ in range(args.rounds):
        for block_size in args.block_sizes:
            begin = clock()
            sample(model, args.batch_size, block_size, args.steps)
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[block_size].append(clock() - begin)
    first = args.block_sizes[0]
    rows = []
    for size in args.block_sizes:
        ratios = [a / b for a, b in zip(seconds[first], seconds[size], strict=True)]
        predicted = predicted_flops(model, args.batch_size, size, args.steps)
        rows.append(
            {
                "block_size": size,
                "blocks": model.num_tokens // size,
                "passes": args.steps * model.num_tokens // size,
                "gflops": flops[size] / 1e9,
                "predicted_gflops": predicted / 1e9,
                "cache_mb": cache_bytes[size] / 1e6,
                "seconds": statistics.median(seconds[size]),
                f"speedup_vs_B={first}": statistics.median(ratios),
            }
        )
    return {"size": args.size, "tokens": model.num_tokens, "steps": args.steps, "clock": args.clock, "rows": rows}

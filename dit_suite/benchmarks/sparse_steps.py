"""Single network passes of a trained video model, dense and with each method, timed in turn."""

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from dit_suite.attention.adaspa import AdaSpaConfig
from dit_suite.attention.methods import VMoBAMethod
from dit_suite.attention.plugin import SparseAttentionHandle
from dit_suite.benchmarks.sparse_contenders import Contender
from dit_suite.benchmarks.sparse_kernels import interleaved, median_ratio
from dit_suite.step_plan import Run, StepContext, publish_step


def run_facts(method: Any, steps: int, layers: int, dense: float, gain: float, search: float) -> dict[str, float]:
    """Gain over a whole run and the searches' share of it, put together from the measured parts.

    Args:
        dense: seconds of a dense network pass; `gain` is how many times faster a sparse one is.
        search: seconds of one search in one layer.
    """
    if isinstance(method, VMoBAMethod):
        dense_steps, searches = math.ceil(method.config.dense_first_steps * steps - 1e-9), 0
    else:
        due = method.config.searches(steps)
        dense_steps, searches = due[0] + 1, method.planned_searches(steps)
    searching = layers * searches * search
    total = dense * dense_steps + dense / gain * (steps - dense_steps) + searching
    return {"run_speedup": steps * dense / total, "search_share": searching / total}


@torch.no_grad()
def time_steps(
    pipe: Any, rows: list[Contender], args: argparse.Namespace, size: tuple[int, int, int] | None = None
) -> None:
    """Times one network pass at the middle of a run, dense and with each method, in turn; fills `row.facts`.

    The input is half-way noise of `size` (frames, height, width; default: the checkpoint's); every method searches (or
    builds its table) on that same input first. A turn is one dense pass and one of each method. The gain of a run
    assumes the default schedule of searches.
    """
    device, network = pipe.device, pipe.transformer
    generator = torch.Generator().manual_seed(args.seed)
    shape = pipe._latent_shape(1, *(size or pipe.config.sample_size))
    given = {
        "hidden_states": torch.randn(shape, generator=generator).to(device, network.dtype),
        "encoder_hidden_states": pipe.encode_prompt([args.prompts[0]], device),
        "timestep": torch.full((1,), 600.0, device=device),
    }
    steps = args.num_inference_steps
    middle, first = steps // 2, AdaSpaConfig().searches(steps)[0]

    def forward(index: int, key: Run) -> None:
        with publish_step(StepContext(index, steps, 600.0, "cond", run=key)):
            network(**given, return_dict=False)

    runs: dict[str, Callable[[], None]] = {"dense": functools.partial(forward, middle, Run())}
    around: dict[str, Callable[[], Any]] = {}
    found = []
    for row in rows:
        method, key = row.build(), Run()
        with SparseAttentionHandle(pipe, method, keep_state=True) as handle:
            forward(first, key)
            layers = handle.stats()["layers"]
        search = statistics.median(layer.get("search_seconds", 0.0) for layer in layers)
        found.append((method, len(layers), search))
        runs[f"{row.name} {row.setting}"] = functools.partial(forward, middle, key)
        around[f"{row.name} {row.setting}"] = functools.partial(SparseAttentionHandle, pipe, method, keep_state=True)
    times = interleaved(runs, args.repeats, around)
    dense = statistics.median(t[0] for t in times["dense"])
    for row, (method, layers, search) in zip(rows, found, strict=True):
        taken = times[f"{row.name} {row.setting}"]
        gain = median_ratio(times["dense"], taken, 0)
        row.facts |= {
            "step_speedup": gain,
            "step_cpu_speedup": median_ratio(times["dense"], taken, 1),
            "dense_step_s": dense,
            "search_s_per_layer": search or None,
        }
        row.facts |= run_facts(method, steps, layers, dense, gain, search)
        print(f"step, {row.name}, {row.setting}: {gain:.2f}x", flush=True)

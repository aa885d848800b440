"""Kernels of block-sparse attention and the search pass, timed in turn with dense attention on one device."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from dit_suite.attention.adaspa import row_budget
from dit_suite.attention.block_mass import block_mass
from dit_suite.attention.block_sparse import block_sparse_attention, choose_backend, table_from_mask
from dit_suite.attention.merge import attention_with_lse
from dit_suite.attention.partition import Grid, partition_on
from dit_suite.attention.vmoba import KINDS, VMoBAConfig, select, vmoba_attention


def one_line(error: Exception) -> str:
    """Kind and message of an error in at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _timed(run: Callable[[], Any], around: Callable[[], AbstractContextManager]) -> tuple[float, float]:
    cuda = torch.cuda.is_available()
    with around():
        if cuda:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu


def interleaved(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    around: Mapping[str, Callable[[], AbstractContextManager]] = MappingProxyType({}),
    failed: dict[str, str] | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of every run; the runs take turns, and one untimed turn warms up.

    What `around` names for a run is entered around it and not timed. Given `failed`, a run that raises is printed, put
    there with its message and left out from then on; runs named there before are not tried. Without it the error
    ends everything.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs if name not in (failed or {})}
    for turn in range(repeats + 1):
        for name in list(times):
            try:
                taken = _timed(runs[name], around.get(name, nullcontext))
            except Exception as error:
                if failed is None:
                    raise
                failed[name] = one_line(error)
                print(f"{name} failed: {failed[name]}", flush=True)
                del times[name]
                continue
            if turn:
                times[name].append(taken)
    return times


def median_ratio(base: list[tuple[float, float]], other: list[tuple[float, float]], which: int) -> float:
    """Median over turns of base time / other time; `which` is 0 for wall and 1 for CPU time."""
    return statistics.median(b[which] / o[which] for b, o in zip(base, other, strict=True))


def random_table(heads: int, length: int, block: int, density: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A row-uniform random table for one sample."""
    blocks = -(-length // block)
    scores = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    kept = scores.argsort(-1) < row_budget(1.0 - density, blocks)
    return table_from_mask(kept.to(device))


def cube_like(length: int) -> Grid:
    """The grid (frames, rows, columns) of `length` tokens whose sides are closest to each other."""
    sides = [n for n in range(1, length + 1) if length % n == 0]
    grids = [(a, b, length // (a * b)) for a in sides for b in sides if length // a % b == 0]
    return min(grids, key=lambda grid: (max(grid) / min(grid), grid))


def vmoba_runs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: Grid, config: VMoBAConfig, label: str = ""
) -> dict[str, Callable[[], Any]]:
    """VMoBA's three kinds of layer, and what selection alone takes of each (the first call permutes its operands)."""
    runs: dict[str, Callable[[], Any]] = {}
    for layer, kind in enumerate(KINDS):
        parts = partition_on(grid, config.block(grid, kind), query.device)
        in_order = functools.cache(lambda p=parts: [p.permute(t, 2) for t in (query, key)])
        runs[f"vmoba-{kind}d{label}"] = lambda i=layer: vmoba_attention(query, key, value, grid, config, i)
        runs[f"vmoba-{kind}d-selection{label}"] = lambda qk=in_order, p=parts, n=kind: select(*qk(), p, config, n)
    return runs


def dense_backend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """The kernel that torch's attention picks for these tensors: what the gains are measured against."""
    return SDPBackend(torch._fused_sdp_choice(query, key, value)).name


def kernel_rows(lengths: list[int], densities: list[float], repeats: int) -> list[dict[str, Any]]:
    """One row per length, density and backend: milliseconds, gain over dense, largest error to the dense mask."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads, dim, block = (12, 128, 128) if device == "cuda" else (4, 64, 64)
    rows = []
    for length in lengths:
        generator = torch.Generator().manual_seed(1)
        query, key, value = (
            torch.randn(1, heads, length, dim, generator=generator).to(device, dtype) for _ in range(3)
        )
        lse = attention_with_lse(query, key, value)[1].float()
        runs = {
            "dense": lambda q=query, k=key, v=value: F.scaled_dot_product_attention(q, k, v),
            "search": lambda q=query, k=key, s=lse: block_mass(q, k, s, block),
        }
        tables = {density: random_table(heads, length, block, density, device) for density in densities}
        passed_over = dict(choose_backend(query, key, block).passed_over)
        backends = [name for name in ("flash4", "flex", "grouped") if name not in passed_over]
        for density, table in tables.items():
            for backend in backends:
                runs[f"{backend} {density}"] = lambda q=query, k=key, v=value, t=table, b=backend: (
                    block_sparse_attention(q, k, v, *t, block, backend=b)
                )
        runs |= vmoba_runs(query, key, value, cube_like(length), VMoBAConfig.training_free())
        times = interleaved(runs, repeats)
        for name, taken in times.items():
            backend, _, density = name.partition(" ")
            row = {
                "part": "kernels",
                "method": backend,
                "tokens": length,
                "density": float(density) if density else 1.0,
                "dense_backend": dense_backend(query, key, value),
                "ms": statistics.median(t[0] for t in taken) * 1e3,
                "step_speedup": median_ratio(times["dense"], taken, 0),
                "step_cpu_speedup": median_ratio(times["dense"], taken, 1),
            }
            if density and length <= 8192:
                table = tables[float(density)]
                exact = block_sparse_attention(query, key, value, *table, block, backend="dense_mask")
                row["max_error"] = float((runs[name]() - exact).abs().max())
            rows.append(row)
    return rows

"""Sparse attention at the sizes people run: full-width layers with random weights on one CUDA device.

The dense side is torch's cuDNN attention. `layer` rows time the attention of one layer; `model` rows time a forward of
a few full-width layers, so the embeddings weigh more than they do in the whole network.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_suite.attention.adaspa import AdaSpaConfig
from dit_suite.attention.block_mass import block_mass
from dit_suite.attention.block_sparse import block_sparse_attention, choose_backend
from dit_suite.attention.merge import attention_with_lse
from dit_suite.attention.methods import AdaSpaMethod, VMoBAMethod
from dit_suite.attention.plugin import SparseAttentionHandle, self_attention_layers
from dit_suite.attention.vmoba import VMoBAConfig
from dit_suite.benchmarks.sparse_kernels import interleaved, median_ratio, one_line, random_table, vmoba_runs
from dit_suite.step_plan import Run, StepContext, publish_step

# Name, (frames, rows, columns) of tokens, heads; head_dim is 128 in both.
SHAPES = (
    ("wan2.1-1.3b 480p", (21, 30, 52), 12),
    ("wan2.1-1.3b 720p", (21, 45, 80), 12),
    ("hunyuan 720p", (33, 45, 80), 24),
)
_BLOCK, _DIM = 128, 128
_DENSE = "dense cuDNN"


def _cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value)


def _timed_rows(
    what: str,
    tokens: int,
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    around: Mapping[str, Callable[[], AbstractContextManager]] = MappingProxyType({}),
    failed: Mapping[str, str] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """A row per method, timed in turn; a method that fails (or did, see `failed`) has its message in place of times."""
    failed = dict(failed)
    times = interleaved(runs, repeats, around, failed)
    rows = []
    for method in runs:
        row = {"part": "gpu", "what": what, "tokens": tokens, "method": method}
        if method in failed:
            row["error"] = failed[method]
        else:
            row["ms"] = sorted(t[0] for t in times[method])[repeats // 2] * 1e3
            if _DENSE in times:
                row["step_speedup"] = median_ratio(times[_DENSE], times[method], 0)
        rows.append(row)
    return rows


def _layer_rows(name: str, grid: tuple[int, int, int], heads: int, repeats: int) -> list[dict[str, Any]]:
    tokens = grid[0] * grid[1] * grid[2]
    query, key, value = (torch.randn(1, heads, tokens, _DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    lse = functools.cache(lambda: attention_with_lse(query, key, value)[1].float())
    runs: dict[str, Callable[[], Any]] = {
        _DENSE: lambda: _cudnn(query, key, value),
        "search": lambda: block_mass(query, key, lse(), _BLOCK),
    }
    backend = choose_backend(query, key, _BLOCK).name
    for density in (0.1, 0.2, 0.3):
        table = random_table(heads, tokens, _BLOCK, density, "cuda")
        runs[f"adaspa {backend} density {density}"] = lambda t=table: block_sparse_attention(
            query, key, value, *t, _BLOCK
        )
    for label, config in (("", VMoBAConfig.training_free()), (" trained", VMoBAConfig.trained())):
        runs |= vmoba_runs(query, key, value, grid, config, label)
    return _timed_rows(f"layer, {name}", tokens, runs, repeats)


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _wan(grid: tuple[int, int, int], layers: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    with torch.device("cuda"):
        model = WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=layers)
    return model.to(torch.bfloat16).eval(), {
        "hidden_states": _bf16(1, 16, grid[0], grid[1] * 2, grid[2] * 2),
        "encoder_hidden_states": _bf16(1, 512, 4096),
        "timestep": torch.full((1,), 600.0, device="cuda"),
    }


def _hunyuan(grid: tuple[int, int, int], layers: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Of `layers` a third are two-stream blocks and at least one is; the whole network has 20 of 60."""
    from diffusers import HunyuanVideoTransformer3DModel

    double = max(1, layers // 3)
    with torch.device("cuda"):
        model = HunyuanVideoTransformer3DModel(num_layers=double, num_single_layers=max(1, layers - double))
    return model.to(torch.bfloat16).eval(), {
        "hidden_states": _bf16(1, 16, grid[0], grid[1] * 2, grid[2] * 2),
        "encoder_hidden_states": _bf16(1, 256, 4096),
        "encoder_attention_mask": torch.ones(1, 256, device="cuda", dtype=torch.bfloat16),
        "pooled_projections": _bf16(1, 768),
        "guidance": torch.full((1,), 6000.0, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.full((1,), 600.0, device="cuda"),
    }


@torch.no_grad()
def _model_rows(
    name: str, build: Callable, grid: tuple[int, int, int], layers: int, repeats: int
) -> list[dict[str, Any]]:
    model, given = build(grid, layers)
    for _, module in self_attention_layers(model):
        module.processor._attention_backend = AttentionBackendName("_native_cudnn")
    model.compile_repeated_blocks(dynamic=False)
    methods = {
        "adaspa sparsity 0.8": AdaSpaMethod(AdaSpaConfig(search_steps=(0.0,))),
        "vmoba training-free": VMoBAMethod(VMoBAConfig.training_free(dense_first_steps=0.0)),
    }
    run = Run()

    def forward(index: int = 1) -> None:
        with publish_step(StepContext(index, 50, 600.0, "cond", run=run)):
            model(**given, return_dict=False)

    around = {
        name: functools.partial(SparseAttentionHandle, model, method, keep_state=True)
        for name, method in methods.items()
    }
    searching, failed = "adaspa sparsity 0.8", {}
    try:
        with around[searching]():
            forward(index=0)
    except Exception as error:
        failed[searching] = one_line(error)
        print(f"{searching} failed: {failed[searching]}", flush=True)
    what = f"model, {len(self_attention_layers(model))} layers of {name}"
    runs = {_DENSE: forward} | dict.fromkeys(methods, forward)
    return _timed_rows(what, grid[0] * grid[1] * grid[2], runs, repeats, around, failed)


def gpu_rows(shapes: list[str], kinds: list[str], layers: int, repeats: int) -> list[dict[str, Any]]:
    """Rows for every shape; needs CUDA. Rows are printed as they come: a run that is cut off has said what it found.

    A method that fails has a row with `error` in place of times; so has a shape whose layers or model cannot be built.
    """
    rows: list[dict[str, Any]] = []
    for name, grid, heads in SHAPES:
        if name not in shapes:
            continue
        build = _hunyuan if name.startswith("hunyuan") else _wan
        measures = {
            "layer": functools.partial(_layer_rows, name, grid, heads, repeats),
            "model": functools.partial(_model_rows, name, build, grid, layers, repeats),
        }
        for kind, measure in measures.items():
            if kind not in kinds:
                continue
            try:
                found = measure()
            except Exception as error:
                found = [{"part": "gpu", "what": f"{kind}, {name}", "method": "all", "error": one_line(error)}]
            for row in found:
                print(row, flush=True)
            rows += found
    return rows

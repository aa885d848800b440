"""Golden fixtures of VMoBA: partition, gate, masks, outputs and gradients."""

from collections.abc import Mapping
from typing import Any

import torch

from dit_suite.attention import selection
from dit_suite.attention.partition import partition
from dit_suite.attention.vmoba import VMoBAConfig, vmoba_attention
from dit_suite.golden import Result, compare, section

FAMILY = "vmoba"
PREFIXES = ("vmoba_",)
_TOLERANCE = 1e-5


def _block_of(config: dict[str, Any]) -> tuple[float | tuple[int, ...], int]:
    """The partition parameter and its number of dimensions."""
    block = config["block"]
    return (float(block), 1) if isinstance(block, (int, float)) else (tuple(block), len(block))


def _options(block: float | tuple[int, ...], kind: int, mode: str, pool: str, value: float) -> VMoBAConfig:
    chosen = {"topk": (int(value),) * 3} if mode == "topk" else {"tau": float(value)}
    cycle = tuple(int(k == kind) for k in (1, 2, 3))
    return VMoBAConfig(
        **{f"block_{kind}d": block},
        select=mode,
        pool=pool,
        cycle=cycle,
        dense_first_steps=0.0,
        empty_selection="full",
        **chosen,
    )


def _packed(masks: torch.Tensor) -> torch.Tensor:
    """`(batch, heads, blocks, tokens)` -> the packed `(batch * blocks, heads, batch * tokens)` of the fixtures."""
    batch, heads, blocks, tokens = masks.shape
    packed = torch.zeros(batch * blocks, heads, batch * tokens, dtype=torch.uint8)
    for b in range(batch):
        rows, columns = slice(b * blocks, (b + 1) * blocks), slice(b * tokens, (b + 1) * tokens)
        packed[rows, :, columns] = masks[b].transpose(0, 1).to(torch.uint8)
    return packed


def check(tensors: Mapping[str, torch.Tensor], config: dict[str, Any]) -> list[Result]:
    """Compares every mode of a fixture; masks and orders exactly, the rest to 1e-5."""
    block, kind = _block_of(config)
    grid = (config["grid_t"], config["grid_h"], config["grid_w"])
    given, expected = section(tensors, "input"), section(tensors, "output")
    query, key, value, upstream = (given[n].transpose(1, 2) for n in ("q", "k", "v", "grad_out"))
    batch = query.shape[0]
    parts = partition(grid, block)
    edges = torch.cat([parts.boundaries[:-1] + b * parts.num_tokens for b in range(batch)])
    edges = torch.cat([edges, torch.tensor([batch * parts.num_tokens])])
    results = [
        compare("order", parts.order, expected["order"], 0.0),
        compare("cu_block", edges, expected["cu_block"], 0.0),
    ]
    block_query, block_key = parts.permute(query, 2), parts.permute(key, 2)
    means = selection.block_means(block_key, parts.boundaries)
    gate = selection.block_gate(block_query, means)
    results.append(compare("block_mean_k", means.transpose(1, 2).flatten(0, 1), expected["block_mean_k"], _TOLERANCE))
    valid = _packed(torch.ones_like(gate)).bool()
    packed_gate = torch.zeros(valid.shape)
    for b in range(batch):
        rows = slice(b * parts.num_blocks, (b + 1) * parts.num_blocks)
        packed_gate[rows, :, b * parts.num_tokens : (b + 1) * parts.num_tokens] = gate[b].transpose(0, 1)
    results.append(compare("gate", packed_gate[valid], expected["gate"][valid], _TOLERANCE))

    for mode, pool, amount in config["modes"]:
        name = f"{mode}.{pool}.{amount}"
        options = _options(block, kind, mode, pool, amount)
        k = options.kept_blocks(kind, parts.num_blocks)
        mask = selection.select_pairs(block_query, means, parts.boundaries, mode, pool, k, options.tau)
        results.append(compare(f"{name}.mask", _packed(mask), expected[f"{name}.mask"], 0.0))
        leaves = [t.detach().clone().requires_grad_() for t in (query, key, value)]
        out = vmoba_attention(*leaves, grid, options, layer=0, scale=config.get("scale"))
        gradients = torch.autograd.grad(out, leaves, upstream)
        results.append(compare(f"{name}.out", out.transpose(1, 2), expected[f"{name}.out"], _TOLERANCE))
        for letter, gradient in zip("qkv", gradients, strict=True):
            wanted = expected[f"{name}.grad_{letter}"]
            results.append(compare(f"{name}.grad_{letter}", gradient.transpose(1, 2), wanted, _TOLERANCE))
    return results

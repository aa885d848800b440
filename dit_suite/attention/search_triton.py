"""AdaSpa's search kernel in Triton: block masses from queries, keys and a cached log-sum-exp, in one pass.

One program handles one (sample, head, query block): it keeps its query tile, walks over all key tiles and stores one
number per tile. No value traffic and no score matrix. Triton's interpreter (`TRITON_INTERPRET=1` before the first
import) runs the same code on CPU tensors, which checks its logic but says nothing about its speed.
"""

import functools
import importlib.util
import os
from collections.abc import Callable

import torch


def triton_unavailable(query: torch.Tensor, block_size: int) -> str | None:
    """Why the kernel cannot run this call; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {query.device.type}"
    if block_size < 16 or block_size & (block_size - 1) or block_size > 128:
        return f"blocks must be 16, 32, 64 or 128 tokens, got {block_size}"
    if query.shape[-1] > 256:
        return f"head_dim must be at most 256, got {query.shape[-1]}"
    if query.dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    return None


@functools.lru_cache(maxsize=1)
def _kernel() -> Callable:
    import triton
    import triton.language as tl

    @triton.jit
    def block_mass_kernel(
        query, key, lse, mass, scale_log2, q_len, k_len, k_blocks, q_blocks,
        head_dim: tl.constexpr, padded_dim: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        block_row = tl.program_id(0)
        head = tl.program_id(1).to(tl.int64)
        rows = block_row * block + tl.arange(0, block)
        dims = tl.arange(0, padded_dim)
        in_dim = dims[None, :] < head_dim
        row_ok = rows < q_len
        q_at = query + head * q_len * head_dim + rows[:, None] * head_dim + dims[None, :]
        q = tl.load(q_at, mask=row_ok[:, None] & in_dim, other=0.0)
        row_lse = tl.load(lse + head * q_len + rows, mask=row_ok, other=float("inf")) * 1.4426950408889634
        for block_column in range(0, k_blocks):
            columns = block_column * block + tl.arange(0, block)
            column_ok = columns < k_len
            k_at = key + head * k_len * head_dim + columns[:, None] * head_dim + dims[None, :]
            k = tl.load(k_at, mask=column_ok[:, None] & in_dim, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - row_lse[:, None]
            weights = tl.where(row_ok[:, None] & column_ok[None, :], tl.exp2(scores), 0.0)
            total = tl.sum(tl.sum(weights, axis=1), axis=0)
            tl.store(mass + (head * q_blocks + block_row) * k_blocks + block_column, total)

    return block_mass_kernel


def triton_block_mass(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, block_size: int, scale: float
) -> torch.Tensor:
    """Block masses `(batch, heads, q_blocks, k_blocks)` in float32; see `block_mass.block_mass`."""
    batch, heads, q_len, dim = query.shape
    k_len = key.shape[2]
    q_blocks, k_blocks = -(-q_len // block_size), -(-k_len // block_size)
    mass = torch.empty(batch, heads, q_blocks, k_blocks, dtype=torch.float32, device=query.device)
    padded_dim = max(16, 1 << (dim - 1).bit_length())
    _kernel()[(q_blocks, batch * heads)](
        query.contiguous(),
        key.contiguous(),
        lse.float().contiguous(),
        mass,
        scale * 1.4426950408889634,
        q_len,
        k_len,
        k_blocks,
        q_blocks,
        head_dim=dim,
        padded_dim=padded_dim,
        block=block_size,
        num_warps=4 if dim <= 64 else 8,
    )
    return mass

"""AdaSpa's search: how much softmax weight every query block puts on every key block (paper equations 9 to 14)."""

import torch

from dit_suite.attention.merge import accumulation_dtype
from dit_suite.attention.search_triton import triton_block_mass, triton_unavailable

SEARCH_IMPLS = ("auto", "triton", "chunked")
_CPU_CHUNK_BYTES = 2 << 20
_ACCELERATOR_CHUNK_BYTES = 512 << 20


def block_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_size: int,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax weight per pair of blocks: `M[p, r] = sum over i in p, j in r of exp(scale * q_i . k_j - lse_i)`.

    With the exact log-sum-exp a row of M sums to the tokens of its query block. With one cached at an earlier step rows
    are scaled by how much the true one has grown. Memory is linear in the sequence.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, heads, k_len, head_dim)`.
        lse: `(batch, heads, q_len)`.
        impl: "triton" (CUDA), "chunked" (any device) or "auto".

    Returns:
        `(batch, heads, q_blocks, k_blocks)` in float32 (float64 for float64 input).

    Raises:
        ValueError: an unknown impl, or "triton" where it cannot run.
    """
    if impl not in SEARCH_IMPLS:
        raise ValueError(f"impl must be one of {', '.join(SEARCH_IMPLS)}, got {impl!r}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    reason = None if impl == "chunked" else triton_unavailable(query, block_size)
    if impl == "triton" and reason is not None:
        raise ValueError(f"the Triton search kernel cannot run this call: {reason}")
    if impl != "chunked" and reason is None:
        return triton_block_mass(query, key, lse, block_size, scale)
    return _chunked_block_mass(query, key, lse, block_size, scale)


def _chunked_block_mass(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, block_size: int, scale: float
) -> torch.Tensor:
    """Scores, exponential and sums for a few query blocks at a time, small enough to stay in cache on CPU."""
    batch, heads, q_len, dim = query.shape
    k_len = key.shape[2]
    dtype = accumulation_dtype(query.dtype)
    on_cpu = query.device.type == "cpu"
    operand = dtype if on_cpu else query.dtype
    q = query.reshape(batch * heads, q_len, dim).to(operand)
    k = key.reshape(batch * heads, k_len, dim).to(operand).transpose(1, 2)
    offset = -lse.reshape(batch * heads, q_len, 1).to(dtype)
    q_blocks, k_blocks = -(-q_len // block_size), -(-k_len // block_size)
    whole_keys = k_len // block_size * block_size
    mass = torch.empty(batch * heads, q_blocks, k_blocks, dtype=dtype, device=query.device)
    budget = _CPU_CHUNK_BYTES if on_cpu else _ACCELERATOR_CHUNK_BYTES
    tiles = max(1, budget // (block_size * k_len * mass.element_size()))
    heads_per_chunk = min(batch * heads, tiles)
    blocks_per_chunk = max(1, tiles // heads_per_chunk)
    for head in range(0, batch * heads, heads_per_chunk):
        some = slice(head, head + heads_per_chunk)
        for first in range(0, q_blocks, blocks_per_chunk):
            rows = slice(first * block_size, min((first + blocks_per_chunk) * block_size, q_len))
            if operand == dtype:
                weights = torch.baddbmm(offset[some, rows], q[some, rows], k[some], alpha=scale).exp_()
            else:
                weights = torch.bmm(q[some, rows], k[some]).to(dtype).mul_(scale).add_(offset[some, rows]).exp_()
            for block in range(first, min(first + blocks_per_chunk, q_blocks)):
                start = (block - first) * block_size
                columns = weights[:, start : start + block_size].sum(1)
                mass[some, block, : whole_keys // block_size] = (
                    columns[:, :whole_keys].reshape(columns.shape[0], -1, block_size).sum(-1)
                )
                if whole_keys < k_len:
                    mass[some, block, -1] = columns[:, whole_keys:].sum(-1)
    return mass.view(batch, heads, q_blocks, k_blocks)

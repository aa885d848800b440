"""AdaSpa's search: how much softmax weight every query block puts on every key block (paper equations 9 to 14)."""

import math

import torch

from dit_suite.attention.merge import accumulation_dtype
from dit_suite.attention.search_triton import triton_block_mass, triton_unavailable

SEARCH_IMPLS = ("auto", "triton", "chunked")
_CPU_TILE, _CPU_HEADS = (128, 512), 4
_ACCELERATOR_TILE_BYTES = 512 << 20


def search_backend(query: torch.Tensor, block_size: int, impl: str = "auto") -> str:
    """The search kernel that `block_mass` runs: "triton" or "chunked".

    Raises:
        ValueError: an unknown impl, or "triton" where it cannot run.
    """
    if impl not in SEARCH_IMPLS:
        raise ValueError(f"impl must be one of {', '.join(SEARCH_IMPLS)}, got {impl!r}")
    reason = None if impl == "chunked" else triton_unavailable(query, block_size)
    if impl == "triton" and reason is not None:
        raise ValueError(f"the Triton search kernel cannot run this call: {reason}")
    return "chunked" if impl == "chunked" or reason is not None else "triton"


@torch.no_grad()
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
    run = {"triton": triton_block_mass, "chunked": _chunked_block_mass}[search_backend(query, block_size, impl)]
    return run(query, key, lse, block_size, query.shape[-1] ** -0.5 if scale is None else scale)


def _tile(heads: int, k_len: int, block_size: int, query: torch.Tensor) -> tuple[int, int, int]:
    """(heads, query rows, keys) of one score tile: cache-sized on CPU, whole rows of keys on an accelerator."""
    if query.device.type == "cpu":
        rows, keys = (block_size * max(1, side // block_size) for side in _CPU_TILE)
        return min(heads, max(_CPU_HEADS, torch.get_num_threads())), rows, keys
    blocks = max(1, _ACCELERATOR_TILE_BYTES // (block_size * k_len * 4))
    return min(heads, blocks), block_size * max(1, blocks // min(heads, blocks)), -(-k_len // block_size) * block_size


def _sums_along(values: torch.Tensor, block_size: int, dim: int) -> torch.Tensor:
    """Sums over consecutive blocks of one dimension; the last block may be shorter."""
    tail = values.shape[dim] % block_size
    if tail == 0:
        return values.unflatten(dim, (-1, block_size)).sum(dim + 1)
    whole, rest = values.split([values.shape[dim] - tail, tail], dim)
    return torch.cat([_sums_along(whole, block_size, dim), rest.sum(dim, keepdim=True)], dim)


def _chunked_block_mass(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, block_size: int, scale: float
) -> torch.Tensor:
    """Scores, exponential and sums tile by tile, in one buffer that stays in each core's cache on CPU."""
    batch, heads, q_len, dim = query.shape
    k_len = key.shape[2]
    dtype = accumulation_dtype(query.dtype)
    operand = dtype if query.device.type == "cpu" else query.dtype
    q = query.reshape(batch * heads, q_len, dim).to(operand)
    k = key.reshape(batch * heads, k_len, dim).to(operand).transpose(1, 2)
    offset = -lse.reshape(batch * heads, q_len, 1).to(dtype)
    q_blocks, k_blocks = -(-q_len // block_size), -(-k_len // block_size)
    mass = torch.empty(batch * heads, q_blocks, k_blocks, dtype=dtype, device=query.device)
    some_heads, some_rows, some_keys = _tile(batch * heads, k_len, block_size, query)
    buffer = torch.empty(some_heads * some_rows * min(some_keys, k_len), dtype=dtype, device=query.device)
    for head in range(0, batch * heads, some_heads):
        which = slice(head, min(head + some_heads, batch * heads))
        for first_key in range(0, k_len, some_keys):
            keys = slice(first_key, min(first_key + some_keys, k_len))
            for first_row in range(0, q_len, some_rows):
                rows = slice(first_row, min(first_row + some_rows, q_len))
                sides = (which.stop - which.start, rows.stop - rows.start, keys.stop - keys.start)
                weights = buffer[: math.prod(sides)].view(sides)
                if operand == dtype:
                    torch.baddbmm(offset[which, rows], q[which, rows], k[which, :, keys], alpha=scale, out=weights)
                else:
                    scores = torch.bmm(q[which, rows], k[which, :, keys]).to(dtype)
                    torch.add(offset[which, rows], scores, alpha=scale, out=weights)
                blocks = tuple(slice(s.start // block_size, -(-s.stop // block_size)) for s in (rows, keys))
                row_sums = _sums_along(weights.exp_(), block_size, 1)
                mass[which, blocks[0], blocks[1]] = _sums_along(row_sums, block_size, 2)
    return mass.view(batch, heads, q_blocks, k_blocks)

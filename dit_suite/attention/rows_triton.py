"""Rows gathered by number in Triton: the result of `index_select`, written as a copy of whole rows.

One program copies a tile of rows of one head, 16 bytes a load, so that a row is read in one piece wherever it lies.
Heads may be interleaved in memory (a transposed view): they are read as they are. Triton's interpreter
(`TRITON_INTERPRET=1` before the first import) runs the same code on CPU tensors, which checks its logic but says
nothing about its speed. It compiles for compute capability 8.0 and 9.0 to the copies meant (tested), but has never run
on a GPU.
"""

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

_TILE = 4096  # elements: four loads of 16 bytes for each of 128 threads
_EIGHT = 8  # half-precision numbers in 16 bytes


def rows_unavailable(source: torch.Tensor) -> str | None:
    """Why the kernel cannot gather rows `(..., rows, dim)` of this tensor; None if it can."""
    if source.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {source.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if source.device.type == "cuda" and torch.cuda.get_device_capability(source.device)[0] < 7:
        return "Triton takes GPUs of compute capability 7.0 on"
    if source.dtype not in (torch.float16, torch.bfloat16):
        return f"it copies float16 or bfloat16, got {source.dtype}"
    if not 2 <= source.ndim <= 4:
        return f"it takes tensors of 2 to 4 dimensions, got {source.ndim}"
    if source.shape[-1] % _EIGHT or source.shape[-1] > 256:
        return f"rows must hold a multiple of 8 numbers, at most 256, got {source.shape[-1]}"
    steps = [step for size, step in zip(source.shape[:-1], source.stride()[:-1], strict=True) if size > 1]
    if source.stride(-1) != 1 or any(step % _EIGHT for step in steps):
        return f"rows must be in one piece and start at multiples of 8, got strides {source.stride()}"
    if torch.is_grad_enabled() and source.requires_grad:
        return "it has no backward pass"
    return None


@functools.lru_cache(maxsize=1)
def _kernel() -> Callable:
    import triton
    import triton.language as tl

    @triton.jit
    def gather_rows_kernel(
        source, index, out, count, groups, heads, sample_step, head_step, row_step,
        dim: tl.constexpr, padded_dim: tl.constexpr, rows: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        group = program % groups
        sample, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
        numbers = (program // groups).to(tl.int64) * rows + tl.arange(0, rows)
        present = numbers < count
        picked = tl.load(index + numbers, mask=present, other=0)
        # Steps count eights of numbers: so the compiler sees that every row begins at a multiple of 16 bytes.
        starts = (sample * sample_step + head * head_step + picked * row_step) * 8
        dims = tl.arange(0, padded_dim)
        mask = present[:, None] & (dims < dim)[None, :]
        values = tl.load(source + starts[:, None] + dims[None, :], mask=mask)
        tl.store(out + (group.to(tl.int64) * count + numbers)[:, None] * dim + dims[None, :], values, mask=mask)

    return gather_rows_kernel


def gather_rows(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows `index` of `source`, as `source.index_select(-2, index)` gives them.

    Args:
        source: float16 or bfloat16 `(..., rows, dim)` with up to two dimensions in front; dim a multiple of 8, at most
            256.
        index: int64 `(n,)` on the same device. Numbers that name no row are not checked for: they read foreign memory.

    Returns:
        `(..., n, dim)`, contiguous. Not differentiable.

    Raises:
        ValueError: the kernel cannot take `source` (see `rows_unavailable`), or `index` is not int64 `(n,)`.
    """
    reason = rows_unavailable(source)
    if reason is not None:
        raise ValueError(f"rows cannot be gathered by the Triton kernel: {reason}")
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"row numbers must be int64 (n,), got {index.dtype} {tuple(index.shape)}")
    count, dim = index.shape[0], source.shape[-1]
    out = source.new_empty(*source.shape[:-2], count, dim)
    if out.numel() == 0:
        return out
    grouped = source[(None,) * (4 - source.ndim)]
    samples, heads = grouped.shape[:2]
    padded_dim = 1 << (dim - 1).bit_length()
    rows = _TILE // padded_dim
    with torch.cuda.device_of(source):
        _kernel()[(samples * heads * -(-count // rows),)](
            source,
            index.contiguous(),
            out,
            count,
            samples * heads,
            heads,
            *(step // _EIGHT for step in grouped.stride()[:3]),
            dim=dim,
            padded_dim=padded_dim,
            rows=rows,
            num_warps=4,
        )
    return out


def take_rows(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`source.index_select(-2, index)`, by the kernel where it runs; differentiable."""
    if rows_unavailable(source) is None:
        return gather_rows(source, index)
    return source.index_select(-2, index)

"""Block-sparse attention on flash-attn-4 (optional extra, CUDA, Hopper).

flash-attn-4 is a beta: the extra pins one exact version. It walks a row's table from the last entry to the first and
masks the sequence tail on the entry it starts with only, so tables have to be ascending (they are, by contract).
"""

import functools
import importlib

import torch

_BLOCK = 128
_HEAD_DIMS = (64, 96, 128)


@functools.lru_cache(maxsize=1)
def import_problem() -> str | None:
    """Why flash-attn-4 can't be imported; None if it can. It is tried once, on the first call with CUDA tensors."""
    try:
        importlib.import_module("flash_attn.cute.interface")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("flash_attn"):
            return "flash-attn-4 is not installed (pip install 'dit-suite[flash-attn-4]')"
        return f"flash-attn-4 is installed without what it needs: {error}"
    except Exception as error:  # whatever a beta and its compiler raise at import: another backend runs instead
        return f"flash-attn-4 can't be imported: {type(error).__name__}: {error}"
    return None


def flash4_unavailable(query: torch.Tensor, key: torch.Tensor, block_size: int, explicit: bool = False) -> str | None:
    """Why flash-attn-4 cannot run this call; None if it can."""
    if query.device.type != "cuda":
        return f"flash-attn-4 runs on CUDA, the tensors are on {query.device.type}"
    if (problem := import_problem()) is not None:
        return problem
    if torch.cuda.get_device_capability(query.device)[0] != 9:
        # Blackwell's kernel works on pairs of query tiles and refuses query blocks of 128 tokens.
        return "flash-attn-4 takes 128-token query blocks on compute capability 9.x only"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn-4 takes float16 or bfloat16, got {query.dtype}"
    if block_size != _BLOCK or query.shape[-1] not in _HEAD_DIMS:
        return f"blocks must be {_BLOCK} tokens and head_dim one of {_HEAD_DIMS}, got {block_size}, {query.shape[-1]}"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "its block-sparse backward is not used here"
    return None


def flash4_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    block_counts: torch.Tensor,
    block_size: int,
    scale: float,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `block_sparse.block_sparse_attention`. All listed blocks are full blocks: no element mask runs."""
    interface = importlib.import_module("flash_attn.cute.interface")
    tensors = interface.BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(block_counts),
        mask_block_idx=torch.zeros_like(block_table[..., :1]),
        full_block_cnt=block_counts.contiguous(),
        full_block_idx=block_table.contiguous(),
    )
    if "block_size" in tensors._fields:
        tensors = tensors._replace(block_size=(block_size, block_size))
    q, k, v = (t.transpose(1, 2).contiguous() for t in (query, key, value))
    result = interface.flash_attn_func(
        q, k, v, softmax_scale=scale, block_sparse_tensors=tensors, return_lse=return_lse
    )
    out, lse = (result[0], result[1]) if isinstance(result, tuple) else (result, None)
    return out.transpose(1, 2), lse if return_lse else None


def flash4_varlen_unavailable(query: torch.Tensor) -> str | None:
    """Why flash-attn-4 cannot run sequences of different lengths for these tensors; None if it can."""
    return flash4_unavailable(query, query, _BLOCK)


def flash4_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of many pairs of sequences laid end to end, each query sequence over its own keys.

    Args:
        query, key, value: `(rows, head_dim)` of one head.
        cu_q, cu_k: int32 `(sequences + 1,)`, where each begins.
        max_q, max_k: the longest.

    Returns:
        output `(rows, head_dim)` and the log-sum-exp `(rows,)`.
    """
    interface = importlib.import_module("flash_attn.cute.interface")
    out, lse = interface.flash_attn_varlen_func(
        *(t[:, None].contiguous() for t in (query, key, value)),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        softmax_scale=scale,
        return_lse=True,
    )[:2]
    return out[:, 0], lse.reshape(-1)

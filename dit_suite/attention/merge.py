"""Exact attention with its log-sum-exp, and the merge of partial attentions over disjoint sets of keys."""

from collections.abc import Sequence

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which scores and log-sum-exps are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flash_takes(query: torch.Tensor) -> bool:
    """Whether torch's CUDA flash attention takes these tensors: half precision, head_dim a multiple of 8, Ampere on."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _two_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = accumulation_dtype(query.dtype)
    scores = torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    return torch.matmul(weights, value.to(dtype)).to(query.dtype), lse


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense softmax attention and the log-sum-exp of every row of scores.

    Uses a fused kernel where torch has one that returns the log-sum-exp (CPU flash attention; CUDA flash attention, see
    `flash_takes`); a mask, a gradient or other tensors take the two matrix products. Rows without an allowed key give
    zeros and `-inf`.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key, value: `(batch, heads, k_len, head_dim)`.
        scale: factor on the scores; `head_dim ** -0.5` if None.
        mask: bool, broadcastable to `(batch, heads, q_len, k_len)`, True where a pair may attend.

    Returns:
        output `(batch, heads, q_len, head_dim)` in the query's type, lse `(batch, heads, q_len)` in float32 (float64
        for float64 input).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if mask is None and not needs_grad and query.numel() and key.numel():
        if query.device.type == "cpu":
            operands = (_unit_stride(query), _unit_stride(key), _unit_stride(value))
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*operands, scale=scale)
        if flash_takes(query):
            fused = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
            return fused[0], fused[1][..., : query.shape[-2]]
    return _two_products(query, key, value, scale, mask)


def merge_by_lse(outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins attentions of the same queries over disjoint key sets into the attention over their union.

    With partial outputs o_i and log-sum-exps l_i: `o = sum_i exp(l_i - l) o_i`, `l = log sum_i exp(l_i)`. Exact. Rows
    whose every part is empty stay zero with lse `-inf`.

    Args:
        outputs: tensors `(..., q_len, head_dim)`.
        lses: tensors `(..., q_len)`, one per output.
    """
    stacked = torch.stack([lse.to(accumulation_dtype(lse.dtype)) for lse in lses])
    total = torch.logsumexp(stacked, dim=0)
    safe = total.masked_fill(total.isinf(), 0.0)
    merged = torch.zeros_like(outputs[0], dtype=stacked.dtype)
    for output, lse in zip(outputs, stacked, strict=True):
        merged = merged + output.to(stacked.dtype) * torch.exp(lse - safe)[..., None]
    return merged.to(outputs[0].dtype), total

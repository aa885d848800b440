"""Exact attention with its log-sum-exp, and the merge of partial attentions over disjoint sets of keys."""

import torch
import torch.nn.functional as F

_FUSED_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _explicit_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), torch.zeros_like(lse), lse)[..., None])
    return torch.matmul(weights.to(value.dtype), value), lse


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense softmax attention and the log-sum-exp of every row of scores.

    Fused kernels are used where torch exposes one that returns the log-sum-exp (flash attention on CPU in any floating
    type, and on CUDA in half precision); everything else takes the two matrix products. Rows without an allowed key
    give zeros and `-inf`.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key, value: `(batch, heads, k_len, head_dim)`.
        scale: factor on the scores; `head_dim ** -0.5` if None.
        mask: bool, broadcastable to `(batch, heads, q_len, k_len)`, True where a pair may attend.

    Returns:
        output `(batch, heads, q_len, head_dim)` in the query's type and lse `(batch, heads, q_len)` in float32 (float64
        for float64 input).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if mask is None and not needs_grad and key.shape[-2] > 0:
        if query.device.type == "cpu" and query.dtype in _FUSED_CPU_DTYPES:
            # `contiguous()`: the CPU kernel reads every operand with a unit stride in its last dimension.
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query.contiguous(), key.contiguous(), value.contiguous(), scale=scale
            )
        half = query.dtype in (torch.float16, torch.bfloat16)
        if query.device.type == "cuda" and half and torch.version.hip is None and query.shape[-1] % 8 == 0:
            out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
            return out[0], out[1][..., : query.shape[-2]]
    if query.dtype == torch.float64:
        scores = torch.matmul(query, key.transpose(-1, -2)) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - torch.where(lse.isinf(), torch.zeros_like(lse), lse)[..., None])
        return torch.matmul(weights, value), lse
    return _explicit_attention(query, key, value, scale, mask)


def merge_by_lse(
    outputs: list[torch.Tensor] | tuple[torch.Tensor, ...], lses: list[torch.Tensor] | tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins attentions of the same queries over disjoint key sets into the attention over their union.

    With partial outputs o_i and log-sum-exps l_i: `o = sum_i exp(l_i - l) o_i`, `l = log sum_i exp(l_i)`. Exact; rows
    whose every part is empty stay zero with lse `-inf`.

    Args:
        outputs: tensors `(..., q_len, head_dim)`.
        lses: tensors `(..., q_len)`, one per output.
    """
    stacked = torch.stack([lse.float() if lse.dtype != torch.float64 else lse for lse in lses])
    total = torch.logsumexp(stacked, dim=0)
    safe = torch.where(total.isinf(), torch.zeros_like(total), total)
    merged = sum(
        output.to(stacked.dtype) * torch.exp(lse - safe)[..., None]
        for output, lse in zip(outputs, stacked, strict=True)
    )
    return merged.to(outputs[0].dtype), total


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch's own dense attention, `(batch, heads, seq, head_dim)`: the baseline every speed-up is measured against."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

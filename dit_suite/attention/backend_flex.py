"""Block-sparse attention on torch's compiled flex_attention.

Only the compiled form is ever called: eager flex ignores the tables of a `BlockMask` that has no element mask and
returns dense attention with nothing but a warning. Torch also runs a compiled function eagerly where compilation is
switched off or has been tried too often; the function compiled here raises an error instead.
"""

from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dit_suite.attention.compiling import compilation_is_off, compiler_missing, run_compiled


def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    if not torch.compiler.is_dynamo_compiling():
        raise RuntimeError("torch did not compile flex_attention, and its eager form ignores block tables")
    return flex_attention(query, key, value, **options)


def flex_unavailable(query: torch.Tensor, key: torch.Tensor, block_size: int, explicit: bool = False) -> str | None:
    """Why compiled flex cannot (or, unless asked for by name, should not) run this call; None if it can."""
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if query.device.type == "cpu":
        if needs_grad:
            return "flex_attention has no backward on CPU"
        if not explicit:
            return "on CPU the compiled kernel has to be asked for by name (it compiles for minutes)"
        return "torch's compilation is switched off" if compilation_is_off() else None
    if query.device.type != "cuda":
        return f"flex_attention is not compiled for {query.device.type}"
    if block_size % 16:
        return f"blocks must be a multiple of 16 tokens, got {block_size}"
    if query.shape[-1] < 16:
        return f"head_dim must be at least 16, got {query.shape[-1]}"
    return compiler_missing()


def flex_attention_tables(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    block_counts: torch.Tensor,
    block_size: int,
    scale: float,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `block_sparse.block_sparse_attention`. A new table of the same shape does not compile again."""
    q_len, k_len = query.shape[2], key.shape[2]
    width = -(-k_len // block_size)
    indices = block_table[..., :width]
    if indices.shape[-1] < width:
        indices = torch.nn.functional.pad(indices, (0, width - indices.shape[-1]))
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    block_mask = BlockMask.from_kv_blocks(
        torch.zeros_like(block_counts),
        torch.zeros_like(indices),
        block_counts,
        indices.contiguous(),
        BLOCK_SIZE=block_size,
        seq_lengths=(q_len, k_len),
        compute_q_blocks=needs_grad,
    )
    options = {}
    if query.device.type == "cuda" and block_size < 128:
        options = {"BLOCK_M": block_size, "BLOCK_N": block_size}
    call = {"block_mask": block_mask, "scale": scale, "kernel_options": options or None}
    if not return_lse:
        return run_compiled(_flex, query, key, value, **call), None
    if query.device.type == "cpu":
        raise ValueError("flex_attention returns no log-sum-exp on CPU; use the grouped backend")
    out, aux = run_compiled(_flex, query, key, value, return_aux=AuxRequest(lse=True), **call)
    return out, aux.lse

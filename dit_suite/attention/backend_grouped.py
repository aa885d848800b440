"""Block-sparse attention by gathering: query blocks with equally many keys share one dense attention call.

Works on every device and computes exactly the scores the table asks for. Gathered keys are cut into chunks that stay in
the processor's cache on CPU (measured: 8 to 16 blocks of 13 tiles run 1.6 times faster than one large gather).
"""

import torch
import torch.nn.functional as F

from dit_suite.attention.merge import accumulation_dtype, attention_with_lse

_CPU_CHUNK_BYTES = 4 << 20
_ACCELERATOR_CHUNK_BYTES = 256 << 20


def _as_blocks(tensor: torch.Tensor, block_size: int) -> torch.Tensor:
    """`(batch, heads, seq, dim)` -> `(batch * heads * blocks, block_size, dim)`, the tail filled with zeros."""
    batch, heads, length, dim = tensor.shape
    missing = -length % block_size
    if missing:
        tensor = F.pad(tensor, (0, 0, 0, missing))
    return tensor.reshape(batch * heads * ((length + missing) // block_size), block_size, dim)


def _groups(
    counts: torch.Tensor, keys: torch.Tensor, is_tail_query: torch.Tensor
) -> list[tuple[int, int, torch.Tensor]]:
    """Rows that may share a call: `(blocks, keys, rows)` with equal block count, equal key count and query length."""
    signature = torch.stack([counts, keys, is_tail_query.long()], dim=1)
    kinds, member = signature.unique(dim=0, return_inverse=True)
    return [(int(kind[0]), int(kind[1]), (member == i).nonzero().squeeze(1)) for i, kind in enumerate(kinds)]


class _Gather:
    """Key and value blocks by number. Without a gradient all chunks share one pair of buffers (fresh ones cost page
    faults: a fifth of the time on CPU)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, most: int, needs_grad: bool) -> None:
        self._sources = (keys, values)
        self._buffers = None if needs_grad else [source.new_empty(most, source.shape[1]) for source in self._sources]

    def __call__(self, picked: torch.Tensor) -> list[torch.Tensor]:
        if self._buffers is None:
            return [source.index_select(0, picked) for source in self._sources]
        buffers = [buffer[: picked.shape[0]] for buffer in self._buffers]
        return [torch.index_select(s, 0, picked, out=b) for s, b in zip(self._sources, buffers, strict=True)]


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    block_counts: torch.Tensor,
    block_size: int,
    scale: float,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `block_sparse.block_sparse_attention`. The log-sum-exp is None unless asked for."""
    batch, heads, q_len, dim = query.shape
    k_len = key.shape[2]
    q_blocks, k_blocks = block_table.shape[2], -(-k_len // block_size)
    q_tail, k_tail = q_len - (q_blocks - 1) * block_size, k_len - (k_blocks - 1) * block_size

    table = block_table.reshape(-1, block_table.shape[-1]).long()
    counts = block_counts.reshape(-1).long()
    last = table.gather(1, (counts - 1).clamp(min=0)[:, None]).squeeze(1)
    keys = counts * block_size - ((last == k_blocks - 1) & (counts > 0)) * (block_size - k_tail)
    row_numbers = torch.arange(counts.shape[0], device=counts.device)
    is_tail_query = (row_numbers % q_blocks == q_blocks - 1) & (q_tail < block_size)
    first_block = (row_numbers // q_blocks)[:, None] * k_blocks

    q_rows, k_rows, v_rows = (_as_blocks(t, block_size) for t in (query, key, value))
    flat_k, flat_v = k_rows.flatten(1), v_rows.flatten(1)
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    budget = _CPU_CHUNK_BYTES if query.device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES
    bytes_per_block = 2 * block_size * dim * query.element_size()
    groups = [group for group in _groups(counts, keys, is_tail_query) if group[0] > 0]
    chunks = [
        (blocks, key_count, chunk)
        for blocks, key_count, rows in groups
        for chunk in rows.split(max(1, budget // (blocks * bytes_per_block)))
    ]
    gather = _Gather(flat_k, flat_v, max((blocks * len(chunk) for blocks, _, chunk in chunks), default=0), needs_grad)
    result = query.new_zeros(q_rows.shape)
    dtype = accumulation_dtype(query.dtype)
    lse_rows = torch.full(q_rows.shape[:2], float("-inf"), dtype=dtype, device=query.device) if return_lse else None
    done, outputs, lses = [], [], []
    for blocks, key_count, chunk in chunks:
        q_count = q_tail if bool(is_tail_query[chunk[0]]) else block_size
        picked = (table[chunk, :blocks] + first_block[chunk]).reshape(-1)
        shape = (chunk.shape[0], 1, blocks * block_size, dim)
        chunk_k, chunk_v = (t.view(shape)[:, :, :key_count] for t in gather(picked))
        chunk_q = q_rows[chunk, None, :q_count]
        if return_lse or query.device.type == "cpu":
            out, lse = attention_with_lse(chunk_q, chunk_k, chunk_v, scale)
        else:
            out, lse = F.scaled_dot_product_attention(chunk_q, chunk_k, chunk_v, scale=scale), None
        if not needs_grad:
            result[chunk, :q_count] = out[:, 0]
            if return_lse:
                lse_rows[chunk, :q_count] = lse[:, 0].to(dtype)
            continue
        done.append(chunk)
        outputs.append(F.pad(out[:, 0], (0, 0, 0, block_size - q_count)))
        if return_lse:
            lses.append(F.pad(lse[:, 0], (0, block_size - q_count), value=float("-inf")))

    if done:
        result = result.index_copy(0, torch.cat(done), torch.cat(outputs))
        lse_rows = lse_rows.index_copy(0, torch.cat(done), torch.cat(lses).to(dtype)) if return_lse else None
    if return_lse:
        lse_rows = lse_rows.view(batch, heads, -1)[:, :, :q_len]
    return result.view(batch, heads, -1, dim)[:, :, :q_len], lse_rows

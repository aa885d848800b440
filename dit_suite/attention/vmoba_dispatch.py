"""The exact path of VMoBA: every (sample, head, block) attends with the query tokens that selected it.

Forward: partial attentions over own blocks and selected blocks, merged by log-sum-exp. Backward: the flash identity
with the merged output and the merged log-sum-exp, so that both kinds of pairs sum into the same gradients.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dit_suite.attention.backend_flash4 import flash4_varlen, flash4_varlen_unavailable
from dit_suite.attention.compiling import run_compiled
from dit_suite.attention.merge import accumulation_dtype, attention_with_lse, flash_takes
from dit_suite.attention.partition import sizes_on
from dit_suite.attention.rows_triton import take_rows


def read_later(number: torch.Tensor) -> Callable[[], int]:
    """Starts to copy a number off its device; the call that comes back waits for that copy only.

    What is launched in between runs on, so that the device has work while the host waits and launches the next.
    """
    if number.device.type != "cuda":
        return lambda: int(number)
    copied, done = number.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record(torch.cuda.current_stream(number.device))

    def read() -> int:
        done.synchronize()
        return int(copied)

    return read


@dataclass(frozen=True)
class PairLists:
    """Which query rows chose which key block.

    A row is `(sample * heads + head) * tokens + token`, an expert `(sample * heads + head) * blocks + block`; tokens
    are numbered in block order.

    Attributes:
        rows: int64 `(pairs,)`, sorted by expert and then by token.
        counts: int64 `(experts,)`, rows of each expert.
        places: int64 `(pairs,)` where every row has equally many pairs: where each pair stands when pairs are listed
            row by row. None where rows differ.
    """

    rows: torch.Tensor
    counts: torch.Tensor
    places: torch.Tensor | None = None

    @property
    def total(self) -> int:
        return self.rows.shape[0]

    def scores(self, sizes: torch.Tensor) -> Callable[[], int]:
        """Query-key scores of all pairs, given the block sizes on the CPU: see `read_later`."""
        if bool((sizes == sizes[0]).all()):
            return lambda: self.total * int(sizes[0])
        per_block = self.counts.view(-1, sizes.shape[0])
        return read_later((per_block * sizes_on(tuple(sizes.tolist()), self.counts.device)).sum())


def pairs_from_mask(mask: torch.Tensor) -> PairLists:
    """Pair lists of a bool mask `(batch, heads, blocks, tokens)`."""
    batch, heads, blocks, tokens = mask.shape
    flat = mask.reshape(batch * heads, blocks, tokens)
    head, _, token = flat.nonzero(as_tuple=True)
    return PairLists(head * tokens + token, flat.sum(-1).flatten())


def pairs_from_indices(chosen: torch.Tensor, blocks: int) -> PairLists:
    """Pair lists of per-token block numbers `(batch, heads, tokens, k)`."""
    batch, heads, tokens, k = chosen.shape
    experts = batch * heads * blocks
    # A radix sort takes a turn per byte of what it sorts.
    dtype = torch.int16 if experts < 1 << 15 else torch.int32
    head = torch.arange(0, experts, blocks, device=chosen.device, dtype=dtype).view(batch, heads, 1, 1)
    in_order, order = (head + chosen.to(dtype)).flatten().sort(stable=True)
    edges = torch.searchsorted(in_order, torch.arange(experts + 1, device=chosen.device, dtype=dtype))
    return PairLists(order.div(max(k, 1), rounding_mode="floor"), edges.diff(), order)


def _experts(pairs: PairLists, boundaries: torch.Tensor, tokens: int) -> Iterator[tuple[slice, slice]]:
    """(slice into the pair list, slice into the flat key rows) of every expert that was chosen."""
    edges = boundaries.tolist()
    blocks = len(edges) - 1
    start = 0
    for expert, count in enumerate(pairs.counts.tolist()):
        if count == 0:
            continue
        head, block = divmod(expert, blocks)
        yield slice(start, start + count), slice(head * tokens + edges[block], head * tokens + edges[block + 1])
        start += count


def _own_blocks(boundaries: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Runs of equal block length: (first token, one past the last token, block length)."""
    edges = boundaries.tolist()
    sizes = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    first = 0
    for i, size in enumerate(sizes):
        if i + 1 == len(sizes) or sizes[i + 1] != size:
            yield edges[first], edges[i + 1], size
            first = i + 1


def _own_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token over its own block; `(heads, tokens, dim)` in and out, lse `(heads, tokens)`."""
    heads, _, dim = query.shape
    outs, lses = [], []
    for start, stop, size in _own_blocks(boundaries):
        q, k, v = (t[:, start:stop].reshape(-1, 1, size, dim) for t in (query, key, value))
        out, lse = attention_with_lse(q, k, v, scale)
        outs.append(out.reshape(heads, stop - start, dim))
        lses.append(lse.reshape(heads, stop - start))
    return torch.cat(outs, 1), torch.cat(lses, 1)


def compiles(query: torch.Tensor) -> bool:
    """Whether steps around these tensors go to torch's compiler, which runs them plainly where it is switched off."""
    return query.device.type == "cuda" and importlib.util.find_spec("triton") is not None


def varlen_available(query: torch.Tensor) -> bool:
    """Whether selected pairs run in one variable-length flash attention call; otherwise one call per chosen block."""
    return flash_takes(query)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences laid end to end, `(rows, dim)`, in one call: flash-attn-4 where it runs, else torch's kernel."""
    if flash4_varlen_unavailable(query[None, None]) is None:
        return flash4_varlen(query, key, value, cu_q, cu_k, max_q, max_k, scale)
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    aux = AuxRequest(lse=True)
    operands = (t[:, None] for t in (query, key, value))
    out, lse = varlen_attn(*operands, cu_q, cu_k, max_q, max_k, return_aux=aux, scale=scale)
    return out[:, 0], lse.reshape(-1)[: query.shape[0]]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept: a later backward pass may save it
def _edges_on(rows: int, edges: tuple[int, ...], device: torch.device) -> torch.Tensor:
    first = torch.arange(0, rows, edges[-1])[:, None] + torch.tensor(edges[:-1])
    return torch.cat([first.flatten(), torch.tensor([rows])]).to(device, torch.int32)


def _block_edges(rows: int, boundaries: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, int]:
    """Where the blocks of all heads begin in `rows` flat rows, and the end: int32 `(experts + 1,)`; the longest block.

    A copy to a GPU waits for all that runs there, so it is made once.
    """
    edges = tuple(boundaries.tolist())
    return _edges_on(rows, edges, device), max(b - a for a, b in itertools.pairwise(edges))


def _own_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token over its own block, `(rows, dim)`: all blocks of all heads in one call."""
    edges, longest = _block_edges(query.shape[0], boundaries, query.device)
    return _varlen(query, key, value, edges, edges, longest, longest, scale)


def _foreign_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    pairs: PairLists,
    scale: float,
    most: Callable[[], int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """All experts in one variable-length call (CUDA, half precision); pairs in the order of `pairs.rows`.

    `most` tells the largest of `pairs.counts`; it may wait for them.
    """
    chosen = take_rows(query, pairs.rows)
    starts = F.pad(pairs.counts.cumsum(0, dtype=torch.int32), (1, 0))
    edges, longest = _block_edges(query.shape[0], boundaries, query.device)
    return _varlen(chosen, key, value, starts, edges, most(), longest, scale)


def _foreign_loop(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    pairs: PairLists,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention per expert with exactly the queries that chose it. Pairs come back row by row if they can."""
    out = query.new_empty(pairs.total, query.shape[-1])
    lse = torch.empty(pairs.total, dtype=accumulation_dtype(query.dtype), device=query.device)
    for chosen, keys in _experts(pairs, boundaries, int(boundaries[-1])):
        q = query.index_select(0, pairs.rows[chosen])
        part, part_lse = attention_with_lse(q[None, None], key[None, None, keys], value[None, None, keys], scale)
        if pairs.places is None:
            out[chosen], lse[chosen] = part[0, 0], part_lse[0, 0]
        else:
            out.index_copy_(0, pairs.places[chosen], part[0, 0])
            lse.index_copy_(0, pairs.places[chosen], part_lse[0, 0].to(lse.dtype))
    return out, lse


def _merge(
    own: torch.Tensor, own_lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges each row's own-block result with its selected blocks' results (rows may appear many times)."""
    dtype = own_lse.dtype
    part_lse = part_lse.to(dtype)
    peak = own_lse.scatter_reduce(0, rows, part_lse, "amax", include_self=True)
    own_weight, part_weight = torch.exp(own_lse - peak), torch.exp(part_lse - peak[rows])
    total = own_weight.index_add(0, rows, part_weight)
    out = (own.to(dtype) * own_weight[:, None]).index_add_(0, rows, part.to(dtype) * part_weight[:, None])
    return out / total[:, None], peak + torch.log(total)


def _merge_rows(
    own: torch.Tensor, own_lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_merge` for parts listed row by row, equally many for each row: no scatter."""
    lses = torch.cat([own_lse[:, None], part_lse.to(own_lse.dtype).view(own_lse.shape[0], -1)], dim=1)
    total = torch.logsumexp(lses, dim=1)
    weights = torch.exp(lses - total[:, None])
    parts = part.to(own_lse.dtype).view(own.shape[0], -1, own.shape[1])
    return torch.baddbmm(own.to(own_lse.dtype)[:, None] * weights[:, :1, None], weights[:, None, 1:], parts)[
        :, 0
    ], total


def _merge_listed(
    own: torch.Tensor, own_lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, listed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_merge` where row r has the parts `listed[r]`, int64 `(rows, k)`. Compiled, it reads every part once."""
    lses = torch.cat([own_lse[:, None], part_lse.to(own_lse.dtype)[listed]], dim=1)
    total = torch.logsumexp(lses, dim=1)
    weights = torch.exp(lses - total[:, None])
    foreign = (part[listed].to(own_lse.dtype) * weights[:, 1:, None]).sum(1)
    return (own.to(own_lse.dtype) * weights[:, :1] + foreign).to(own.dtype), total


def _merge_places(
    own: torch.Tensor, own_lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_merge` for equally many parts a row in the order of `PairLists.rows`."""
    pair = torch.arange(places.shape[0], device=places.device)
    listed = torch.empty_like(places).index_copy_(0, places, pair).view(own.shape[0], -1)
    merge = functools.partial(run_compiled, _merge_listed) if compiles(own) else _merge_listed
    return merge(own, own_lse, part, part_lse, listed)


def _backward_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of one set of pairs under the merged log-sum-exp; `(..., rows, dim)` operands."""
    weights = torch.exp(torch.matmul(query, key.transpose(-1, -2)) * scale - lse[..., None])
    grad_value = torch.matmul(weights.transpose(-1, -2), grad)
    scores = weights * (torch.matmul(grad, value.transpose(-1, -2)) - delta[..., None]) * scale
    return torch.matmul(scores, key), torch.matmul(scores.transpose(-1, -2), query), grad_value


def _expert_batches(
    pairs: PairLists, boundaries: torch.Tensor, tokens: int, budget: int = 1 << 26
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Chosen experts in batches of equal block length and similar numbers of queries.

    Yields (query rows `(experts, longest)`, which of them are real, key rows `(experts, block length)`); a batch holds
    at most about `budget` scores.
    """
    device = pairs.rows.device
    blocks = boundaries.shape[0] - 1
    starts = pairs.counts.cumsum(0) - pairs.counts
    sizes = boundaries.diff().to(device)
    for size in sizes.unique().tolist():
        experts = ((pairs.counts > 0) & (sizes.repeat(pairs.counts.shape[0] // blocks) == size)).nonzero().squeeze(1)
        experts = experts[pairs.counts[experts].argsort(descending=True, stable=True)]
        counts = pairs.counts[experts].tolist()
        first = 0
        while first < len(counts):
            longest = counts[first]
            some = experts[first : first + max(1, budget // (longest * size))]
            first += some.shape[0]
            offsets = torch.arange(longest, device=device)
            real = offsets < pairs.counts[some, None]
            rows = pairs.rows[(starts[some, None] + offsets).clamp(max=pairs.total - 1)]
            first_key = some.div(blocks, rounding_mode="floor") * tokens + boundaries.to(device)[some % blocks]
            yield rows, real, first_key[:, None] + torch.arange(size, device=device)


def _prefers_batches(query: torch.Tensor) -> bool:
    """On an accelerator a few padded batches beat one launch per expert; on CPU exactly the chosen pairs do."""
    return query.device.type != "cpu"


class PairAttention(torch.autograd.Function):
    """Attention over own block and selected pairs; `(batch, heads, tokens, dim)` in block order.

    Returns the output and its log-sum-exp, both differentiable.
    """

    @staticmethod
    def forward(ctx, query, key, value, boundaries, pairs, scale):
        batch, heads, tokens, dim = query.shape
        q, k, v = (t.reshape(batch * heads, tokens, dim) for t in (query, key, value))
        flat_q, flat_k, flat_v = (t.reshape(-1, dim) for t in (q, k, v))
        in_one_call = varlen_available(query)
        if in_one_call:
            most = read_later(pairs.counts.max()) if pairs.total else None
            out, lse = _own_varlen(flat_q, flat_k, flat_v, boundaries, scale)
        else:
            out, lse = _own_attention(q, k, v, boundaries, scale)
            out, lse = out.reshape(-1, dim), lse.reshape(-1)
        if pairs.total:
            foreign = functools.partial(_foreign_varlen, most=most) if in_one_call else _foreign_loop
            part, part_lse = foreign(flat_q, flat_k, flat_v, boundaries, pairs, scale)
            if pairs.places is None:
                out, lse = _merge(out, lse, part, part_lse, pairs.rows)
            elif in_one_call:
                out, lse = _merge_places(out, lse, part, part_lse, pairs.places)
            else:
                out, lse = _merge_rows(out, lse, part, part_lse)
        out = out.to(query.dtype)
        ctx.save_for_backward(flat_q, flat_k, flat_v, out, lse, boundaries)
        ctx.pairs, ctx.scale, ctx.shape = pairs, scale, query.shape
        return out.view(query.shape), lse.view(batch, heads, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        query, key, value, out, lse, boundaries = ctx.saved_tensors
        batch, heads, tokens, dim = ctx.shape
        dtype = accumulation_dtype(query.dtype)
        q, k, v, o, g = (t.reshape(-1, dim).to(dtype) for t in (query, key, value, out, grad_out))
        delta = (o * g).sum(-1) - grad_lse.reshape(-1).to(dtype)
        grads = [torch.zeros_like(t) for t in (q, k, v)]

        def per_head(t: torch.Tensor, start: int, stop: int, size: int) -> torch.Tensor:
            return t.view(batch * heads, tokens, *t.shape[1:])[:, start:stop].reshape(-1, size, *t.shape[1:])

        for start, stop, size in _own_blocks(boundaries):
            parts = _backward_of(*(per_head(t, start, stop, size) for t in (q, k, v, g, lse, delta)), ctx.scale)
            for total, part in zip(grads, parts, strict=True):
                total.view(batch * heads, tokens, dim)[:, start:stop] += part.view(batch * heads, -1, dim)
        if ctx.pairs.total and _prefers_batches(query):
            for rows, real, keys in _expert_batches(ctx.pairs, boundaries, tokens):
                row_lse = lse[rows].masked_fill(~real, float("inf"))  # padding gets zero weight
                dq, dk, dv = _backward_of(q[rows], k[keys], v[keys], g[rows], row_lse, delta[rows], ctx.scale)
                for total, index, part in zip(grads, (rows, keys, keys), (dq, dk, dv), strict=True):
                    total.index_add_(0, index.flatten(), part.flatten(0, 1))
            return *(total.to(query.dtype).view(ctx.shape) for total in grads), None, None, None
        for chosen, keys in _experts(ctx.pairs, boundaries, tokens):
            rows = ctx.pairs.rows[chosen]
            dq, dk, dv = _backward_of(q[rows], k[keys], v[keys], g[rows], lse[rows], delta[rows], ctx.scale)
            grads[0].index_add_(0, rows, dq)
            grads[1][keys] += dk
            grads[2][keys] += dv
        return *(total.to(query.dtype).view(ctx.shape) for total in grads), None, None, None

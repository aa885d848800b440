"""VMoBA's one variable-length call for all chosen (head, block) pairs: its lists on a CPU, the kernel on a GPU."""

import pytest
import torch
from torch.nn.attention import varlen

from dit_suite.attention import vmoba_dispatch
from dit_suite.attention.partition import partition, partition_on
from dit_suite.attention.vmoba import VMoBAConfig, masked_oracle, select, vmoba_attention

GRID, BLOCK = (5, 6, 7), (2, 4, 4)  # blocks of 6 to 32 tokens
RULES = [("topk", "query_head"), ("topk", "head_global"), ("threshold", "query_head"), ("threshold", "head_global")]


def _qkv(dtype, device="cpu", dim=8):
    """Keys of the first block point away from every query, so that nobody chooses it."""
    generator = torch.Generator().manual_seed(7)
    query, key, value = (torch.randn(2, 3, 210, dim, generator=generator) for _ in range(3))
    query[..., 0] += 4.0
    key[:, :, partition(GRID, BLOCK).order[:32], 0] -= 4.0
    return [t.to(device, dtype) for t in (query, key, value)]


def _config(mode, pool):
    return VMoBAConfig(select=mode, pool=pool, topk=(3, 3, 3), tau=0.15, cycle=(0, 0, 1), block_3d=BLOCK)


def _oracle(query, key, value, config):
    """Dense attention under the mask that the pair lists describe."""
    parts = partition_on(GRID, BLOCK, query.device)
    order, inverse = parts.order, parts.inverse
    query, key, value = (t.index_select(2, order) for t in (query, key, value))
    pairs = select(query.detach(), key.detach(), parts, config, 3)
    experts = torch.arange(pairs.counts.shape[0], device=query.device).repeat_interleave(pairs.counts)
    head, block, token = experts // parts.num_blocks, experts % parts.num_blocks, pairs.rows % 210
    assert torch.equal(head, pairs.rows // 210)
    mask = parts.block_of_token.to(query.device) == torch.arange(parts.num_blocks, device=query.device)[:, None]
    mask = mask.repeat(6, 1, 1)
    mask[head, block, token] = True
    assert (pairs.counts == 0).any() and (pairs.counts > 1).any()
    return masked_oracle(query, key, value, mask.view(2, 3, -1, 210), parts, query.shape[-1] ** -0.5).index_select(
        2, inverse
    )


@pytest.mark.parametrize(("mode", "pool"), RULES)
def test_lists_of_the_variable_length_call(mode, pool, monkeypatch):
    """The kernel is replaced by what its documentation says it computes."""
    calls = []

    def plain(query, key, value, cu_q, cu_k, max_q, max_k, *, return_aux, scale):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and return_aux.lse
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
        assert (cu_q[-1], cu_k[-1]) == (len(query), len(key))
        out, lse = torch.empty_like(query), query.new_empty(1, len(query))
        for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            scores = query[q0:q1, 0] @ key[k0:k1, 0].mT * scale
            out[q0:q1, 0], lse[0, q0:q1] = scores.softmax(-1) @ value[k0:k1, 0], scores.logsumexp(-1)
        calls.append(len(query))
        return out, lse

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    monkeypatch.setattr(vmoba_dispatch, "varlen_available", lambda query: True)
    query, key, value = _qkv(torch.float64)
    config = _config(mode, pool)
    out = vmoba_attention(query, key, value, GRID, config, 0)
    assert len(calls) == 2 and calls[0] == 2 * 3 * 210 and calls[1] > 0  # own blocks, then the chosen pairs
    assert (out - _oracle(query, key, value, config)).abs().max() < 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("mode", "pool"), RULES)
def test_on_a_gpu(mode, pool):
    """Compiled selection, variable-length attention, the merge and the padded backward."""
    leaves = [t.requires_grad_() for t in _qkv(torch.bfloat16, "cuda", dim=64)]
    assert vmoba_dispatch.varlen_available(leaves[0])
    config = _config(mode, pool)
    out = vmoba_attention(*leaves, GRID, config, 0)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    exact = _oracle(*leaves, config)
    expected = torch.autograd.grad(exact.float().square().sum(), leaves)
    for a, e in zip((out, *grads), (exact, *expected), strict=True):
        assert (a.float() - e.float()).abs().max() < 2e-2 * max(1.0, float(e.abs().max()))

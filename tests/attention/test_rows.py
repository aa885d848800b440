"""Rows gathered by the Triton kernel against `index_select`: in Triton's interpreter, and compiled on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from dit_suite.attention import vmoba_dispatch
from dit_suite.attention.partition import partition, partition_on
from dit_suite.attention.rows_triton import gather_rows, rows_unavailable, take_rows
from dit_suite.attention.vmoba import VMoBAConfig, vmoba_attention

GRID, BLOCK = (5, 6, 7), (2, 4, 4)  # blocks of 6 to 32 tokens

_INTERPRETED = """
import torch
from dit_suite.attention import rows_triton
from dit_suite.attention.partition import partition
from dit_suite.attention.rows_triton import gather_rows, rows_unavailable

generator = torch.Generator().manual_seed(0)
for dim, count in ((8, 1), (24, 200), (64, 64), (128, 33), (256, 40), (128, 0)):
    for dtype in (torch.bfloat16, torch.float16):
        source = torch.randn(50, dim, generator=generator).to(dtype)
        index = torch.randint(0, 50, (count,), generator=generator)
        assert torch.equal(gather_rows(source, index), source.index_select(0, index)), (dim, dtype)

calls, original = [], rows_triton.gather_rows
rows_triton.gather_rows = lambda source, index: calls.append(source.shape) or original(source, index)
parts = partition((5, 6, 7), (2, 4, 4))
interleaved = torch.randn(2, 210, 3, 16, generator=generator).bfloat16().transpose(1, 2)
sliced = torch.randn(2, 3, 250, 16, generator=generator).bfloat16()[:, 1:, 40:]
for tensor in (interleaved, interleaved.contiguous(), sliced, interleaved[0]):
    dim = tensor.ndim - 2
    moved = parts.permute(tensor, dim)
    assert moved.is_contiguous() and torch.equal(moved, tensor.index_select(dim, parts.order))
    assert torch.equal(parts.restore(moved, dim), tensor)
assert len(calls) == 8
leaf = interleaved.clone().requires_grad_()
(gradient,) = torch.autograd.grad(parts.permute(leaf, 2)[:, :, 0].float().sum(), leaf)
assert gradient.sum() == 2 * 3 * 16 and len(calls) == 8
with torch.no_grad():
    parts.permute(leaf, 2)
parts.permute(interleaved[..., 0], 2)
assert len(calls) == 9
for wrong in (torch.zeros(4, 12), torch.zeros(4, 12).half(), torch.zeros(4, 264).half(), torch.zeros(16, 9).half().T):
    assert rows_unavailable(wrong), wrong.shape
print("same")
"""


def test_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _INTERPRETED], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert run.stdout.strip() == "same", run.stderr[-2000:]


def test_on_a_cpu_index_select_runs():
    source, index = torch.arange(40).view(5, 8).bfloat16(), torch.tensor([4, 0, 4])
    assert take_rows(source, index)[:, 0].tolist() == [32, 0, 32]
    assert rows_unavailable(source) == "the tensors are on cpu"
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        gather_rows(source, index)


def test_block_edges_are_copied_once():
    boundaries = partition((1, 1, 5), (1, 1, 2)).boundaries
    edges, longest = vmoba_dispatch._block_edges(10, boundaries, torch.device("cpu"))
    assert edges.tolist() == [0, 2, 4, 5, 7, 9, 10] and edges.dtype == torch.int32 and longest == 2
    assert vmoba_dispatch._block_edges(10, boundaries.clone(), torch.device("cpu"))[0] is edges


def test_a_partition_made_in_inference_mode_serves_training():
    """What is kept from call to call must not be an inference tensor: a backward pass may not save those."""
    config = VMoBAConfig(cycle=(0, 0, 1), block_3d=(2, 4, 3), topk=(2, 2, 2))
    query = torch.randn(1, 1, 210, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vmoba_attention(query, query, query, GRID, config, 0)
    leaf = query.clone().requires_grad_()
    out = vmoba_attention(leaf, leaf, leaf, GRID, config, 0)
    assert torch.autograd.grad(out.square().sum(), leaf)[0].abs().max() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dim", [8, 72, 128, 256])
def test_kernel_on_a_gpu(dim):
    """Written without a GPU at hand; it has never run."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(1, 1000, 3, dim, generator=generator).to("cuda", torch.bfloat16).transpose(1, 2)
    index = torch.randint(0, 1000, (5001,), generator=generator).cuda()
    assert torch.equal(gather_rows(source, index), source.index_select(2, index))
    assert torch.equal(gather_rows(source[0, 1].contiguous(), index), source[0, 1].index_select(0, index))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernel_on_a_gpu_beyond_two_to_the_31_numbers():
    """Written without a GPU at hand; it has never run. The result takes 4 GiB."""
    source = torch.arange(100, device="cuda").bfloat16()[:, None].repeat(1, 128)
    index = torch.arange((1 << 24) + 100, device="cuda") % 100
    out = gather_rows(source, index)
    assert torch.equal(out[:, 0].float(), index.float()) and torch.equal(out[-100:], source[index[-100:]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_permutations_on_a_gpu():
    """Written without a GPU at hand; it has never run."""
    parts = partition_on(GRID, BLOCK, torch.device("cuda"))
    tensor = torch.randn(2, 3, 210, 64, device="cuda", dtype=torch.float16)
    assert rows_unavailable(tensor) is None
    assert torch.equal(parts.permute(tensor, 2), tensor.index_select(2, parts.order))
    assert torch.equal(parts.restore(parts.permute(tensor, 2), 2), tensor)
    read = vmoba_dispatch.read_later(tensor.isfinite().sum())
    assert read() == tensor.numel()

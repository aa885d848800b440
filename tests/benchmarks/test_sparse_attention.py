"""The sparse-attention benchmark's arguments and what its rows are measured against."""

import argparse

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_suite.benchmarks.sparse_attention import add_arguments
from dit_suite.benchmarks.sparse_contenders import contenders
from dit_suite.benchmarks.sparse_kernels import dense_backend


def _rows(*flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return [(row.name, row.setting) for row in contenders(parser.parse_args(flags))]


def test_rivals_at_several_sparsities():
    rows = _rows("--rival-sparsity", "0.7", "0.9")
    assert [s for name, s in rows if name == "radial"] == ["sparsity 0.7", "sparsity 0.9"]
    assert not any(name == "radial" for name, _ in _rows("--rival-sparsity"))
    assert _rows("--rival-sparsity", "0.7", "0.9", "--methods", "oracle:0.9") == [("oracle", "sparsity 0.9")]


def test_the_dense_kernel_is_named():
    query = torch.zeros(1, 2, 8, 16)
    assert dense_backend(query, query, query) == "FLASH_ATTENTION"
    with sdpa_kernel(SDPBackend.MATH):
        assert dense_backend(query, query, query) == "MATH"

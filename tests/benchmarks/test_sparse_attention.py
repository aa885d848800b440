"""The sparse-attention benchmark's arguments and what its rows are measured against."""

import argparse

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_suite.benchmarks import sparse_gpu
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


def test_a_failing_method_keeps_its_row_and_loses_no_other(monkeypatch, capsys):
    def fails():
        raise RuntimeError("no\nkernel")

    runs = {"dense cuDNN": lambda: None, "search": fails, "sparse": lambda: None, "vmoba": lambda: None}
    rows = sparse_gpu._timed_rows("layer, x", 64, runs, 3, failed={"vmoba": "ValueError: known"})
    assert [row["method"] for row in rows] == list(runs)
    assert [row.get("error") for row in rows] == [None, "RuntimeError: no kernel", None, "ValueError: known"]
    assert rows[0]["step_speedup"] == 1.0 and rows[2]["step_speedup"] > 0 and "ms" not in rows[1]
    without_dense = sparse_gpu._timed_rows("layer, x", 64, {"dense cuDNN": fails, "sparse": lambda: None}, 1)
    assert set(without_dense[1]) == {"part", "what", "tokens", "method", "ms"}

    monkeypatch.setattr(sparse_gpu, "_layer_rows", lambda *given: fails())
    monkeypatch.setattr(sparse_gpu, "_model_rows", lambda name, *given: [{"what": name}])
    capsys.readouterr()
    found = sparse_gpu.gpu_rows(["wan2.1-1.3b 480p"], ["layer", "model"], 2, 1)
    assert [row.get("error") for row in found] == ["RuntimeError: no kernel", None]
    assert capsys.readouterr().out.splitlines() == [str(row) for row in found]

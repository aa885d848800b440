"""The rivals: their scores mean what they say, and they run at the density they are given."""

import argparse
import contextlib

import pytest
import torch

from dit_suite.attention.adaspa import AdaSpaConfig
from dit_suite.attention.block_mass import block_mass
from dit_suite.attention.mask_rules import (
    RuleMethod,
    antidiagonal_score,
    block_centres,
    radial_score,
    sliding_tile_score,
)
from dit_suite.attention.merge import attention_with_lse
from dit_suite.attention.methods import AdaSpaMethod, VMoBAMethod
from dit_suite.attention.partition import partition
from dit_suite.attention.plugin import SparseAttentionHandle
from dit_suite.attention.vmoba import VMoBAConfig
from dit_suite.benchmarks import discover, sparse_clips
from dit_suite.benchmarks.sparse_clips import Probe
from dit_suite.benchmarks.sparse_contenders import contenders
from dit_suite.benchmarks.sparse_kernels import interleaved
from dit_suite.benchmarks.sparse_steps import run_facts
from dit_suite.step_plan import Run, StepContext, publish_step
from tests.attention.tiny_models import build, forward, wan_inputs


def test_block_centres_of_tiles():
    order = partition((4, 4, 4), (4, 2, 2)).order
    t, y, x = block_centres((4, 4, 4), order, 16)
    assert t.tolist() == [1.5] * 4
    assert list(zip(y.tolist(), x.tolist(), strict=True)) == [(0.5, 0.5), (0.5, 2.5), (2.5, 0.5), (2.5, 2.5)]


def test_static_scores_prefer_what_is_near():
    centres = block_centres((8, 4, 4), None, 4)  # a block is one row of one frame
    for score in (radial_score(centres), sliding_tile_score(centres)):
        assert torch.equal(score, score.T)
        assert (score.diagonal()[:, None] >= score).all()
        same_frame, next_frame, far_frame = score[0, 3], score[0, 4 + 3], score[0, 28 + 3]
        assert same_frame > next_frame > far_frame


def test_antidiagonal_score_is_exact_for_stride_one_and_close_beyond():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(1, 2, 16, 8, generator=generator).repeat_interleave(8, 2)
    query, key = (smooth + 0.1 * torch.randn(1, 2, 128, 8, generator=generator) for _ in range(2))
    lse = attention_with_lse(query, key, key)[1]
    exact = block_mass(query, key, lse, 16)
    one = antidiagonal_score(query, key, 16, 8**-0.5, stride=1)
    assert (one - exact).abs().max() < 1e-4
    strided = antidiagonal_score(query, key, 16, 8**-0.5, stride=8) * 8
    assert torch.corrcoef(torch.stack([strided.flatten(), exact.flatten()]))[0, 1] > 0.9
    assert antidiagonal_score(query[:, :, :100], key[:, :, :100], 16, 1.0).shape == (1, 2, 7, 7)


@pytest.mark.parametrize(
    ("name", "every_step"), [("radial", False), ("sliding-tile", False), ("antidiagonal", True), ("oracle", True)]
)
def test_rivals_run_at_the_given_density(name, every_step):
    model, given = build("wan"), wan_inputs()
    dense = forward(model, given)
    config = AdaSpaConfig(sparsity=0.5, block_size=16, search_steps=(0.0, 5), min_tokens=0, head_adaptive=False)
    run = Run()
    with SparseAttentionHandle(model, RuleMethod(name, config, every_step=every_step)) as handle:
        outs = []
        for step in range(4):
            with publish_step(StepContext(step, 10, 1.0, "cond", run=run)):
                outs.append(forward(model, given))
        stats = handle.stats()
    assert stats["method"] == name
    assert stats["density"] == pytest.approx(0.5)
    assert stats["cached_searches"] == (9 if every_step else 0)
    assert stats["sparse_calls"] == 9
    assert (outs[0] - dense).abs().max() < 1e-5
    assert (outs[1] - dense).abs().max() > 1e-5
    assert forward(model, given).equal(dense)


def test_oracle_keeps_more_weight_than_the_static_rules():
    model, given = build("wan"), wan_inputs()
    config = AdaSpaConfig(sparsity=0.5, block_size=16, search_steps=(0.0,), min_tokens=0, head_adaptive=False)
    errors = {}
    dense = forward(model, given)
    for name, every_step in (("radial", False), ("oracle", True)):
        run = Run()
        with SparseAttentionHandle(model, RuleMethod(name, config, every_step=every_step)):
            for step in range(2):
                with publish_step(StepContext(step, 10, 1.0, "cond", run=run)):
                    out = forward(model, given)
        errors[name] = float((out - dense).abs().mean())
    assert errors["oracle"] < errors["radial"]


def test_the_kernel_benchmark_reports_errors_and_gains():
    module = discover()["sparse-attention"]
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args(["--part", "kernels", "--lengths", "512", "--densities", "0.25", "--repeats", "1"])
    rows = module.run(args)["rows"]
    vmoba = [f"vmoba-{n}d{part}" for n in (1, 2, 3) for part in ("", "-selection")]
    assert [row["method"] for row in rows] == ["dense", "search", "grouped", *vmoba]
    assert rows[0]["step_speedup"] == 1.0
    assert rows[2]["max_error"] < 1e-5
    assert all(row["ms"] > 0 for row in rows)


def test_runs_take_turns_each_inside_what_is_around_it():
    seen = []

    @contextlib.contextmanager
    def around():
        seen.append("enter")
        yield
        seen.append("leave")

    runs = {"dense": lambda: seen.append("dense"), "sparse": lambda: seen.append("sparse")}
    times = interleaved(runs, 2, {"sparse": around})
    assert seen == ["dense", "enter", "sparse", "leave"] * 3
    assert {name: len(taken) for name, taken in times.items()} == {"dense": 2, "sparse": 2}


def test_a_run_that_fails_leaves_the_others(capsys):
    turns = iter(range(9))

    def fails_later():
        if next(turns) == 1:
            raise ValueError("out of\nluck")

    failed = {"tried before": "ValueError: known"}
    runs = {"dense": lambda: None, "later": fails_later, "tried before": lambda: 1 / 0, "last": lambda: None}
    times = interleaved(runs, 3, failed=failed)
    assert {name: len(taken) for name, taken in times.items()} == {"dense": 3, "last": 3} and next(turns) == 2
    assert failed == {"tried before": "ValueError: known", "later": "ValueError: out of luck"}
    assert capsys.readouterr().out == "later failed: ValueError: out of luck\n"
    with pytest.raises(ZeroDivisionError):
        interleaved(runs, 1)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_probe_measures_the_weight_that_was_kept(share):
    """At a full budget it is 1; below, both ways to measure it (tables, log-sum-exp) lie between the share and 1."""
    model, given = build("wan"), wan_inputs()
    blocks = {"block_1d": 1.0, "block_2d": (2, 2), "block_3d": (2, 2, 2)}
    adaspa = AdaSpaConfig(sparsity=1.0 - share, block_size=16, search_steps=(0.0,), min_tokens=0, head_adaptive=False)
    vmoba = VMoBAConfig(topk_ratio=share, dense_first_steps=0.0, min_tokens=0, **blocks)
    for method in (AdaSpaMethod(adaspa), VMoBAMethod(vmoba)):
        probe, run = Probe(method, {1}), Run()
        with SparseAttentionHandle(model, method):
            for step in range(3):
                with publish_step(StepContext(step, 10, 1.0, "cond", run=run)):
                    forward(model, given)
        assert len(probe.recalls) == 3
        if share == 1.0:
            assert probe.recalls == pytest.approx([1.0] * 3, abs=1e-5)
        else:
            assert all(share - 0.1 < recall < 0.999 for recall in probe.recalls)


def test_a_run_is_put_together_from_dense_steps_searches_and_sparse_steps():
    adaspa = run_facts(AdaSpaMethod(AdaSpaConfig()), 30, layers=8, dense=2.0, gain=2.0, search=0.25)
    assert adaspa["run_speedup"] == pytest.approx(60 / (6 * 2 + 24 * 1 + 8 * 2 * 0.25))  # steps 0-5 dense, 2 searches
    assert adaspa["search_share"] == pytest.approx(0.1)
    static = RuleMethod("radial", AdaSpaConfig(), every_step=False)
    assert run_facts(static, 30, 8, 2.0, 2.0, 0.25)["search_share"] == pytest.approx(2 / 38)
    vmoba = run_facts(VMoBAMethod(VMoBAConfig.training_free()), 30, 8, 2.0, 2.0, 0.0)
    assert vmoba == {"run_speedup": pytest.approx(60 / (8 * 2 + 22 * 1)), "search_share": 0.0}


def test_clips_in_the_file_are_not_made_again(tmp_path, monkeypatch):
    made = []

    def clip(pipe, prompt, args):
        made.append(prompt)
        return torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 1.0

    monkeypatch.setattr(sparse_clips, "_clip", clip)
    model, parser = build("wan"), argparse.ArgumentParser()
    discover()["sparse-attention"].add_arguments(parser)
    file = tmp_path / "clips.jsonl"
    args = parser.parse_args(
        ["--prompts", "a", "b", "--methods", "vmoba", "adaspa-tile:0.8", "--clips-file", str(file)]
    )
    sparse_clips.make_clips(model, contenders(args), args)
    assert made == ["a"] * 3 + ["b"] * 3  # dense, then two methods
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:20])  # stopped while writing the last row
    for expected in (["b"] * 2, []):
        made.clear()
        rows = contenders(args)
        sparse_clips.make_clips(model, rows, args)
        assert made == expected
    assert len(file.read_text().splitlines()) == 4
    assert [row.mean("psnr") for row in rows] == [100.0, 100.0]


def test_the_benchmark_refuses_unknown_methods_and_missing_gpus():
    module = discover()["sparse-attention"]
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    with pytest.raises(ValueError, match="there is no method 'magic'"):
        module.run(parser.parse_args(["--part", "bundle", "--methods", "magic"]))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            module.run(parser.parse_args(["--part", "gpu"]))

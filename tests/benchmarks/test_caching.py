"""The caching benchmark on a tiny model: rows, the picture, and distances that go on where they were stopped."""

import argparse
import contextlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_suite.benchmarks import caching
from dit_suite.benchmarks.strips import comparison_picture
from dit_suite.caching.recorder import ProfileRecorder
from dit_suite.checkpoints import load_pipeline
from tests.tiny import save_tiny

FIXTURE = Path(__file__).parents[1] / "fixtures/emoji.parquet"


@pytest.fixture
def run(tmp_path):
    """The benchmark as a function of flags, on a tiny calibrated model."""
    folder = save_tiny(tmp_path / "tiny")
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    with ProfileRecorder(pipe) as recorder:
        pipe("red cat", num_inference_steps=6, guidance_scale=4.0)
    recorder.profile().save(folder / "bac" / "profile-6.safetensors")
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(FIXTURE, data / "images.parquet")
    parser = argparse.ArgumentParser()
    caching.add_arguments(parser)

    def call(flags: str) -> dict:
        fixed = f"--model {folder} --num-inference-steps 6 --flop-fractions 0.6 --features random-conv --data {data} "
        args = parser.parse_args((fixed + flags).split())
        args.output = tmp_path / "out"
        return caching.run(args)

    return call, tmp_path


def test_side_by_side(run):
    call, folder = run
    rows = call(f"--num-prompts 2 --rivals none --picture {folder}/strip.png")["rows"]
    assert [row["method"] for row in rows][:2] == ["no cache", "BAC"] and rows[-1]["method"] == "fewer steps"
    bac = rows[1]
    assert bac["flops"] <= 0.6 and bac["psnr_mean"] >= bac["psnr_min"] > 10
    assert Image.open(folder / "strip.png").size == (16 + 12 + 2 * (2 * 16 + 16) - 12, 17 * 3 + 4 + 2 * 20)


def test_distances_go_on(run):
    call, folder = run
    rows = call("--fd-samples 12 --batch-size 6 --tuning-runs 1")["rows"]
    names = ["no cache", "BAC", "BAC, plain sum of errors", "fewer steps", "MagCache (diffusers)"]
    assert [row["method"] for row in rows] == names
    assert rows[1]["kid_verdict"] and rows[0]["fd"] != rows[3]["fd"]
    pictures = sorted((folder / "out/fd-6").glob("bac-[0-9]*/*.png"))
    stamps = {path: path.stat().st_mtime_ns for path in pictures[6:]}
    kept = pictures[0].read_bytes()
    pictures[0].unlink()
    assert call("--fd-samples 12 --batch-size 6 --tuning-runs 1")["rows"] == rows
    assert pictures[0].read_bytes() == kept and {p: p.stat().st_mtime_ns for p in pictures[6:]} == stamps


def test_distances_of_chosen_methods(run, monkeypatch):
    """Other caches too, one of them on a pipeline of its own; what is not installed is said and left out."""
    call, folder = run
    flags = "--fd-samples 12 --batch-size 12 --tuning-runs 1 --fd-methods "
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    result = call(flags + "taylorseer dbcache firstblock")
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["no cache", "TaylorSeer (diffusers)", "FirstBlockCache (diffusers)"]
    assert result["not_measured"] == ["DBCache F1B0 (cache-dit): the package is not installed"]
    assert rows["TaylorSeer (diffusers)"]["flops"] < 0.9 and len({row["kid"] for row in rows.values()}) == 3
    assert all(row["fd_verdict"] for row in result["rows"][1:])

    other = load_pipeline(folder / "tiny")
    other.transformer.proj_out.bias.data += 0.3
    monkeypatch.setattr(caching, "_dbcache", lambda bench, threshold, steps: contextlib.nullcontext(other))
    assert call(flags + "dbcache firstblock")["rows"][2] == rows["FirstBlockCache (diffusers)"]
    pictures = [
        np.asarray(Image.open(folder / f"out/fd-6/{name}/000003.png")).astype(int) for name in ("none", "dbcache")
    ]
    assert np.abs(pictures[0] - pictures[1]).max() > 10


def test_strip(tmp_path):
    """The difference stands beside the second method, four times enlarged."""
    first, second = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 110, np.uint8)
    comparison_picture([["a"], ["b"]], [[first], [second]], tmp_path / "strip.png", scale=1)
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    top = strip.shape[0] - 8
    assert strip.shape[1] == 4 + 12 + 4 + 4 + 4
    assert (strip[top : top + 4, :4] == 100).all() and (strip[top : top + 4, 16:20] == 110).all()
    assert (strip[top : top + 4, 24:28] == 40).all()

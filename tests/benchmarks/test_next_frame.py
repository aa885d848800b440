"""The next-frame benchmark runs on a small shape and counts what it should."""

import argparse

import pytest

from dit_suite.benchmarks import discover, next_frame

FLAGS = "--shape toy --frame 3 8 8 --patch-size 4 --window 3 --steps 2 --frames 4 --rounds 1 --persistence 1.0"


def test_rows_and_counts():
    assert discover()["next-frame"] is next_frame
    parser = argparse.ArgumentParser()
    next_frame.add_arguments(parser)
    result = next_frame.run(parser.parse_args([*FLAGS.split(), "--draft-length", "2", "--clock", "cpu"]))
    rows = {row["variant"]: row for row in result["rows"]}
    assert {"no cache", "cache", "cache + speculation N=2", "context of 2 frames", "decode one frame"} <= set(rows)
    assert rows["cache + speculation N=2"]["hit_rate"] == pytest.approx(0.5)
    assert rows["cache + speculation N=2"]["drafts"] == pytest.approx(0.5)
    assert rows["cache + speculation N=2"]["discard_rate"] == 0
    assert rows["no cache"]["speedup_vs_no_cache"] == 1
    assert all(row["ms_per_frame"] > 0 for row in result["rows"])
    assert result["tokens_per_frame"] == 4


def test_every_number_of_passes_has_drafts_and_contexts(monkeypatch):
    """Times are made up here: passes a frame, so that a row that was timed with other passes would show."""
    monkeypatch.setattr(next_frame, "_seconds", seconds_by_passes)
    parser = argparse.ArgumentParser()
    next_frame.add_arguments(parser)
    flags = FLAGS.replace("--steps 2", "--steps 3 1").replace("--persistence 1.0", "--persistence 0.5 1.0")
    result = next_frame.run(parser.parse_args([*flags.split(), "--draft-length", "1", "2"]))
    drafts = [row for row in result["rows"] if "speculation" in row["variant"]]
    assert [(row["steps"], row["persistence"], row["variant"][-1]) for row in drafts] == [
        (steps, persistence, length) for steps in (3, 1) for persistence in (0.5, 1.0) for length in "12"
    ]
    contexts = [row for row in result["rows"] if "context" in row["variant"]]
    assert {(row["variant"], row["steps"]) for row in contexts} == {
        (f"context of {frames} frames", steps) for frames in (1, 2) for steps in (3, 1)
    }
    assert all(row["ms_per_frame"] == pytest.approx(1000 * row["steps"]) for row in contexts)
    for row in drafts:
        shown = row["steps"] * row["drafts"]
        assert row["ms_per_frame"] == pytest.approx(1000 * shown)
        assert row["speedup_vs_cache"] == pytest.approx(row["steps"] / shown)


def seconds_by_passes(work, args, *inputs) -> float:
    """Runs the work and says how many denoising passes it took."""
    owner = getattr(work, "__self__", None) or (inputs[0] if inputs else None)
    sampler = getattr(owner, "engine", owner)
    before = sampler.counts.denoise_passes if sampler is not None else 0
    work(*inputs)
    return float(sampler.counts.denoise_passes - before) if sampler is not None else 0.0


@pytest.mark.parametrize("persistence", [0.5, 0.9])
def test_players_keep_their_action_as_often_as_asked(persistence: float):
    stream = next_frame.action_stream(5, 4000, persistence)
    kept = sum(a == b for a, b in zip(stream, stream[1:], strict=False)) / (len(stream) - 1)
    assert kept == pytest.approx(persistence, abs=0.03)

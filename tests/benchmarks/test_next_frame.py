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


@pytest.mark.parametrize("persistence", [0.5, 0.9])
def test_players_keep_their_action_as_often_as_asked(persistence: float):
    stream = next_frame.action_stream(5, 4000, persistence)
    kept = sum(a == b for a, b in zip(stream, stream[1:], strict=False)) / (len(stream) - 1)
    assert kept == pytest.approx(persistence, abs=0.03)

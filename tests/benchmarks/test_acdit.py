"""The ACDiT cost benchmark: the counted work follows the cost model, and caching pays in attention."""

import argparse

from dit_suite.benchmarks import acdit


def test_counted_flops_follow_the_model():
    parser = argparse.ArgumentParser()
    acdit.add_arguments(parser)
    flags = "--grid 8 --block-sizes 64 16 --steps 1 --rounds 1 --clock cpu"
    rows = acdit.run(parser.parse_args(flags.split()))["rows"]
    assert [row["blocks"] for row in rows] == [1, 4]
    assert [row["passes"] for row in rows] == [1, 4]
    for row in rows:  # embeddings and the last layer are not in the model
        assert row["predicted_gflops"] < row["gflops"] < 1.003 * row["predicted_gflops"]
    assert rows[0]["cache_mb"] == 0
    assert rows[1]["cache_mb"] > 0

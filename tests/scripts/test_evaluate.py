"""scripts/evaluate.py: one JSON line, the same number for one process, two processes and two steps, and refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.evaluate import main
from scripts.sample import main as sample
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parent.parent.parent
METRICS = ["--metrics", "fd,kid,is", "--features", "random-conv", "--bootstrap", "20", "--is-splits", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "real.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    return path


def sampling(model):
    return [
        "--model", str(model), "--prompts", "red apple", "green cat", "blue sun", "--num-samples", "11",
        "--batch-size", "2", "--num-inference-steps", "2", "--seed", "11", "--device", "cpu",
    ]  # fmt: skip


def score(capsys, *arguments):
    assert main([*map(str, arguments), *METRICS]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("samples")
    assert sample([*sampling(model), "--output", str(path), "--npz"]) == 0
    return path


def test_generate_gives_the_number_of_the_two_step_way(model, reference, folder, capsys, tmp_path):
    one = score(capsys, "--generate", *sampling(model), "--reference", reference, "--feature-batch-size", "3")
    two = score(capsys, "--samples", folder, "--reference", reference, "--feature-batch-size", "3")
    assert one["samples"]["sha256"] == two["samples"]["sha256"]
    assert one["metrics"] == two["metrics"]
    assert one["intervals"] == two["intervals"]
    assert one["n_samples"] == 11 and one["samples"]["job"]["seed"] == 11
    three = score(capsys, "--samples", folder / "samples_11x8x8x3.npz", "--reference", reference)
    assert three["metrics"] == pytest.approx(one["metrics"], rel=1e-5)


def test_two_processes_give_the_number_of_one(model, reference, folder, capsys):
    one = score(capsys, "--samples", folder, "--reference", reference, "--feature-batch-size", "4")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "scripts/evaluate.py", "--generate", *sampling(model), "--reference", str(reference), *METRICS,
        "--feature-batch-size", "4",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    two = json.loads(lines[0])
    assert two["samples"]["sha256"] == one["samples"]["sha256"]
    assert two["metrics"] == one["metrics"]


def test_statistics_made_by_the_script_serve_as_reference(reference, folder, capsys, tmp_path):
    statistics, results = tmp_path / "new" / "real.npz", tmp_path / "results" / "all.jsonl"
    assert main(["--samples", str(reference), "--save-statistics", str(statistics), "--features", "random-conv"]) == 0
    assert capsys.readouterr().out == ""
    direct = score(capsys, "--samples", folder, "--reference", reference)
    stored = score(capsys, "--samples", folder, "--reference", statistics, "--output", results)
    assert stored["metrics"] == pytest.approx(direct["metrics"], rel=1e-9)
    score(capsys, "--samples", folder, "--reference", statistics, "--output", results)
    assert [json.loads(line)["metrics"] for line in results.read_text().splitlines()] == [stored["metrics"]] * 2


def test_bundled_references_are_complete_and_refuse_other_features(folder, capsys):
    from dit_suite.evaluation.reference import bundled_references
    from dit_suite.evaluation.statistics import load_feature_set

    assert main(["--list-references"]) == 0
    assert capsys.readouterr().out.split() == ["emoji64-heldout", "emoji64-train"]
    heldout, train = (load_feature_set(bundled_references()[f"emoji64-{name}"]) for name in ("heldout", "train"))
    assert (heldout.count, train.count) == (771, 7298)
    assert heldout.features.shape == (771, 1280) and train.features is None
    assert heldout.tag == train.tag and heldout.tag.name == "enet-lite0"
    assert bool((train.statistics.covariance.diagonal() > 0).all())
    assert main(["--samples", str(folder), "--reference", "emoji64-heldout", *METRICS]) == 2
    assert "1280 against 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--reference", "REAL"], "give --samples, or --generate"),
        (["--samples", "FOLDER", "--generate", "--model", "MODEL"], "not both"),
        (["--samples", "FOLDER", "--reference", "nowhere"], "nowhere is no folder here, nor are there statistics of"),
        (["--samples", "EMPTY", "--reference", "REAL"], "holds no pictures"),
        (["--samples", "FOLDER", "--num-samples", "12", "--reference", "REAL"], "is incomplete: 1 samples"),
        (["--samples", "FOLDER", "--reference", "REAL", "--metrics", "foo"], "there is no metric 'foo'"),
        (["--samples", "FOLDER", "--reference", "REAL", "--features", "foo"], "there are no features 'foo'"),
        (["--samples", "FOLDER", "--reference", "REAL", "--bootstrap", "3"], "bootstrap must be"),
        (["--samples", "FOLDER", "--reference", "REAL", "--output", "EMPTY"], "empty is a folder; name a file in it"),
        (["--samples", "FOLDER", "--save-statistics", "STATS"], "taken is a file; choose a folder"),
        (["--generate", "--reference", "REAL"], "give --pipeline or --model"),
        (["--generate", "--model", "MODEL", "--reference", "REAL"], "needs --prompts"),
        (["--generate", "--model", "MODEL", "--conditions-from", "no.parquet", "--reference", "REAL"], "no.parquet"),
    ],
)
def test_bad_input_gives_one_sentence(arguments, words, model, reference, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").write_text("")
    places = {"REAL": reference, "FOLDER": folder, "MODEL": model, "EMPTY": tmp_path / "empty"}
    places["STATS"] = tmp_path / "taken" / "statistics.npz"
    assert main([str(places.get(word, word)) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""
    assert captured.err.count("\n") == 1


def test_sampling_flags_without_generate_are_refused(folder, reference, capsys):
    with pytest.raises(SystemExit):
        main(["--samples", str(folder), "--reference", str(reference), "--guidance-scale", "2"])
    assert "need --generate" in capsys.readouterr().err


def test_prompts_come_from_a_data_set(model, reference, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"label": ["apple", "cat"], "style": ["noto", "fluent-flat"], "group": ["a", "b"], "split": ["heldout"] * 2}
    pq.write_table(pa.table(rows), tmp_path / "set.parquet")
    line = score(
        capsys, "--generate", "--model", model, "--conditions-from", f"{tmp_path}/set.parquet:heldout",
        "--num-samples", "12", "--num-inference-steps", "1", "--device", "cpu", "--reference", reference,
    )  # fmt: skip
    assert set(line["samples"]["job"]["conditions"]) == {"apple, noto style", "cat, flat style"}


def test_bits_per_dimension_of_samples_under_a_flow(model, tmp_path, capsys):
    from dit_suite.evaluation.bpd import bits_per_dim
    from tests.pipelines.test_pipeline_tarflow import tiny_pipe

    flow = tiny_pipe()
    flow.save_pretrained(tmp_path / "flow")
    pictures = np.random.default_rng(1).integers(0, 256, (6, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", arr_0=pictures)
    expected = bits_per_dim(flow.transformer, list(pictures)).mean
    samples = ["--samples", str(tmp_path / "pictures.npz"), "--features", "random-conv", "--device", "cpu"]
    bpd = ["--bpd", str(tmp_path / "flow")]
    assert main([*samples, *bpd, "--save-statistics", str(tmp_path / "statistics.npz")]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["metrics"] == {"bpd": pytest.approx(expected, rel=1e-6)}
    assert line["features"]["name"] == "random-conv"
    alone = ["--samples", str(tmp_path / "pictures.npz"), "--features", "torchscript:nowhere", "--device", "cpu"]
    assert main([*alone, *bpd, "--bpd-class-labels", "2", "style/cat"]) == 0
    line = json.loads(capsys.readouterr().out)
    labelled = bits_per_dim(flow.transformer, list(pictures), [2, 0] * 3).mean
    assert line["metrics"] == {"bpd": pytest.approx(labelled, rel=1e-6)} and abs(labelled - expected) > 1e-4
    assert "features" not in line and line["n_samples"] == 6
    assert line["details"]["bpd"]["class_labels"] == ["2", "style/cat"]
    assert main([*alone, *bpd, "--bpd-class-labels", "3"]) == 2
    assert "between 0 and 2, got 3" in capsys.readouterr().err
    assert main([*alone, "--bpd-class-labels", "1"]) == 2
    assert "belongs to --bpd" in capsys.readouterr().err
    assert main([*samples, "--bpd", str(model)]) == 2
    assert "needs a TarFlow checkpoint" in capsys.readouterr().err
    assert main(samples) == 2
    assert "nothing was asked for" in capsys.readouterr().err

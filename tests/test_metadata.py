"""Metadata in files, and files that are whole or not there."""

import json

import numpy as np
import pytest
from PIL import Image

from dit_suite.call_options import TextToImageOptions
from dit_suite.files import write_atomically
from dit_suite.metadata import read_record, write_png
from dit_suite.sampling import SamplingJob, batches, job_of_record, sample_record

JOB = SamplingJob(
    technique="pixart",
    model="emoji-pixart-64",
    weights_sha256="ab" * 32,
    conditions=("a red apple, 苹果", "a cat", "the sun"),
    options=TextToImageOptions(num_inference_steps=7, negative_prompt="blur"),
    seed=40,
    batch_size=2,
    scheduler="flow-heun",
)


def picture():
    return Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def test_record_survives_the_file(tmp_path):
    record = sample_record(JOB, 3, [2, 3])
    write_png(picture(), tmp_path / "x.png", record)
    assert read_record(tmp_path / "x.png") == record
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(picture()))
        lines = image.info["parameters"].split("\n")
    assert lines[0] == "a red apple, 苹果" and lines[1] == "Negative prompt: blur"
    assert lines[2].startswith("Steps: 7, Sampler: flow-heun, CFG scale: 4.0, Seed: 43, Model hash: abababab")


@pytest.mark.parametrize("index", range(6))
def test_record_gives_the_job_back(index):
    """The job of a record has the same condition for every sample of the batch, and the same everything else."""
    (indices,) = (list(batch) for batch in batches(6, 2) if index in batch)
    job, again = job_of_record(sample_record(JOB, index, indices))
    assert again == indices
    assert [job.condition(i) for i in indices] == [JOB.condition(i) for i in indices]
    assert {**job.to_dict(), "conditions": None} == {**JOB.to_dict(), "conditions": None}


def test_no_metadata_means_none(tmp_path):
    write_png(picture(), tmp_path / "x.png", None)
    with pytest.raises(ValueError, match="carries no dit_suite metadata"):
        read_record(tmp_path / "x.png")


@pytest.mark.parametrize("content", [b"", b"not a picture"])
def test_unreadable_pictures(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="can't be read as a picture"):
        read_record(tmp_path / "x.png")


def test_strange_records_are_refused(tmp_path):
    from dit_suite.metadata import parse_record

    with pytest.raises(ValueError, match="is not valid JSON"):
        parse_record("{", "x")
    with pytest.raises(ValueError, match="has no 'technique'"):
        parse_record("[]", "x")
    with pytest.raises(ValueError, match="has version 99"):
        parse_record(json.dumps({**sample_record(JOB, 0, [0, 1]), "version": 99}), "x")


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "x", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditions": ()}, "at least one prompt"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be between"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
)
def test_bad_jobs(change, message):
    values = {name: getattr(JOB, name) for name in JOB.__dataclass_fields__} | change
    with pytest.raises(ValueError, match=message):
        SamplingJob(**values)

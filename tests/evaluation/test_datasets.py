"""Choosing rows of a data set on the command line."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dit_suite.data.readers import decode_picture
from dit_suite.evaluation.datasets import conditions_of, parse_dataset, read_dataset, split_size
from dit_suite.evaluation.sources import ParquetSource


@pytest.fixture
def dataset(tmp_path):
    rows = {
        "label": ["apple", "cat", "sun", "owl"],
        "style": ["noto", "fluent-3d", "noto", "fluent-flat"],
        "group": ["food", "animals", "sky", "animals"],
        "split": ["train", "heldout", "pairs", "heldout"],
    }
    pq.write_table(pa.table(rows), tmp_path / "set.parquet")
    return f"{tmp_path}/set.parquet"


def test_filters():
    assert parse_dataset("a.parquet") == (Path("a.parquet"), {})
    path, where = parse_dataset("x/a.parquet:heldout+pairs,style=noto")
    assert (path, where) == (Path("x/a.parquet"), {"split": ("heldout", "pairs"), "style": ("noto",)})
    for wrong in ("a.parquet:", "a.parquet:train,", "a.parquet:style="):
        with pytest.raises(ValueError, match="can't be read"):
            parse_dataset(wrong)


def test_rows_and_refusals(dataset):
    path, where = parse_dataset(f"{dataset}:heldout+pairs,style=noto+fluent-3d")
    assert [row["label"] for row in read_dataset(path, where, ["label"])] == ["cat", "sun"]
    for choice, words in (
        ("test", "no split 'test'; it has heldout, pairs, train"),
        ("train,style=twemoji", "no style 'twemoji'"),
        ("train,style=fluent-3d", "no rows of that choice"),
        ("colour=red", "no column 'colour'"),
    ):
        with pytest.raises(ValueError, match=words):
            read_dataset(*parse_dataset(f"{dataset}:{choice}"), ["label"])
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_dataset(Path("nowhere.parquet"), {}, ["label"])


def test_size_is_no_choice_of_rows(dataset):
    _, where = parse_dataset(f"{dataset}:heldout,size=32")
    assert split_size(where) == ({"split": ("heldout",)}, 32) and split_size({}) == ({}, 0)
    assert conditions_of(f"{dataset}:pairs,size=32", "prompt") == ("sun, noto style",)
    for wrong in ("0", "-3", "big", "3+4", "99999"):
        with pytest.raises(ValueError, match="no side in pixels"):
            split_size({"size": tuple(wrong.split("+"))})


def test_pictures_are_resized_as_in_training():
    fixture = Path(__file__).parents[1] / "fixtures/emoji.parquet"
    rows = [row for row in pq.read_table(fixture).to_pylist() if row["style"] == "noto"]
    source = ParquetSource(f"{fixture}:style=noto,size=32")
    expected = decode_picture(rows[2]["image"], "row", 32).permute(1, 2, 0).numpy()
    assert source.shape == (32, 32, 3) and len(source) == len(rows)
    assert np.array_equal(source.read([2])[0], expected)
    assert ParquetSource(f"{fixture}:style=noto").shape == (64, 64, 3)


def test_conditions_in_the_model_s_words(dataset):
    assert conditions_of(f"{dataset}:pairs", "prompt") == ("sun, noto style",)
    labels = conditions_of(f"{dataset}:heldout", "class_labels")
    assert set(labels) == {"fluent-3d/animals", "fluent-flat/animals"}
    # A fixed shuffle, not the order of the file: the first N are a fair draw.
    assert conditions_of(dataset, "prompt")[0] != "apple, noto style"
    assert conditions_of(dataset, "prompt") == conditions_of(f"{dataset}:train+heldout+pairs", "prompt")
    with pytest.raises(ValueError, match="not actions"):
        conditions_of(dataset, "actions")

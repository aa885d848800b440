"""The Compare tab's measurement: equal work gives equal pictures, fewer steps cost less, bad variants cost nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

from dit_suite.caching.recorder import ProfileRecorder
from dit_suite.call_options import TextToImageOptions
from dit_suite.checkpoints import load_pipeline
from dit_suite.metadata import read_record
from dit_suite.ui.catalog import offers
from dit_suite.ui.compare_tab import comparable, compare, difference_map, suggestions, variant_job
from dit_suite.ui.engine import Engine, StopFlag, make_job
from dit_suite.ui.settings import Limits
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(tmp_path_factory.mktemp("output"), Limits())


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    model = save_tiny(tmp_path_factory.mktemp("tiny") / "model")
    return make_job(str(model), "red apple", TextToImageOptions(num_inference_steps=6), seed=3)


def final(engine, job, variants):
    *_, (results, rows) = compare(engine, job, variants, StopFlag())
    return results, rows


def test_variants_beside_the_baseline(engine, job):
    results, rows = final(engine, job, ["steps=6", "steps=3"])
    assert [row[0] for row in rows] == ["baseline", "steps=6", "steps=3"]
    assert [row[3] for row in rows] == [6, 6, 3]
    same, fewer = rows[1], rows[2]
    assert same[4] == 100.0 and same[5] == 1.0
    assert fewer[4] < 60 and fewer[5] < 1.0
    records = [read_record(result.path) for result in results]
    assert {record["seed"] for record in records} == {3}
    pictures = [np.asarray(Image.open(result.path)) for result in results]
    assert np.asarray(difference_map(pictures[0], pictures[1])).max() == 0
    assert np.asarray(difference_map(pictures[0], pictures[2])).max() > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps=many", "steps must be a whole number"),
        ("steps=0", "num_inference_steps must be between 1 and 1000, got 0"),
        ("warp", "there is no acceleration 'warp'"),
        ("adaspa", "adaspa does not fit"),
        ("bac:speed=9", "'speed=9' is not a setting of BACConfig"),
        ("bac:flop_fraction=much", "flop_fraction must be float, got 'much'"),
    ],
)
def test_bad_variants_are_refused_before_anything_runs(engine, job, text, message):
    with pytest.raises(ValueError, match=message):
        next(compare(engine, job, [text], StopFlag()))


def test_a_plug_in_is_part_of_the_variants_job(job):
    changed = variant_job(job, "bac:flop_fraction=0.5,granularity=block")
    found = changed.to_dict()["accelerations"]["bac"]
    assert (found["flop_fraction"], found["granularity"]) == (0.5, "block")
    assert changed.seed == job.seed and job.accelerations == {}


def test_the_first_press_fits_every_model_on_offer():
    """The baseline has as many steps as a profile of the model, and a model without one is not offered BAC."""
    found = {offer.name: (offer, *suggestions(offer, 200)) for offer in comparable(offers())}
    assert {name: (steps, texts[:2]) for name, (_, steps, texts) in found.items()} == {
        "emoji-pixart-64": (40, ["bac", "steps=14"]),
        "emoji-ptdit-64": (20, ["bac", "steps=7"]),
        "emoji-pixart-64-graft": (20, ["steps=7", "steps=10"]),
    }
    assert suggestions(found["emoji-pixart-64"][0], 30)[0] == 20
    for name, (offer, steps, texts) in found.items():
        options = offer.technique.options_class()(num_inference_steps=steps)
        baseline = make_job(name, "red apple", options, seed=0)
        for text in texts:
            job = variant_job(baseline, text)
            assert not job.accelerations or steps in offer.profile_steps


def test_a_variant_with_a_cache_is_measured(tmp_path):
    """All steps computed: the baseline's picture. Half of them: another picture, for as many network evaluations."""
    folder = save_tiny(tmp_path / "model")
    options = TextToImageOptions(num_inference_steps=6)
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    with ProfileRecorder(pipe) as recorder:
        pipe("red apple", **options.to_kwargs(), generator=torch.Generator().manual_seed(0))
    recorder.profile().save(folder / "bac" / "profile-6.safetensors")
    job = make_job(str(folder), "red apple", options, seed=3)
    texts = ["bac:budget=6", "bac:budget=3,granularity=block"]
    results, rows = final(Engine(tmp_path / "output", Limits()), job, texts)
    assert [row[0] for row in rows] == ["baseline", *texts] and [row[3] for row in rows] == [6, 6, 6]
    assert all(result.seconds > 0 for result in results) and all(row[2] > 0 for row in rows) and rows[0][2] == 1.0
    assert rows[1][4:] == [100.0, 1.0] and 10 < rows[2][4] < 100 and rows[2][5] < 1.0
    record = read_record(results[2].path)
    assert record["accelerations"]["bac"]["budget"] == 3 and "bac" not in read_record(results[0].path)["accelerations"]

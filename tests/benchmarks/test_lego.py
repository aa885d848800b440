"""The LEGO and trained-backbones benchmarks: seams, held-out domains, equal evaluations, and one small run."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_suite.benchmarks import lego, trained_backbones
from dit_suite.benchmarks.lego import Pictures, borders, canvas_borders, end_columns, seam_ratio
from dit_suite.data.labels import LabelTable
from dit_suite.files import write_json
from dit_suite.models.lego import LegoTransformer2DModel
from dit_suite.pipelines.pipeline_lego import LegoPipeline
from dit_suite.schedulers.edm_heun import EDMHeunScheduler


def test_borders_of_windows_and_patches():
    assert borders(160, 64, 16) == ([32, 64, 96, 128], [16, 48, 80, 112, 144])
    assert borders(64, 64, 16) == ([], [16, 32, 48])
    seams, inside = borders(160, 64, 16, offset=13)
    assert seams == [13, 45, 64, 77, 96, 109, 141] and {29, 61, 93, 125} < set(inside) and not set(seams) & set(inside)
    assert end_columns(160, 64, 16) == [16, 32, 128, 144]


def test_borders_of_a_run_are_those_of_its_steps():
    """Drifting windows begin at 13 + 32 k in the second step and not at the columns of the first."""
    assert canvas_borders(160, 64, 16, "overlap", 3)[0] == 3 * [32, 64, 96, 128]
    seams, inside = canvas_borders(160, 64, 16, "drift", 2)
    assert seams == [32, 64, 96, 128, 13, 45, 64, 77, 96, 109, 141]
    pictures = np.random.default_rng(0).integers(100, 110, (8, 16, 160, 3)).astype(np.uint8)
    pictures[:, :, 45:109] += 60
    assert seam_ratio(pictures, seams, inside) > 4
    assert seam_ratio(pictures, *borders(160, 64, 16)) < 1.25, "the columns of the first step miss it"


def test_borders_of_drifting_windows_worked_by_hand():
    """24 columns, windows of 16, patches of 4: windows begin at 0, 8; then 0, 3, 8; then 0, 6, 8. The starts are those
    of the windows that the pipeline hands to the network, which show their first column here."""
    seams, inside = canvas_borders(24, 16, 4, "drift", 3)
    assert seams == [8, 16] + [3, 8, 16, 19] + [6, 8, 16, 22]
    assert inside == [4, 12, 20] + [4, 7, 11, 12, 15, 20] + [4, 10, 12, 14, 18, 20]
    shape = {"brick_sizes": (4, 16), "patch_sizes": (2, 4), "brick_depths": (1, 1), "num_classes": 2}
    network = LegoTransformer2DModel(sample_size=16, num_attention_heads=2, attention_head_dim=8, **shape)
    pipe, begun = LegoPipeline(network, EDMHeunScheduler()), []
    network.forward = lambda windows, *_, **__: begun.append(windows[:, 0, 0, 0].tolist()) or (windows,)
    for step in range(3):
        pipe.run_network(torch.arange(24.0).expand(1, 3, 16, 24), 0.0, torch.tensor([1]), "drift", None, step)
    assert begun == [[0, 8], [0, 3, 8], [0, 6, 8]]


def test_the_seam_ratio_sees_a_seam_and_only_a_seam():
    generator = np.random.default_rng(0)
    pictures = generator.integers(100, 110, (8, 16, 160, 3)).astype(np.uint8)
    seams, inside = borders(160, 64, 16)
    assert 0.8 < seam_ratio(pictures, seams, inside) < 1.25
    pictures[:, :, 32:64] += 60
    assert seam_ratio(pictures, seams, inside) > 5
    assert seam_ratio(pictures, inside, seams) < 0.2


def test_held_out_rows_follow_the_training_domain():
    data = Path("data/emoji64/images.parquet")
    record = {"config": {"data": {"styles": ["noto", "noto-blob"], "groups": ["food-drink"]}, "run": {"batch_size": 8}}}
    found = trained_backbones.held_out_rows(record, data)
    assert found == "data/emoji64/images.parquet:heldout+pairs,style=noto+noto-blob,group=food-drink"
    assert trained_backbones.held_out_rows({}, data) == "data/emoji64/images.parquet:heldout+pairs"
    assert trained_backbones.images_seen(record | {"steps": 30}) == 240
    assert trained_backbones.images_seen({}) is None


def test_solvers_get_the_same_number_of_evaluations():
    assert trained_backbones.steps_of(15, 1) == 15
    heun = trained_backbones.steps_of(15, 2)
    assert heun == 8 and 2 * heun - 1 == 15


def test_pictures_are_a_source():
    source = Pictures(np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3))
    assert len(source) == 2 and source.shape == (4, 4, 3)
    assert source.read(range(1, 2)).tolist() == source.samples[1:].tolist()


def test_part_trained_asks_for_checkpoints():
    with pytest.raises(ValueError, match="--trained"):
        trained_backbones.trained_rows(argparse.Namespace(trained=[]))


def test_one_run_of_skipping_and_panorama(tmp_path):
    """A t_break of zero is the unskipped run: identical pictures count as 100 dB; a wide canvas is made."""
    torch.manual_seed(0)
    network = LegoTransformer2DModel(
        sample_size=16, brick_sizes=(4, 16), patch_sizes=(2, 4), brick_depths=(1, 1), num_attention_heads=2,
        attention_head_dim=8, num_classes=6,
    )  # fmt: skip
    domain = {"styles": ["fluent-3d", "noto", "noto-blob"], "groups": ["food-drink", "objects"]}
    names = dict(enumerate(LabelTable(tuple(domain["styles"]), tuple(domain["groups"])).names().values()))
    LegoPipeline(network, EDMHeunScheduler(), id2label=names).save_pretrained(tmp_path / "model")
    write_json({"steps": 1, "config": {"data": domain}}, tmp_path / "model" / "training.json")
    fixture = Path(__file__).parents[1] / "fixtures" / "emoji.parquet"
    parser = argparse.ArgumentParser()
    lego.add_arguments(parser)
    given = f"--model {tmp_path / 'model'} --data {fixture} --breaks 0 --samples 2 --steps 2 --panoramas 1"
    args = parser.parse_args([*given.split(), "--panorama-width", "40"])
    rows = lego.run(args)["rows"]
    assert [row["setting"] for row in rows] == [
        "t_break 0", "t_break 0", "16 x 40 panorama, overlap", "16 x 40 panorama, drift",
    ]  # fmt: skip
    assert (
        rows[1]["psnr_median"] == 100.0
        and rows[2]["seam_ratio"] > 0
        and rows[3]["border_ratio"] > 0
        and rows[3]["end_ratio"] > 0
    )

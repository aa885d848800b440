"""The grafting benchmark end to end on a tiny model: every part, resuming, and refusals."""

import argparse
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from dit_suite.benchmarks import grafting
from dit_suite.benchmarks.held_out import HeldOut
from dit_suite.checkpoints import find_checkpoint
from dit_suite.data.captions import all_captions, save_states
from dit_suite.data.labels import LabelTable
from dit_suite.data.tables import read_rows
from dit_suite.evaluation.statistics import load_feature_set
from dit_suite.models.dit import DiTModel
from dit_suite.pipelines.pipeline_class_to_image import ClassToImagePipeline
from dit_suite.training.trainer import Trainer
from tests.tiny import tiny_text_encoder, tiny_text_to_image, tiny_tokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures/emoji.parquet"
SOURCE = {"hub_id": "tiny/encoder", "package": "tiny", "requirement": "tiny", "weights_sha256": "0" * 64}
STAGE2 = """
name: stage2
model: {from: elsewhere}
objective: {name: distilled_flow, options: {teacher: TINY}}
data: {kind: images, size: 8, split: train, captions: [0.4, 0.6, 0.0], styles: [noto]}
condition: {max_length: 8}
optimizer: {lr: 1.0e-3, warmup_steps: 0}
run: {max_steps: 2, batch_size: 4, log_every: 1}
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The benchmark as a function of flags, on a tiny model and the fixture's pictures."""
    encoder = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    monkeypatch.setattr("dit_suite.text_encoders.load_text_encoder", lambda source: dict(encoder))
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(FIXTURE, data / "images.parquet")
    captions = all_captions(read_rows(FIXTURE, ["label", "style", "tags"]))
    save_states(data / "captions.safetensors", captions, [torch.randn(3, 16) for _ in captions])
    tiny_text_to_image(text_encoder=None, tokenizer=None, text_encoder_source=SOURCE).save_pretrained(tmp_path / "tiny")
    (tmp_path / "narrow.yaml").write_text("mlp: {kind: mlp, ratio: 2, init: inherit, layers: all}\n")
    (tmp_path / "stage2.yaml").write_text(STAGE2.replace("TINY", str(tmp_path / "tiny")))
    parser = argparse.ArgumentParser()
    grafting.add_arguments(parser)
    fixed = (
        f"--model {tmp_path}/tiny --data {data} --plans {tmp_path} --stage1-prompts 4 --stage1-epochs 1 "
        f"--stage2-config {tmp_path}/stage2.yaml --stage2-minutes 0.002 --num-samples 12 --num-inference-steps 2 "
        "--batch-size 6 --features random-conv --cells original narrow"
    )

    def run(flags: str = "") -> dict[str, dict]:
        args = parser.parse_args([*fixed.split(), *flags.split()])
        args.output = tmp_path / "out"
        return {row["cell"]: row for row in grafting.run(args)["rows"]}

    return run, tmp_path / "out"


def test_cells(bench, monkeypatch):
    run, output = bench
    rows = run("--parts stage1 speed before")
    assert rows["narrow"]["flops"] < 0.95 and rows["original"]["flops"] == 1.0
    assert rows["narrow"]["stage1_error"] > 0 and rows["narrow"]["fd_after"] == "-"
    assert rows["original"]["stage2_steps"] is None
    record = json.loads((output / "narrow/cell.json").read_text())
    assert {entry["steps"] for entry in record["stage1"]["operators"]} == {2 * 2}
    assert [v["metric"] for v in record["before"]["comparison"]] == ["fd_random_conv", "kid_random_conv"]
    assert len(list((output / "narrow/before").glob("*.png"))) == 12
    monkeypatch.setattr(Trainer, "run", lambda trainer: None)
    rows = run()
    assert rows["narrow"]["stage2_steps"] is None and rows["narrow"]["fd_before"] != "-"
    assert not (output / "original/stage2").exists() and rows["original"]["fd_after"] == "-"


def test_stage_two_and_resuming(bench):
    run, output = bench
    (output / "narrow").mkdir(parents=True)
    plan = {"steps": 3, "seconds_per_step": 1.0, "cpu_seconds": 60.0}
    (output / "narrow/cell.json").write_text(json.dumps({"stage2_plan": plan}))
    rows = run("--cells narrow --parts stage1 stage2")
    assert rows["narrow"]["stage2_steps"] == 3 and rows["narrow"]["stage2_minutes"] > 1.0
    rows = run("--cells narrow --parts before after")
    assert rows["narrow"]["fd_before"] != rows["narrow"]["fd_after"] != "-"
    first = sorted((output / "narrow/after").glob("*.png"))
    stamps = {path: path.stat().st_mtime_ns for path in first[6:]}
    first[0].unlink()
    assert run("--cells narrow --parts after --redo")["narrow"] == rows["narrow"]
    assert {path: path.stat().st_mtime_ns for path in first[6:]} == stamps
    text = (output / "grafting.md").read_text()
    assert "| narrow | " in text and "0.ff " in text and "3 steps" in text
    with pytest.raises(ValueError, match="was begun with num_inference_steps 2"):
        run("--cells narrow --num-inference-steps 3")
    with pytest.raises(ValueError, match=r"there is no plan other\.yaml"):
        run("--cells other")
    with pytest.raises(ValueError, match="has 42 captions"):
        run("--num-samples 99")


def test_a_class_model_is_measured_on_its_own_classes(bench, tmp_path):
    """Class names in the pictures' proportions, references of those classes at the model's size, and all parts."""
    run, output = bench
    table = LabelTable(("noto", "fluent-3d"), ("objects", "activities"))
    torch.manual_seed(0)
    model = DiTModel(
        sample_size=16, patch_size=4, in_channels=3, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_classes=4, learn_sigma=False,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    names = {str(key): name for key, name in table.names().items()}
    ClassToImagePipeline(model, FlowMatchEulerDiscreteScheduler(), id2label=names).save_pretrained(tmp_path / "classes")
    table.save(tmp_path / "classes")
    pictures = read_rows(FIXTURE, ["style", "group"])
    known = [dict.fromkeys([*first, *(row[key] for row in pictures)]) for key, first in
             (("style", table.styles), ("group", table.groups))]  # fmt: skip
    LabelTable(*map(tuple, known)).save(tmp_path / "data")
    checkpoint = find_checkpoint(tmp_path / "classes")
    held_out = HeldOut.of_checkpoint(checkpoint, tmp_path / "data", output, 11, "random-conv")
    rows = [f"{s}/{g}" for s, g in itertools.product(table.styles, table.groups)]
    assert held_out.size == 16 and len(held_out.captions()) == 11
    # one held-out picture of every class, and a pair of fluent-3d/activities
    assert Counter(held_out.captions(count=5)) == Counter([*rows, "fluent-3d/activities"])
    assert held_out.captions()[:5] == held_out.captions()[5:10]
    stage2 = (tmp_path / "stage2.yaml").read_text().replace(str(tmp_path / "tiny"), str(tmp_path / "classes"))
    stage2 = stage2.replace("size: 8", "size: 16").replace("[noto]", "[noto, fluent-3d], groups: [objects, activities]")
    (tmp_path / "stage2.yaml").write_text(stage2)
    rows = run(f"--model {tmp_path / 'classes'} --cells narrow original")
    assert rows["narrow"]["flops"] < 1.0 and rows["narrow"]["stage2_steps"] >= 1
    assert "-" not in (rows["narrow"]["fd_after"], rows["narrow"]["fd_before"], rows["original"]["fd_before"])
    pictures = [(output / cell / "before/000000.png").read_bytes() for cell in ("narrow", "original")]
    assert pictures[0] != pictures[1]
    assert Image.open(next((output / "narrow/after").glob("*.png"))).size == (16, 16)
    reference = load_feature_set(output / "reference.npz")
    assert reference.count == 5

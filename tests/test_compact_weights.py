"""Weights stored in one byte: bounds of the change, opening, training from them, refusals."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from dit_suite.checkpoints import find_checkpoint, load_pipeline
from dit_suite.compact_weights import FILE_NAME, SCALE, from_int8, load_network, to_int8
from dit_suite.grafting.models import GraftedDiTModel, graft
from dit_suite.grafting.plan import GraftPlan
from dit_suite.models.dit import DiTModel
from dit_suite.pipelines.pipeline_class_to_image import ClassToImagePipeline
from dit_suite.training.config import config_from_dict
from dit_suite.training.trainer import Trainer
from scripts.compact_weights import main
from tests.training.conftest import tiny_values


def test_no_weight_moves_by_more_than_half_a_step():
    tensors = {
        "matrix": torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
        * torch.tensor([[1e-4], [1], [9], [0], [3]]),
        "kernel": torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)),
        "bias": torch.tensor([0.5, -0.25]),
        "count": torch.tensor(7),
    }
    again = from_int8(to_int8(tensors))
    assert again.keys() == tensors.keys() and again["count"] == 7
    for name in ("matrix", "kernel"):
        rows, moved = tensors[name].flatten(1), (again[name] - tensors[name]).flatten(1)
        step = rows.abs().amax(1) / 127
        assert (moved.abs().amax(1) <= 0.5001 * step).all() and again[name].dtype == torch.float32
        assert torch.allclose(again[name].flatten(1).abs().amax(1), rows.abs().amax(1))
    assert torch.equal(again["bias"], tensors["bias"])
    twice = from_int8(to_int8(again))
    assert torch.allclose(twice["matrix"], again["matrix"], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="bias is not finite"):
        to_int8({"bias": torch.tensor([float("nan")])})


@pytest.fixture
def folders(tmp_path):
    """A grafted tiny pipeline in the usual form, and in one byte."""
    torch.manual_seed(0)
    options = tiny_values(tmp_path)["model"]["options"]
    model = DiTModel(**options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    plan = GraftPlan.from_dict({"mlp": {"1": {"kind": "mlp", "ratio": 2}}}, 2)
    pipe = ClassToImagePipeline(graft(model, plan).eval(), FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path / "usual")
    assert main([str(tmp_path / "usual"), "--output", str(tmp_path / "small")]) == 0
    return tmp_path / "usual", tmp_path / "small"


def test_the_folder_opens_and_trains(folders, tmp_path, capsys):
    usual, small = folders
    pipe, whole = load_pipeline(small), load_pipeline(usual)
    assert (
        isinstance(pipe.transformer, GraftedDiTModel) and pipe.transformer.config.graft_plan["mlp"]["1"]["ratio"] == 2
    )
    stored = from_int8(to_int8(whole.transformer.state_dict()))
    assert all(torch.equal(value, stored[key]) for key, value in pipe.transformer.state_dict().items())
    x, labels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 2])
    with torch.no_grad():
        ours = pipe.transformer(x, torch.tensor([100.0, 900.0]), class_labels=labels).sample
        theirs = whole.transformer(x, torch.tensor([100.0, 900.0]), class_labels=labels).sample
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.02
    assert load_pipeline(small, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16
    assert find_checkpoint(small).weights_sha256 != find_checkpoint(usual).weights_sha256
    assert "_name_or_path" not in (small / "transformer/config.json").read_text()
    values = tiny_values(tmp_path / "run", max_steps=1) | {"init_from": str(small)}
    values["model"] = {
        "name": "dit_suite.grafting.models:GraftedDiTModel",
        "options": json.loads((small / "transformer/config.json").read_text()),
    }
    values["model"]["options"] = {k: v for k, v in values["model"]["options"].items() if not k.startswith("_")}
    trainer = Trainer(config_from_dict(values))
    assert all(torch.equal(value, stored[key]) for key, value in trainer.bare.state_dict().items())


def test_refusals(folders, capsys):
    usual, small = folders
    assert main([str(usual), "--output", str(small)]) == 2
    assert "exists already" in capsys.readouterr().err
    path = small / "transformer" / FILE_NAME
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith(SCALE)).removesuffix(SCALE)
    save_file({key: value for key, value in tensors.items() if not key.startswith(name)}, path)
    with pytest.raises(ValueError, match="do not fit GraftedDiTModel"):
        load_network(GraftedDiTModel, small / "transformer")


def test_the_grafted_bundle_draws_what_the_original_draws():
    """Text to picture from stored bytes; `docs/grafting.md` has the distances of many pictures."""
    pictures = []
    for name in ("emoji-pixart-64", "emoji-pixart-64-graft"):
        pipe = load_pipeline(name)
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        prompts = ["red apple, flat style", "rainbow, gradient style"]
        pictures.append(pipe(prompts, num_inference_steps=6, generator=generators, output_type="pt").images)
    assert sum(p.numel() for p in pipe.transformer.parameters()) == 8_092_976
    assert [unit["ratio"] for unit in pipe.transformer.config.graft_plan["mlp"].values()] == [2.0] * 4
    error = (pictures[0] - pictures[1]).square().mean((1, 2, 3))
    other = (pictures[0] - pictures[1].flip(0)).square().mean((1, 2, 3))
    assert (error < 0.25 * other).all()

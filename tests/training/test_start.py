"""Training that starts from a checkpoint folder: plain and grafted."""

import dataclasses
import json
import shutil

import pytest
import torch

from dit_suite.checkpoints import load_pipeline
from dit_suite.grafting.models import GraftedDiTModel, graft
from dit_suite.grafting.plan import GraftPlan
from dit_suite.models.tarflow import TarFlowModel
from dit_suite.pipelines.pipeline_tarflow import TarFlowPipeline
from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler
from dit_suite.training.config import load_config
from dit_suite.training.trainer import Trainer

RECIPE = """
name: stage2
model: {{from: {folder}}}
objective: rectified_flow
data: {{kind: shapes, size: 8, count: 48}}
optimizer: {{lr: 1.0e-3, warmup_steps: 0}}
ema: {{decay: 0.5}}
run: {{max_steps: 3, batch_size: 8, log_every: 1, save_every: 2, output: {output}}}
"""


def start(folder, tmp_path):
    path = tmp_path / "stage2.yaml"
    path.write_text(RECIPE.format(folder=folder, output=tmp_path / "run"))
    return load_config(path)


def test_a_finished_checkpoint_is_the_start(finished, tmp_path):
    """Class, weights, technique and scheduler come from the folder; what is written opens again and has moved."""
    folder = finished[1] / "checkpoint"
    config = start(folder, tmp_path)
    assert config.technique == "dit" and config.task == "class-to-image"
    assert config.scheduler.name == "FlowMatchEulerDiscreteScheduler"
    before = load_pipeline(folder).transformer.state_dict()
    trainer = Trainer(config)
    assert all(torch.equal(value, before[key]) for key, value in trainer.bare.state_dict().items())
    after = load_pipeline(trainer.run()).transformer.state_dict()
    assert after.keys() == before.keys() and any(not torch.equal(after[key], before[key]) for key in before)
    settings = json.loads((tmp_path / "run" / "checkpoint" / "training.json").read_text())["config"]
    assert settings["init_from"] == "checkpoint"


@pytest.fixture
def flow_folder(tmp_path):
    torch.manual_seed(0)
    flow = TarFlowModel(
        sample_size=8, patch_size=2, hidden_size=16, num_blocks=2, num_layers=1, head_dim=8, num_classes=16
    )
    flow.blocks[1].proj_out.weight.data.normal_(0.0, 0.1)  # zeros would keep gradients from what comes before
    TarFlowPipeline(flow, GSJacobiScheduler(modules=[0, 1], sweeps=[1, 2])).save_pretrained(tmp_path / "flow")
    return tmp_path / "flow"


FLOW_RECIPE = RECIPE.replace("rectified_flow", "{{name: flow_nll, options: {{noise_std: 0.05}}}}") + (
    "condition: {{null_label: -1}}\n"
)


def test_a_scheduler_of_ours_comes_along_and_only_the_parameters_named_are_trained(flow_folder, tmp_path):
    path = tmp_path / "flow.yaml"
    path.write_text(FLOW_RECIPE.format(folder=flow_folder, output=tmp_path / "run"))
    config = load_config(path, ["optimizer.only=[blocks.1.layers.0.ff, blocks.1.proj_in.bias]"])
    assert config.scheduler.name == "dit_suite.schedulers.gs_jacobi:GSJacobiScheduler"
    before = load_pipeline(flow_folder)
    after = load_pipeline(Trainer(config).run())
    assert after.scheduler.strategies == before.scheduler.strategies
    pairs = zip(before.transformer.named_parameters(), after.transformer.named_parameters(), strict=True)
    moved = {name for (name, value), (_, other) in pairs if not torch.equal(value, other)}
    assert moved == {
        "blocks.1.proj_in.bias",
        "blocks.1.layers.0.ff_in.weight",
        "blocks.1.layers.0.ff_in.bias",
        "blocks.1.layers.0.ff_out.weight",
        "blocks.1.layers.0.ff_out.bias",
    }
    with pytest.raises(ValueError, match="optimizer.only: no parameter's name begins with 'head.'"):
        Trainer(load_config(path, ["optimizer.only=[blocks.0., head.]"]))


def test_classes_of_other_names_are_refused(finished, tmp_path):
    """The data's class 1 must be the checkpoint's class 1, unless its names are given up; then the data's are saved."""
    folder = tmp_path / "renamed"
    shutil.copytree(finished[1] / "checkpoint", folder)
    index = json.loads((folder / "model_index.json").read_text())
    names = dict(index["id2label"])
    index["id2label"] = {**names, "0": names["1"], "1": names["0"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"class 0 of the data set is '{names['0']}', but '{names['1']}'"):
        Trainer(start(folder, tmp_path))
    config = start(folder, tmp_path)
    anew = dataclasses.replace(config, pipeline={**config.pipeline, "id2label": None})
    written = Trainer(anew).run()
    assert json.loads((written / "model_index.json").read_text())["id2label"] == names


def test_a_grafted_folder_keeps_its_plan(finished, tmp_path):
    """Stage 2: every operator trains, the folder it writes is grafted, and a stopped run goes on from its state."""
    pipe = load_pipeline(finished[1] / "checkpoint")
    plan = GraftPlan.from_dict({"attention": {"1": {"kind": "hyena_x"}}, "mlp": {"0": {"kind": "mlp", "ratio": 2}}}, 2)
    pipe.transformer = graft(pipe.transformer, plan)
    pipe.save_pretrained(tmp_path / "grafted")
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    config = start(tmp_path / "grafted", tmp_path)
    again = load_pipeline(Trainer(config).run()).transformer
    assert isinstance(again, GraftedDiTModel)
    assert GraftPlan.from_dict(again.config.graft_plan) == plan
    still = [key for key, value in again.state_dict().items() if torch.equal(value, before[key])]
    assert not [key for key in still if "attn" in key or ".ff." in key]
    resumed = load_config(tmp_path / "run" / "config.yaml", ["run.max_minutes=1"])
    assert resumed.identity() == config.identity()
    assert Trainer(resumed).run() == tmp_path / "run" / "checkpoint"


def test_what_can_not_be_a_start(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint"):
        start("nowhere", tmp_path)
    path = tmp_path / "both.yaml"
    path.write_text(RECIPE.format(folder="emoji-pixart-64", output=tmp_path) + "init_from: elsewhere\n")
    with pytest.raises(ValueError, match="not both"):
        load_config(path)

"""The loop: resuming, accumulation, averaging, export, and every kind of network."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dit_suite.checkpoints import load_pipeline
from dit_suite.training.config import OptimizerSection, config_from_dict, config_text, load_config
from dit_suite.training.schedule import learning_rate
from dit_suite.training.state import states
from dit_suite.training.trainer import Trainer

from .conftest import curve, tiny, tiny_values

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def test_checkpoint_opens_and_holds_the_averaged_weights(finished):
    config, folder = finished
    pipe = load_pipeline(folder / "checkpoint")
    assert pipe.config.prediction_type == "flow_prediction" and pipe.config.id2label["0"] == "red circle"
    images = pipe(class_labels=[3], num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (1, 8, 8, 3)
    state = states(folder / "state")[-1]
    averaged, last = load_file(state / "ema.safetensors"), load_file(state / "model.safetensors")
    name = "final_layer.linear.weight" if "final_layer.linear.weight" in averaged else next(iter(averaged))
    saved = pipe.transformer.state_dict()[name]
    assert torch.equal(saved, averaged[name]) and not torch.equal(saved, last[name])
    about = json.loads((folder / "checkpoint/training.json").read_text())
    assert about["steps"] == 12 and about["config"]["optimizer"]["lr"] == 0.003
    assert about["last_loss"] == curve(folder)[-1][1]
    assert str(folder) not in json.dumps(about)


def test_stopped_run_goes_on_bit_for_bit(finished, tmp_path):
    config, folder = finished
    other = tiny(tmp_path / "run")
    first = Trainer(other)
    take = first.step

    def counted(step, total):
        if step == 5:
            first.request_stop()
        return take(step, total)

    first.step = counted
    assert first.run() is None and len(curve(tmp_path / "run")) == 6
    with (tmp_path / "run/log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 7, "lo')  # a line that a kill cut short
    Trainer(other).run()
    assert curve(tmp_path / "run") == curve(folder)
    ends = [load_file(states(place / "state")[-1] / "model.safetensors") for place in (folder, tmp_path / "run")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_killed_run_goes_on_bit_for_bit(finished, tmp_path):
    config, folder = finished
    path = tmp_path / "tiny.yaml"
    values = tiny_values(tmp_path / "run")
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, str(ROOT / "scripts/train.py"), "--config", str(path)]
    child = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not states(tmp_path / "run/state") and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert states(tmp_path / "run/state"), "the child saved no state"
    half = tmp_path / "run/state/.step_00000099.1.part"
    half.mkdir()
    (half / "state.json").write_text("{}")
    Trainer(load_config(path)).run()
    assert curve(tmp_path / "run") == curve(folder)
    left = {place.name for place in (tmp_path / "run/state").iterdir()}
    assert left == {place.name for place in states(tmp_path / "run/state")}


def test_accumulation_changes_nothing_but_rounding(finished, tmp_path):
    _, folder = finished
    Trainer(tiny(tmp_path / "run", accumulation=4)).run()
    for (_, loss, norm), (_, expected, expected_norm) in zip(curve(tmp_path / "run"), curve(folder), strict=True):
        assert abs(loss - expected) < 1e-5 and abs(norm - expected_norm) < 1e-4


def test_checkpointing_changes_nothing_but_rounding(finished, tmp_path):
    _, folder = finished
    Trainer(tiny(tmp_path / "run", gradient_checkpointing=True, max_steps=12)).run()
    pairs = zip(curve(tmp_path / "run"), curve(folder), strict=True)
    assert max(abs(a[1] - b[1]) for a, b in pairs) < 1e-5


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(parallel, finished, tmp_path):
    _, folder = finished
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values(tmp_path / "run", parallel=parallel)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts/train.py"), "--config", str(path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for (_, loss, norm), (_, expected, expected_norm) in zip(curve(tmp_path / "run"), curve(folder), strict=True):
        assert abs(loss - expected) < 1e-5 and abs(norm - expected_norm) < 1e-4
    one, two = (load_pipeline(place / "checkpoint").transformer.state_dict() for place in (folder, tmp_path / "run"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-4


def test_checkpoints_on_the_way_are_kept(finished, tmp_path):
    config, folder = finished
    target = Trainer(tiny(tmp_path / "run", export_every=4)).run()
    assert curve(tmp_path / "run") == curve(folder)
    kept = sorted((tmp_path / "run/checkpoints").iterdir())
    assert [path.name for path in kept] == ["step_00000004", "step_00000008", "step_00000012"]
    assert [json.loads((path / "training.json").read_text())["steps"] for path in kept] == [4, 8, 12]
    first, last, end = (load_pipeline(path).transformer.state_dict() for path in (kept[0], kept[-1], target))
    assert all(torch.equal(last[name], end[name]) for name in end)
    assert any(not torch.equal(first[name], end[name]) for name in end)


def test_bare_no_is_a_word(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(tiny_values(tmp_path)) + "")
    assert load_config(path, ["run.precision=no"]).run.precision == "no"
    assert load_config(path, ["run.precision=bf16"]).run.precision == "bf16"
    path.write_text(path.read_text().replace("run:\n", "run:\n  precision: no\n"))
    assert load_config(path).run.precision == "no"
    with pytest.raises(ValueError, match="run: precision must be one of no, bf16, got 'fp32'"):
        load_config(path, ["run.precision=fp32"])
    with pytest.raises(ValueError, match="run: compile must be bool, got 'no'"):
        load_config(path, ["run.compile='no'"])


def test_number_of_classes_must_be_that_of_the_data(tmp_path):
    values = tiny_values(tmp_path)
    values["model"]["options"]["num_classes"] = 7
    with pytest.raises(ValueError, match=r"has 7 classes, but the data set has 16: set model.options.num_classes=16"):
        Trainer(config_from_dict(values))
    values["model"]["options"]["num_classes"] = None
    trainer = Trainer(config_from_dict(values))
    assert trainer.bare.config.num_classes == 16 and trainer.config.identity() == tiny(tmp_path).identity()


def test_other_settings_are_refused_and_change_nothing(finished):
    config, folder = finished
    changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=1e-4))
    with pytest.raises(ValueError, match=r"optimizer.lr was 0.003, now 0.0001"):
        Trainer(changed).run()
    assert load_config(folder / "config.yaml").identity() == config.identity()


def test_grids_of_an_action_model_are_refused_before_the_first_step(tmp_path):
    values = tiny_values(tmp_path, preview_every=1) | {"task": "action-to-video"}
    with pytest.raises(ValueError, match=r"set run.preview_every=0"):
        Trainer(config_from_dict(values))


def test_loss_falls(tmp_path):
    Trainer(tiny(tmp_path / "run", max_steps=120, batch_size=32, save_every=1000)).run()
    losses = [loss for _, loss, _ in curve(tmp_path / "run")]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


def test_time_limit_derives_the_steps_and_corrects_them(tmp_path, monkeypatch):
    limited = tiny(tmp_path / "run", max_steps=0, max_minutes=0.1, save_every=10)
    trainer, clock = Trainer(limited), SimpleNamespace(now=0.0)
    take, totals = trainer.step, []

    def timed(step, total):
        clock.now += 0.05 if step < 25 else 0.1
        totals.append(total)
        return take(step, total)

    trainer.step = timed
    monkeypatch.setattr("dit_suite.training.trainer.time", SimpleNamespace(monotonic=lambda: clock.now))
    assert (trainer.run() / "model_index.json").is_file()
    # 20 steps of 0.05 s are timed after 5; of 6 s 4.75 are left, so 25 + 0.97 * 95 steps; then the machine slows down
    assert totals[25] == 25 + 92 and totals[-1] < 80
    steps = [step for step, _, _ in curve(tmp_path / "run")]
    assert steps[-1] == totals[-1] and clock.now <= 6.0 + 0.1


def test_preview_grid_is_written(tmp_path):
    Trainer(tiny(tmp_path / "run", max_steps=2, preview_every=2, preview_steps=2, preview_count=4)).run()
    from PIL import Image

    with Image.open(tmp_path / "run/previews/step_00000002.png") as grid:
        assert grid.size == (22, 22)


def test_learning_rate_shape():
    section = OptimizerSection(lr=1.0, warmup_steps=10, decay_share=0.4)
    assert learning_rate(section, 0, 100) == pytest.approx(0.1)
    assert learning_rate(section, 30, 100) == learning_rate(section, 59, 100) == 1.0
    assert learning_rate(section, 80, 100) == pytest.approx(0.5) and learning_rate(section, 100, 100) == 0.0
    cosine = OptimizerSection(lr=1.0, warmup_steps=0, decay="cosine", decay_share=1.0, final_lr=0.1)
    assert learning_rate(cosine, 50, 100) == pytest.approx(0.55)


def test_config_errors_name_the_key(tmp_path):
    values = tiny_values(tmp_path)
    with pytest.raises(ValueError, match="no key 'modle'"):
        config_from_dict({**values, "modle": 1})
    with pytest.raises(ValueError, match="optimizer: OptimizerSection has no option 'learning_rate'"):
        config_from_dict({**values, "optimizer": {"learning_rate": 1}})
    with pytest.raises(ValueError, match="run: batch_size must be at least 1"):
        config_from_dict({**values, "run": {"batch_size": 0, "max_steps": 1}})
    with pytest.raises(ValueError, match="has no option 'depth'"):
        Trainer(config_from_dict({**values, "model": {"name": "dit", "options": {"depth": 3}}}))
    with pytest.raises(ValueError, match="no class of diffusers"):
        Trainer(config_from_dict({**values, "model": "NoSuchNetwork"}))
    with pytest.raises(ValueError, match=r"'dit_suite.training.objectives:Nothing' can't be imported"):
        Trainer(config_from_dict({**values, "objective": "dit_suite.training.objectives:Nothing"}))
    with pytest.raises(ValueError, match=r"'no_such_module:reader' can't be imported"):
        Trainer(config_from_dict({**values, "data": {"kind": "no_such_module:reader"}}))
    with pytest.raises(ValueError, match=r"objective.call has no effect: only model has one"):
        config_from_dict({**values, "objective": {"name": "rectified_flow", "call": {"a": 1}}})
    with pytest.raises(ValueError, match=r"auxiliary.weight must be a number, got 'much'"):
        config_from_dict({**values, "auxiliary": {"name": "a:B", "weight": "much"}})


def test_config_round_trip_and_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(config_text(tiny(tmp_path)))
    config = load_config(path, ["optimizer.lr=1e-4", "model.options.num_layers=3", "data.styles=[noto]"])
    assert config.optimizer.lr == 1e-4 and config.model.options["num_layers"] == 3
    assert config.data.styles == ("noto",)
    assert load_config(path).identity() == tiny(tmp_path).identity()
    with pytest.raises(ValueError, match="key=value"):
        load_config(path, ["optimizer.lr"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid(path):
    load_config(path)

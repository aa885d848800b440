"""Distillation of a velocity: closed forms, and a student that comes to its teacher."""

import pytest
import torch

from dit_suite.checkpoints import load_pipeline
from dit_suite.data.draws import Draws
from dit_suite.training.config import config_from_dict
from dit_suite.training.objectives import RectifiedFlow, TrainingBatch, objective_class
from dit_suite.training.trainer import Trainer
from dit_suite.training.velocity_distillation import DistilledFlow
from tests.training.conftest import curve, tiny_values


def batch() -> TrainingBatch:
    samples = torch.rand((6, 3, 4, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return TrainingBatch(samples, {"class_labels": torch.arange(6)}, Draws(3, 11, torch.arange(6)))


def test_closed_form():
    """The student sees what flow matching would show it; off by a constant c, its loss is c squared."""
    seen, asked = [], []

    def teacher(x, timestep, class_labels, return_dict):
        asked.append((x, timestep, class_labels))
        return (torch.cat([3.0 * x, x], 1),)  # the second half is a variance, which is none of ours

    def student(x, timestep, class_labels):
        seen.append((x, timestep, class_labels))
        return 3.0 * x + 0.5

    levels = {"levels": "logit_normal", "mean": 0.4, "shift": 2.0}
    result = DistilledFlow(teacher="given", **levels).loss(student, batch(), teacher)
    assert torch.allclose(result.loss, torch.full((6,), 0.25), atol=1e-5)
    power = (3.0 * seen[0][0]).square().flatten(1).mean(1)
    assert torch.allclose(result.parts["relative"], 0.25 / power, rtol=1e-4)
    RectifiedFlow(**levels).loss(student, batch())
    for ours, theirs, plain in zip(seen[0], asked[0], seen[1], strict=True):
        assert torch.equal(ours, plain) and torch.equal(theirs, plain)


def test_it_needs_a_teacher():
    with pytest.raises(ValueError, match=r"set objective\.options\.teacher"):
        objective_class("distilled_flow").from_dict({})


def test_a_student_comes_to_its_teacher(finished, tmp_path):
    """A copy of the teacher has no loss and stays where it is; a disturbed copy comes back, the teacher stays."""
    folder = finished[1] / "checkpoint"
    values = tiny_values(tmp_path / "copy", max_steps=2)
    values["objective"] = {"name": "distilled_flow", "options": {"teacher": str(folder)}}
    values["init_from"] = str(folder)
    values["optimizer"]["weight_decay"] = 0.0
    before = load_pipeline(folder).transformer.state_dict()
    Trainer(config_from_dict(values)).run()
    assert [loss for _, loss, _ in curve(tmp_path / "copy")] == [0.0, 0.0]
    assert str(folder) not in (tmp_path / "copy" / "checkpoint" / "training.json").read_text()
    after = load_pipeline(tmp_path / "copy" / "checkpoint").transformer.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)

    values["run"] |= {"max_steps": 40, "output": str(tmp_path / "disturbed")}
    trainer = Trainer(config_from_dict(values))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainer.bare.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trainer.run()
    losses = [loss for _, loss, _ in curve(tmp_path / "disturbed")]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert all(torch.equal(value, before[key]) for key, value in load_pipeline(folder).transformer.state_dict().items())

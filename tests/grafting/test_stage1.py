"""Stage 1 on a saved checkpoint: seeds of the operators, and what a stopped run may go on with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_suite.call_options import ClassToImageOptions
from dit_suite.checkpoints import find_checkpoint, load_pipeline
from dit_suite.grafting import DistillConfig, GraftPlan, graft
from dit_suite.grafting.stage1 import REPORT_FILE, STATE_FILE, graft_checkpoint
from dit_suite.sampling import SamplingJob
from tests.grafting.test_surgery import pipeline, teacher


def _operator(plan: dict, layer: int, seed: int | None, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return graft(model, GraftPlan.from_dict(plan, 4), seed).transformer_blocks[layer].attn.state_dict()


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", ["hyena_se", "gla", "swa", "mamba2"])
def test_an_operator_starts_from_the_seed_of_its_layer(kind: str) -> None:
    spec = {"kind": kind, "d_state": 8} if kind == "mamba2" else {"kind": kind}
    alone = {"attention": {"2": spec}}
    among = {"attention": {"0": {"kind": "mha"}, "2": spec, "3": spec}, "mlp": {"1": {"kind": "mlp", "ratio": 3.0}}}
    model = teacher()
    first = _operator(alone, 2, 5, model)
    assert _equal(_operator(among, 2, 5, model), first)
    assert _equal(_operator({"attention": {"1": spec}}, 1, 6, model), first)
    assert not _equal(_operator(alone, 2, 6, model), first) and not _equal(_operator(among, 3, 5, model), first)
    pair = graft(model, GraftPlan.from_dict({**alone, "pairs": [[2, 3]]}, 4), 5).transformer_blocks[2]
    assert _equal(pair.first.attn.state_dict(), first)
    assert not _equal(_operator(alone, 2, None, model), _operator(alone, 2, None, model))


@pytest.fixture
def checkpoint(tmp_path: Path):
    pipeline(teacher()).save_pretrained(tmp_path / "tiny")
    return find_checkpoint(str(tmp_path / "tiny"))


def _run(checkpoint, output: Path, report=lambda line: None, *, kind="hyena_x", epochs=2, seed=0, **changes):
    plan = output.parent / f"{kind}.yaml"
    plan.write_text(f"attention: {{kind: {kind}, layers: [1, 3]}}\n")
    job = SamplingJob(
        technique="dit", model=str(checkpoint.folder), weights_sha256=checkpoint.weights_sha256, conditions=(1, 2),
        options=ClassToImageOptions(num_inference_steps=2), batch_size=2, seed=seed,
    )  # fmt: skip
    return graft_checkpoint(
        checkpoint, plan, replace(job, **changes), DistillConfig(seed=seed), output, epochs=epochs, report=report
    )


def test_a_stopped_run_goes_on_only_with_the_same_facts(checkpoint, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    torch.manual_seed(1)
    assert _run(checkpoint, whole)["batches"] == 2

    class Stop(Exception):
        pass

    def report(line: str) -> None:
        if line.startswith("batch 1"):
            raise Stop

    torch.manual_seed(2)
    with pytest.raises(Stop):
        _run(checkpoint, stopped, report)
    assert (stopped / STATE_FILE).is_file() and not (stopped / REPORT_FILE).exists()
    for change, name in (
        ({"kind": "hyena_se"}, "plan"),
        ({"seed": 1}, "settings"),
        ({"conditions": (1, 3)}, "conditions"),
        ({"epochs": 3}, "epochs"),
        ({"options": ClassToImageOptions(num_inference_steps=3)}, "sampling"),
        ({"batch_size": 1}, "sampling"),
    ):
        with pytest.raises(ValueError, match=f"stage1.pt belongs to a distillation that differs in its {name}; delete"):
            _run(checkpoint, stopped, **change)
    assert _run(checkpoint, stopped)["batches"] == 2
    one, other = (load_pipeline(folder).transformer.state_dict() for folder in (whole, stopped))
    assert _equal(one, other)

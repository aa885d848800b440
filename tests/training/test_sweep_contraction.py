"""The term that makes a block of a flow solvable by sweeps: its equations, what it refuses, and that it works."""

import math
from pathlib import Path

import pytest
import torch

from dit_suite.data.draws import Draws
from dit_suite.models.dit import DiTModel
from dit_suite.models.tarflow import TarFlowModel
from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler
from dit_suite.training.config import config_from_dict
from dit_suite.training.objectives import FlowNLL, TrainingBatch
from dit_suite.training.start import start_from_checkpoint
from dit_suite.training.sweep_contraction import SweepContraction, contraction, sweep
from dit_suite.training.trainer import Network, Trainer
from pipelines.pipeline_tarflow import TarFlowPipeline

from .conftest import tiny_values


def wild_flow(noise_std: float = 0.1) -> TarFlowModel:
    """A flow of two blocks on 8 px pictures (16 tokens) whose last block depends strongly on the tokens before."""
    torch.manual_seed(0)
    flow = TarFlowModel(
        sample_size=8, patch_size=2, hidden_size=32, num_blocks=2, num_layers=1, head_dim=16, num_classes=16
    )
    flow.register_to_config(noise_std=noise_std)
    with torch.no_grad():
        for block, scale in zip(flow.blocks, (0.02, 0.3), strict=True):
            block.proj_out.weight.normal_(0.0, scale)
            block.proj_out.weight[:12] *= 0.2  # log-scales
    return flow


def batch_of(step: int, count: int = 6) -> TrainingBatch:
    samples = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * 2 - 1
    labels = torch.arange(count) - 1
    return TrainingBatch(samples, {"class_labels": labels}, Draws(3, step, torch.arange(count)))


def errors_by_sweep(flow: TarFlowModel, sweeps: int) -> list[float]:
    """RMS error after each sweep of the last block from the guess zero, over 16 samples of noise."""
    block = flow.blocks[1]
    noise = torch.randn(16, 16, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        solved = block.order(GSJacobiScheduler().step(block, 1, noise, torch.arange(16)).tokens)
        latents, condition = block.order(noise), block.condition(torch.arange(16))
        iterate = torch.cat([latents[:, :1], torch.zeros_like(latents[:, 1:])], dim=1)
        found = []
        for _ in range(sweeps):
            iterate = sweep(block, iterate, latents, condition)
            found.append((iterate - solved).square().mean().sqrt().item())
    return found


def test_a_sweep_keeps_the_solution_and_is_the_forward_pass_read_backwards():
    flow = wild_flow().eval()
    tokens = torch.randn(3, 16, 12)
    with torch.no_grad():
        latents, _ = flow.blocks[1](tokens, torch.tensor([4, 0, -1]))
        block = flow.blocks[1]
        swept = sweep(block, block.order(tokens), block.order(latents), block.condition(torch.tensor([4, 0, -1])))
    torch.testing.assert_close(block.order(swept), tokens, rtol=1e-4, atol=1e-5)


def test_contraction_is_the_share_of_the_squared_error_that_is_left():
    solution = torch.randn(2, 5, 3)
    iterate, swept = solution + torch.tensor([1.0, 0.0])[:, None, None], solution + 0.5
    torch.testing.assert_close(contraction(swept, iterate, solution), torch.tensor([0.25 / 1.0001, 2500.0]))


@pytest.mark.parametrize("step", [0, 3])
def test_the_term_by_hand(step):
    """Sample by sample: noise on the solution, or `step` sweeps from zero."""
    flow, batch = wild_flow().eval(), batch_of(step)
    term = SweepContraction(blocks=(1,), sweeps=6)
    term.attach(flow)
    result = FlowNLL(noise_std=0.1).loss(Network(flow, {}), batch)
    loss = term.loss(batch, result)
    block, outputs = flow.blocks[1], result.prediction[2]
    chance, noise = batch.draws.uniform(6, (2,)), batch.draws.normal(7, (16, 12))
    expected = []
    for row, label in enumerate(batch.condition["class_labels"]):
        condition = block.condition(label[None])
        x, z = outputs[0][row : row + 1].flip(1).detach(), outputs[1][row : row + 1].flip(1).detach()
        if chance[row, 0] < 0.5:
            y = x + 0.03 * (0.5 / 0.03) ** chance[row, 1] * noise[row]
        else:
            y = torch.zeros_like(z)
            y[:, 0] = z[:, 0]
            for _ in range(step):
                y = sweep(block, y, z, condition).clamp(-8, 8)
        y[:, 0] = x[:, 0]
        left = (sweep(block, y, z, condition) - x).square().mean()
        expected.append(math.log1p((left / ((y - x).square().mean() + 1e-4)).item()))
    assert {bool(value < 0.5) for value in chance[:, 0]} == {True, False}
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_it_says_what_it_needs():
    with pytest.raises(ValueError, match="needs blocks between 1 and 1, got 0"):
        SweepContraction(blocks=(0,)).attach(wild_flow())
    with pytest.raises(ValueError, match="needs blocks between 1 and 1, got none"):
        SweepContraction().attach(wild_flow())
    options = {"sample_size": 8, "patch_size": 4, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
    with pytest.raises(ValueError, match="needs a TarFlow, got DiTModel"):
        SweepContraction(blocks=(1,)).attach(DiTModel(**options))


@pytest.fixture(scope="module")
def wild_checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wild") / "flow"
    TarFlowPipeline(wild_flow(), GSJacobiScheduler()).save_pretrained(folder)
    return folder


def trained(checkpoint: Path, output: Path, weight: float) -> TarFlowModel:
    values = tiny_values(output, max_steps=60, batch_size=16, save_every=60, log_every=20)
    config = config_from_dict(
        start_from_checkpoint(
            {key: values[key] for key in ("name", "data", "run")}
            | {
                "model": {"from": str(checkpoint)},
                "objective": {"name": "flow_nll", "options": {"noise_std": 0.1}},
                "auxiliary": {
                    "name": "dit_suite.training.sweep_contraction:SweepContraction",
                    "weight": weight,
                    "options": {"blocks": [1]},
                },
                "condition": {"null_label": -1},
                "optimizer": {"lr": 3e-3, "warmup_steps": 2, "only": ["blocks.1."]},
                "ema": {"decay": 0.8},
            }
        )
    )
    return TarFlowModel.from_pretrained(Trainer(config).run() / "transformer")


def test_training_with_it_leaves_a_block_that_sweeps_solve(wild_checkpoint, tmp_path):
    """Beside the same training without it, and without touching the other block."""
    before = wild_flow()
    with_term = trained(wild_checkpoint, tmp_path / "with", 1.0)
    without = trained(wild_checkpoint, tmp_path / "without", 0.0)
    after, control = errors_by_sweep(with_term, 4)[-1], errors_by_sweep(without, 4)[-1]
    assert after < 0.3 * control, (errors_by_sweep(before, 4), control, after)
    for name, value in before.blocks[0].named_parameters():
        assert torch.equal(value, with_term.blocks[0].get_parameter(name)), name


def test_only_must_name_something(wild_checkpoint, tmp_path):
    values = tiny_values(tmp_path)
    values["optimizer"]["only"] = ["head."]
    with pytest.raises(ValueError, match="optimizer.only: no parameter's name begins with 'head.'"):
        Trainer(config_from_dict(values))

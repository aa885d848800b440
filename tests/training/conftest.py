"""Small runs for the trainer's tests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_suite.training.config import TrainConfig, config_from_dict
from dit_suite.training.trainer import Trainer


def tiny_values(output: Path, **run: Any) -> dict[str, Any]:
    """A config that trains a DiT of a few thousand parameters on 8 px shapes."""
    return {
        "name": "tiny",
        "task": "class-to-image",
        "technique": "dit",
        "model": {
            "name": "dit_suite.models.dit:DiTModel",
            "options": {
                "sample_size": 8,
                "patch_size": 4,
                "in_channels": 3,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_classes": 16,
                "learn_sigma": False,
            },
        },
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "objective": "rectified_flow",
        "data": {"kind": "shapes", "size": 8, "count": 48},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "run": {
            "max_steps": 12,
            "batch_size": 8,
            "log_every": 1,
            "save_every": 4,
            "output": str(output),
            **run,
        },
    }


def tiny(output: Path, **run: Any) -> TrainConfig:
    """The config of `tiny_values`."""
    return config_from_dict(tiny_values(output, **run))


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every line of a run's log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in a fixed order, as in the child processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[TrainConfig, Path]:
    """An uninterrupted run, its config and folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    torch.set_num_threads(1)
    config = tiny(folder)
    Trainer(config).run()
    return config, folder

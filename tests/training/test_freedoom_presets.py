"""The Freedoom presets keep to the sizes that two CPU cores can play."""

import math
from pathlib import Path

import pytest
import torch

from dit_suite.training.build import construct
from dit_suite.training.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("nfd_freedoom", 7_432_384), ("nfd_freedoom_student", 7_432_384), ("nfd_freedoom_cpu", 2_877_826)],
)
def test_a_preset_is_small_enough(name: str, parameters: int):
    """At most 7.5 M parameters, 48 tokens a frame and a window of 8; the docs say 7.4 and 2.9 M."""
    config = load_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        network = construct(config.model)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == parameters
    assert count <= 7_500_000
    assert network.tokens_per_frame == 48
    assert network.config.window <= 8
    assert network.config.num_actions == len(config.pipeline["action_names"]) == 6


@pytest.mark.parametrize("name", ["nfd_freedoom_student", "nfd_freedoom_cpu", "nfd_moving_square_student"])
def test_the_last_pass_of_a_student_is_late(name: str):
    """The error of a frame is about that of the velocity times the level of the last pass."""
    config = load_config(CONFIGS / f"{name}.yaml")
    scheduler = construct(config.scheduler)
    scheduler.set_timesteps(config.pipeline["default_steps"])
    first, *_, last = scheduler.timesteps.tolist()
    assert first == pytest.approx(math.pi / 2, abs=1e-4)
    assert scheduler.noise_level(last) <= 0.41


def test_teacher_and_student_are_one_network():
    teacher, student = (load_config(CONFIGS / f"{name}.yaml") for name in ("nfd_freedoom", "nfd_freedoom_student"))
    assert teacher.model == student.model

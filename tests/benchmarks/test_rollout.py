"""The rollout benchmark on recorded play: rows, the judge's classes, and that a poor judge judges nothing."""

import argparse

import numpy as np
import pytest
import torch

from dit_suite.benchmarks import discover, rollout
from dit_suite.data.freedoom import ACTION_NAMES, SCHEMA
from dit_suite.data.tables import write_table
from dit_suite.evaluation.rollout import RolloutOptions, roll_out
from dit_suite.models.nfd import NFDTransformer3DModel
from dit_suite.pipelines.pipeline_nfd import NFDPipeline
from dit_suite.schedulers.frame_sampler import FrameSamplerOptions
from dit_suite.schedulers.generators import sample_generators
from dit_suite.schedulers.trigflow import TrigFlowScheduler


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A view that turns by four pixels; walking leaves no trace."""
    folder, rows = tmp_path_factory.mktemp("play"), []
    wall = np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8)
    for episode in range(8):
        rng = np.random.default_rng(episode)
        actions = rng.integers(0, len(ACTION_NAMES), 40)
        turns = np.array([0, 0, 4, -4, 4, -4])[actions]
        places = np.concatenate([[0], np.cumsum(turns)[:-1]]) + int(rng.integers(64))
        frames = np.stack([np.roll(wall, int(place), axis=1)[:, :16] for place in places])
        rows.append(
            {
                "frames": frames.tobytes(), "actions": actions.tolist(), "episode": episode, "height": 16,
                "width": 16, "scenario": "wall", "action_names": list(ACTION_NAMES),
                "split": "heldout" if episode % 4 == 3 else "train",
            }
        )  # fmt: skip
    write_table(folder / "episodes.parquet", rows, SCHEMA, {})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    network = NFDTransformer3DModel(
        3, 16, 16, 8, num_layers=1, num_attention_heads=1, attention_head_dim=16, num_actions=6, window=3
    )
    folder = tmp_path_factory.mktemp("model")
    NFDPipeline(network, TrigFlowScheduler(), action_names=ACTION_NAMES).save_pretrained(folder)
    return folder


def rows(model, recorded, *flags: str) -> list[dict]:
    parser = argparse.ArgumentParser()
    rollout.add_arguments(parser)
    wanted = ["--model", str(model), "--data", str(recorded), "--clips", "3", "--rollout-steps", "1", "4", *flags]
    result = rollout.run(parser.parse_args([*wanted, "--judge-pairs", "200"]))
    assert result["judge_classes"] == ["straight", "left", "right"]
    return result["rows"]


def test_recorded_play_is_compared_and_turns_are_judged(model, recorded):
    assert discover()["rollout"] is rollout
    good = rows(model, recorded, "--judge-steps", "40")
    assert [row["step"] for row in good] == [1, 4]
    assert good[0]["judge_accuracy"] > 0.9
    assert good[0]["action_following"] < 0.9
    assert all(row["psnr"] < row["psnr_of_still"] for row in good)


def test_what_joint_drafts_cost_has_its_own_rows(recorded, tmp_path):
    """The first frame of a draft is the plain one, the later ones are not; rows repeat what the sampler makes."""
    torch.manual_seed(0)
    network = NFDTransformer3DModel(
        3, 16, 16, 8, num_layers=1, num_attention_heads=1, attention_head_dim=16, num_actions=6, window=3
    )
    for name, parameter in network.named_parameters():
        if "modulation" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    NFDPipeline(network.eval(), TrigFlowScheduler(), action_names=ACTION_NAMES).save_pretrained(tmp_path)
    found = rows(tmp_path, recorded, "--judge-steps", "2", "--draft-length", "1", "3")
    assert [(row["draft_length"], row["step"]) for row in found] == [(1, 1), (1, 4), (3, 1), (3, 4)]
    assert found[2]["l1"] == pytest.approx(found[0]["l1"], abs=0.01)
    assert abs(found[3]["l1"] - found[1]["l1"]) > 0.01
    pipe = NFDPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    video, actions = torch.zeros(1, 3, 4, 16, 16), torch.eye(6)[None, :1].expand(1, 4, 6)
    options = RolloutOptions(steps=(3,), speculation="joint", draft_length=3)
    together = roll_out(pipe, video, actions, options)
    seeds = pipe.base_seeds(1, sample_generators(0, [0]))
    sampler = pipe.sampler(seeds, FrameSamplerOptions(num_inference_steps=pipe.config.default_steps), 3)
    sampler.extend(video[:, :, :1], torch.zeros(1, 1, 6))
    torch.testing.assert_close(together, sampler.draft(actions[:, 1:]).clamp(-1, 1), atol=1e-4, rtol=0)


def test_a_poor_judge_judges_nothing(model, recorded):
    poor = rows(model, recorded, "--judge-steps", "2")
    assert poor[0]["judge_accuracy"] < 0.9
    assert poor[0]["action_following"] is None
    with pytest.raises(FileNotFoundError, match="no folder"):
        rows(model, recorded / "elsewhere")

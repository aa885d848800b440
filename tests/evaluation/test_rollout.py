"""Rollout closeness and the inverse-dynamics judge, on the built-in game."""

import pytest
import torch

from dit_suite.data.moving_square import MovingSquareClips, MovingSquareOptions
from dit_suite.evaluation.rollout import (
    InverseDynamics,
    JudgeError,
    RolloutOptions,
    accuracy,
    action_following,
    closeness,
    roll_out,
    train_inverse_dynamics,
    transitions,
    turn_classes,
    visible,
)
from dit_suite.pipelines.pipeline_output import VideoPipelineOutput


def clips(count: int, frames: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = MovingSquareClips(count, frames, MovingSquareOptions(persistence=0.5), seed=seed)
    items = [data[i] for i in range(count)]
    return torch.stack([i["video"] for i in items]), torch.stack([i["actions"] for i in items])


class Oracle:
    """Stands where a pipeline stands: returns the real clip, from frame `late` on one frame late."""

    def __init__(self, video: torch.Tensor, late: int):
        self.video, self.late, self.place = video, late, 0

    def __call__(self, actions, image, generator, **options):
        rows = slice(self.place, self.place + len(actions))
        self.place += len(actions)
        frames = self.video[rows].clone()
        frames[:, :, self.late :] = self.video[rows][:, :, self.late - 1 : -1]
        return VideoPipelineOutput(frames=(frames[:, :, : actions.shape[1] + image.shape[2]].transpose(1, 2) + 1) / 2)


def test_closeness_is_measured_step_by_step():
    video, actions = clips(6, 10, 0)
    options = RolloutOptions(steps=(1, 4, 8), batch_size=4)
    rows = closeness(roll_out(Oracle(video, late=6), video, actions, options), video[:, :, 1:], options.steps)
    assert [row["step"] for row in rows] == [1, 4, 8]
    assert [row["psnr"] for row in rows[:2]] == [100.0, 100.0]
    assert rows[0]["l1"] == 0
    assert rows[0]["ssim"] == pytest.approx(1.0)
    assert rows[2]["psnr"] < 60
    assert rows[2]["l1"] > 0
    with pytest.raises(ValueError, match="needs clips of 129 frames, got 10"):
        roll_out(Oracle(video, 6), video, actions, RolloutOptions())


def test_known_difference_has_the_known_values():
    one = torch.zeros(2, 3, 1, 16, 16)
    rows = closeness(one + 2 * 10 / 255, one, (1,))
    assert rows[0]["l1"] == pytest.approx(10, abs=1)
    assert rows[0]["psnr"] == pytest.approx(28.13, abs=0.9)


def test_the_judge_learns_real_frames_and_separates_following_from_not():
    pairs = transitions(*clips(300, 6, 0))
    seen = visible(*pairs, still_action=0)
    judge = train_inverse_dynamics(tuple(t[seen] for t in pairs), 5, steps=100, batch_size=64, width=12)
    held_out = transitions(*clips(60, 6, 1))
    held_out = tuple(t[visible(*held_out, still_action=0)] for t in held_out)
    result = action_following(judge, held_out, held_out)
    assert result["judge_accuracy"] > 0.95
    disobedient = held_out[0], held_out[1], (held_out[2] + 1) % 5
    assert action_following(judge, held_out, disobedient)["action_following"] < 0.1
    untrained = InverseDynamics(5)
    assert accuracy(untrained, held_out) < 0.6
    with pytest.raises(JudgeError, match="needs 90%"):
        action_following(untrained, held_out, held_out)


def test_turns_are_what_first_person_actions_are_judged_by():
    names, classes = turn_classes(("none", "forward", "left", "right", "forward-left", "TURN_RIGHT"))
    assert [names[i] for i in classes.tolist()] == ["straight", "straight", "left", "right", "left", "right"]
    with pytest.raises(ValueError, match="turns left or right"):
        turn_classes(("stay", "jump"))


def test_shifts_are_measured_where_they_are():
    """A picture moved by d pixels matches itself best at shift d, in every band of rows."""
    picture = torch.rand(2, 3, 12, 40, generator=torch.Generator().manual_seed(0))
    judge = InverseDynamics(3, width=4, reach=10)
    for moved in (-7, 0, 4):
        errors = judge.shift_errors(picture[..., 10:30], picture[..., 10 - moved : 30 - moved]).view(2, 6, 21)
        assert (errors.argmin(-1) == moved + 10).all()

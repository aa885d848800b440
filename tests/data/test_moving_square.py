"""The built-in game: rules, alignment of actions and frames, reproducible clips."""

import numpy as np
import pytest
import torch

from dit_suite.data.moving_square import (
    GROUND,
    MovingSquareClips,
    MovingSquareGame,
    MovingSquareOptions,
    one_hot,
    play,
    random_actions,
    to_samples,
)


def corner(frame: np.ndarray) -> tuple[int, int]:
    rows, columns = np.nonzero((frame != np.array(GROUND, dtype=np.uint8)).any(-1))
    return int(rows.min()), int(columns.min())


def test_an_action_moves_the_very_next_frame_and_walls_stop_it():
    game = MovingSquareGame()
    before = corner(game.reset(3))
    assert corner(game.step(4)) == (before[0], before[1] + 2)
    assert corner(game.step(2)) == (before[0] + 2, before[1] + 2)
    for _ in range(30):
        frame = game.step(1)
    assert corner(frame)[0] == 0
    assert np.array_equal(game.step(1), frame)
    assert np.array_equal(game.step(0), frame)
    with pytest.raises(ValueError, match=r"0\.\.4, got 5"):
        game.step(5)


def test_clips_are_a_function_of_seed_and_index_and_actions_lead_to_their_frame():
    clips = MovingSquareClips(50, 6, seed=2)
    assert torch.equal(clips[7]["video"], MovingSquareClips(9, 6, seed=2)[7]["video"])
    assert not torch.equal(clips[7]["video"], MovingSquareClips(9, 6, seed=3)[7]["video"])
    moved = 0
    for index in range(50):
        frames, actions = clips.episode(index)
        vectors = clips[index]["actions"]
        assert not vectors[0].any()
        assert torch.equal(vectors[1:].argmax(-1), torch.from_numpy(actions))
        for t, action in enumerate(actions):
            (row, column), (next_row, next_column) = corner(frames[t]), corner(frames[t + 1])
            assert abs(next_row - row) + abs(next_column - column) <= 2 * int(action != 0)
            moved += (row, column) != (next_row, next_column)
    assert moved > 100


def test_persistence_of_the_random_player():
    actions = random_actions(5, 20000, 0.7, 0)
    assert np.mean(actions[1:] == actions[:-1]) == pytest.approx(0.7 + 0.3 / 5, abs=0.02)


def test_samples_are_in_range_and_sizes_are_checked():
    sample = to_samples(play(MovingSquareGame(), 0, [1, 2]))
    assert sample.shape == (3, 3, 16, 16)
    assert float(sample.min()) >= -1
    assert float(sample.max()) <= 1
    assert one_hot([2, 0], 5).argmax(-1).tolist() == [0, 2, 0]
    with pytest.raises(ValueError, match="cannot move"):
        MovingSquareOptions(size=8, square=8)
    with pytest.raises(ValueError, match="at least 1 clip"):
        MovingSquareClips(0, 4)

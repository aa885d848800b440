"""A game small enough to learn in minutes: a coloured square on a dark ground moves one step in the direction pressed.

It has exact ground truth, so it settles questions that a recorded game cannot: does the very next frame follow the
action, how far is a rollout from what the game would have shown. The colour never changes within an episode, so a model
has to carry it from the frames before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dit_suite.data.readers import ActionWindows
from dit_suite.data.section import DataSection
from dit_suite.data.splits import made_seed
from dit_suite.options import Options, option

ACTION_NAMES = ("stay", "up", "down", "left", "right")
MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
COLOURS = ((230, 60, 60), (60, 200, 90), (80, 120, 240), (240, 200, 60), (200, 90, 220), (240, 240, 240))
GROUND = (24, 26, 40)


@dataclass(frozen=True)
class MovingSquareOptions(Options):
    """Size of the game and behaviour of the random player."""

    size: int = option(16, "pixels per side of a frame", minimum=8, maximum=128)
    square: int = option(4, "pixels per side of the square", minimum=1, maximum=64)
    step: int = option(2, "pixels per move", minimum=1, maximum=16)
    persistence: float = option(0.7, "chance that the player repeats the last action", minimum=0.0, maximum=1.0)

    def validate(self) -> None:
        if self.square + self.step > self.size:
            raise ValueError(f"a square of {self.square} pixels cannot move in a frame of {self.size}")


class MovingSquareGame:
    """The rules. `reset` and `step` return frames `(size, size, 3)` uint8.

    Raises:
        ValueError: `step` is given an action that does not exist.
    """

    num_actions = len(ACTION_NAMES)
    action_names = ACTION_NAMES

    def __init__(self, options: MovingSquareOptions | None = None):
        self.options = options or MovingSquareOptions()
        self.reset(0)

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode: position and colour follow from the seed."""
        rng = np.random.default_rng(seed)
        room = (self.options.size - self.options.square) // self.options.step
        self.row, self.column = (int(v) * self.options.step for v in rng.integers(0, room + 1, 2))
        self.colour = COLOURS[int(rng.integers(len(COLOURS)))]
        return self.render()

    def step(self, action: int) -> np.ndarray:
        """Moves the square; the walls stop it."""
        if not 0 <= action < self.num_actions:
            raise ValueError(f"the actions are 0..{self.num_actions - 1}, got {action}")
        limit = self.options.size - self.options.square
        down, right = (delta * self.options.step for delta in MOVES[action])
        if 0 <= self.row + down <= limit:
            self.row += down
        if 0 <= self.column + right <= limit:
            self.column += right
        return self.render()

    def render(self) -> np.ndarray:
        """The present frame."""
        frame = np.empty((self.options.size, self.options.size, 3), dtype=np.uint8)
        frame[:] = GROUND
        end_row, end_column = self.row + self.options.square, self.column + self.options.square
        frame[self.row : end_row, self.column : end_column] = self.colour
        return frame


def random_actions(num_actions: int, length: int, persistence: float, seed: int) -> np.ndarray:
    """Actions `(length,)` int64 of a player who repeats the last one with probability `persistence`."""
    rng = np.random.default_rng([seed, 1])
    actions = rng.integers(0, num_actions, length)
    for i in np.flatnonzero(rng.random(length) < persistence):
        if i:
            actions[i] = actions[i - 1]
    return actions


def play(game: MovingSquareGame, seed: int, actions: Sequence[int]) -> np.ndarray:
    """Frames `(len(actions) + 1, size, size, 3)` uint8: `actions[t]` leads from frame t to frame t + 1."""
    frames = [game.reset(seed)]
    frames.extend(game.step(int(action)) for action in actions)
    return np.stack(frames)


def one_hot(actions: Sequence[int] | np.ndarray, num_actions: int) -> torch.Tensor:
    """Action vectors of a clip that starts with a given frame: `(len(actions) + 1, num_actions)`, first row the null
    action, row t + 1 the action that leads to frame t + 1."""
    vectors = torch.zeros(len(actions) + 1, num_actions)
    vectors[torch.arange(1, len(actions) + 1), torch.as_tensor(np.asarray(actions), dtype=torch.long)] = 1.0
    return vectors


def to_samples(frames: np.ndarray) -> torch.Tensor:
    """Frames `(..., height, width, 3)` uint8 to `(3, frames, height, width)` (or `(3, height, width)`) in [-1, 1]."""
    return torch.from_numpy(frames).float().div(127.5).sub(1.0).movedim(-1, 0)


class MovingSquareClips(torch.utils.data.Dataset):
    """Random clips; clip i is a pure function of (options, seed, i).

    Items: `video` `(3, num_frames, size, size)` in [-1, 1] and `actions` `(num_frames, 5)`, one-hot, first row null.

    Args:
        num_clips: length of the data set.
        num_frames: frames per clip.
        seed: another seed gives other clips (use one for training, one for testing).
    """

    def __init__(self, num_clips: int, num_frames: int, options: MovingSquareOptions | None = None, seed: int = 0):
        if num_clips < 1 or num_frames < 2:
            raise ValueError(f"at least 1 clip of 2 frames is needed, got {num_clips} of {num_frames}")
        self.num_clips, self.num_frames, self.seed = num_clips, num_frames, seed
        self.options = options or MovingSquareOptions()

    def __len__(self) -> int:
        return self.num_clips

    def episode(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames uint8 and actions of clip `index`."""
        number = self.seed * 1_000_003 + index
        persistence = self.options.persistence if index % 10 else 0.0
        actions = random_actions(MovingSquareGame.num_actions, self.num_frames - 1, persistence, number)
        return play(MovingSquareGame(self.options), number, actions), actions

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_clips:
            raise IndexError(f"clip {index} of {self.num_clips}")
        frames, actions = self.episode(index)
        return {"video": to_samples(frames), "actions": one_hot(actions, MovingSquareGame.num_actions)}


def open_moving_square(section: DataSection) -> ActionWindows:
    """The game as a training set (`data.kind: dit_suite.data.moving_square:open_moving_square`).

    `section.count` episodes of twice `section.frames` frames; `section.size` pixels (0: 16). The splits are "train" and
    "heldout".
    """
    options = MovingSquareOptions(size=section.size or 16)
    clips = MovingSquareClips(section.count, 2 * section.frames, options, seed=made_seed(section.split))
    frames, actions, episodes = [], [], []
    for index in range(section.count):
        pictures, pressed = clips.episode(index)
        frames.append(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        actions.append(torch.from_numpy(np.append(pressed, 0)))
        episodes.append(torch.full((len(pictures),), index))
    return ActionWindows(torch.cat(frames), torch.cat(actions), torch.cat(episodes), section, ACTION_NAMES)

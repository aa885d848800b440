"""A world model against the real game under the same actions: closeness per rollout step, and action following.

`--data game` plays the built-in moving-square game; a folder is recorded play (`scripts/prepare_data.py freedoom`),
whose held-out episodes are used. A small inverse-dynamics network, trained here on real frames and held to 90 % on real
held-out frames, judges whether the generated frames follow the actions; a worse one judges nothing. On recorded
first-person play it is asked for the turn only (see `dit_suite.evaluation.rollout`).

`--draft-length 1 2 3 --drafts joint staggered` says what drafts cost in quality: their later frames are not those of
plain sampling.
"""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
from dit_suite.schedulers.speculative import TOGETHER

NAME = "rollout"
STILL = 0
Clips = tuple[torch.Tensor, torch.Tensor]
Pairs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmark."""
    parser.add_argument("--model", default="moving-square-nfd", help="bundled name or folder")
    parser.add_argument("--data", default="game", help="game, or the folder of recorded play")
    parser.add_argument("--clips", type=int, default=32, help="clips compared")
    parser.add_argument("--rollout-steps", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--num-inference-steps", type=int, nargs="*", default=[], help="default: as trained")
    parser.add_argument("--draft-length", type=int, nargs="+", default=[1], help="frames per draft; 1: plain sampling")
    parser.add_argument("--drafts", nargs="+", default=["joint"], choices=TOGETHER, help="how drafts are made")
    parser.add_argument("--judge-steps", type=int, default=600, help="training steps of the inverse dynamics")
    parser.add_argument("--judge-pairs", type=int, default=3000, help="real frame pairs that train it")
    parser.add_argument("--judge-labels", choices=("auto", "all", "turn"), default="auto", help="what it must tell")
    parser.add_argument("--device", default="cpu")


def game_clips(count: int, frames: int, seed: int) -> Clips:
    """Clips of the built-in game with a lively player."""
    from dit_suite.data.moving_square import MovingSquareClips, MovingSquareOptions

    data = MovingSquareClips(count, frames, MovingSquareOptions(persistence=0.7), seed=seed)
    items = [data[index] for index in range(count)]
    return torch.stack([item["video"] for item in items]), torch.stack([item["actions"] for item in items])


def recorded_clips(folder: str, split: str, count: int, frames: int, num_actions: int) -> Clips:
    """Evenly spread windows of recorded play; the action to the first frame of a window is known or null."""
    from dit_suite.data.draws import Draws
    from dit_suite.data.readers import open_actions
    from dit_suite.data.section import DataSection

    source = open_actions(DataSection(kind="actions", path=folder, split=split, frames=frames))
    rows = torch.linspace(0, len(source) - 1, min(count, len(source))).long()
    fetched = source.fetch(rows, Draws(0, 0, torch.arange(len(rows))))
    index = fetched["actions"]
    vectors = torch.nn.functional.one_hot(index.clamp(min=0), num_actions).float() * (index >= 0)[..., None]
    return fetched["samples"], vectors


@dataclass(frozen=True)
class Judge:
    """Real frame pairs of a game and what is to be told from them.

    Attributes:
        train, held_out: real pairs `(before, after, class)`.
        names: of the classes.
        classes: class of every action, int64.
        still: action `STILL` changes nothing, and pairs in which another action changes nothing are left out.
    """

    train: Pairs
    held_out: Pairs
    names: tuple[str, ...]
    classes: torch.Tensor
    still: bool


def classified(clips: Clips, classes: torch.Tensor, still: bool, real: torch.Tensor | None = None) -> Pairs:
    """Frame pairs of clips with their classes; what is visible is decided on `real` (default: the clips themselves)."""
    video, actions = clips
    pairs = transitions(video, actions)
    if still:
        seen = visible(*transitions(video if real is None else real, actions), still_action=STILL)
        pairs = tuple(part[seen] for part in pairs)
    return pairs[0], pairs[1], classes[pairs[2]]


def open_judge(args: argparse.Namespace, action_names: tuple[str, ...]) -> Judge:
    """The frame pairs that train and hold the judge."""
    game = args.data == "game"
    turning = args.judge_labels == "turn" or (args.judge_labels == "auto" and not game)
    names, classes = action_names, torch.arange(len(action_names))
    if turning:
        names, classes = turn_classes(action_names)
    if game:
        train, held_out = game_clips(max(1, args.judge_pairs // 5), 6, 102), game_clips(100, 6, 103)
    else:
        train = recorded_clips(args.data, "train", args.judge_pairs, 2, len(action_names))
        held_out = recorded_clips(args.data, "heldout", 1000, 2, len(action_names))
    return Judge(classified(train, classes, game), classified(held_out, classes, game), names, classes, game)


def train_judge(judge: Judge, steps: int) -> InverseDynamics:
    """The inverse-dynamics network for these pairs."""
    reach = 0 if judge.still else judge.train[0].shape[-1] // 4
    return train_inverse_dynamics(judge.train, len(judge.names), steps=steps, reach=reach)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One row per number of passes, way of drafting, draft length and rollout step."""
    import dit_suite

    if args.data != "game" and not Path(args.data).is_dir():
        raise FileNotFoundError(f"there is no folder {args.data}")
    pipe = dit_suite.load_pipeline(args.model, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    steps = tuple(args.rollout_steps)
    num_frames = 1 + max(steps)
    names = tuple(pipe.config.action_names)
    if args.data == "game":
        video, actions = game_clips(args.clips, num_frames, 101)
    else:
        video, actions = recorded_clips(args.data, "heldout", args.clips, num_frames, len(names))
    judge = open_judge(args, names)
    network = train_judge(judge, args.judge_steps)
    real = video[:, :, 1:]
    floor = closeness(video[:, :, :1].expand_as(real), real, steps)
    rows = []
    ways = [("off", 1)] * (1 in args.draft_length)
    ways += [(mode, length) for mode in args.drafts for length in args.draft_length if length > 1]
    for passes, (mode, length) in itertools.product(args.num_inference_steps or [pipe.config.default_steps], ways):
        options = RolloutOptions(
            steps=steps,
            num_inference_steps=passes,
            speculation=mode,
            draft_length=length,
            batch_size=32,
        )
        predicted = roll_out(pipe, video, actions, options).cpu()
        near = slice(0, min(9, num_frames))
        walked = torch.cat([video[:, :, :1], predicted], dim=2)[:, :, near]
        generated = classified((walked, actions[:, near]), judge.classes, judge.still, video[:, :, near])
        for row, flat in zip(closeness(predicted, real, steps), floor, strict=True):
            rows.append(
                {"passes": passes, "drafts": mode, "draft_length": length, **row, "psnr_of_still": flat["psnr"]}
            )
        try:
            rows[-len(steps)] |= action_following(network, judge.held_out, generated)
        except JudgeError:
            rows[-len(steps)] |= {"judge_accuracy": accuracy(network, judge.held_out), "action_following": None}
    about = {"judge_classes": list(judge.names), "judge_pairs": [len(judge.train[2]), len(judge.held_out[2])]}
    return {"model": args.model, "data": args.data, "clips": len(video), **about, "rows": rows}

"""A world model against the real game under the same actions: closeness per rollout step, and action following.

`--data game` plays the built-in moving-square game; a folder is recorded play (`scripts/prepare_data.py freedoom`),
whose held-out episodes are used. A small inverse-dynamics network, trained here on real frames and held to 90 % on real
held-out frames, judges whether the generated frames follow the actions.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from dit_suite.evaluation.rollout import (
    RolloutOptions,
    action_following,
    closeness,
    roll_out,
    train_inverse_dynamics,
    transitions,
    visible,
)

NAME = "rollout"
Clips = tuple[torch.Tensor, torch.Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmark."""
    parser.add_argument("--model", default="moving-square-nfd", help="bundled name or folder")
    parser.add_argument("--data", default="game", help="game, or the folder of recorded play")
    parser.add_argument("--clips", type=int, default=32, help="clips compared")
    parser.add_argument("--rollout-steps", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--num-inference-steps", type=int, nargs="*", default=[], help="default: as trained")
    parser.add_argument("--judge-steps", type=int, default=600, help="training steps of the inverse dynamics")
    parser.add_argument("--judge-clips", type=int, default=600, help="real clips that train it")
    parser.add_argument("--device", default="cpu")


def game_clips(count: int, frames: int, seed: int) -> Clips:
    """Clips of the built-in game with a lively player."""
    from dit_suite.data.moving_square import MovingSquareClips, MovingSquareOptions

    data = MovingSquareClips(count, frames, MovingSquareOptions(persistence=0.7), seed=seed)
    items = [data[index] for index in range(count)]
    return torch.stack([item["video"] for item in items]), torch.stack([item["actions"] for item in items])


def recorded_clips(folder: str, split: str, count: int, frames: int, num_actions: int) -> Clips:
    """Evenly spread windows of recorded play; the action to the first frame of a window is known or null."""
    from dit_suite.data.readers import open_actions
    from dit_suite.training.config import DataSection
    from dit_suite.training.draws import Draws

    source = open_actions(DataSection(kind="actions", path=folder, split=split, frames=frames))
    rows = torch.linspace(0, len(source) - 1, min(count, len(source))).long()
    fetched = source.fetch(rows, Draws(0, 0, torch.arange(len(rows))))
    index = fetched["actions"]
    vectors = torch.nn.functional.one_hot(index.clamp(min=0), num_actions).float() * (index >= 0)[..., None]
    return fetched["samples"], vectors


def open_clips(args: argparse.Namespace, frames: int, num_actions: int) -> tuple[Clips, Clips, Clips, int | None]:
    """Real clips to compare with, to train the judge, to hold it to; and the action that changes nothing, if known."""
    if args.data == "game":
        return game_clips(args.clips, frames, 101), game_clips(args.judge_clips, 6, 102), game_clips(100, 6, 103), 0
    if not Path(args.data).is_dir():
        raise FileNotFoundError(f"there is no folder {args.data}")
    test = recorded_clips(args.data, "heldout", args.clips, frames, num_actions)
    train = recorded_clips(args.data, "train", args.judge_clips, 6, num_actions)
    return test, train, recorded_clips(args.data, "heldout", 150, 6, num_actions), None


def _judged(clips: Clips, still: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs = transitions(*clips)
    if still is None:
        return pairs
    seen = visible(*pairs, still_action=still)
    return tuple(part[seen] for part in pairs)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One row per number of passes and rollout step."""
    import dit_suite

    pipe = dit_suite.load_pipeline(args.model, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    steps = tuple(args.rollout_steps)
    length = 1 + max(steps)
    (video, actions), train, held_out, still = open_clips(args, length, pipe.transformer.config.num_actions)
    judge = train_inverse_dynamics(_judged(train, still), actions.shape[-1], steps=args.judge_steps)
    real = video[:, :, 1:]
    floor = closeness(video[:, :, :1].expand_as(real), real, steps)
    rows = []
    for passes in args.num_inference_steps or [pipe.config.default_steps]:
        options = RolloutOptions(steps=steps, num_inference_steps=passes, batch_size=32)
        predicted = roll_out(pipe, video, actions, options).cpu()
        walked = torch.cat([video[:, :, :1], predicted], dim=2)
        near = min(8, length - 1)
        first = walked[:, :, : near + 1], actions[:, : near + 1]
        known = transitions(video[:, :, : near + 1], first[1])
        keep = slice(None) if still is None else visible(*known, still_action=still)
        generated = tuple(part[keep] for part in transitions(*first))
        following = action_following(judge, _judged(held_out, still), generated)
        for row, flat in zip(closeness(predicted, real, steps), floor, strict=True):
            rows.append({"passes": passes, **row, "psnr_of_still": flat["psnr"]})
        rows[-len(steps)] |= following
    return {"model": args.model, "data": args.data, "clips": len(video), "rows": rows}

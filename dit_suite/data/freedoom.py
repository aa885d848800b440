"""freedoom: play recorded with ViZDoom on its Freedoom levels, for action-conditioned video.

The player walks by a small policy on the depth buffer: near a wall it turns towards the deeper side, else it holds a
random action for a few steps. Every episode is a function of (seed, scenario, episode number).
"""

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from dit_suite.data.cards import content_hash, count_lines
from dit_suite.data.tables import read_rows, table_metadata, write_table
from dit_suite.files import write_text
from dit_suite.options import Options, option

ACTION_NAMES = ("none", "forward", "left", "right", "forward-left", "forward-right")
# buttons: move forward, turn left, turn right
BUTTONS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1))
SCENARIOS = ("my_way_home", "health_gathering", "health_gathering_supreme", "deathmatch", "deadly_corridor")
_ODDS = (0.03, 0.52, 0.09, 0.09, 0.135, 0.135)
_NEAR = 12.0
_CENTRE = (slice(40, 80), slice(50, 110))
_FRAME_SKIP = 4
SCHEMA = pa.schema(
    [
        ("frames", pa.binary()),
        ("actions", pa.list_(pa.int8())),
        ("episode", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("scenario", pa.string()),
        ("action_names", pa.list_(pa.string())),
        ("split", pa.string()),
    ]
)
NOTICE = """This data set holds pictures of the Freedoom levels and art that come with ViZDoom.

Freedoom: Copyright (c) 2001-2024 Contributors to the Freedoom project. All rights reserved.

Redistribution and use in source and binary forms, with or without modification, are permitted provided that the
following conditions are met:

  * Redistributions of source code must retain the above copyright notice, this list of conditions and the
    following disclaimer.
  * Redistributions in binary form must reproduce the above copyright notice, this list of conditions and the
    following disclaimer in the documentation and/or other materials provided with the distribution.
  * Neither the name of the Freedoom project nor the names of its contributors may be used to endorse or
    promote products derived from this software without specific prior written permission.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES,
INCLUDING, BUT NOT LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT OWNER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL,
SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR
SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY,
WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE
USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.

ViZDoom: MIT licence.
"""


@dataclass(frozen=True)
class FreedoomOptions(Options):
    """What is recorded."""

    scenarios: tuple[str, ...] = option(
        ("my_way_home", "health_gathering_supreme"), "levels of ViZDoom to play", choices=SCENARIOS
    )
    frames: int = option(20000, "frames per scenario", minimum=2)
    episode_frames: int = option(300, "longest episode in frames", minimum=2, maximum=2000)
    width: int = option(64, "frame width", minimum=16, maximum=160)
    height: int = option(48, "frame height", minimum=12, maximum=120)
    seed: int = option(0, "seed of levels and player", minimum=0, maximum=2**20)
    heldout: float = option(0.05, "share of episodes held out", minimum=0.0, maximum=0.9)

    def validate(self) -> None:
        if not self.scenarios:
            raise ValueError(f"give at least one scenario of {', '.join(SCENARIOS)}")


class DepthPlayer:
    """The policy; `act(depth)` returns an index into `ACTION_NAMES`."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.action, self.left = rng, 1, 0

    def act(self, depth: np.ndarray) -> int:
        """Next action for a depth buffer (120, 160): larger is further away."""
        centre = depth[_CENTRE].astype(np.float32)
        blocked = centre.mean() < _NEAR
        if self.left > 0 and not (blocked and self.action not in (2, 3)):
            self.left -= 1
            return self.action
        if blocked:
            half = depth.shape[1] // 2
            self.action = 2 if depth[:, :half].mean() > depth[:, half:].mean() else 3
            self.left = int(self.rng.integers(4, 10)) - 1
        else:
            self.action = int(self.rng.choice(len(_ODDS), p=_ODDS))
            self.left = int(self.rng.integers(2, 8)) - 1
        return self.action


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Runs a block in a temporary working folder: the engine writes its settings where it is started."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _game(vizdoom: Any, scenario: str, limit: int) -> Any:
    game = vizdoom.DoomGame()
    folder = Path(vizdoom.scenarios_path)
    game.load_config(str(folder / f"{scenario}.cfg"))
    game.set_doom_game_path(str(Path(vizdoom.__file__).parent / "freedoom2.wad"))
    game.set_window_visible(False)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    game.set_labels_buffer_enabled(False)
    game.set_automap_buffer_enabled(False)
    game.set_render_hud(False)
    game.set_render_weapon(False)
    game.set_render_crosshair(False)
    game.set_available_buttons([vizdoom.Button.MOVE_FORWARD, vizdoom.Button.TURN_LEFT, vizdoom.Button.TURN_RIGHT])
    game.set_available_game_variables([])
    game.set_episode_timeout(_FRAME_SKIP * (limit + 2))
    return game


def play_episode(game: Any, seed: int, limit: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One episode: frames uint8 (T, height, width, 3) and actions int8 (T,); action t leads frame t to frame t + 1."""
    rng = np.random.default_rng(seed)
    player = DepthPlayer(rng)
    game.set_seed(seed % 2**31)
    game.new_episode()
    frames, actions = [], []
    while not game.is_episode_finished() and len(frames) < limit:
        state = game.get_state()
        picture = Image.fromarray(np.asarray(state.screen_buffer)).resize(size, Image.Resampling.BOX)
        action = player.act(np.asarray(state.depth_buffer))
        frames.append(np.asarray(picture))
        actions.append(action)
        game.make_action([bool(button) for button in BUTTONS[action]], _FRAME_SKIP)
    return np.stack(frames), np.asarray(actions, np.int8)


def still_share(frames: np.ndarray, threshold: float = 0.5) -> float:
    """Share of neighbouring frames whose mean absolute difference in grey levels is below the threshold."""
    if len(frames) < 2:
        return 0.0
    moved = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    return float((moved < threshold).mean())


def _record(options: FreedoomOptions, scenario: str, number: int) -> list[dict[str, Any]]:
    import vizdoom

    rows: list[dict[str, Any]] = []
    total, episode = 0, 0
    with _elsewhere():
        game = _game(vizdoom, scenario, options.episode_frames)
        game.set_seed(options.seed)
        game.init()
        try:
            while total < options.frames:
                seed = (options.seed * 64 + number) * 100_003 + episode
                limit = min(options.episode_frames, options.frames - total)
                frames, actions = play_episode(game, seed, limit, (options.width, options.height))
                held = np.random.default_rng([seed, 1]).random() < options.heldout
                rows.append(
                    {
                        "frames": frames.tobytes(),
                        "actions": actions.tolist(),
                        "episode": number * 1_000_000 + episode,
                        "height": options.height,
                        "width": options.width,
                        "scenario": scenario,
                        "action_names": list(ACTION_NAMES),
                        "split": "heldout" if held else "train",
                    }
                )
                total += len(frames)
                episode += 1
        finally:
            game.close()
    return rows


def build_freedoom(output: Path, options: FreedoomOptions, report: Callable[[str], None] = lambda line: None) -> Path:
    """Records `episodes.parquet`, `README.md` and `NOTICE`; a second call resumes by scenario.

    Raises:
        FileNotFoundError: vizdoom is not installed.
    """
    if importlib.util.find_spec("vizdoom") is None:
        raise FileNotFoundError("recording needs ViZDoom: run `pip install vizdoom==1.3.2`")
    rows: list[dict[str, Any]] = []
    for number, scenario in enumerate(options.scenarios):
        part = output / "parts" / f"{scenario}.parquet"
        key = json.dumps({**options.to_dict(), "scenarios": [scenario, number]}, sort_keys=True)
        if not part.is_file() or table_metadata(part).get("key") != key:
            write_table(part, _record(options, scenario, number), SCHEMA, {"key": key})
        found = read_rows(part)
        report(f"{scenario}: {sum(len(row['actions']) for row in found)} frames in {len(found)} episodes")
        rows += found
    target = output / "episodes.parquet"
    about = {"dataset": "freedoom", "options": json.dumps(options.to_dict(), sort_keys=True)}
    write_table(target, rows, SCHEMA, about)
    write_text(output / "NOTICE", NOTICE)
    write_text(output / "README.md", _card(rows, options))
    return target


def _card(rows: list[dict[str, Any]], options: FreedoomOptions) -> str:
    shape = (-1, options.height, options.width, 3)
    still = [still_share(np.frombuffer(row["frames"], np.uint8).reshape(shape)) for row in rows]
    lengths = [len(row["actions"]) for row in rows]
    kept = [np.equal(row["actions"][1:], row["actions"][:-1]).mean() for row in rows if len(row["actions"]) > 1]
    lines = [
        "# freedoom",
        "",
        f"{sum(lengths):,} frames in {len(rows):,} episodes, {options.width} x {options.height} RGB, "
        f"{35 / _FRAME_SKIP:g} frames a second.",
        f"Content hash `{content_hash(rows, ('frames', 'actions', 'split'))}`.",
        f"Still frames: {100 * np.average(still, weights=lengths):.2f} %. An action repeats with probability "
        f"{np.mean(kept) if kept else 0:.2f}.",
        "",
        "Action t leads frame t to frame t + 1. A training window never crosses an episode.",
        f"Actions: {', '.join(f'{index} {name}' for index, name in enumerate(ACTION_NAMES))}.",
    ]
    for column in ("scenario", "split"):
        lines += ["", f"| {column} | episodes |", "| --- | --- |", *count_lines(rows, column)]
    lines += ["", "Only the Freedoom levels and art that come with ViZDoom are used; see `NOTICE`.", ""]
    return "\n".join(lines)

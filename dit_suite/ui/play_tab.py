"""The Play tab: buttons and keyboard in, frames out."""

import json
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.context import Context
from PIL import Image

from dit_suite.schedulers.speculative import MODES
from dit_suite.ui.play import Player, PlayOptions, PlaySession, enlargement, keys_of_actions

_KEYS = """
() => {
  if (window.ditSuiteKeys) return;
  window.ditSuiteKeys = true;
  const word = {ArrowUp: "up", KeyW: "up", ArrowDown: "down", KeyS: "down", ArrowLeft: "left", KeyA: "left",
                ArrowRight: "right", KeyD: "right"};
  const held = new Set();
  let last = "";
  const press = () => {
    const table = document.querySelector("#play-keys [data-keys]");
    if (!table) return;
    const combinations = JSON.parse(table.dataset.keys);
    let best = -1, size = -1;
    combinations.forEach((keys, index) => {
      if (keys.length > size && keys.every(k => held.has(k))) { best = index; size = keys.length; }
    });
    if (best < 0 || String(best) === last) return;
    const button = document.querySelector(`#play-action-${best}`);
    if (button) { last = String(best); (button.querySelector("button") || button).click(); }
  };
  const active = event => {
    const tag = (event.target.tagName || "").toLowerCase();
    const stage = document.querySelector("#play-stage");
    return word[event.code] && stage && stage.offsetParent !== null && tag !== "input" && tag !== "textarea";
  };
  document.addEventListener("keydown", event => {
    if (!active(event)) return;
    event.preventDefault();
    if (!held.has(word[event.code])) { held.add(word[event.code]); press(); }
  });
  document.addEventListener("keyup", event => {
    if (!word[event.code]) return;
    held.delete(word[event.code]);
    if (active(event)) { event.preventDefault(); press(); }
  });
  window.addEventListener("blur", () => { held.clear(); press(); });
}
"""


@dataclass
class PlayContext:
    """What the tab needs from the app.

    Attributes:
        models: names of the checkpoints that can be played, the first is shown at once.
        output: folder for recordings.
        device: torch device.
        max_visitors: games that may run at once.
        lock: held while a network runs; give the app's own so that playing and generating take turns.
    """

    models: tuple[str, ...]
    output: Path
    device: str = "cpu"
    max_visitors: int = 4
    lock: Any = field(default_factory=threading.Lock)


class PlayRooms:
    """The games of all visitors, by Gradio session; models are opened once and shared."""

    def __init__(self, context: PlayContext):
        self.context = context
        self._pipes: dict[str, tuple[Any, str]] = {}
        self._players: dict[str, Player] = {}
        self._models: dict[str, str] = {}

    def pipe(self, model: str) -> tuple[Any, str]:
        """The pipeline of a checkpoint on offer and the hash of its weights.

        Raises:
            ValueError: the model is not on offer.
        """
        if model not in self.context.models:
            raise ValueError(f"model must be one of {', '.join(self.context.models)}, got {model!r}")
        if model not in self._pipes:
            from dit_suite.checkpoints import find_checkpoint, open_pipeline

            checkpoint = find_checkpoint(model)
            pipe = open_pipeline(checkpoint, device=self.context.device)
            self._pipes[model] = pipe, checkpoint.weights_sha256
        return self._pipes[model]

    def start(self, visitor: str, model: str, options: PlayOptions) -> Player:
        """A new game for this visitor; the one under way ends.

        Raises:
            ValueError: too many games are running.
        """
        self.stop(visitor)
        running = sum(not player.stopped.is_set() for player in self._players.values())
        if running >= self.context.max_visitors:
            raise ValueError(f"{running} games are running; try again when one has ended")
        player = Player(PlaySession(self.pipe(model)[0], options, self.context.lock))
        self._players[visitor], self._models[visitor] = player, model
        return player

    @property
    def players(self) -> tuple[Player, ...]:
        """The games of all visitors, ended ones included until their visitor leaves."""
        return tuple(self._players.values())

    def hold(self, visitor: str, action: int) -> None:
        """The action that counts from the next frame on."""
        if visitor in self._players:
            self._players[visitor].held = action

    def stop(self, visitor: str) -> None:
        """Ends the visitor's game; it can still be saved."""
        if visitor in self._players:
            self._players[visitor].stopped.set()

    def forget(self, visitor: str) -> None:
        """Ends the game and drops it."""
        self.stop(visitor)
        self._players.pop(visitor, None)

    def save(self, visitor: str) -> Path:
        """Writes the visitor's game as MP4.

        Raises:
            ValueError: nothing has been played.
        """
        player = self._players.get(visitor)
        if player is None or not player.session.actions:
            raise ValueError("play first, then save")
        model = self._models[visitor]
        path = self.context.output / f"play-{secrets.token_hex(6)}.mp4"
        return player.session.save(path, model, self.pipe(model)[1])


def enlarge(picture: np.ndarray) -> Image.Image:
    """A frame as shown on the page: about 256 pixels high, hard pixel edges."""
    scale = enlargement(picture.shape[0])
    return Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1))


def start_pictures(pipe: Any) -> list[tuple[Image.Image, str]]:
    """The start frames of a checkpoint with their numbers, then a grey picture: the model dreams one."""
    given = pipe.start_frames()
    frames = [] if given is None else [PlaySession.picture(frame) for frame in given]
    grey = np.random.default_rng(0).integers(96, 160, pipe.frame_size, dtype=np.uint8)
    tiles = [(enlarge(frame), str(number)) for number, frame in enumerate(frames)]
    return [*tiles, (enlarge(np.stack([grey] * 3, axis=2)), "dream")]


def start_choice(pipe: Any, index: int) -> int | None:
    """The `start_frame` that the picture at this place of `start_pictures` stands for."""
    given = pipe.start_frames()
    return index if given is not None and index < len(given) else None


@dataclass
class PlayHandlers:
    """What the controls call."""

    rooms: PlayRooms

    def play(
        self, model: str, begin: int | None, seed: float, steps: float, speed: float, speculation: str, draft: float,
        adaptive: bool, request: gr.Request,
    ) -> Iterator[tuple[Any, str]]:  # fmt: skip
        """Yields (picture, figures) for as long as the game runs."""
        try:
            options = PlayOptions(
                num_inference_steps=int(steps),
                speculation=speculation,
                draft_length=int(draft),
                adaptive_draft=bool(adaptive),
                seed=int(seed or 0),
                start_frame=begin,
                frames_per_second=int(speed),
            )
            player = self.rooms.start(request.session_hash, model, options)
        except ValueError as error:
            raise gr.Error(str(error)) from None
        yield enlarge(player.session.frames[0]), "go"
        for picture, stats in player.frames():
            yield enlarge(picture), stats.line()

    def keep(self, request: gr.Request) -> Any:
        """The visitor's game as a file to download."""
        try:
            return gr.File(str(self.rooms.save(request.session_hash)), visible=True)
        except ValueError as error:
            raise gr.Error(str(error)) from None

    def halt(self, request: gr.Request) -> None:
        """Ends the visitor's game."""
        self.rooms.stop(request.session_hash)

    def leave(self, request: gr.Request) -> None:
        """Forgets the visitor."""
        self.rooms.forget(request.session_hash)

    def switched(self, name: str) -> tuple[Any, Any, Any, Any]:
        """Start frames, the one chosen, passes and speed of another model."""
        chosen, _ = self.rooms.pipe(name)
        pictures = gr.Gallery(start_pictures(chosen), selected_index=0)
        return pictures, start_choice(chosen, 0), chosen.config.default_steps, chosen.config.fps

    def pick(self, name: str, event: gr.SelectData) -> int | None:
        """The start frame that was clicked."""
        return start_choice(self.rooms.pipe(name)[0], event.index)


def _action_buttons(rooms: PlayRooms, model: gr.Dropdown) -> None:
    """A button for every action of the chosen model, drawn anew for another one, and the keys that press them."""

    @gr.render(inputs=[model])
    def draw(name: str) -> None:
        chosen, _ = rooms.pipe(name)
        table = json.dumps(keys_of_actions(chosen.config.action_names))
        gr.HTML(f"<span data-keys='{table}'></span>", elem_id="play-keys")
        with gr.Row():
            for index, label in enumerate(chosen.config.action_names):
                button = gr.Button(label, size="sm", elem_id=f"play-action-{index}", min_width=48)

                def press(request: gr.Request, action: int = index) -> None:
                    rooms.hold(request.session_hash, action)

                button.click(press, None, None, queue=False, show_progress="hidden", api_visibility="private")


@dataclass
class Stage:
    """Where the game is seen, and its buttons."""

    screen: gr.Image
    figures: gr.Markdown
    start: gr.Button
    stop: gr.Button
    save: gr.Button
    saved: gr.File


def _stage(rooms: PlayRooms, model: gr.Dropdown) -> Stage:
    screen = gr.Image(label="Game", format="jpeg", height=320, interactive=False, buttons=[])
    figures = gr.Markdown("Press Play, then use the arrow keys, WASD or the buttons.")
    _action_buttons(rooms, model)
    with gr.Row():
        start = gr.Button("Play", variant="primary", elem_id="play-start")
        stop = gr.Button("Stop")
        save = gr.Button("Save MP4")
    saved = gr.File(label="Recording", interactive=False, visible=False)
    return Stage(screen, figures, start, stop, save, saved)


@dataclass
class Settings:
    """How the next game is played: `begin` holds the start frame that `starts` shows as chosen."""

    begin: gr.State
    starts: gr.Gallery
    speed: gr.Slider
    seed: gr.Number
    steps: gr.Slider
    speculation: gr.Radio
    draft: gr.Slider
    adaptive: gr.Checkbox


def _settings(pipe: Any) -> Settings:
    defaults = PlayOptions(frames_per_second=pipe.config.fps)
    begin = gr.State(start_choice(pipe, 0))
    starts = gr.Gallery(
        start_pictures(pipe), label="Start frame (grey: the model dreams one)", columns=3, height=430,
        object_fit="contain", format="png", allow_preview=False, selected_index=0, interactive=False,
        buttons=[], elem_id="play-starts",
    )  # fmt: skip
    speed = gr.Slider(1, 60, value=defaults.frames_per_second, step=1, label="Frames per second")
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
    with gr.Accordion("Advanced", open=False):
        steps = gr.Slider(1, 20, value=pipe.config.default_steps, step=1, label="Passes per frame")
        speculation = gr.Radio(
            list(MODES), value=defaults.speculation, label="Frames drafted ahead",
            info="run_ahead: in idle time, same frames; joint, staggered: several per pass, fewer passes",
        )  # fmt: skip
        draft = gr.Slider(1, 8, value=defaults.draft_length, step=1, label="Longest draft")
        adaptive = gr.Checkbox(defaults.adaptive_draft, label="Draft length follows the player")
    return Settings(begin, starts, speed, seed, steps, speculation, draft, adaptive)


def build_play_tab(context: PlayContext) -> PlayRooms:
    """Adds the controls to the tab that is open. The first model is opened to learn its actions.

    Raises:
        ValueError: no model is given.
    """
    if not context.models:
        raise ValueError("the Play tab needs at least one model")
    rooms = PlayRooms(context)
    handlers = PlayHandlers(rooms)
    pipe, _ = rooms.pipe(context.models[0])
    model = gr.Dropdown(list(context.models), value=context.models[0], label="Model", render=False)
    with gr.Row():
        with gr.Column(scale=2, elem_id="play-stage"):
            stage = _stage(rooms, model)
        with gr.Column(scale=1):
            model.render()
            chosen = _settings(pipe)

    private = {"api_visibility": "private"}
    controls = [
        model, chosen.begin, chosen.seed, chosen.steps, chosen.speed, chosen.speculation, chosen.draft, chosen.adaptive,
    ]  # fmt: skip
    game = stage.start.click(
        handlers.play, controls, [stage.screen, stage.figures], concurrency_id="play",
        concurrency_limit=context.max_visitors, show_progress="hidden", **private,
    )  # fmt: skip
    stage.stop.click(handlers.halt, None, None, queue=False, cancels=[game], **private)
    stage.save.click(handlers.keep, None, [stage.saved], **private)
    model.change(handlers.switched, [model], [chosen.starts, chosen.begin, chosen.steps, chosen.speed], **private)
    chosen.starts.select(handlers.pick, [model], [chosen.begin], queue=False, show_progress="hidden", **private)
    # not on the click of Play: the page runs the listeners of one event in turn, and the game's ends with the game
    Context.root_block.load(None, None, None, js=_KEYS, **private)
    Context.root_block.unload(handlers.leave)
    return rooms

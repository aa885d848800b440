"""Playing inside a model: a session per visitor, and the Play tab around it.

`PlaySession` holds one visitor's clip and has no Gradio in it. Frames follow from (model, options, seed, start frame,
actions) alone and equal those of `NFDPipeline`, so a recording can be made again from its metadata.
"""

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_suite.call_options import NFDOptions
from dit_suite.options import Options, option
from dit_suite.sampling import SamplingJob, sample_record
from dit_suite.schedulers.frame_sampler import FIXED_PASSES, FrameSampler, FrameSamplerOptions
from dit_suite.schedulers.speculative import MODES, SpeculativeOptions, SpeculativeSampler

TIMED_FRAMES = 40


@dataclass(frozen=True)
class PlayOptions(Options):
    """What a visitor may choose before a game starts."""

    num_inference_steps: int | None = option(None, "passes per frame (default: as trained)", minimum=1, maximum=50)
    speculation: str = option("run_ahead", "draft frames for the present action", choices=MODES)
    draft_length: int = option(3, "frames per draft", minimum=1, maximum=8)
    adaptive_draft: bool = option(True, "draft length follows how long actions are held")
    fixed_passes: str = option("off", "passes of one shape, see FixedPass", choices=("off", *FIXED_PASSES))
    seed: int = option(0, "seed of the dream", minimum=0, maximum=2**31 - 1)
    start_frame: int | None = option(0, "start frame of the checkpoint; none: the model dreams one", minimum=0)
    frames_per_second: int = option(8, "speed of the game", minimum=1, maximum=60)
    max_frames: int = option(3000, "frames of a game", minimum=1, maximum=100_000)


@dataclass(frozen=True)
class PlayStats:
    """Live figures of a session.

    Attributes:
        frames: frames played.
        game_fps: frames per second of the game as it runs: model, pauses, and waiting for other visitors included.
        model_fps: frames per second of the model alone, over the last frames; work in pauses counts.
        hit_rate, discard_rate: see `SpeculationStats`.
        draft_length: length of the next draft.
        num_inference_steps: passes per frame.
    """

    frames: int
    game_fps: float
    model_fps: float
    hit_rate: float
    discard_rate: float
    draft_length: int
    num_inference_steps: int

    def line(self) -> str:
        """One line of text."""
        return (
            f"frame {self.frames} | game {self.game_fps:.1f} frames/s | model {self.model_fps:.1f} frames/s | "
            f"{self.num_inference_steps} passes a frame | draft {self.draft_length} | hits {self.hit_rate:.0%} | "
            f"discarded {self.discard_rate:.0%}"
        )


class PlaySession:
    """One visitor's walk.

    Args:
        pipe: an `NFDPipeline`; sessions may share one, they share no state in it.
        options: see `PlayOptions`.
        lock: held while the network runs, so that sessions on one device take turns.
        clock: seconds, for the live figures.

    Raises:
        ValueError: the start frame does not exist.
    """

    def __init__(
        self,
        pipe: Any,
        options: PlayOptions | None = None,
        lock: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.pipe, self.options = pipe, options or PlayOptions()
        self.lock, self._clock = lock or threading.Lock(), clock
        self._clip_lock = threading.Lock()  # of its own: saving does not wait for a network
        self.num_inference_steps = self.options.num_inference_steps or pipe.config.default_steps
        speculation = SpeculativeOptions(
            speculation=self.options.speculation,
            draft_length=self.options.draft_length,
            adaptive_draft=self.options.adaptive_draft,
        )
        settings = FrameSamplerOptions(
            num_inference_steps=self.num_inference_steps,
            context_noise=pipe.config.context_noise,
            fixed_passes=self.options.fixed_passes,
        )
        self._seconds: deque[float] = deque(maxlen=TIMED_FRAMES)
        self._ends: deque[float] = deque(maxlen=TIMED_FRAMES)
        self._ahead = 0.0  # seconds of work in pauses since the last frame
        self.actions: list[int] = []
        self.frames: list[np.ndarray] = []
        with self.lock, torch.no_grad():
            self._sampler: FrameSampler = pipe.sampler([self._base_seed()], settings, speculation.num_ahead)
            self._given = self._begin()
            self._machine = SpeculativeSampler(self._sampler, speculation)
            if not self._given:
                null = (0.0,) * pipe.transformer.config.num_actions
                self.frames.append(self.picture(pipe.decode(self._machine.tick(null)[:, :, None])[0, :, 0]))

    def _base_seed(self) -> int:
        generator = torch.Generator().manual_seed(self.options.seed)
        return self.pipe.base_seeds(1, generator)[0]

    def _begin(self) -> bool:
        """Puts the chosen start frame in place; False when the model is to dream one."""
        given = self.pipe.start_frames() if self.options.start_frame is not None else None
        if given is None:
            return False
        if self.options.start_frame >= len(given):
            raise ValueError(f"start_frame must be between 0 and {len(given) - 1}, got {self.options.start_frame}")
        frame = given[self.options.start_frame]
        null = torch.zeros(1, 1, self.pipe.transformer.config.num_actions)
        self._sampler.extend(self.pipe.encode(frame[None, :, None]), null)
        self.frames.append(self.picture(frame))
        return True

    @staticmethod
    def picture(sample: torch.Tensor) -> np.ndarray:
        """A frame `(3, height, width)` in [-1, 1] as uint8 `(height, width, 3)`."""
        pixels = ((sample.float().cpu() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(1, 2, 0).numpy()

    @property
    def action_names(self) -> Sequence[str]:
        return self.pipe.config.action_names

    @property
    def finished(self) -> bool:
        """True when the longest game allowed has been played."""
        return len(self.actions) >= self.options.max_frames

    def step(self, action: int) -> np.ndarray:
        """Plays one frame; uint8 `(height, width, 3)`.

        Raises:
            ValueError: there is no such action, or the game is over.
        """
        if not 0 <= action < len(self.action_names):
            raise ValueError(f"there is no action {action}; they are 0..{len(self.action_names) - 1}")
        if self.finished:
            raise ValueError(f"the game is over after {self.options.max_frames} frames")
        vector = tuple(float(i == action) for i in range(len(self.action_names)))
        with self.lock, torch.no_grad():
            begin = self._clock()
            sample = self._machine.tick(vector)
            picture = self.picture(self.pipe.decode(sample[:, :, None])[0, :, 0])
            end = self._clock()
        with self._clip_lock:
            self._seconds.append(end - begin + self._ahead)
            self._ahead = 0.0
            self._ends.append(end)
            self.actions.append(int(action))
            self.frames.append(picture)
        return picture

    def idle(self) -> bool:
        """Runs one frame ahead in a pause (run_ahead only); True when something was done."""
        with self.lock:
            begin = self._clock()
            worked = self._machine.idle()
            if worked:
                self._ahead += self._clock() - begin
        return worked

    def stats(self) -> PlayStats:
        """Live figures."""
        total = sum(self._seconds)
        span = self._ends[-1] - self._ends[0] if self._ends else 0.0
        return PlayStats(
            frames=len(self.actions),
            game_fps=(len(self._ends) - 1) / span if span else 0.0,
            model_fps=len(self._seconds) / total if total else 0.0,
            hit_rate=self._machine.stats.hit_rate,
            discard_rate=self._machine.stats.discard_rate,
            draft_length=self._machine.draft_length(),
            num_inference_steps=self.num_inference_steps,
        )

    def snapshot(self) -> tuple[list[int], list[np.ndarray]]:
        """Actions and frames so far, a frame more than actions, also while the game goes on."""
        with self._clip_lock:
            return self.actions.copy(), self.frames.copy()

    def record(self, model: str, weights_sha256: str, actions: Sequence[int] | None = None) -> dict[str, Any]:
        """Metadata of a sampling job that makes the same frames (`scripts/sample.py --from-image`).

        Args:
            actions: those of the frames in question; default: all so far.
        """
        options = NFDOptions(
            num_inference_steps=self.num_inference_steps,
            start_frame=self.options.start_frame if self._given else None,
            speculation=self.options.speculation,
            draft_length=self.options.draft_length,
            adaptive_draft=self.options.adaptive_draft,
            fixed_passes=self.options.fixed_passes,
            fps=self.options.frames_per_second,
        )
        played = list(self.snapshot()[0] if actions is None else actions)
        job = SamplingJob("nfd", model, weights_sha256, (played,), options, self.options.seed, 1)
        return sample_record(job, 0, [0])

    def save(self, path: Path, model: str, weights_sha256: str) -> Path:
        """Writes the game so far as MP4 with its actions inside. Small frames are enlarged without smoothing."""
        from dit_suite.video import write_video

        actions, pictures = self.snapshot()
        frames = np.stack(pictures)
        scale = enlargement(frames.shape[1])
        frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = self.record(model, weights_sha256, actions)
        write_video(frames, path, fps=self.options.frames_per_second, record=record)
        return path


def enlargement(height: int, target: int = 256) -> int:
    """The whole factor that brings a picture of `height` pixels to about `target`."""
    return max(1, target // height)


def keys_of_actions(names: Sequence[str]) -> list[list[str]]:
    """The held keys that mean each action: "forward-left" needs both; "stay" and "none" need none.

    Words: up/forward, down/back, left, right; other words get no key and are reached by their button.
    """
    words = {"up": "up", "forward": "up", "down": "down", "back": "down", "left": "left", "right": "right"}
    combinations = []
    for name in names:
        parts = [
            words.get(part.strip().lower().replace("turn_", "").replace("move_", ""))
            for part in re.split(r"[+-]", name)
        ]
        combinations.append(sorted(part for part in parts if part))
    return combinations


class Player:
    """Plays a session in real time: reads the held action, makes frames at the game's speed, can be stopped."""

    def __init__(self, session: PlaySession, clock: Callable[[], float] = time.perf_counter):
        self.session, self._clock = session, clock
        self.held = 0
        self.stopped = threading.Event()

    def frames(self):
        """Yields `(picture, stats)` until stopped or the game is over; closing the iterator stops too."""
        period = 1.0 / self.session.options.frames_per_second
        due = self._clock()
        try:
            while not self.stopped.is_set() and not self.session.finished:
                picture = self.session.step(self.held)
                yield picture, self.session.stats()
                due = max(due + period, self._clock() - period)
                while self._clock() < due and not self.stopped.is_set():
                    if not self.session.idle():
                        self.stopped.wait(max(0.0, min(due - self._clock(), 0.02)))
        finally:
            self.stopped.set()

"""Speculative sampling of frames: draft several frames for the present action, drop them when the action changes.

The rule of the paper: there is no quality test, a drafted frame is accepted exactly when the action it assumed is the
action that came. Acceptance is decided before a frame is shown, so input is never delayed and a wrong frame never seen.

`joint` denoises the drafted frames together: fewer, wider passes. The first frame of a draft equals plain sampling, the
later ones were denoised beside a neighbour that was still noisy and do not; with few passes they can be much worse.
`staggered` (ours) starts every drafted frame one pass after the one before it: N - 1 passes more for N frames, and
cleaner neighbours. `run_ahead` samples one frame after another in idle time; it saves no work, hides latency, and its
output is the plain one whatever the player does.
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch

from dit_suite.options import Options, option
from dit_suite.schedulers.frame_sampler import FrameSampler

Action = tuple[float, ...]
MODES = ("off", "joint", "staggered", "run_ahead")
TOGETHER = ("joint", "staggered")  # several frames per draft


@dataclass(frozen=True)
class SpeculativeOptions(Options):
    """When and how far to draft."""

    speculation: str = option("joint", "off, joint or staggered drafts, or running ahead in idle time", choices=MODES)
    draft_length: int = option(3, "frames in a draft (the most, where it adapts)", minimum=1, maximum=16)
    adaptive_draft: bool = option(False, "choose the draft length from how long actions have been held")
    draft_cost: float = option(
        0.5, "assumed extra time of each further frame in a draft, in plain frames", minimum=0.0, maximum=1.0
    )

    @property
    def num_ahead(self) -> int:
        """Frames that may exist beyond the committed ones."""
        return 1 if self.speculation == "off" else self.draft_length


def accepted_frames(persistence: float, length: int) -> float:
    """A(p, N) = (1 - p^N) / (1 - p): frames used of a draft of N when an action is repeated with probability p."""
    return sum(persistence**i for i in range(length))


def best_draft_length(persistence: float, longest: int, cost: float) -> int:
    """The N that maximises A(p, N) / c(N) with c(N) = 1 + cost (N - 1)."""
    return max(range(1, longest + 1), key=lambda n: accepted_frames(persistence, n) / (1.0 + cost * (n - 1)))


class PersistenceMeter:
    """Running estimate of the chance that an action is repeated; recent frames count more."""

    def __init__(self, decay: float = 0.97):
        self.decay = decay
        self._same, self._total = 1.0, 2.0
        self._last: Action | None = None

    def update(self, action: Action) -> None:
        """Takes in the action of one more frame."""
        if self._last is not None:
            self._same = self.decay * self._same + float(action == self._last)
            self._total = self.decay * self._total + 1.0
        self._last = action

    @property
    def value(self) -> float:
        return self._same / self._total


@dataclass
class SpeculationStats:
    """Counts since the start.

    Attributes:
        frames: frames shown.
        hits: frames that came out of a draft made earlier.
        drafts: drafts made (every draft yields at least the frame shown at once).
        drafted: frames drafted.
        discarded: drafted frames thrown away.
    """

    frames: int = 0
    hits: int = 0
    drafts: int = 0
    drafted: int = 0
    discarded: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.frames if self.frames else 0.0

    @property
    def discard_rate(self) -> float:
        return self.discarded / self.drafted if self.drafted else 0.0


class FrameEngine(Protocol):
    """What the state machine drives."""

    num_frames: int

    def draft(self, actions: torch.Tensor) -> torch.Tensor:
        """Frames `(1, channels, count, height, width)` for actions `(1, count, num_actions)`."""
        ...

    def draft_staggered(self, actions: torch.Tensor) -> torch.Tensor:
        """The same with each frame a pass behind the one before it."""
        ...

    def append(self, frame: torch.Tensor, action: torch.Tensor) -> None:
        """Adds a frame to the clip."""
        ...

    def rollback(self, num_frames: int) -> None:
        """Takes frames back."""
        ...


class SpeculativeSampler:
    """The state machine: committed frames, a queue of drafted ones, and what happens when an action arrives.

    Args:
        engine: usually a `FrameSampler` with one clip and `draft_frames = options.num_ahead`.
        options: see `SpeculativeOptions`.
    """

    def __init__(self, engine: FrameEngine | FrameSampler, options: SpeculativeOptions):
        self.engine, self.options = engine, options
        self.stats = SpeculationStats()
        self.persistence = PersistenceMeter()
        self._queue: deque[tuple[torch.Tensor, Action]] = deque()
        self._committed = engine.num_frames
        self._action: Action | None = None

    def draft_length(self) -> int:
        """Frames that the next draft has."""
        options = self.options
        if options.speculation == "off":
            return 1
        if options.adaptive_draft:
            return best_draft_length(self.persistence.value, options.draft_length, options.draft_cost)
        return options.draft_length

    def tick(self, action: Action) -> torch.Tensor:
        """The next frame `(1, channels, height, width)`, for the action just pressed."""
        self.persistence.update(action)
        self.stats.frames += 1
        if self._queue and self._queue[0][1] == action:
            frame = self._queue.popleft()[0]
            self.stats.hits += 1
            if self.options.speculation in TOGETHER:
                self.engine.append(frame, torch.tensor([action]))
        else:
            frame = self._miss(action)
        self._committed += 1
        self._action = action
        return frame

    def idle(self) -> bool:
        """Runs one frame ahead if this is the mode and there is room; True when something was done."""
        if self.options.speculation != "run_ahead" or self._action is None:
            return False
        if len(self._queue) >= self.draft_length() - 1:
            return False
        frame = self._draft(self._action, 1)[:, :, 0]
        self.engine.append(frame, torch.tensor([self._action]))
        self._queue.append((frame, self._action))
        return True

    def _draft(self, action: Action, count: int) -> torch.Tensor:
        self.stats.drafts += 1
        self.stats.drafted += count
        draft = self.engine.draft_staggered if self.options.speculation == "staggered" else self.engine.draft
        return draft(torch.tensor([[action] * count]))

    def _miss(self, action: Action) -> torch.Tensor:
        self.stats.discarded += len(self._queue)
        self._queue.clear()
        if self.engine.num_frames > self._committed:
            self.engine.rollback(self._committed)
        count = self.draft_length() if self.options.speculation in TOGETHER else 1
        frames = self._draft(action, count).unbind(dim=2)
        self._queue.extend((frame, action) for frame in frames[1:])
        self.engine.append(frames[0], torch.tensor([action]))
        return frames[0]

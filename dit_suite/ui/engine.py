"""Runs requests on the one device: opens models, makes samples one by one, reports progress, stops within a step.

No Gradio in here. A request runs in a worker thread; the caller iterates over its events and may close the iterator at
any time, which stops the run at the next step and keeps what is finished.
"""

import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_suite.checkpoints import find_checkpoint
from dit_suite.files import write_atomically
from dit_suite.metadata import write_png
from dit_suite.options import Options
from dit_suite.sampling import SamplingJob, StartImage, open_job, sample_batch, sample_record
from dit_suite.ui.settings import Limits

PREVIEW_SECONDS = 0.4
START_IMAGES = "start_images"
HEARTBEAT_SECONDS = 0.5


@dataclass(frozen=True)
class Progress:
    """Where a run stands: finished samples, steps of the present one, and perhaps a preview of it.

    `calls` of `num_calls` network calls of the present sample are made, where the pipeline counts them within a step.
    """

    finished: int
    count: int
    step: int
    num_steps: int
    preview: Image.Image | None = None
    calls: int = 0
    num_calls: int = 0

    @property
    def fraction(self) -> tuple[int, int]:
        """What a progress bar shows: the calls of the sample if they are counted, else its steps; done and all."""
        return (self.calls, self.num_calls) if self.num_calls else (self.step, self.num_steps)

    def __str__(self) -> str:
        text = f"Sample {self.finished + 1} of {self.count}: step {self.step} of {self.num_steps}"
        return f"{text}, network call {self.calls} of {self.num_calls}" if self.num_calls else text


@dataclass(frozen=True)
class Finished:
    """One sample was written, after `evaluations` network passes."""

    index: int
    path: Path
    seconds: float
    evaluations: int = 0


@dataclass(frozen=True)
class Stopped:
    """The run ended before its last sample; `finished` samples are kept."""

    finished: int


@dataclass(frozen=True)
class Waiting:
    """Nothing new for a moment (a model is being opened, or a step is long); lets the caller close the iterator."""


class CallCounter:
    """Counts the forward passes of a network while it is entered."""

    def __init__(self, network: Any) -> None:
        self.count = 0
        self._network = network
        self._hook: Any = None

    def __enter__(self) -> "CallCounter":
        if self._network is not None:
            self._hook = self._network.register_forward_pre_hook(self._count)
        return self

    def _count(self, *_: Any) -> None:
        self.count += 1

    def __exit__(self, *_: Any) -> None:
        if self._hook is not None:
            self._hook.remove()


class StopFlag:
    """A stop request that the sampling loop sees at its next step, or earlier; a parent's request counts too."""

    def __init__(self, parent: "StopFlag | None" = None) -> None:
        self._event = threading.Event()
        self._parent = parent
        self._listeners: list[Callable[[], None]] = []

    def set(self) -> None:
        self._event.set()
        for listener in list(self._listeners):
            listener()

    @contextmanager
    def calling(self, listener: Callable[[], None]) -> Iterator[None]:
        """Within this block a stop request calls `listener` at once, in the thread that makes the request."""
        self._listeners.append(listener)
        try:
            with nullcontext() if self._parent is None else self._parent.calling(listener):
                yield
        finally:
            self._listeners.remove(listener)

    def is_set(self) -> bool:
        return self._event.is_set() or (self._parent is not None and self._parent.is_set())


def check_limits(job: SamplingJob, count: int, limits: Limits) -> None:
    """Raises `ValueError` if a request asks for more than the server allows."""
    options = job.options.to_dict()
    asked = {name: (options.get(name), most) for name, most in limits.of_options.items()}
    asked["count"] = (count, limits.max_count)
    for name, (value, most) in asked.items():
        if value is not None and value > most:
            raise ValueError(f"{name} may be at most {most} on this server, got {value}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    for condition in job.conditions:
        if isinstance(condition, str) and len(condition) > limits.max_prompt:
            raise ValueError(f"a prompt may have {limits.max_prompt} characters, got {len(condition)}")
    negative = options.get("negative_prompt") or ""
    if len(negative) > limits.max_prompt:
        raise ValueError(f"a negative prompt may have {limits.max_prompt} characters, got {len(negative)}")


def make_job(
    model: str,
    condition: Any,
    options: Options,
    seed: int,
    scheduler: str | None = None,
    accelerations: Any = None,
    start_image: StartImage | None = None,
) -> SamplingJob:
    """A job of single samples on a checkpoint by name."""
    checkpoint = find_checkpoint(model)
    return SamplingJob(
        technique=checkpoint.technique.name,
        model=model,
        weights_sha256=checkpoint.weights_sha256,
        conditions=(condition,),
        options=options,
        seed=seed,
        batch_size=1,
        scheduler=scheduler,
        accelerations=accelerations or {},
        start_image=start_image,
    )


def resolve_seed(seed: int | None) -> int:
    """-1 or None becomes a random seed; others are returned."""
    if seed is None or seed == -1:
        return secrets.randbelow(2**31)
    return int(seed)


class Engine:
    """One device and the one model that is open on it."""

    def __init__(self, output: Path, limits: Limits, device: str = "cpu") -> None:
        self.output = output
        self.limits = limits
        self.device = device
        self.lock = threading.Lock()
        self._opened: tuple[Any, Any] | None = None

    def _pipeline(self, job: SamplingJob) -> Any:
        """The job's pipeline; another one is dropped first, so that one model at most is in memory."""
        key = (job.model, job.weights_sha256, job.scheduler, job.dtype, repr(sorted(job.accelerations.items())))
        key += (job.start_image is None,)  # `open_job` refuses a model that can't do with or without one
        if self._opened is None or self._opened[0] != key:
            self._opened = None
            pipe = open_job(job, device=self.device)
            pipe.set_progress_bar_config(disable=True)
            self._opened = (key, pipe)
        return self._opened[1]

    def keep_start_image(self, upload: str | Path) -> StartImage:
        """A copy of an uploaded picture beside what is made from it, so that it can be made again."""
        found = StartImage.of_file(upload)
        kept = self.output / START_IMAGES / f"{found.sha256[:16]}{Path(upload).suffix}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, lambda temporary: shutil.copyfile(upload, temporary))
        return StartImage(str(kept), found.sha256)

    def _path(self, job: SamplingJob, index: int) -> Path:
        folder = self.output / time.strftime("%Y-%m-%d")
        folder.mkdir(parents=True, exist_ok=True)
        stamp = f"{time.strftime('%H%M%S')}-{secrets.token_hex(3)}"
        return folder / f"{stamp}-{job.technique}-{job.seed + index}.png"

    def _save(self, job: SamplingJob, index: int, sample: np.ndarray) -> Path:
        record = sample_record(job, index, [index])
        path = self._path(job, index)
        if sample.ndim == 3:
            write_png(Image.fromarray(sample), path, record)
            return path
        from dit_suite.video import write_video

        path = path.with_suffix(".mp4")
        write_video(sample, path, fps=getattr(job.options, "fps", 8), record=record)
        return path

    def run(self, job: SamplingJob, count: int, stop: StopFlag) -> Iterator[Progress | Finished | Stopped | Waiting]:
        """Makes `count` samples (indices 0 ..) one after the other, yielding events.

        Closing the iterator, or `stop.set()`, ends the run within one step.

        Raises:
            ValueError: the request exceeds the limits or the model can't do it; raised before or between events.
        """
        check_limits(job, count, self.limits)
        events: queue.Queue[Any] = queue.Queue()
        closed = StopFlag(parent=stop)
        worker = threading.Thread(target=self._work, args=(job, count, closed, events), daemon=True)
        worker.start()
        try:
            while (event := _next_event(events)) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            closed.set()

    def warm_up(self, job: SamplingJob) -> None:
        """Opens the job's model and runs one step of it, so that the next run is timed without the start."""

        def stop_at_once(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = True
            return {}

        with self.lock:
            sample_batch(self._pipeline(job), job, [0], on_step=stop_at_once)

    def _work(self, job: SamplingJob, count: int, stop: StopFlag, events: queue.Queue) -> None:
        """The worker thread: puts events, ends with None."""
        try:
            with self.lock:
                pipe = self._pipeline(job)
                for index in range(count):
                    with CallCounter(getattr(pipe, "transformer", None)) as calls:
                        started = time.perf_counter()
                        sample = self._sample(pipe, job, index, count, stop, events)
                        seconds = time.perf_counter() - started
                    if stop.is_set():
                        events.put(Stopped(index))
                        return
                    events.put(Finished(index, self._save(job, index, sample), seconds, calls.count))
        except (ValueError, FileNotFoundError, RuntimeError, OSError) as error:
            events.put(error)
        finally:
            events.put(None)

    def _sample(
        self, pipe: Any, job: SamplingJob, index: int, count: int, stop: StopFlag, events: queue.Queue
    ) -> np.ndarray:
        shown = told = time.monotonic()
        steps, calls = 0, (0, 0)

        def on_call(pipe: Any, done: int, total: int) -> None:
            nonlocal told, calls
            calls = (done, total)
            if not stop.is_set() and time.monotonic() - told > PREVIEW_SECONDS:
                told = time.monotonic()
                events.put(Progress(index, count, steps, pipe.num_timesteps, None, *calls))

        def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal shown, steps
            steps = step + 1
            if stop.is_set():
                pipe._interrupt = True
                return {}
            preview = None
            if time.monotonic() - shown > PREVIEW_SECONDS:
                shown = time.monotonic()
                preview = _preview(pipe, tensors.get("latents"))
            events.put(Progress(index, count, steps, pipe.num_timesteps, preview, *calls))
            return {}

        def interrupt() -> None:
            pipe._interrupt = True

        if stop.is_set():
            return np.empty(0)
        with stop.calling(interrupt):
            return sample_batch(pipe, job, [index], on_step=on_step, on_call=on_call)[0]


def _next_event(events: queue.Queue) -> Any:
    try:
        return events.get(timeout=HEARTBEAT_SECONDS)
    except queue.Empty:
        return Waiting()


def _preview(pipe: Any, latents: Any) -> Image.Image | None:
    """A cheap look at an unfinished sample, a clip's last frame; models with a VAE show none, decoding costs too much.

    A pipeline whose samples are partly not begun has `preview_sample`, which hides or leaves out that part.
    """
    if latents is None or getattr(pipe, "vae", None) is not None:
        return None
    if hasattr(pipe, "preview_sample"):
        latents = pipe.preview_sample(latents)
    if latents.ndim == 5:
        latents = latents[:, :, -1]
    if latents.ndim != 4 or latents.shape[1] != 3:
        return None
    pixels = (latents[0].float().cpu().clamp(-1, 1) * 127.5 + 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def single_job(job: SamplingJob, index: int) -> SamplingJob:
    """The job whose sample 0 is `job`'s sample `index`."""
    return replace(job, seed=job.seed + index, conditions=(job.condition(index),), batch_size=1)

"""Batch sampling: what a job is, how its samples are cut into batches, and how one batch is made.

Batches are cut by sample index, not by process: batch b holds the indices [b B, (b + 1) B), and process r of K makes
the batches with b mod K = r. A sample is therefore the same whatever K is, and a run that was killed goes on where it
stopped.
"""

import hashlib
import inspect
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_suite.checkpoints import Checkpoint, find_checkpoint, open_pipeline
from dit_suite.conditions import check_conditions
from dit_suite.metadata import VERSION, versions
from dit_suite.options import Options, fields_of
from dit_suite.registry import Technique, acceleration, technique


@dataclass(frozen=True)
class StartImage:
    """A picture file that the first frame of a clip shows; the hash is that of the file."""

    path: str
    sha256: str

    @classmethod
    def of_file(cls, path: str | Path) -> "StartImage":
        """Takes the file as it is now.

        Raises:
            ValueError: it can't be read as a picture.
        """
        found = cls(str(path), hashlib.sha256(_read_bytes(path)).hexdigest())
        found.open()
        return found

    def open(self) -> Image.Image:
        """The picture in RGB.

        Raises:
            ValueError: the file is gone, is no picture, or is another one than it was.
        """
        content = _read_bytes(self.path)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(f"the start image {self.path} is not the file it was (sha256 {self.sha256[:16]})")
        try:
            return Image.open(io.BytesIO(content)).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"the start image {self.path} can't be read as a picture: {error}") from None


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"the start image {path} can't be read: {error.strerror}") from None


@dataclass(frozen=True)
class SamplingJob:
    """Everything that decides the pixels of a run.

    Attributes:
        technique: the registry's row.
        model: the checkpoint as the user named it (bundled name, folder, or owner/name@revision).
        weights_sha256: hash of its weights.
        conditions: prompts, class labels or action lists; sample i gets `conditions[i % len(conditions)]`.
        options: call options.
        seed: sample i draws everything from `manual_seed(seed + i)`.
        batch_size: pictures per network call.
        scheduler: a name of `dit_suite.schedulers.diffusers_schedulers.SCHEDULERS`, or None for the checkpoint's own.
        dtype: "float32", "bfloat16" or "float16".
        accelerations: plug-ins by name with their options.
        start_image: the first frame of every clip, for models that take one.
    """

    technique: str
    model: str
    weights_sha256: str
    conditions: tuple[Any, ...]
    options: Options
    seed: int = 0
    batch_size: int = 4
    scheduler: str | None = None
    dtype: str = "float32"
    accelerations: dict[str, Options] = field(default_factory=dict)
    start_image: StartImage | None = None

    def __post_init__(self) -> None:
        if not self.conditions:
            raise ValueError("give at least one prompt, label or action list")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed must be between 0 and 2**62, got {self.seed}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")

    @property
    def row(self) -> Technique:
        return technique(self.technique)

    def condition(self, index: int) -> Any:
        """The condition of sample `index`."""
        return self.conditions[index % len(self.conditions)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; two runs with equal dictionaries make the same samples."""
        facts = {
            "technique": self.technique,
            "model": self.model,
            "weights_sha256": self.weights_sha256,
            "conditions": list(self.conditions),
            "options": self.options.to_dict(),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "scheduler": self.scheduler,
            "dtype": self.dtype,
            "accelerations": {name: config.to_dict() for name, config in self.accelerations.items()},
        }
        return facts if self.start_image is None else facts | {"start_image": asdict(self.start_image)}


def parse_settings(cls: type[Options], text: str) -> Options:
    """Options from `key=value,key=value`; values of a tuple are separated by `;`.

    Raises:
        ValueError: an unknown key, or a value that does not fit.
    """
    specs = {spec.name: spec for spec in fields_of(cls)}
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        name = key.replace("-", "_")
        if not equals or name not in specs:
            raise ValueError(f"{item!r} is not a setting of {cls.__name__}; it takes {', '.join(specs)} as key=value")
        values[name] = specs[name].parse(value)
    return cls(**values)


def parse_acceleration(text: str) -> tuple[str, Options]:
    """`NAME` or `NAME:key=value,key=value` as (name, its checked options).

    Raises:
        ValueError: unknown plug-in, unknown key, or a value that does not fit.
    """
    name, _, settings = text.partition(":")
    return name.strip(), parse_settings(acceleration(name.strip()).config_class(), settings)


def batches(num_samples: int, batch_size: int) -> list[range]:
    """Sample indices of each batch."""
    return [range(start, min(start + batch_size, num_samples)) for start in range(0, num_samples, batch_size)]


def sample_record(job: SamplingJob, index: int, indices: Sequence[int]) -> dict[str, Any]:
    """The metadata of sample `index`, made in a batch with the consecutive `indices`.

    The batch is part of it: the rounding of a matrix product depends on its shape, and the same pixels are promised.
    """
    shared = job.to_dict()
    del shared["conditions"]
    conditions = [job.condition(i) for i in indices]
    batch = {"indices": list(indices), "conditions": conditions}
    return {
        "version": VERSION,
        **shared,
        "index": index,
        "condition": job.condition(index),
        "batch": batch if len(set(map(repr, conditions))) > 1 else {"indices": list(indices)},
        "software": versions(),
    }


def job_of_record(record: dict[str, Any], model: str | None = None) -> tuple[SamplingJob, list[int]]:
    """The job that made the sample with this metadata, and the indices of the batch it was made in.

    Args:
        record: what `dit_suite.metadata.read_record` returned.
        model: where the checkpoint lies now, if it moved.

    Raises:
        ValueError: unknown technique, plug-in or option.
    """
    row = technique(record["technique"])
    batch = record.get("batch", {})
    indices = list(batch.get("indices", [record["index"]]))
    count = len(indices)
    conditions = [record["condition"]] * count
    for index, condition in zip(indices, batch.get("conditions", conditions), strict=True):
        conditions[index % count] = condition
    job = SamplingJob(
        technique=row.name,
        model=model or record["model"],
        weights_sha256=record["weights_sha256"],
        conditions=tuple(conditions),
        options=row.options_class().from_dict(record["options"]),
        seed=record["seed"],
        batch_size=record.get("batch_size", count),
        scheduler=record.get("scheduler"),
        dtype=record.get("dtype", "float32"),
        accelerations={
            name: acceleration(name).config_class().from_dict(values)
            for name, values in record.get("accelerations", {}).items()
        },
        start_image=StartImage(**record["start_image"]) if "start_image" in record else None,
    )
    return job, indices


def open_job(job: SamplingJob, device: Any = None, checkpoint: Checkpoint | None = None) -> Any:
    """The job's pipeline, with its scheduler and plug-ins in place.

    Raises:
        ValueError: the checkpoint is not the one the job was made with, or it does not know a class or an action, both
            told before the network is opened; or scheduler, plug-ins or start image do not fit it.
    """
    import torch

    checkpoint = checkpoint or find_checkpoint(job.model)
    if checkpoint.weights_sha256 != job.weights_sha256:
        raise ValueError(
            f"{job.model} has weights {checkpoint.weights_sha256[:16]}, the job was made with {job.weights_sha256[:16]}"
        )
    check_conditions(job.options.condition, job.conditions, checkpoint.folder)
    pipe = open_pipeline(checkpoint, dtype=getattr(torch, job.dtype), device=device)
    if (job.start_image is not None) != getattr(pipe, "takes_start_image", False):
        raise ValueError(f"{job.model} {'takes no' if job.start_image else 'needs a'} start image")
    if job.scheduler is not None:
        from dit_suite.schedulers.diffusers_schedulers import build_scheduler

        if not type(pipe.scheduler).__module__.startswith("diffusers."):
            own = type(pipe.scheduler).__name__
            raise ValueError(f"{job.model} samples with a scheduler of its kind only ({own}): leave the scheduler out")
        predicts = pipe.config.get("prediction_type", "epsilon")
        pipe.scheduler = build_scheduler(job.scheduler, pipe.scheduler, predicts)
    for name, config in job.accelerations.items():
        acceleration(name).apply_to(pipe, config)
    return pipe


def sample_batch(
    pipe: Any,
    job: SamplingJob,
    indices: Sequence[int],
    on_step: Callable | None = None,
    on_call: Callable | None = None,
) -> np.ndarray:
    """Makes the samples `indices` in one batch.

    Args:
        pipe: what `open_job` returned.
        indices: sample indices.
        on_step: a `callback_on_step_end`.
        on_call: a `callback_on_network_call`, for pipelines whose steps are long enough to have one.

    Returns:
        uint8, `(n, H, W, 3)` for pictures or `(n, T, H, W, 3)` for clips.
    """
    from dit_suite.schedulers.generators import sample_generators

    given: dict[str, Any] = {job.options.condition: [job.condition(i) for i in indices]}
    if job.start_image is not None:
        given["image"] = job.start_image.open()
    if on_call is not None and "callback_on_network_call" in inspect.signature(pipe.__call__).parameters:
        given["callback_on_network_call"] = on_call
    output = pipe(
        **given,
        **job.options.to_kwargs(),
        generator=sample_generators(job.seed, indices),
        output_type="np",
        return_dict=False,
        callback_on_step_end=on_step,
    )
    return to_uint8(output[0])


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[0, 1] to 0..255, rounding to nearest (the rule of diffusers' PIL export)."""
    return (np.asarray(images) * 255).round().clip(0, 255).astype(np.uint8)

"""What the pipelines share: the properties that callbacks read, common checks, initial noise, and class labels."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from dit_suite.schedulers.generators import randn_per_sample

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Generators = torch.Generator | list[torch.Generator] | None


class SamplingMixin:
    """For a `DiffusionPipeline` that sets `_guidance_scale`, `_num_timesteps` and `_interrupt` in its call."""

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Calls of `callback_on_step_end` in the present run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @staticmethod
    def callback_tensor_names(callback: Any, names: Sequence[str] | None) -> list[str]:
        """The tensors that a callback asks for: a `PipelineCallback` names them itself."""
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        return list(names or ["latents"])

    def check_sampling(
        self,
        shape: tuple[int, ...],
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str,
        callback_tensor_inputs: Sequence[str],
        output_types: Sequence[str] = OUTPUT_TYPES,
    ) -> None:
        """The checks that every pipeline makes, for noise of `shape` (samples first).

        Raises:
            ValueError: generators or latents do not fit the shape, or an output type or callback tensor is unknown.
        """
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators were given for {shape[0]} samples")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        if output_type not in output_types:
            raise ValueError(f"output_type must be one of {', '.join(output_types)}, got {output_type!r}")
        unknown = [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callbacks can have {', '.join(self._callback_tensor_inputs)}, not {unknown[0]}")


def check_positive(**values: int) -> None:
    """Raises `ValueError` for the first value below 1, by its name."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def initial_noise(shape: tuple[int, ...], device: torch.device, generator: Generators) -> torch.Tensor:
    """Standard normal float32 noise on `device`; with a list of generators, row i comes from generator i alone."""
    if isinstance(generator, list):
        return randn_per_sample(shape[1:], generator, device)
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source, dtype=torch.float32).to(device)


class ClassLabelsMixin:
    """Class labels by id or by name, from the pipeline's config entry `id2label` ({id: "name, other name"})."""

    @property
    def labels(self) -> dict[str, tuple[int, ...]]:
        """Class ids by name (lower case); in ImageNet a few names belong to two classes."""
        found: dict[str, tuple[int, ...]] = {}
        for key, names in (self.config.id2label or {}).items():
            for name in names.split(","):
                name = name.strip().lower()
                found[name] = (*found.get(name, ()), int(key))
        return found

    def get_label_ids(self, labels: Any) -> list[int]:
        """Class ids of names or ids; None is the null class where the network has one.

        Raises:
            ValueError: a name is unknown or belongs to several classes, an id is out of range, or nothing was given.
        """
        given = labels if isinstance(labels, (list, tuple)) else [labels]
        if not given:
            raise ValueError("class_labels must name at least one class")
        return [self._label_id(label) for label in given]

    def _label_id(self, label: int | str | None) -> int:
        if label is None:
            if self.null_class is None:
                raise ValueError("class_labels must be ids or names, got None (this network has no null class)")
            return self.null_class
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise ValueError(f"class_labels must be ids or names, got {label!r}")
        if not self.num_classes:
            raise ValueError(f"this network is unconditional: class_labels must be None, got {label!r}")
        if isinstance(label, str) and not label.strip().isdecimal():
            return self._named_label(label)
        value = int(label)
        if not (0 <= value < self.num_classes or value == self.null_class):
            raise ValueError(f"class_labels must lie between 0 and {self.num_classes - 1}, got {value}")
        return value

    def _named_label(self, label: str) -> int:
        names = self.labels
        ids = names.get(label.strip().lower(), ())
        if len(ids) > 1:
            raise ValueError(f"{label!r} is the name of the classes {', '.join(map(str, ids))}: give the id")
        if not ids:
            close = difflib.get_close_matches(label.strip().lower(), names, n=3)
            hint = f"; close names: {', '.join(close)}" if close else "" if names else "; this model has no names"
            raise ValueError(f"there is no class {label!r}{hint}")
        return ids[0]

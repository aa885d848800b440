"""What a network is told, chosen by the task: nothing, class labels, text states, or actions.

A conditioner turns what the data set knows into keyword arguments of the network, with conditions dropped for guidance
outside the network, so that the drops are functions of (seed, step, sample). Which arguments it passes follows from the
signature of the network's `forward`, never from its name.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional

from dit_suite.data.captions import FILE_NAME, CaptionStates
from dit_suite.data.draws import Draws, Stream
from dit_suite.data.readers import Source
from dit_suite.training.config import TrainConfig


class Conditioner(Protocol):
    """One task's way of telling."""

    def to(self, device: torch.device) -> None:
        """Moves tables to the device that trains."""
        ...

    def arguments(self, fetched: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """Keyword arguments of the network's forward for one batch."""
        ...

    def preview(self, count: int) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call for a grid of `count` samples."""
        ...


def accepted_arguments(model: torch.nn.Module) -> frozenset[str]:
    """Names that the network's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def dropped(draws: Draws, share: float) -> torch.Tensor:
    """bool (batch,): whose condition is dropped."""
    return draws.uniform(Stream.DROPOUT) < share


class NoCondition:
    """Unconditional training."""

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    def arguments(self, fetched: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        return {}

    def preview(self, count: int) -> dict[str, Any]:
        return {}


class ClassCondition:
    """Class labels; a dropped one becomes the null class.

    A network that also drops labels by itself in training mode is told by `force_drop_ids` to leave them alone.
    """

    def __init__(self, accepted: frozenset[str], num_classes: int, null_label: int | None, share: float) -> None:
        if num_classes < 1:
            raise ValueError("the data set has no class labels, which task class-to-image needs")
        self.accepted, self.num_classes, self.share = accepted, num_classes, share
        self.null_label = num_classes if null_label is None else null_label

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    def arguments(self, fetched: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        labels = fetched["class_labels"]
        drop = dropped(draws, self.share)
        found = {"class_labels": torch.where(drop, self.null_label, labels)}
        if "force_drop_ids" in self.accepted:
            found["force_drop_ids"] = drop.long()
        return found

    def preview(self, count: int) -> dict[str, Any]:
        return {"class_labels": [(index * self.num_classes) // count % self.num_classes for index in range(count)]}


class TextCondition:
    """Cached caption states; a dropped caption becomes the empty one.

    With `encoder_attention_mask` in the signature the network gets the mask; without it the padding rows are zero.
    """

    def __init__(self, accepted: frozenset[str], states: CaptionStates, share: float, prompts: Sequence[str]) -> None:
        absent = states.missing(["", *prompts])
        if absent:
            raise ValueError(f"preview prompt {absent[0]!r} has no cached states; choose captions of the data set")
        self.accepted, self.states, self.share, self.prompts = accepted, states, share, tuple(prompts)

    def to(self, device: torch.device) -> None:
        self.states.to(device)

    def arguments(self, fetched: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        drop = dropped(draws, self.share).tolist()
        captions = ["" if gone else text for gone, text in zip(drop, fetched["captions"], strict=True)]
        states, mask = self.states.lookup(captions)
        found = {"encoder_hidden_states": states}
        if "encoder_attention_mask" in self.accepted:
            found["encoder_attention_mask"] = mask
        if "added_cond_kwargs" in self.accepted:
            found["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        return found

    def preview(self, count: int) -> dict[str, Any]:
        prompts = [self.prompts[index % len(self.prompts)] for index in range(count)]
        states, mask = self.states.lookup(prompts)
        null_states, null_mask = self.states.lookup([""] * count)
        return {
            "prompt_embeds": states,
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": null_states,
            "negative_prompt_attention_mask": null_mask,
        }


class ActionCondition:
    """One-hot actions (batch, frames, actions), the action that leads to each frame; "none" is all zeros."""

    def __init__(self, num_actions: int, share: float) -> None:
        self.num_actions, self.share = num_actions, share

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    def arguments(self, fetched: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        actions = fetched["actions"]
        vectors = functional.one_hot(actions.clamp(min=0), self.num_actions) * (actions >= 0)[..., None]
        drop = dropped(draws, self.share)[:, None, None]
        return {"actions": torch.where(drop, 0, vectors).float()}

    def preview(self, count: int) -> dict[str, Any]:
        raise ValueError("sample grids of an action model need recorded first frames: set run.preview_every=0")


def _check_names(trained: Mapping[str, str], given: Mapping[int, str]) -> None:
    """A checkpoint with named classes goes on with data that call them the same.

    Raises:
        ValueError: the data have a class that the checkpoint lacks or calls otherwise.
    """
    for index, name in given.items():
        known = trained.get(str(index))
        if trained and known != name:
            raise ValueError(
                f"class {index} of the data set is {name!r}, but {known!r} in the checkpoint: order the data's classes "
                "as there, or give pipeline.id2label=null to train its classes anew"
            )


def _class_condition(config: TrainConfig, source: Source, model: torch.nn.Module) -> Conditioner:
    own = getattr(getattr(model, "config", None), "num_classes", None)
    if config.condition.null_label is None and source.num_classes and own not in (None, source.num_classes):
        raise ValueError(
            f"the network has {own} classes, but the data set has {source.num_classes}: "
            f"set model.options.num_classes={source.num_classes}, or null to take the number from the data"
        )
    if config.init_from:
        _check_names(config.pipeline.get("id2label") or {}, source.class_names)
    accepted = accepted_arguments(model)
    return ClassCondition(accepted, source.num_classes, config.condition.null_label, config.condition.dropout)


def _text_condition(config: TrainConfig, source: Source, model: torch.nn.Module) -> Conditioner:
    if not source.captions:
        raise ValueError(f"the data set {config.data.path!r} has no captions, which task {config.task} needs")
    path = Path(config.condition.states or Path(config.data.path) / FILE_NAME)
    states = CaptionStates(path, config.condition.max_length)
    used = {text for row in source.captions for text, odds in zip(row, config.data.captions, strict=False) if odds > 0}
    absent = states.missing(sorted(used))
    if absent:
        raise ValueError(f"{path} lacks {len(absent)} captions of the data set, such as {absent[0]!r}: make it again")
    spread = [row[-1 if len(row) == 1 else 1] for row in source.captions[:: max(1, len(source) // 16)]]
    return TextCondition(
        accepted_arguments(model), states, config.condition.dropout, config.run.preview_prompts or spread
    )


def _action_condition(config: TrainConfig, source: Source, model: torch.nn.Module) -> Conditioner:
    return ActionCondition(source.num_classes, config.condition.dropout)


def _no_condition(config: TrainConfig, source: Source, model: torch.nn.Module) -> Conditioner:
    return NoCondition()


_BY_TASK: Mapping[str, Callable[[TrainConfig, Source, torch.nn.Module], Conditioner]] = {
    "unconditional": _no_condition,
    "class-to-image": _class_condition,
    "class-to-video": _class_condition,
    "text-to-image": _text_condition,
    "text-to-video": _text_condition,
    "action-to-video": _action_condition,
}


def make_conditioner(config: TrainConfig, source: Source, model: torch.nn.Module) -> Conditioner:
    """The conditioner of the config's task.

    Raises:
        FileNotFoundError, ValueError: the data set lacks what the task needs, or the task has no sample grids and the
            config asks for them.
    """
    conditioner = _BY_TASK[config.task](config, source, model)
    if config.run.preview_every:
        conditioner.preview(config.run.preview_count)
    return conditioner

"""Captions of a picture set, and their text-encoder states cached in one small file.

A state file holds only the tokens of each caption, not the padding, so that it travels: `tokens` (all tokens, width),
`offsets` (captions + 1,) and, for int8, one scale per feature. The captions themselves are in the metadata.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dit_suite.data.packages import STYLES
from dit_suite.files import write_atomically

FILE_NAME = "captions.safetensors"
_TAGS = 3


def captions_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The three captions of a picture: label; label and style; label and up to three tags.

    A row without style or tags (a user's own pictures) repeats its label.
    """
    label = row["label"]
    known = {style.name: style.caption for style in STYLES}
    name = row.get("style") or ""
    styled = f"{label}, {known.get(name, name)} style" if name else label
    words = [tag for tag in row.get("tags") or () if tag not in label.split()][:_TAGS]
    return label, styled, ", ".join([label, *words])


def all_captions(rows: Iterable[Mapping[str, Any]], tags: bool = False) -> list[str]:
    """Every caption of the rows once, sorted, the empty one (for guidance) first; those with tags when asked for."""
    kinds = 3 if tags else 2
    return ["", *sorted({caption for row in rows for caption in captions_of(row)[:kinds]} - {""})]


@torch.no_grad()
def encode_captions(
    captions: Sequence[str], encoder: Mapping[str, Any], max_length: int = 24, batch_size: int = 256
) -> list[torch.Tensor]:
    """Token states of every caption, each float32 (its tokens, width); longer captions are cut at `max_length`.

    Captions of like length are encoded together: attention never looks at padding, so its amount does not matter.
    """
    tokenizer, model = encoder["tokenizer"], encoder["text_encoder"].eval()
    states: list[torch.Tensor] = [torch.empty(0)] * len(captions)
    order = sorted(range(len(captions)), key=lambda index: len(captions[index]))
    for start in range(0, len(captions), batch_size):
        members = order[start : start + batch_size]
        texts = [captions[index] for index in members]
        inputs = tokenizer(texts, padding="longest", max_length=max_length, truncation=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        hidden = model(**inputs)[0].float().cpu()
        for index, row, length in zip(members, hidden, inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
            states[index] = row[:length].clone()
    return states


def save_states(path: Path, captions: Sequence[str], states: Sequence[torch.Tensor], storage: str = "int8") -> None:
    """Writes a state file; `storage` is "int8" (a scale per feature, half the size) or "float16"."""
    if storage not in ("int8", "float16"):
        raise ValueError(f"storage must be int8 or float16, got {storage!r}")
    tokens = torch.cat(list(states))
    offsets = torch.tensor([0] + [len(row) for row in states]).cumsum(0)
    tensors = {"offsets": offsets.to(torch.int32)}
    if storage == "int8":
        scale = tokens.abs().amax(dim=0).clamp(min=1e-8) / 127.0
        tensors["tokens"] = (tokens / scale).round().to(torch.int8)
        tensors["scale"] = scale
    else:
        tensors["tokens"] = tokens.half()
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"captions": json.dumps(list(captions), ensure_ascii=False)}
    write_atomically(path, lambda part: save_file(tensors, part, about))
    path.chmod(0o644)


class CaptionStates:
    """Cached states by caption.

    Args:
        path: a file that `save_states` wrote.
        max_length: rows of a padded caption.

    Raises:
        FileNotFoundError: no such file (the sentence says how to make it).
        ValueError: not a state file.
    """

    def __init__(self, path: Path, max_length: int = 24) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"there are no caption states at {path}; make them with "
                f"`python scripts/prepare_data.py captions --data {path.parent}`"
            )
        try:
            with safe_open(path, "pt") as file:
                captions = json.loads((file.metadata() or {})["captions"])
                tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a caption state file: {error}") from None
        self.index = {caption: row for row, caption in enumerate(captions)}
        self.offsets = tensors["offsets"].long()
        self.tokens = tensors["tokens"]
        self.scale = tensors.get("scale", torch.ones(()))
        self.max_length = max_length

    @property
    def width(self) -> int:
        """Features per token."""
        return self.tokens.shape[1]

    def to(self, device: torch.device | str) -> "CaptionStates":
        """Moves the tensors; returns self."""
        self.tokens, self.scale = self.tokens.to(device), self.scale.to(device)
        self.offsets = self.offsets.to(device)
        return self

    def missing(self, captions: Iterable[str]) -> list[str]:
        """The captions that are not in the file."""
        return [caption for caption in captions if caption not in self.index]

    def lookup(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States float32 (batch, max_length, width), zero after each caption's end, and mask int64 (batch, max_length).

        Raises:
            ValueError: a caption is not in the file.
        """
        absent = self.missing(captions)
        if absent:
            raise ValueError(f"caption {absent[0]!r} has no cached states; make the states again")
        rows = torch.tensor([self.index[caption] for caption in captions], device=self.offsets.device)
        first, last = self.offsets[rows], self.offsets[rows + 1]
        place = torch.arange(self.max_length, device=first.device)
        mask = place[None] < (last - first)[:, None]
        states = self.tokens[(first[:, None] + place[None]).clamp(max=len(self.tokens) - 1)].float() * self.scale
        return states * mask[..., None], mask.long()

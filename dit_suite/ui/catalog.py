"""Which checkpoints the app offers, and what it can tell of them without opening the network."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_suite.checkpoints import bundled_index, find_checkpoint
from dit_suite.options import Options
from dit_suite.registry import TECHNIQUES, Technique


@dataclass(frozen=True)
class Offer:
    """One checkpoint on offer.

    Attributes:
        name: what `find_checkpoint` takes.
        technique: the registry's row.
        labels: class names, for class-conditional models.
        takes_start_image: whether clips start with a given picture.
        profile_steps: step counts that the checkpoint has a BAC profile for, rising.
        takes_scheduler: whether another scheduler of diffusers may be chosen.
        recommended: the call options that the checkpoint recommends; None for those of its technique.
    """

    name: str
    technique: Technique
    labels: tuple[str, ...]
    takes_start_image: bool = False
    profile_steps: tuple[int, ...] = ()
    takes_scheduler: bool = True
    recommended: Options | None = None

    @property
    def title(self) -> str:
        """The name, and what the technique is."""
        return f"{self.name}: {self.technique.title}"

    @property
    def defaults(self) -> Options:
        """Call options as long as nobody chose others."""
        return self.recommended or self.technique.options_class()()

    @property
    def accelerations(self) -> tuple[str, ...]:
        """Plug-ins that work on this checkpoint as it is: BAC needs a profile."""
        return tuple(name for name in self.technique.accelerations if name != "bac" or self.profile_steps)


def choices(offers: Iterable[Offer]) -> list[tuple[str, str]]:
    """What a dropdown of models shows, and the name that stands behind it."""
    return [(offer.title, offer.name) for offer in offers]


def _labels(model_index: dict[str, Any]) -> tuple[str, ...]:
    table = model_index.get("id2label") or {}
    return tuple(table[key] for key in sorted(table, key=int))


def _profile_steps(folder: Path) -> tuple[int, ...]:
    names = [path.stem.removeprefix("profile-") for path in (folder / "bac").glob("profile-*.safetensors")]
    return tuple(sorted(int(name) for name in names if name.isdigit()))


def _takes_start_image(folder: Path, technique: Technique) -> bool:
    """Told from the network's config: a video network that reads more channels than it predicts."""
    path = folder / "transformer" / "config.json"
    if technique.task != "text-to-video" or not path.is_file():
        return False
    config = json.loads(path.read_text("utf-8"))
    return config["in_channels"] > (config.get("out_channels") or config["in_channels"])


def offers(extra: tuple[str, ...] = ()) -> list[Offer]:
    """Bundled checkpoints that are present, the registry's first, then the extra ones.

    Raises:
        ValueError, FileNotFoundError: an extra checkpoint can't be opened.
    """
    found = []
    first = [row.bundled for row in TECHNIQUES if row.bundled in bundled_index()]
    others = [name for name in bundled_index() if name not in first]
    for name in (*first, *others, *extra):
        try:
            checkpoint = find_checkpoint(name)
        except FileNotFoundError:
            if name in extra:
                raise
            continue
        model_index = json.loads((checkpoint.folder / "model_index.json").read_text("utf-8"))
        starts = _takes_start_image(checkpoint.folder, checkpoint.technique)
        steps = _profile_steps(checkpoint.folder)
        scheduler = model_index.get("scheduler", ["diffusers"])[0] == "diffusers"
        labels = _labels(model_index)
        found.append(Offer(name, checkpoint.technique, labels, starts, steps, scheduler, checkpoint.defaults))
    return found

"""Pictures for held-out captions, and their distances to the held-out pictures: shared by benchmarks of one bundle.

Everything goes on where it was stopped: pictures are made batch by batch, features are kept beside them.
"""

import contextlib
import itertools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from dit_suite.checkpoints import Checkpoint
from dit_suite.data.labels import FILE_NAME as LABEL_FILE
from dit_suite.data.labels import LabelTable
from dit_suite.evaluation.datasets import SEPARATOR, conditions_of
from dit_suite.evaluation.extraction import extract
from dit_suite.evaluation.extractors import load_extractor
from dit_suite.evaluation.feature_extractor import FeatureExtractor
from dit_suite.evaluation.metric_names import parse_metrics
from dit_suite.evaluation.options import EvaluationOptions
from dit_suite.evaluation.runner import Evaluation, Inputs
from dit_suite.evaluation.sources import FolderSource, ParquetSource
from dit_suite.evaluation.statistics import FeatureSet, load_feature_set, save_feature_set
from dit_suite.files import write_json
from dit_suite.metadata import write_png
from dit_suite.sampling import SamplingJob, batches, sample_batch

STYLES = ("fluent-3d", "fluent-color", "fluent-flat", "noto", "noto-blob")
FEATURES = "features.npz"
Scope = Callable[[], AbstractContextManager[Any]]


def pipeline_inside(inside: Any, pipe: Any) -> Any:
    """The pipeline to sample with: what a scope gave if that is one (a cache that needs its own), else `pipe`."""
    return inside if hasattr(inside, "transformer") else pipe


@dataclass
class HeldOut:
    """The held-out part of a picture set that `prepare_data.py` wrote, as captions and as a reference.

    Attributes:
        data: folder of the set.
        output: folder of the benchmark; holds the reference's features.
        count: captions, and so pictures, of every comparison.
        styles: of the pictures; those that the model was trained on.
        features: name of the feature network.
        groups: only pictures of these groups; none named means all.
        size: side in pixels that the model was trained at; 0 keeps the pictures as they are.
        kind: what the model is told, "prompt" or "class_labels".
    """

    data: Path
    output: Path
    count: int
    styles: tuple[str, ...] = STYLES
    features: str = "enet-lite0"
    groups: tuple[str, ...] = ()
    size: int = 0
    kind: str = "prompt"
    options: EvaluationOptions = field(default_factory=EvaluationOptions)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, data: Path, output: Path, count: int, features: str) -> "HeldOut":
        """The held-out pictures of what a checkpoint was trained on: a class-conditional one's own classes
        (`labels.json`) at its size, else the default styles."""
        kind = checkpoint.technique.options_class().condition
        if kind != "class_labels" or not (checkpoint.folder / LABEL_FILE).is_file():
            return cls(data, output, count, features=features, kind=kind)
        table = LabelTable.load(checkpoint.folder)
        config = json.loads((checkpoint.folder / "transformer" / "config.json").read_text("utf-8"))
        size = int(config["sample_size"])
        return cls(data, output, count, table.styles, features, table.groups, size, kind)

    def rows(self, splits: str) -> str:
        """The choice of rows in the words of `evaluate.py`."""
        groups = f",group={'+'.join(self.groups)}" if self.groups else ""
        return f"{self.data / 'images'}{SEPARATOR}{splits},style={'+'.join(self.styles)}{groups}"

    def captions(self, splits: str = "heldout+pairs", count: int | None = None) -> tuple[str, ...]:
        """A fair draw of captions, or as many class names as asked for in the pictures' proportions.

        Raises:
            FileNotFoundError, ValueError: no such data set, or it has fewer rows.
        """
        count, found = count or self.count, conditions_of(self.rows(splits), self.kind)
        if self.kind == "class_labels":
            return tuple(itertools.islice(itertools.cycle(found), count))
        if len(found) < count:
            raise ValueError(f"{self.data} has {len(found)} captions in {splits}, asked for {count}")
        return found[:count]

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """The feature network."""
        return load_extractor(self.features)

    @cached_property
    def reference(self) -> FeatureSet:
        """Features of the held-out pictures."""
        size = f",size={self.size}" if self.size else ""
        return self._features(self.output / "reference.npz", lambda: ParquetSource(self.rows("heldout+pairs") + size))

    def _features(self, path: Path, source: Callable[[], Any]) -> FeatureSet:
        if not path.is_file():
            found = extract(source(), self.extractor, batch_size=self.options.feature_batch_size, progress=path.stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_feature_set(path, found.feature_set, compact=True)
        return load_feature_set(path)

    def make(
        self, folder: Path, job: SamplingJob, pipe: Any, scope: Scope = contextlib.nullcontext, note: str = ""
    ) -> None:
        """Makes what is missing of the pictures in `folder`, each batch inside a fresh `scope`; `note` describes it.

        A scope that gives a pipeline is sampled with that one instead of `pipe`.

        Raises:
            ValueError: the folder holds pictures that were made with other settings.
        """
        facts = json.loads(json.dumps({**job.to_dict(), "model": Path(job.model).name, "note": note}))
        run = folder / "run.json"
        if run.is_file() and json.loads(run.read_text("utf-8")) != facts:
            raise ValueError(f"{folder} holds pictures made with other settings; choose another --output")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(facts, run)
        paths = [folder / f"{index:06d}.png" for index in range(self.count)]
        for indices in batches(self.count, job.batch_size):
            if all(paths[index].is_file() for index in indices):
                continue
            with scope() as inside:
                samples = sample_batch(pipeline_inside(inside, pipe), job, indices)
            for index, sample in zip(indices, samples, strict=True):
                write_png(Image.fromarray(sample), paths[index], None)

    def feature_set(self, folder: Path) -> FeatureSet:
        """Features of the pictures in a folder that `make` filled."""
        return self._features(folder / FEATURES, lambda: FolderSource(folder, self.count))

    def score(self, folder: Path, baseline: Path | None = None) -> dict[str, Any]:
        """Distances of the pictures in `folder` to the held-out ones, with intervals, floor and, against the pictures
        in `baseline` (same captions and seeds), a paired verdict."""
        other = None if baseline is None else self.feature_set(baseline)
        inputs = Inputs(self.feature_set(folder), self.reference, other)
        report = Evaluation(inputs, self.extractor, parse_metrics("fd,kid"), self.options).run()
        facts = report.to_dict()
        kept = ("metrics", "intervals", "floor", "comparison", "n_samples", "n_reference", "warnings")
        return {key: facts[key] for key in kept if key in facts}


def save_sheet(folder: Path, target: Path, count: int = 32, columns: int = 8) -> None:
    """Writes the first pictures of a folder side by side, at their own size."""
    paths = [folder / f"{index:06d}.png" for index in range(count) if (folder / f"{index:06d}.png").is_file()]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * (width + 2), number // columns * (height + 2)))
    write_png(sheet, target, None)


def distance_cells(score: dict[str, Any] | None) -> dict[str, str]:
    """FD and KID with their intervals as text, for a table."""
    cells = {}
    for kind in ("fd", "kid"):
        name = next((name for name in (score or {}).get("metrics", {}) if name.startswith(kind)), None)
        if name is None:
            cells[kind] = "-"
            continue
        digits = 1 if kind == "fd" else 4
        interval = score["intervals"][name]
        value, low, high = score["metrics"][name], interval["low"], interval["high"]
        cells[kind] = f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return cells

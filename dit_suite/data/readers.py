"""Data sets as the trainer reads them: rows in memory, batches as a pure function of (rows, draws)."""

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dit_suite.data.captions import captions_of
from dit_suite.data.draws import Draws, Stream
from dit_suite.data.labels import FILE_NAME as LABEL_FILE
from dit_suite.data.labels import LabelTable
from dit_suite.data.procedural import shapes_set, sprites_set
from dit_suite.data.section import DataSection
from dit_suite.data.splits import made_seed
from dit_suite.data.tables import read_rows
from dit_suite.registry import resolve, resolve_named

_WORKERS = 8


class Source(Protocol):
    """A data set of `len(source)` rows."""

    sample_shape: tuple[int, ...]
    num_classes: int
    class_names: Mapping[int, str]
    captions: Sequence[Sequence[str]]

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> "Source":
        """Moves what lies in memory to the device that trains."""
        ...

    def fetch(self, rows: torch.Tensor, draws: Draws) -> dict[str, Any]:
        """`samples` float32 in [-1, 1] and whatever the set knows: `class_labels`, `captions`, `actions`."""
        ...


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return pixels.float() / 127.5 - 1.0


def decode_picture(data: bytes, where: str, size: int = 0) -> torch.Tensor:
    """uint8 (3, height, width); `ValueError` names `where` when the bytes are no picture."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture = picture.convert("RGB")
            if size and picture.size != (size, size):
                picture = picture.resize((size, size), Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ValueError(f"{where} can't be read as a picture: {error}") from None


def decode_clip(data: bytes, where: str, num_frames: int | None = None) -> torch.Tensor:
    """uint8 (frames, 3, height, width) of an animated WebP.

    Args:
        data: the file.
        where: its name in a message.
        num_frames: frames of equal length that were encoded; a picture that lasts longer stands for several of them.

    Raises:
        ValueError: not a clip, or its pictures do not last `num_frames` frames.
    """
    try:
        with Image.open(io.BytesIO(data)) as clip:
            frames, durations = [], []
            for index in range(getattr(clip, "n_frames", 1)):
                clip.seek(index)
                frames.append(np.array(clip.convert("RGB")))
                durations.append(clip.info.get("duration", 0))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ValueError(f"{where} can't be read as a clip: {error}") from None
    stacked = np.stack(frames)
    if num_frames is not None and num_frames != len(frames):
        repeats = [round(num_frames * each / max(sum(durations), 1)) for each in durations]
        if min(repeats) < 1 or sum(repeats) != num_frames:
            raise ValueError(f"{where} has {len(frames)} pictures, which can't be {num_frames} frames")
        stacked = np.repeat(stacked, repeats, axis=0)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def select_rows(rows: list[dict[str, Any]], section: DataSection, where: Path) -> list[dict[str, Any]]:
    """The rows of a split, of the chosen styles and of the chosen groups.

    Raises:
        ValueError: a style or group that no row has, or nothing is left.
    """
    chosen = {"style": section.styles, "group": section.groups}
    for column, values in chosen.items():
        known = {str(row[column]) for row in rows if row.get(column)}
        for value in values:
            if value not in known:
                held = f"it has {', '.join(sorted(known)[:20])}" if known else f"its rows have no {column}"
                raise ValueError(f"{where} has no {column} {value!r}; {held}")
    kept = [
        row
        for row in rows
        if section.split in ("all", row.get("split") or "train")
        and all(not values or row.get(column) in values for column, values in chosen.items())
    ]
    if not kept:
        picks = [f"{column} {' or '.join(values)}" for column, values in chosen.items() if values]
        raise ValueError(f"{where} has no rows in split {section.split!r}{' with ' * bool(picks)}{' and '.join(picks)}")
    return kept


def labels_of(
    rows: Sequence[Mapping[str, Any]], folder: Path, section: DataSection
) -> tuple[torch.Tensor | None, dict[int, str]]:
    """Class ids and names by the folder's label table, cut to the chosen styles and groups; (None, {}) without one."""
    if not (folder / LABEL_FILE).is_file():
        return None, {}
    table = LabelTable.load(folder).narrowed(section.styles, section.groups)
    ids = torch.tensor([table.id_of(row["style"], row["group"]) for row in rows])
    return ids, table.names()


def pick_caption(choices: Sequence[str], odds: Sequence[float], draw: float) -> str:
    """One of the captions, by its odds; `draw` lies in (0, 1)."""
    weights = list(odds[: len(choices)])
    total = sum(weights)
    if total <= 0:
        return choices[0]
    for choice, weight in zip(choices, weights, strict=False):
        draw -= weight / total
        if draw < 0:
            return choice
    return choices[len(weights) - 1]


class _Captioned:
    """Captions and labels that pictures and clips share."""

    captions: Sequence[Sequence[str]]
    labels: torch.Tensor | None
    section: DataSection

    def conditions(self, rows: torch.Tensor, draws: Draws) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.labels is not None:
            found["class_labels"] = self.labels[rows.cpu()].to(draws.samples.device)
        if self.captions:
            chances = draws.uniform(Stream.CAPTION).tolist()
            odds = self.section.captions
            found["captions"] = [
                pick_caption(self.captions[row], odds, chance)
                for row, chance in zip(rows.tolist(), chances, strict=True)
            ]
        return found


def shift_on_white(pixels: torch.Tensor, draws: Draws, reach: int) -> torch.Tensor:
    """Moves every picture (..., height, width) by up to `reach` pixels each way; what comes in is white."""
    offsets = draws.integers(Stream.AUGMENT, 2 * reach + 1, (2,))
    height, width = pixels.shape[-2:]
    padded = torch.nn.functional.pad(pixels, (reach,) * 4, value=255)
    rows = offsets[:, :1] + torch.arange(height, device=pixels.device)
    columns = offsets[:, 1:] + torch.arange(width, device=pixels.device)
    batch = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    moved = padded.flatten(1, -3)[batch, :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).reshape(pixels.shape)


class ImageRows(_Captioned):
    """Pictures of one size, decoded once and kept as uint8."""

    def __init__(
        self,
        pixels: torch.Tensor,
        section: DataSection,
        labels: torch.Tensor | None = None,
        class_names: Mapping[int, str] | None = None,
        captions: Sequence[Sequence[str]] = (),
    ) -> None:
        self.pixels, self.section = pixels, section
        self.labels, self.captions = labels, captions
        self.class_names = dict(class_names or {})
        self.num_classes = len(self.class_names)
        self.sample_shape = tuple(pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device) -> "ImageRows":
        self.pixels = self.pixels.to(device)
        return self

    def fetch(self, rows: torch.Tensor, draws: Draws) -> dict[str, Any]:
        pixels = self.pixels[rows.to(self.pixels.device)].to(draws.samples.device)
        if self.section.translate:
            pixels = shift_on_white(pixels, draws, self.section.translate)
        if self.section.flip:
            turned = draws.uniform(Stream.FLIP)[:, None, None, None] < 0.5
            pixels = torch.where(turned, pixels.flip(-1), pixels)
        return {"samples": to_unit_range(pixels), **self.conditions(rows, draws)}


def for_pictures_only(section: DataSection, *names: str) -> None:
    """Raises `ValueError` for the first of these settings that is given: clips would not heed it."""
    for name in names:
        if getattr(section, name):
            raise ValueError(f"data.{name} is for pictures: a set of kind {section.kind} does not take it")


class ClipRows(_Captioned):
    """Clips of any length; a sample is a window of `frames` frames, which wraps round in a shorter clip."""

    def __init__(
        self,
        clips: Sequence[torch.Tensor],
        section: DataSection,
        labels: torch.Tensor | None = None,
        class_names: Mapping[int, str] | None = None,
        captions: Sequence[Sequence[str]] = (),
    ) -> None:
        for_pictures_only(section, "translate", "flip")
        self.frames = torch.cat(list(clips))
        self.lengths = torch.tensor([len(clip) for clip in clips])
        self.first = self.lengths.cumsum(0) - self.lengths
        self.section, self.labels, self.captions = section, labels, captions
        self.class_names = dict(class_names or {})
        self.num_classes = len(self.class_names)
        channels, height, width = self.frames.shape[1:]
        self.sample_shape = (channels, section.frames, height, width)

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> "ClipRows":
        self.frames, self.lengths, self.first = (t.to(device) for t in (self.frames, self.lengths, self.first))
        return self

    def fetch(self, rows: torch.Tensor, draws: Draws) -> dict[str, Any]:
        place = rows.to(self.frames.device)
        lengths = self.lengths[place].to(draws.samples.device)
        span = (self.section.frames - 1) * self.section.stride + 1
        start = draws.integers(Stream.WINDOW, (lengths - span).clamp(min=0) + 1)
        steps = torch.arange(self.section.frames, device=start.device) * self.section.stride
        inside = (start[:, None] + steps) % lengths[:, None]
        window = self.frames[self.first[place][:, None] + inside.to(self.frames.device)]
        samples = to_unit_range(window.to(draws.samples.device)).transpose(1, 2)
        return {"samples": samples, **self.conditions(rows, draws)}


class ActionWindows:
    """Windows of recorded play; no window crosses an episode.

    `actions[:, j]` is the action that led to frame j of the window: the recording's action t leads frame t to t + 1.
    The first frame of an episode has no such action; it gets -1.
    """

    def __init__(
        self,
        frames: torch.Tensor,
        actions: torch.Tensor,
        episodes: torch.Tensor,
        section: DataSection,
        action_names: Sequence[str] = (),
    ) -> None:
        for_pictures_only(section, "translate", "flip")
        if not len(frames) == len(actions) == len(episodes):
            raise ValueError(f"{len(frames)} frames, {len(actions)} actions, {len(episodes)} episode ids: not aligned")
        self.frames, self.section = frames, section
        begins = torch.ones(len(frames), dtype=torch.bool)
        begins[1:] = episodes[1:] != episodes[:-1]
        self.incoming = torch.cat([torch.full((1,), -1), actions[:-1].long()])
        self.incoming[begins] = -1
        span = (section.frames - 1) * section.stride + 1
        last = torch.arange(len(frames)) + span - 1
        fits = last < len(frames)
        fits[fits.clone()] &= episodes[last[fits]] == episodes[fits]
        self.starts = fits.nonzero()[:, 0]
        if not len(self.starts):
            raise ValueError(f"no episode is as long as a window of {span} frames")
        if section.stride != 1:
            raise ValueError("stride must be 1: skipping frames would skip their actions")
        self.class_names = dict(enumerate(action_names))
        self.num_classes = len(self.class_names) or int(actions.max()) + 1
        self.captions: Sequence[Sequence[str]] = ()
        self.sample_shape = (frames.shape[1], section.frames, *frames.shape[2:])

    def __len__(self) -> int:
        return len(self.starts)

    def to(self, device: torch.device) -> "ActionWindows":
        self.frames, self.incoming, self.starts = (t.to(device) for t in (self.frames, self.incoming, self.starts))
        return self

    def fetch(self, rows: torch.Tensor, draws: Draws) -> dict[str, Any]:
        start = self.starts[rows.to(self.starts.device)]
        place = start[:, None] + torch.arange(self.section.frames, device=start.device)
        device = draws.samples.device
        samples = to_unit_range(self.frames[place].to(device)).transpose(1, 2)
        return {"samples": samples, "actions": self.incoming[place].to(device)}


def _decode_all(rows: Sequence[Mapping[str, Any]], column: str, decode: Any) -> list[torch.Tensor]:
    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(lambda pair: decode(pair[1][column], pair[0]), enumerate(rows)))


def _table_file(section: DataSection, name: str) -> Path:
    folder = Path(section.path)
    path = folder / name
    if not section.path or not path.is_file():
        raise FileNotFoundError(
            f"data.path {str(folder)!r} holds no {name}; build the set with scripts/prepare_data.py and set data.path"
        )
    return path


def open_images(section: DataSection) -> ImageRows:
    """A folder with `images.parquet` (columns image and label; style, tags, group, split when it has them)."""
    path = _table_file(section, "images.parquet")
    rows = select_rows(read_rows(path), section, path)
    pictures = _decode_all(rows, "image", lambda data, row: decode_picture(data, f"{path}, row {row}", section.size))
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(f"{path} holds pictures of several sizes, {sorted(shapes)[:3]}: set data.size")
    labels, names = labels_of(rows, path.parent, section)
    return ImageRows(torch.stack(pictures), section, labels, names, [captions_of(row) for row in rows])


def open_clips(section: DataSection) -> ClipRows:
    """A folder with `clips.parquet` (columns clip and label)."""
    for_pictures_only(section, "size")
    path = _table_file(section, "clips.parquet")
    rows = select_rows(read_rows(path), section, path)
    clips = _decode_all(
        rows, "clip", lambda data, row: decode_clip(data, f"{path}, row {row}", rows[row].get("num_frames"))
    )
    labels, names = labels_of(rows, path.parent, section)
    return ClipRows(clips, section, labels, names, [captions_of(row) for row in rows])


def open_actions(section: DataSection) -> ActionWindows:
    """A folder with `episodes.parquet`: rows of raw frames, their actions and the episode they belong to."""
    for_pictures_only(section, "size")
    path = _table_file(section, "episodes.parquet")
    rows = select_rows(read_rows(path), section, path)
    frames, actions, episodes = [], [], []
    for row in rows:
        picture = np.frombuffer(row["frames"], np.uint8).reshape(-1, row["height"], row["width"], 3)
        frames.append(torch.from_numpy(picture.copy()).permute(0, 3, 1, 2))
        actions.append(torch.tensor(row["actions"]))
        episodes.append(torch.full((len(picture),), row["episode"]))
    return ActionWindows(torch.cat(frames), torch.cat(actions), torch.cat(episodes), section, rows[0]["action_names"])


def open_shapes(section: DataSection) -> ImageRows:
    """The procedural shapes; the splits are "train" and "heldout"."""
    pixels, labels, captions = shapes_set(section.count, section.size or 16, made_seed(section.split))
    names = {int(label): caption for label, caption in sorted(zip(labels.tolist(), captions, strict=True))}
    return ImageRows(pixels, section, labels, names, [(caption,) for caption in captions])


def open_sprites(section: DataSection) -> ClipRows:
    """The procedural bouncing sprites; the splits are "train" and "heldout"."""
    size, seed = section.size or 16, made_seed(section.split)
    clips, labels, captions = sprites_set(section.count, 2 * section.frames, size, seed)
    names = {int(label): caption for label, caption in sorted(zip(labels.tolist(), captions, strict=True))}
    return ClipRows(list(clips), section, labels, names, [(caption,) for caption in captions])


KINDS = (
    ("images", "dit_suite.data.readers:open_images"),
    ("clips", "dit_suite.data.readers:open_clips"),
    ("actions", "dit_suite.data.readers:open_actions"),
    ("shapes", "dit_suite.data.readers:open_shapes"),
    ("sprites", "dit_suite.data.readers:open_sprites"),
    ("square", "dit_suite.data.moving_square:open_moving_square"),
)


def open_source(section: DataSection) -> Source:
    """Opens the data set that a config names.

    Raises:
        FileNotFoundError, ValueError: the folder is absent, empty or holds something else.
    """
    for name, opener in KINDS:
        if name == section.kind:
            return resolve(opener)(section)
    if ":" not in section.kind:
        names = ", ".join(name for name, _ in KINDS)
        raise ValueError(f"data.kind must be one of {names}, or module:function, got {section.kind!r}")
    return resolve_named(section.kind)(section)

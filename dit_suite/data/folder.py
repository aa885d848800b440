"""A user's own pictures or clips, turned into the tables that the trainer reads."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from dit_suite.data.cards import content_hash, count_lines
from dit_suite.data.emoji64 import lossless_webp
from dit_suite.data.labels import LabelTable
from dit_suite.data.pictures import on_white
from dit_suite.data.splits import split_of
from dit_suite.data.tables import read_rows, table_metadata, write_table
from dit_suite.files import write_text
from dit_suite.hashing import sha256_of
from dit_suite.options import Options, option

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
CAPTION_FILE = "captions.jsonl"
_STYLE = "photo"
_CONVERSION = "upright, on white"  # another way to convert needs another word
_PICTURES_A_PART, _VIDEOS_A_PART = 128, 8
IMAGE_SCHEMA = pa.schema(
    [("image", pa.binary())] + [(name, pa.string()) for name in ("label", "group", "style", "file", "split")]
)
CLIP_SCHEMA = pa.schema(
    [("clip", pa.binary()), ("num_frames", pa.int32())]
    + [(name, pa.string()) for name in ("label", "group", "style", "file", "split")]
)
IMAGE_PART_SCHEMA = pa.schema([("image", pa.binary()), ("file", pa.string())])
CLIP_PART_SCHEMA = pa.schema([("clip", pa.binary()), ("num_frames", pa.int32()), ("file", pa.string())])


@dataclass(frozen=True)
class FolderOptions(Options):
    """How files become rows."""

    size: int = option(64, "side in pixels: shorter side resized, centre cropped", minimum=8, maximum=4096)
    heldout: float = option(0.05, "share of files held out", minimum=0.0, maximum=0.9)
    salt: str = option("dit_suite", "names the split")
    frames: int = option(48, "longest clip cut from a video, in frames", minimum=2, maximum=4096)
    every: int = option(2, "keep every n-th frame of a video", minimum=1, maximum=64)
    skip_broken: bool = option(False, "leave unreadable files out instead of stopping")


def centre_crop(picture: Image.Image, size: int) -> np.ndarray:
    """ADM's crop: halve with a box filter while the shorter side is at least twice the target, bicubic, centre."""
    picture = on_white(picture)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    wide = (max(size, round(picture.width * scale)), max(size, round(picture.height * scale)))
    picture = picture.resize(wide, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def read_captions(folder: Path, files: list[Path]) -> dict[str, str] | None:
    """`{relative path: caption}` from `captions.jsonl`, lines `{"file": ..., "caption": ...}`; None without the file.

    Raises:
        ValueError: a line is not valid, or a file has no caption.
    """
    path = folder / CAPTION_FILE
    if not path.is_file():
        return None
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file, caption = entry["file"], entry["caption"]
            if not isinstance(caption, str):
                raise TypeError("a caption is text")
            found[file] = caption
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'{path}, line {number}: expected {{"file": ..., "caption": ...}}') from None
    missing = [name for file in files if (name := file.relative_to(folder).as_posix()) not in found]
    if missing:
        raise ValueError(f"{path} has no caption for {len(missing)} of {len(files)} files, such as {missing[0]}")
    return found


def _collect(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())


def _picture(path: Path, options: FolderOptions) -> dict[str, Any]:
    with _named(path), Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture)
        return {"image": lossless_webp(centre_crop(upright, options.size))}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} can't be read as a picture: {error}") from None


def _check_pictures(files: Sequence[Path]) -> None:
    """Headers and checksums of all pictures, so that a broken one stops the build before it starts."""
    for path in files:
        with _named(path), Image.open(path) as picture:
            picture.verify()


def _video(path: Path, options: FolderOptions) -> dict[str, Any]:
    import imageio.v3 as iio

    from dit_suite.data.anim64 import encode_clip

    frames = []
    try:
        for index, frame in enumerate(iio.imiter(path)):
            if index % options.every == 0:
                frames.append(centre_crop(Image.fromarray(np.asarray(frame)), options.size))
            if len(frames) == options.frames:
                break
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path} can't be read as a video: {error}") from None
    if len(frames) < 2:
        raise ValueError(f"{path} holds {len(frames)} usable frames, at least 2 are needed")
    return {"clip": encode_clip(frames, 95, 42), "num_frames": len(frames)}


def _part_key(files: Sequence[Path], source: Path, options: FolderOptions) -> str:
    """Changes whenever the converted files would change: their names and bytes, and what the options do to them."""
    assembled = ("heldout", "salt")
    facts: list[Any] = [_CONVERSION, {k: value for k, value in options.to_dict().items() if k not in assembled}]
    for path in files:
        facts.append([path.relative_to(source).as_posix(), sha256_of(path)])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _build_part(
    files: Sequence[Path], source: Path, options: FolderOptions, convert: Callable[[Path, FolderOptions], dict]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Converted rows and what was left out."""
    rows, broken = [], []
    for path in files:
        try:
            rows.append(convert(path, options) | {"file": path.relative_to(source).as_posix()})
        except ValueError as error:
            if not options.skip_broken:
                raise
            broken.append(str(error))
    return rows, broken


def _converted(
    files: Sequence[Path], source: Path, parts: Path, options: FolderOptions, report: Callable[[str], None]
) -> tuple[list[dict[str, Any]], int]:
    """Rows of all files, converted in parts that a later call takes as they are, and how many were unreadable."""
    videos = files[0].suffix.lower() in VIDEOS
    convert, size = (_video, _VIDEOS_A_PART) if videos else (_picture, _PICTURES_A_PART)
    schema = CLIP_PART_SCHEMA if videos else IMAGE_PART_SCHEMA
    rows: list[dict[str, Any]] = []
    unreadable, names = 0, set()
    for number, first in enumerate(range(0, len(files), size)):
        chunk = files[first : first + size]
        part = parts / f"{'clips' if videos else 'images'}-{number:05d}.parquet"
        key = _part_key(chunk, source, options)
        if not part.is_file() or table_metadata(part).get("key") != key:
            found, broken = _build_part(chunk, source, options, convert)
            write_table(part, found, schema, {"key": key, "broken": json.dumps(broken)})
            if len(files) > size:
                report(f"{min(first + size, len(files))} of {len(files)} files")
        broken = json.loads(table_metadata(part)["broken"])
        for line in broken:
            report(f"left out: {line}")
        rows += read_rows(part)
        unreadable += len(broken)
        names.add(part.name)
    for stale in parts.glob("*.parquet"):
        if stale.name not in names:
            stale.unlink()
    return rows, unreadable


def build_folder(
    source: Path,
    output: Path,
    options: FolderOptions,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Turns a folder of pictures or of videos into `images.parquet` or `clips.parquet`; a second call resumes by part.

    Labels: the sub-folder of a file (ImageFolder layout) is its class. Captions: `captions.jsonl` in the folder, else
    the sub-folder's name, else the file's name without its number.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds neither pictures nor videos, both, an unreadable file, or a file without caption.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder {source}")
    pictures, videos = _collect(source, PICTURES), _collect(source, VIDEOS)
    if not pictures and not videos:
        raise ValueError(f"{source} holds no pictures ({', '.join(PICTURES)}) and no videos ({', '.join(VIDEOS)})")
    if pictures and videos:
        raise ValueError(
            f"{source} holds {len(pictures)} pictures and {len(videos)} videos: split them into two folders"
        )
    files = pictures or videos
    captions = read_captions(source, files)
    if pictures and not options.skip_broken:
        _check_pictures(files)
    rows, broken = _converted(files, source, output / "parts", options, report)
    if not rows:
        raise ValueError(f"none of the {len(files)} files in {source} could be read")
    for row in rows:
        name = row["file"]
        group = name.split("/")[0] if "/" in name else "all"
        fallback = group.replace("_", " ") if group != "all" else Path(name).stem.rstrip("0123456789").strip("_- ")
        row |= {
            "label": captions[name] if captions else fallback or "picture",
            "group": group,
            "style": _STYLE,
            "split": split_of(name, "", salt=options.salt, heldout=options.heldout, pairs=0.0),
        }
    target = output / ("images.parquet" if pictures else "clips.parquet")
    schema = IMAGE_SCHEMA if pictures else CLIP_SCHEMA
    write_table(target, rows, schema, {"dataset": "folder", "options": json.dumps(options.to_dict(), sort_keys=True)})
    LabelTable((_STYLE,), tuple(sorted({row["group"] for row in rows}))).save(output)
    column = "image" if pictures else "clip"
    lines = [
        f"# {source.name}",
        "",
        f"{len(rows):,} {'pictures' if pictures else 'clips'}, {options.size} x {options.size} RGB"
        + (f"; {broken} unreadable files left out." if broken else "."),
        f"Content hash `{content_hash(rows, (column, 'label', 'split'))}`. The licence is that of the files given.",
    ]
    for name in ("split", "group"):
        lines += ["", f"| {name} | files |", "| --- | --- |", *count_lines(rows, name)]
    write_text(output / "README.md", "\n".join(lines) + "\n")
    report(f"{len(rows)} files")
    return target

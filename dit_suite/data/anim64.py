"""anim64: animated Fluent emoji as short clips at 12 frames a second, from pinned npm packages."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from dit_suite.data.cards import content_hash, count_lines, notice_text
from dit_suite.data.emoji64 import EmojiRecord, normalized_key, read_records, to_square
from dit_suite.data.packages import (
    ANIMATION,
    CODE_POINTS,
    EMOJIBASE,
    check_license,
    fetch,
    iterate_files,
    read_json,
)
from dit_suite.data.splits import split_of
from dit_suite.data.tables import read_rows, table_metadata, write_table
from dit_suite.files import write_text
from dit_suite.options import Options, option

SCHEMA = pa.schema(
    [
        ("clip", pa.binary()),
        ("num_frames", pa.int32()),
        ("duration_ms", pa.int32()),
        ("label", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("group", pa.string()),
        ("style", pa.string()),
        ("license", pa.string()),
        ("hex", pa.string()),
        ("split", pa.string()),
    ]
)
_CREDIT = "Fluent Emoji (animated), Copyright (c) Microsoft Corporation, MIT"


@dataclass(frozen=True)
class AnimationOptions(Options):
    """What goes into the set."""

    size: int = option(64, "side of a frame in pixels", minimum=8, maximum=256)
    every: int = option(2, "keep every n-th frame of the 24 a second", minimum=1, maximum=24)
    quality: int = option(90, "WebP quality; 100 is lossless", minimum=1, maximum=100)
    parts: tuple[int, ...] = option((1, 2, 3, 4), "which of the four packages to read", minimum=1, maximum=4)
    heldout: float = option(0.05, "share of concepts held out", minimum=0.0, maximum=0.9)
    salt: str = option("dit_suite", "names the split")


def clip_frames(data: bytes, size: int, every: int) -> tuple[list[np.ndarray], int]:
    """Every n-th frame of an animated file, on white, and the duration in milliseconds."""
    frames, duration = [], 0
    with Image.open(io.BytesIO(data)) as clip:
        for index in range(getattr(clip, "n_frames", 1)):
            clip.seek(index)
            picture = clip.convert("RGBA")
            duration += int(clip.info.get("duration", 42))
            if index % every == 0:
                frames.append(to_square(picture, size))
    return frames, duration


def encode_clip(frames: list[np.ndarray], quality: int, milliseconds: int) -> bytes:
    """An animated WebP of frames that last `milliseconds` each; quality 100 is lossless.

    The encoder merges equal neighbours into one picture that lasts longer; `decode_clip` takes them apart again.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    settings: dict[str, Any] = {"lossless": True} if quality == 100 else {"quality": quality}
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=milliseconds,
        minimize_size=False,
        allow_mixed=False,
        method=4,
        **settings,
    )
    return buffer.getvalue()


def _convert(data: bytes, size: int, every: int, quality: int) -> tuple[bytes, int, int]:
    """(clip, frames, milliseconds); no frames for a still picture."""
    with Image.open(io.BytesIO(data)) as clip:
        if getattr(clip, "n_frames", 1) < 2:
            return b"", 0, 0
    frames, duration = clip_frames(data, size, every)
    return encode_clip(frames, quality, 42 * every), len(frames), duration


def _rows_of_part(
    archive: Path, options: AnimationOptions, records: dict[str, EmojiRecord], allowed: set[str], pool: Any
) -> list[dict[str, Any]]:
    chosen = []
    for stem, data in iterate_files(archive, ".webp"):
        key = normalized_key(stem)
        if key in records and key in allowed:
            chosen.append((key, data))
    size, every, quality = ([value] * len(chosen) for value in (options.size, options.every, options.quality))
    done = pool.map(_convert, [data for _, data in chosen], size, every, quality, chunksize=4)
    rows = []
    for (key, _), (clip, count, duration) in zip(chosen, done, strict=True):
        if count:
            record = records[key]
            rows.append(
                {
                    "clip": clip,
                    "num_frames": count,
                    "duration_ms": duration,
                    "label": record.label,
                    "tags": list(record.tags),
                    "group": record.group,
                    "style": "fluent-anim",
                    "license": "MIT",
                    "hex": key,
                    "split": split_of(key, "", salt=options.salt, heldout=options.heldout, pairs=0.0),
                }
            )
    return rows


def part_key(options: AnimationOptions, requirement: str, archive: Path) -> str:
    """Changes whenever the rows of this package would change; the choice of packages does not matter."""
    facts = {name: value for name, value in options.to_dict().items() if name != "parts"}
    stated = json.dumps([facts, requirement, archive.stat().st_size], sort_keys=True)
    return hashlib.sha256(stated.encode()).hexdigest()


def build_anim64(
    output: Path,
    options: AnimationOptions,
    *,
    cache: Path,
    download: bool = False,
    workers: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Builds `clips.parquet`, `README.md` and `NOTICE` in `output`; a second call resumes by package.

    Only base emoji that fluent-flat draws too are taken (the others are not Microsoft's art), and only animated files.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: a package is absent, can't be fetched or is not what it should be.
    """
    flat = fetch(CODE_POINTS, cache, download)
    allowed = {normalized_key(code) for code in read_json(flat, "chars.json")}
    records = {r.key: r for r in read_records(fetch(EMOJIBASE, cache, download)) if r.base}
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(max_workers=workers or os.cpu_count()) as pool:
        for number in options.parts:
            package = ANIMATION[number - 1]
            archive = fetch(package, cache, download)
            check_license(package, archive)
            part = output / "parts" / f"anim-{number}.parquet"
            key = part_key(options, package.requirement, archive)
            if not part.is_file() or table_metadata(part).get("key") != key:
                write_table(part, _rows_of_part(archive, options, records, allowed, pool), SCHEMA, {"key": key})
            found = read_rows(part)
            report(f"{package.requirement}: {len(found)} clips")
            rows += found
    rows.sort(key=lambda row: row["hex"])
    target = output / "clips.parquet"
    write_table(target, rows, SCHEMA, {"dataset": "anim64", "options": json.dumps(options.to_dict(), sort_keys=True)})
    frames = sum(row["num_frames"] for row in rows)
    lines = [
        "# anim64",
        "",
        f"{len(rows):,} clips, {frames:,} frames, {options.size} x {options.size} RGB on white, "
        f"{24 / options.every:g} frames a second, animated WebP (quality {options.quality}).",
        f"Content hash `{content_hash(rows, ('clip', 'label', 'split'))}`.",
        "",
        "Columns of `clips.parquet`: clip, num_frames, duration_ms, label, tags, group, style, license, hex, split.",
        "A training window never crosses clips; in a clip shorter than the window it wraps round.",
    ]
    for column in ("split", "group", "license"):
        lines += ["", f"| {column} | clips |", "| --- | --- |", *count_lines(rows, column)]
    lines += ["", "Packages: " + ", ".join(ANIMATION[number - 1].requirement for number in options.parts) + ".", ""]
    write_text(output / "README.md", "\n".join(lines))
    credits = [(_CREDIT, "MIT"), ("emojibase, Copyright (c) Miles Johnson, MIT; names from Unicode CLDR", "MIT")]
    write_text(output / "NOTICE", notice_text(credits))
    return target

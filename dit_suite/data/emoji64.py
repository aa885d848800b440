"""emoji64: emoji art of several styles, rasterised from pinned npm packages, with captions, tags and groups."""

import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from dit_suite.data.cards import write_emoji_card
from dit_suite.data.labels import LabelTable
from dit_suite.data.packages import (
    CODE_POINTS,
    EMOJIBASE,
    PERMISSIVE,
    STYLES,
    Style,
    check_license,
    fetch,
    iterate_files,
    read_json,
    style,
)
from dit_suite.data.splits import assign_splits
from dit_suite.data.tables import read_rows, table_metadata, write_table
from dit_suite.hashing import sha256_of
from dit_suite.options import Options, option

SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("label", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("group", pa.string()),
        ("subgroup", pa.string()),
        ("style", pa.string()),
        ("license", pa.string()),
        ("hex", pa.string()),
        ("base", pa.bool_()),
        ("split", pa.string()),
    ]
)
_NOT_CORE = ("flags", "symbols", "component")
_RENDER_SIDE = 128
_CHUNK = 32


@dataclass(frozen=True)
class EmojiOptions(Options):
    """What goes into the set."""

    size: int = option(64, "side of a picture in pixels", minimum=8, maximum=256)
    styles: tuple[str, ...] = option((), "styles to take (default: every style whose licence is switched on)")
    include_attribution: bool = option(False, "also take CC-BY-4.0 styles (their credits must be shown)")
    include_sharealike: bool = option(False, "also take CC-BY-SA-4.0 styles (derived files must carry that licence)")
    skin_tones: bool = option(False, "also take skin-tone variants")
    all_groups: bool = option(False, "also take flags, symbols and components")
    heldout: float = option(0.05, "share of concepts held out in every style", minimum=0.0, maximum=0.9)
    pairs: float = option(0.05, "share of (concept, style) pairs held out", minimum=0.0, maximum=0.9)
    salt: str = option("dit_suite", "names the split: another salt, another split")

    def validate(self) -> None:
        for name in self.styles:
            row = style(name)
            if row.package.license not in self.licenses():
                raise ValueError(f"style {name} is {row.package.license}: switch that licence on to use it")

    def licenses(self) -> tuple[str, ...]:
        """The licences that are switched on."""
        extra = ("CC-BY-4.0",) if self.include_attribution else ()
        return PERMISSIVE + extra + (("CC-BY-SA-4.0",) if self.include_sharealike else ())

    def chosen_styles(self) -> tuple[Style, ...]:
        """Rows of the style table, in its order."""
        wanted = [row for row in STYLES if row.package.license in self.licenses()]
        return tuple(row for row in wanted if not self.styles or row.name in self.styles)


@dataclass(frozen=True)
class EmojiRecord:
    """What emojibase says about one emoji."""

    key: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    base: bool


def normalized_key(hexcode: str) -> str:
    """Lower-case code points without the presentation selector: "2764-FE0F" -> "2764"."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def slug(label: str) -> str:
    """The icon name that a label would have: "Mrs. Claus" -> "mrs-claus"."""
    plain = unicodedata.normalize("NFKD", label.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c) and c not in "'’")
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in plain).split()
    return "-".join(words)


def read_records(archive: Path) -> list[EmojiRecord]:
    """Every emoji of emojibase that belongs to a group, skin-tone variants included."""
    names = read_json(archive, "meta/groups.json")
    records = []
    for entry in read_json(archive, "en/data.json"):
        if "group" not in entry:
            continue
        group = names["groups"][str(entry["group"])]
        subgroup = names["subgroups"][str(entry["subgroup"])]
        tags = tuple(entry.get("tags", ()))
        records.append(EmojiRecord(normalized_key(entry["hexcode"]), entry["label"], tags, group, subgroup, True))
        for skin in entry.get("skins", ()):
            records.append(EmojiRecord(normalized_key(skin["hexcode"]), skin["label"], tags, group, subgroup, False))
    return records


def to_square(picture: Image.Image, size: int) -> np.ndarray:
    """Composites on white, pads to a square and resizes with Lanczos; uint8 (size, size, 3)."""
    picture = picture.convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def lossless_webp(pixels: np.ndarray) -> bytes:
    """Encodes uint8 (height, width, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=80, method=4, exact=True)
    return buffer.getvalue()


def render(source: str | bytes, size: int) -> bytes:
    """A picture from SVG text (resvg) or from an encoded raster file, as lossless WebP."""
    if isinstance(source, str):
        import resvg_py

        source = bytes(
            resvg_py.svg_to_bytes(svg_string=source, width=_RENDER_SIDE, background="#ffffff", skip_system_fonts=True)
        )
    with Image.open(io.BytesIO(source)) as picture:
        return lossless_webp(to_square(picture, size))


def _render_all(sources: list[str | bytes], size: int) -> list[bytes]:
    return [render(source, size) for source in sources]


def _svg_text(icons: dict[str, Any], icon: dict[str, Any]) -> str:
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} width="{width}" height="{height}" viewBox="{box}">{icon["body"]}</svg>'


def _sources(
    row: Style, archive: Path, records: list[EmojiRecord], code_points: dict[str, str]
) -> Iterator[tuple[EmojiRecord, str | bytes]]:
    """(record, SVG text or encoded file) of every record that this style draws, in the records' order.

    Only fluent-3d pictures that fluent-flat draws too are taken: the others are not Microsoft's art.
    """
    if row.match == "files":
        files = {normalized_key(stem): data for stem, data in iterate_files(archive, ".webp")}
        for record in records:
            if record.key in files and record.key in code_points:
                yield record, files[record.key]
        return
    icons = read_json(archive, "icons.json")
    own = {normalized_key(code): name for code, name in read_json(archive, "chars.json").items()}
    chars = own or code_points
    for record in records:
        name = chars.get(record.key) if row.match == "chars" else slug(record.label)
        icon = icons["icons"].get(name)
        if icon is not None:
            yield record, _svg_text(icons, icon)


def _part_key(options: EmojiOptions, row: Style, archive: Path) -> str:
    """Changes whenever the pictures of this style would change."""
    facts = [options.size, options.skin_tones, options.all_groups, row.name, row.package.requirement]
    facts.append(sha256_of(archive))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _build_part(path: Path, key: str, pairs: list, row: Style, size: int, pool: ProcessPoolExecutor) -> None:
    chunks = [[source for _, source in pairs[i : i + _CHUNK]] for i in range(0, len(pairs), _CHUNK)]
    images = [image for done in pool.map(_render_all, chunks, [size] * len(chunks)) for image in done]
    rows = [
        {
            "image": image,
            "label": record.label,
            "tags": list(record.tags),
            "group": record.group,
            "subgroup": record.subgroup,
            "style": row.name,
            "license": row.package.license,
            "hex": record.key,
            "base": record.base,
            "split": "",
        }
        for (record, _), image in zip(pairs, images, strict=True)
    ]
    write_table(path, rows, SCHEMA, {"key": key})


def build_emoji64(
    output: Path,
    options: EmojiOptions,
    *,
    cache: Path,
    download: bool = False,
    workers: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Builds `images.parquet`, `labels.json`, `README.md` and `NOTICE` in `output`; a second call resumes by style.

    Args:
        output: folder of the data set.
        options: what goes in.
        cache: folder of `npm pack` files.
        download: let npm fetch what is not in the cache.
        workers: rendering processes (default: one per core).
        report: called with one line per style.

    Returns:
        Path of `images.parquet`.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: a package is absent, can't be fetched or is not what it should be.
    """
    chosen = options.chosen_styles()
    archives = {row.name: fetch(row.package, cache, download) for row in chosen}
    for row in chosen:
        check_license(row.package, archives[row.name])
    flat = fetch(CODE_POINTS, cache, download)
    code_points = {normalized_key(code): name for code, name in read_json(flat, "chars.json").items()}
    records = [
        record
        for record in read_records(fetch(EMOJIBASE, cache, download))
        if (options.skin_tones or record.base) and (options.all_groups or record.group not in _NOT_CORE)
    ]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(max_workers=workers or os.cpu_count()) as pool:
        for row in chosen:
            part = output / "parts" / f"{row.name}.parquet"
            key = _part_key(options, row, archives[row.name])
            if not part.is_file() or table_metadata(part).get("key") != key:
                pairs = list(_sources(row, archives[row.name], records, code_points))
                _build_part(part, key, pairs, row, options.size, pool)
            found = read_rows(part)
            report(f"{row.name}: {len(found)} pictures")
            rows += found
    splits = assign_splits(
        [(row["hex"], row["style"]) for row in rows], salt=options.salt, heldout=options.heldout, pairs=options.pairs
    )
    for row, split in zip(rows, splits, strict=True):
        row["split"] = split
    table = LabelTable(tuple(row.name for row in chosen), tuple(sorted({row["group"] for row in rows})))
    target = output / "images.parquet"
    about = {"dataset": "emoji64", "options": json.dumps(options.to_dict(), sort_keys=True)}
    write_table(target, rows, SCHEMA, about)
    table.save(output)
    write_emoji_card(output, rows, chosen, options)
    return target

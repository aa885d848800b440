"""The emoji builder on small stand-ins for the packages, the splits, and the fixture's contents."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_suite.data import emoji64
from dit_suite.data.cards import notice_text
from dit_suite.data.emoji64 import EmojiOptions, build_emoji64, normalized_key, read_records, render, slug, to_square
from dit_suite.data.labels import LabelTable
from dit_suite.data.packages import EMOJIBASE, STYLES, NpmPackage, check_license, fetch, style
from dit_suite.data.readers import decode_picture
from dit_suite.data.splits import assign_splits, split_of
from dit_suite.data.tables import read_rows

FIXTURE = Path(__file__).parents[1] / "fixtures/emoji.parquet"
RED = '<rect width="16" height="16" fill="#f00"/>'
BLUE = '<circle cx="8" cy="8" r="6" fill="#00f"/>'


def _archive(path: Path, members: dict[str, object]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, value in members.items():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _webp(color: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), color).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """Archives of two emoji, a flag, and a picture that only the 3-D package has."""
    cache = tmp_path / "cache"
    cache.mkdir()
    skins = [{"label": "waving hand: light skin tone", "hexcode": "1F44B-1F3FB"}]
    data = [
        {"label": "red apple", "hexcode": "1F34E", "tags": ["fruit"], "group": 4, "subgroup": 1},
        {"label": "waving hand", "hexcode": "1F44B", "tags": [], "group": 1, "subgroup": 1, "skins": skins},
        {"label": "flag: Chad", "hexcode": "1F1F9-1F1E9", "tags": [], "group": 9, "subgroup": 1},
        {"label": "no group", "hexcode": "1F1E6"},
    ]
    groups = {"groups": {"1": "people-body", "4": "food-drink", "9": "flags"}, "subgroups": {"1": "some"}}
    info = {"license": {"spdx": "MIT"}}
    icons = {"icons": {"red-apple": {"body": RED}, "waving-hand": {"body": BLUE}}, "width": 16, "height": 16}
    chars = {"1f34e": "red-apple", "1f44b": "waving-hand"}
    files = {f"assets/{key}.webp": _webp((0, 200, 0, 255)) for key in ("1f34e", "1f44b", "1f1f9-1f1e9")}
    built = {
        EMOJIBASE.name: {"en/data.json": data, "meta/groups.json": groups},
        style("fluent-flat").package.name: {"icons.json": icons, "chars.json": chars, "info.json": info},
        style("fluent-color").package.name: {"icons.json": icons, "chars.json": {}, "info.json": info},
        style("fluent-3d").package.name: {"package.json": {"license": "MIT"}, **files},
    }
    paths = {name: _archive(cache / f"{index}.tgz", members) for index, (name, members) in enumerate(built.items())}
    monkeypatch.setattr(emoji64, "fetch", lambda package, cache, download: paths[package.name])
    return cache


def _options(**more) -> EmojiOptions:
    return EmojiOptions(size=16, styles=("fluent-3d", "fluent-color", "fluent-flat"), **more)


def test_build_is_deterministic_and_resumes(packages, tmp_path, monkeypatch):
    first = build_emoji64(tmp_path / "a", _options(), cache=packages, workers=1)
    rows = read_rows(first)
    assert Counter(row["style"] for row in rows) == {"fluent-3d": 2, "fluent-color": 2, "fluent-flat": 2}
    apple = next(row for row in rows if row["label"] == "red apple" and row["style"] == "fluent-flat")
    assert apple["group"] == "food-drink" and apple["license"] == "MIT" and apple["hex"] == "1f34e"
    assert decode_picture(apple["image"], "apple").float().mean((1, 2)).tolist() == pytest.approx([255, 0, 0], abs=2)
    monkeypatch.setattr(emoji64, "_build_part", lambda *_: pytest.fail("a finished part was rendered again"))
    again = build_emoji64(tmp_path / "a", _options(heldout=0.5), cache=packages, workers=1)
    assert [row["image"] for row in read_rows(again)] == [row["image"] for row in rows]
    monkeypatch.undo()


def test_two_builds_are_equal_bytes(packages, tmp_path):
    one, two = (build_emoji64(tmp_path / name, _options(), cache=packages, workers=1) for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert (tmp_path / "a/README.md").read_text() == (tmp_path / "b/README.md").read_text()
    table = LabelTable.load(tmp_path / "a")
    assert table.groups == ("food-drink", "people-body") and len(table) == 6
    assert table.id_of("fluent-flat", "people-body") == 5
    assert "Twemoji" not in (tmp_path / "a/NOTICE").read_text()


def test_flags_and_skin_tones_are_opt_in(packages, tmp_path):
    rows = read_rows(build_emoji64(tmp_path / "a", _options(all_groups=True), cache=packages, workers=1))
    # the flag is in the 3-D package only, so it is not Microsoft's art and stays out
    assert not [row for row in rows if row["group"] == "flags"]
    records = read_records(emoji64.fetch(EMOJIBASE, packages, False))
    assert [record.base for record in records] == [True, True, False, True]


def test_share_alike_and_attribution_are_opt_in():
    default = {row.package.license for row in EmojiOptions().chosen_styles()}
    assert default == {"MIT", "Apache-2.0"} and len(EmojiOptions().chosen_styles()) == 7
    assert len(EmojiOptions(include_attribution=True).chosen_styles()) == 10
    assert len(EmojiOptions(include_attribution=True, include_sharealike=True).chosen_styles()) == len(STYLES)
    with pytest.raises(ValueError, match="openmoji is CC-BY-SA-4.0"):
        EmojiOptions(styles=("openmoji",))
    with pytest.raises(ValueError, match="there is no style 'apple'"):
        EmojiOptions(styles=("apple",))


def test_packages_are_checked(tmp_path):
    package = NpmPackage("@iconify-json/thing", "1.0.0", "MIT", "0" * 64)
    with pytest.raises(FileNotFoundError, match=r"npm pack @iconify-json/thing@1.0.0"):
        fetch(package, tmp_path, download=False)
    path = _archive(tmp_path / package.file_name, {"info.json": {"license": {"spdx": "GPL-3.0"}}})
    with pytest.raises(ValueError, match="sha256"):
        fetch(package, tmp_path, download=False)
    with pytest.raises(ValueError, match="states licence 'GPL-3.0', expected 'MIT'"):
        check_license(package, path)


def test_names():
    assert normalized_key("2764-FE0F") == "2764" and normalized_key("0023-FE0F-20E3") == "0023-20e3"
    assert slug("Mrs. Claus") == "mrs-claus" and slug("woman’s hat") == "womans-hat" and slug("piñata") == "pinata"


def test_render_pads_and_composites_on_white():
    wide = Image.new("RGBA", (20, 10), (0, 0, 0, 255))
    square = to_square(wide, 20)
    assert square.shape == (20, 20, 3) and square[0].min() > 240 and square[10].max() < 15
    clear = np.asarray(Image.open(io.BytesIO(render(_webp((0, 0, 0, 0)), 8))))
    assert clear.min() == 255


def test_splits_hold_out_concepts_and_pairs():
    items = [(f"c{concept}", f"s{index}") for concept in range(1400) for index in range(6)]
    splits = assign_splits(items)
    share = Counter(splits)
    assert abs(share["heldout"] / len(items) - 0.05) < 0.015 and abs(share["pairs"] / len(items) - 0.0475) < 0.01
    concepts = {split: {c for (c, _), s in zip(items, splits, strict=True) if s == split} for split in share}
    styles = {s for (_, s), split in zip(items, splits, strict=True) if split == "train"}
    assert not concepts["heldout"] & concepts["train"] and concepts["pairs"] <= concepts["train"]
    assert styles == {f"s{index}" for index in range(6)}
    assert splits == [split if split != "pairs" else split for split in assign_splits(items)]
    assert split_of("c1", "s1", salt="x") in ("train", "heldout", "pairs")
    assert assign_splits(items, salt="other") != splits
    assert "pairs" not in assign_splits([(f"c{k}", "only") for k in range(500)])


def test_notice_lists_each_licence_once():
    text = notice_text([("A", "MIT"), ("B", "MIT"), ("C", "CC-BY-4.0")])
    assert text.count("Permission is hereby granted") == 1 and "creativecommons.org/licenses/by/4.0" in text


def test_fixture_keeps_the_promises_of_the_set():
    rows = read_rows(FIXTURE)
    assert len(rows) <= 200 and FIXTURE.stat().st_size <= 600_000
    assert {row["license"] for row in rows} == {"MIT", "Apache-2.0"}
    assert {row["split"] for row in rows} == {"train", "heldout", "pairs"}
    pictures = np.stack([decode_picture(row["image"], row["label"]).numpy() for row in rows])
    assert pictures.shape[1:] == (3, 64, 64) and pictures.dtype == np.uint8
    corners = pictures[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].min(axis=(1, 2))
    assert (corners >= 250).mean() >= 0.95
    coverage = (pictures.min(axis=1) < 250).mean(axis=(1, 2))
    assert coverage.min() > 0.02 and all(row["label"] for row in rows)

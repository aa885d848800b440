"""The npm packages that hold the art: pinned versions, licences, and reading them without unpacking."""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_suite.hashing import sha256_of

PERMISSIVE = ("MIT", "Apache-2.0")


@dataclass(frozen=True)
class NpmPackage:
    """One pinned package; `sha256` is that of the `.tgz` that `npm pack` writes."""

    name: str
    version: str
    license: str
    sha256: str | None = None

    @property
    def file_name(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def requirement(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Style:
    """One art style.

    Attributes:
        name: the id in the `style` column.
        caption: the word used in captions, "<label>, <caption> style".
        package: where the art is.
        match: how an icon finds its emoji: "files" (webp named by code points), "chars" (the package's code-point
            table, or that of fluent-flat), or "label" (the icon is named like the emoji).
        credit: the attribution line.
    """

    name: str
    caption: str
    package: NpmPackage
    match: str
    credit: str


EMOJIBASE = NpmPackage(
    "emojibase-data", "17.0.0", "MIT", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)
_MICROSOFT = "Fluent Emoji, Copyright (c) Microsoft Corporation, MIT"
_GOOGLE = "Noto Emoji, Google LLC, Apache-2.0"
_FLAT = NpmPackage(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "MIT",
    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
)

STYLES: tuple[Style, ...] = (
    Style(
        "fluent-3d",
        "3d",
        NpmPackage(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "MIT",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ),
        "files",
        _MICROSOFT,
    ),
    Style(
        "fluent-color",
        "gradient",
        NpmPackage(
            "@iconify-json/fluent-emoji",
            "1.2.7",
            "MIT",
            "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        ),
        "chars",
        _MICROSOFT,
    ),
    Style("fluent-flat", "flat", _FLAT, "chars", _MICROSOFT),
    Style(
        "fluent-hc",
        "black and white",
        NpmPackage(
            "@iconify-json/fluent-emoji-high-contrast",
            "1.2.6",
            "MIT",
            "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        ),
        "chars",
        _MICROSOFT,
    ),
    Style(
        "noto",
        "noto",
        NpmPackage(
            "@iconify-json/noto",
            "1.2.9",
            "Apache-2.0",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        ),
        "chars",
        _GOOGLE,
    ),
    Style(
        "noto-blob",
        "blob",
        NpmPackage(
            "@iconify-json/noto-v1",
            "1.2.5",
            "Apache-2.0",
            "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        ),
        "label",
        _GOOGLE,
    ),
    Style(
        "fxemoji",
        "fx",
        NpmPackage(
            "@iconify-json/fxemoji",
            "1.2.2",
            "Apache-2.0",
            "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        ),
        "label",
        "FxEmoji, Mozilla Foundation, Apache-2.0",
    ),
    Style(
        "twemoji",
        "twemoji",
        NpmPackage("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
        "chars",
        "Twemoji graphics by Twitter, Inc. and other contributors, CC-BY 4.0, rasterised",
    ),
    Style(
        "emojione2",
        "emojione",
        NpmPackage("@iconify-json/emojione", "1.2.3", "CC-BY-4.0"),
        "label",
        "EmojiOne v2, CC-BY 4.0, rasterised",
    ),
    Style(
        "streamline",
        "streamline",
        NpmPackage("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0"),
        "label",
        "Streamline emojis, CC-BY 4.0, rasterised",
    ),
    Style(
        "openmoji",
        "openmoji",
        NpmPackage("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0"),
        "chars",
        "OpenMoji, CC-BY-SA 4.0, rasterised",
    ),
    Style(
        "emojione1",
        "emojione classic",
        NpmPackage("@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0"),
        "label",
        "EmojiOne v1, CC-BY-SA 4.0, rasterised",
    ),
)

CODE_POINTS = _FLAT
ANIMATION: tuple[NpmPackage, ...] = tuple(
    NpmPackage(f"@lobehub/fluent-emoji-anim-{part}", "1.0.0", "MIT") for part in (1, 2, 3, 4)
)


def style(name: str) -> Style:
    """The style called `name`; `ValueError` lists the names when there is none."""
    for row in STYLES:
        if row.name == name:
            return row
    raise ValueError(f"there is no style {name!r}; the names are {', '.join(row.name for row in STYLES)}")


def fetch(package: NpmPackage, cache: Path, download: bool) -> Path:
    """The package's `.tgz` in `cache`, packed by the npm client when it is not there and `download` is set.

    Raises:
        FileNotFoundError: the file is absent and downloading is not allowed or npm is not installed.
        RuntimeError: npm failed.
        ValueError: the file is not the pinned one.
    """
    path = cache / package.file_name
    if not path.is_file():
        command = f"npm pack {package.requirement}"
        if not download:
            raise FileNotFoundError(
                f"{package.file_name} is not in {cache}: add --download, or run `{command}` there (npm is needed once)"
            )
        if shutil.which("npm") is None:
            raise FileNotFoundError(f"npm is not installed, so `{command}` can't be run; install Node.js with npm")
        cache.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", "--silent", package.requirement], cwd=cache, capture_output=True, text=True, check=False
        )
        if done.returncode or not path.is_file():
            raise RuntimeError(f"`{command}` failed: {(done.stderr or done.stdout).strip()[-400:]}")
    if package.sha256 is not None:
        digest = sha256_of(path)
        if digest != package.sha256:
            raise ValueError(f"{path} has sha256 {digest}, expected {package.sha256}; delete it and fetch it again")
    return path


def read_json(archive: Path, member: str) -> Any:
    """One JSON file of a package.

    Raises:
        ValueError: the package is damaged, or has no such file.
    """
    try:
        with tarfile.open(archive) as tar:
            file = tar.extractfile(f"package/{member}")
            if file is not None:
                return json.load(file)
    except KeyError:
        pass
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} is a damaged package ({error}): delete it and fetch it again") from None
    raise ValueError(f"{archive.name} holds no {member}")


def iterate_files(archive: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(file stem, bytes) of every file of a package with this suffix, in archive order; nothing is written to disk."""
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() and member.name.endswith(suffix) else None
            if file is not None:
                yield Path(member.name).stem, file.read()


def check_license(package: NpmPackage, archive: Path) -> None:
    """Compares the licence that the package states with the table.

    Raises:
        ValueError: they differ.
    """
    if package.name.startswith("@iconify-json/"):
        stated = read_json(archive, "info.json")["license"]["spdx"]
    else:
        stated = read_json(archive, "package.json").get("license")
    if stated != package.license:
        raise ValueError(f"{package.requirement} states licence {stated!r}, expected {package.license!r}: not used")

"""Data cards and notices, written from what a set really holds."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_suite.data.packages import EMOJIBASE, Style
from dit_suite.files import write_text
from dit_suite.options import Options

MIT_TEXT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
Software, and to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of
the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO
THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
DEALINGS IN THE SOFTWARE.
"""

_LICENSES = {
    "MIT": MIT_TEXT,
    "Apache-2.0": "Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0\n"
    "The pictures were rasterised, padded to a square, composited on white and resized.\n",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/ - rasterised and resized.\n",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/ - rasterised and resized; files derived from this "
    "art must carry the same licence.\n",
}


def notice_text(credits: Sequence[tuple[str, str]]) -> str:
    """A NOTICE from (credit line, licence) pairs: every credit once, then each licence once."""
    lines = ["This data set holds or was derived from:", ""]
    lines += [f"- {credit}" for credit in dict.fromkeys(credit for credit, _ in credits)]
    for name in dict.fromkeys(licence for _, licence in credits):
        lines += ["", f"{name}", "-" * len(name), _LICENSES[name].rstrip()]
    return "\n".join(lines) + "\n"


def content_hash(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """sha256 over the chosen columns of all rows: equal builds have equal hashes."""
    digest = hashlib.sha256()
    for row in rows:
        for column in columns:
            value = row[column]
            digest.update(value if isinstance(value, bytes) else str(value).encode())
            digest.update(b"\0")
    return digest.hexdigest()


def count_lines(rows: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    """Markdown rows `| value | count |`, largest first."""
    counted = Counter(row[column] for row in rows)
    return [
        f"| {value} | {count:,} |" for value, count in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))
    ]


def write_emoji_card(
    output: Path, rows: Sequence[Mapping[str, Any]], styles: Sequence[Style], options: Options
) -> None:
    """`README.md` and `NOTICE` of an emoji64 folder."""
    digest = content_hash(rows, ("image", "label", "style", "hex", "split"))
    concepts = len({row["hex"] for row in rows})
    lines = [
        "# emoji64",
        "",
        f"{len(rows):,} pictures of {concepts:,} concepts, {options.size} x {options.size} RGB, lossless WebP.",
        f"Content hash `{digest}`.",
        "",
        "Columns of `images.parquet`: image, label, tags, group, subgroup, style, license, hex, base, split.",
        "Splits: `heldout` holds concepts unseen in every style, `pairs` holds unseen (concept, style) combinations.",
        "Class labels are in `labels.json` (style x group).",
    ]
    for column in ("split", "style", "license", "group"):
        lines += ["", f"| {column} | pictures |", "| --- | --- |", *count_lines(rows, column)]
    lines += ["", "| package | licence |", "| --- | --- |"]
    lines += [f"| {row.package.requirement} ({row.name}) | {row.package.license} |" for row in styles]
    lines += [f"| {EMOJIBASE.requirement} (names, tags, groups) | MIT |", "", "Options:", "", "```"]
    lines += [f"{name}: {value}" for name, value in options.to_dict().items()]
    lines += ["```", "", "Credits and licence texts are in `NOTICE`.", ""]
    write_text(output / "README.md", "\n".join(lines))
    credits = [(row.credit, row.package.license) for row in styles]
    credits.append(("emojibase, Copyright (c) Miles Johnson, MIT; names from Unicode CLDR", "MIT"))
    write_text(output / "NOTICE", notice_text(credits))

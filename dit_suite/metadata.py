"""What goes into every picture file: enough to make the same sample again.

A PNG carries two text chunks: `dit_suite`, a JSON object (see `dit_suite.sampling.sample_record`), and `parameters`,
the text that common viewers of generated pictures understand. The comment of an MP4 or GIF holds the JSON object.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from dit_suite.files import write_atomically

CHUNK = "dit_suite"
CLIP_TAG = "comment"
VERSION = 1


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the pixels."""
    from importlib.metadata import version

    import dit_suite

    names = ("torch", "diffusers", "transformers")
    return {"dit_suite": dit_suite.__version__} | {name: version(name) for name in names}


def parameters_line(record: dict[str, Any]) -> str:
    """The `parameters` text: condition, negative prompt, then comma-separated settings."""
    options = record["options"]
    lines = [str(record["condition"])]
    if options.get("negative_prompt"):
        lines.append(f"Negative prompt: {options['negative_prompt']}")
    settings = {
        "Steps": options.get("num_inference_steps"),
        "Sampler": record.get("scheduler"),
        "CFG scale": options.get("guidance_scale"),
        "Seed": record["seed"] + record["index"],
        "Model hash": record["weights_sha256"][:10],
        "Model": record["model"],
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def write_png(image: Image.Image, path: Path, record: dict[str, Any] | None) -> None:
    """Writes a PNG whole or not at all, with `record` inside (None writes no metadata)."""
    info = PngImagePlugin.PngInfo()
    if record is not None:
        info.add_itxt(CHUNK, json.dumps(record, sort_keys=True, ensure_ascii=False))
        info.add_itxt("parameters", parameters_line(record))
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def parse_record(text: str, origin: str) -> dict[str, Any]:
    """The record in a text chunk or sidecar; `ValueError` says what is wrong with it."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(f"the metadata of {origin} is not valid JSON") from None
    needed = ("technique", "model", "weights_sha256", "seed", "index", "condition", "options")
    missing = [key for key in needed if not isinstance(record, dict) or key not in record]
    if missing:
        raise ValueError(f"the metadata of {origin} has no {missing[0]!r}")
    if record.get("version") != VERSION:
        raise ValueError(f"the metadata of {origin} has version {record.get('version')}, this release reads {VERSION}")
    return record


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object inside a picture, MP4 or GIF that this suite wrote.

    Raises:
        ValueError: the file is no picture or clip, or carries no metadata of this suite.
    """
    path = Path(path)
    kind = path.suffix.lower()
    text = _mp4_tag(path) if kind == ".mp4" else _gif_comment(path) if kind == ".gif" else _png_chunk(path)
    if not text:
        raise ValueError(f"{path} carries no {CHUNK} metadata (was it saved without, or re-encoded?)")
    return parse_record(text, str(path))


def _png_chunk(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(CHUNK)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} can't be read as a picture: {error}") from None


def _gif_comment(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            comment = image.info.get("comment")
    except OSError as error:
        raise ValueError(f"{path} can't be read as a clip: {error}") from None
    return comment.decode("ascii", errors="replace") if comment else None


def _mp4_tag(path: Path) -> str | None:
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    run = subprocess.run(command, capture_output=True, check=False)
    if run.returncode != 0:
        raise ValueError(f"{path} can't be read as a clip: {run.stderr.decode(errors='replace').strip()[:200]}")
    prefix = f"{CLIP_TAG}="
    lines = [line for line in run.stdout.decode("utf-8").split("\n") if line.startswith(prefix)]
    if not lines:
        return None
    escaped, text, position = lines[0][len(prefix) :], [], 0
    while position < len(escaped):  # ffmpeg's metadata format puts a backslash before = ; # \ and newlines
        position += escaped[position] == "\\"
        text.append(escaped[position])
        position += 1
    return "".join(text)

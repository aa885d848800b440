"""Clips on disk: MP4, GIF or PNG frames, written whole or not at all, with the sample's metadata inside.

MP4 is H.264 in yuv420p, which every browser plays; its sides are even (an odd side repeats its last row or column).
"""

import json
import os
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageSequence

from dit_suite.files import write_atomically
from dit_suite.metadata import CLIP_TAG, write_png

SUFFIXES = (".mp4", ".gif")


def check_clip(frames: np.ndarray) -> None:
    """Raises `ValueError` unless `frames` is uint8 `(T, H, W, 3)` with at least one frame."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"a clip is uint8 (frames, height, width, 3), got {frames.dtype} {frames.shape}")


def _text(record: dict[str, Any] | None) -> str | None:
    return None if record is None else json.dumps(record, sort_keys=True, ensure_ascii=True)


def _write_mp4(frames: np.ndarray, path: Path, fps: float, text: str | None) -> None:
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    # One thread and "bitexact": the same frames give the same file on every machine.
    options = ["-f", "mp4", "-crf", "12", "-preset", "slow", "-threads", "1", "-fflags", "+bitexact"]
    options += ["-flags:v", "+bitexact", "-movflags", "+faststart"]
    if text is not None:
        options += ["-metadata", f"{CLIP_TAG}={text}"]
    scratch = path.with_name(path.name + ".mp4")  # imageio looks at the suffix
    writer = imageio.get_writer(
        scratch,
        format="FFMPEG",
        mode="I",
        fps=fps,
        codec="libx264",
        pixelformat="yuv420p",
        quality=None,
        macro_block_size=2,
        ffmpeg_log_level="error",
        output_params=options,
    )
    try:
        with writer:
            for frame in frames:
                writer.append_data(np.ascontiguousarray(frame))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _write_gif(frames: np.ndarray, path: Path, fps: float, text: str | None) -> None:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    extra = {} if text is None else {"comment": text.encode("ascii")}
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **extra)


def write_video(
    frames: np.ndarray, path: str | os.PathLike, *, fps: float = 8, record: dict[str, Any] | None = None
) -> None:
    """Writes a clip; the suffix of `path` chooses the format.

    Args:
        frames: uint8 `(T, H, W, 3)`.
        path: ends in .mp4 or .gif.
        fps: frames per second (GIF keeps hundredths of a second).
        record: what `dit_suite.sampling.sample_record` made; None writes no metadata.

    Raises:
        ValueError: `frames` is no clip, `fps` is not positive, or the suffix is unknown.
    """
    path = Path(path)
    check_clip(frames)
    if fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"a clip is written as {' or '.join(SUFFIXES)}, not {path.suffix!r}")
    write = _write_mp4 if path.suffix.lower() == ".mp4" else _write_gif
    write_atomically(path, lambda temporary: write(frames, temporary, fps, _text(record)))


def write_frames(frames: np.ndarray, folder: str | os.PathLike, record: dict[str, Any] | None = None) -> list[Path]:
    """Writes `0000.png`, `0001.png`, ... into `folder` (made if missing), each with the clip's metadata."""
    check_clip(frames)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04d}.png" for i in range(len(frames))]
    for frame, path in zip(frames, paths, strict=True):
        write_png(Image.fromarray(frame), path, record)
    return paths


def read_video(path: str | os.PathLike) -> np.ndarray:
    """The frames of a clip, uint8 `(T, H, W, 3)`.

    Raises:
        ValueError: the file can't be read as a clip.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".gif":
            with Image.open(path) as image:
                return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
        with imageio.get_reader(path, format="FFMPEG") as reader:
            return np.stack([np.asarray(frame) for frame in reader])
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} can't be read as a clip: {error}") from None

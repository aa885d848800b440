"""Clips on disk: what is written can be read back, with its metadata, and never half."""

import numpy as np
import pytest

from dit_suite.metadata import read_record
from dit_suite.video import read_video, write_frames, write_video

RECORD = {
    "version": 1,
    "technique": "wan",
    "model": "emoji-wan-16x64",
    "weights_sha256": "0" * 64,
    "seed": 3,
    "index": 1,
    "condition": 'a "quoted"; prompt = with # and \\ and\nünïcode ☃',
    "options": {"num_inference_steps": 30},
}


def _clip(height=32, width=48):
    ramp = np.linspace(20, 230, width, dtype=np.float32)[None, None, :, None]
    rise = np.linspace(0, 20, height, dtype=np.float32)[None, :, None, None]
    time = np.arange(5, dtype=np.float32)[:, None, None, None] * 4
    return (ramp + rise - time + np.zeros((5, height, width, 3), np.float32)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_round_trip_of_frames_and_metadata(tmp_path, suffix):
    clip = _clip()
    path = tmp_path / f"clip{suffix}"
    write_video(clip, path, fps=10, record=RECORD)
    back = read_video(path)
    assert back.shape == clip.shape
    assert np.abs(back.astype(int) - clip.astype(int)).mean() < 3
    assert read_record(path) == RECORD
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_mp4_is_the_same_file_each_time_and_pads_odd_sides(tmp_path):
    clip = _clip(31, 45)
    for name in ("a.mp4", "b.mp4"):
        write_video(clip, tmp_path / name)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert read_video(tmp_path / "a.mp4").shape == (5, 32, 46, 3)


def test_frames_as_png_are_exact_and_carry_the_record(tmp_path):
    clip = _clip()
    paths = write_frames(clip, tmp_path / "frames", RECORD | {"options": {}})
    from PIL import Image

    assert [p.name for p in paths] == [f"{i:04d}.png" for i in range(5)]
    assert np.array_equal(np.stack([np.asarray(Image.open(p)) for p in paths]), clip)
    assert read_record(paths[2])["index"] == 1


def test_bad_clips_and_files(tmp_path):
    with pytest.raises(ValueError, match="a clip is uint8"):
        write_video(_clip().astype(np.float32), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="written as .mp4 or .gif"):
        write_video(_clip(), tmp_path / "a.avi")
    with pytest.raises(ValueError, match="fps must be positive"):
        write_video(_clip(), tmp_path / "a.mp4", fps=0)
    write_video(_clip(), tmp_path / "plain.mp4")
    with pytest.raises(ValueError, match="carries no dit_suite metadata"):
        read_record(tmp_path / "plain.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    for read in (read_video, read_record):
        with pytest.raises(ValueError, match="can't be read as a clip"):
            read(tmp_path / "broken.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.mp4", "plain.mp4"]

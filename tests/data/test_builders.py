"""Folders of a user, clips, recorded play, and the command line of prepare_data."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from dit_suite.data import folder as folder_builder
from dit_suite.data.anim64 import AnimationOptions, clip_frames, encode_clip, part_key
from dit_suite.data.folder import FolderOptions, build_folder, centre_crop
from dit_suite.data.freedoom import BUTTONS, SCENARIOS, DepthPlayer, FreedoomOptions, build_freedoom, still_share
from dit_suite.data.packages import read_json
from dit_suite.data.readers import decode_clip, decode_picture, open_source
from dit_suite.data.section import DataSection
from dit_suite.data.tables import read_rows

ROOT = Path(__file__).parents[2]


def _pictures(folder: Path) -> Path:
    for index, name in enumerate(("cats/one.png", "cats/two.jpg", "dogs/three.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (80 * index, 0, 0)).save(folder / name)
    return folder


def test_image_folder_becomes_a_set_that_the_reader_opens(tmp_path):
    build_folder(_pictures(tmp_path / "in"), tmp_path / "out", FolderOptions(size=16, heldout=0.0))
    source = open_source(DataSection(path=str(tmp_path / "out")))
    assert len(source) == 3 and source.sample_shape == (3, 16, 16) and source.num_classes == 2
    assert source.labels.tolist() == [0, 0, 1] and source.captions[2][0] == "dogs"


def test_captions_file_is_used_and_must_be_complete(tmp_path):
    folder = _pictures(tmp_path / "in")
    lines = [{"file": "cats/one.png", "caption": "a cat"}, {"file": "cats/two.jpg", "caption": "two cats"}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"no caption for 1 of 3 files, such as dogs/three.png"):
        build_folder(folder, tmp_path / "out", FolderOptions(size=16))
    lines.append({"file": "dogs/three.png", "caption": "a dog"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = read_rows(build_folder(folder, tmp_path / "out", FolderOptions(size=16)))
    assert [row["label"] for row in rows] == ["a cat", "two cats", "a dog"]
    (folder / "captions.jsonl").write_text(json.dumps({"file": "cats/one.png", "caption": 3}))
    with pytest.raises(ValueError, match="line 1"):
        build_folder(folder, tmp_path / "out", FolderOptions(size=16))
    (folder / "captions.jsonl").write_text("{broken")
    with pytest.raises(ValueError, match="line 1"):
        build_folder(folder, tmp_path / "out", FolderOptions(size=16))


def test_bad_folders_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        build_folder(tmp_path / "none", tmp_path / "out", FolderOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        build_folder(tmp_path / "empty", tmp_path / "out", FolderOptions())
    folder = _pictures(tmp_path / "in")
    (folder / "cats/broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ValueError, match=r"broken.png can't be read as a picture"):
        build_folder(folder, tmp_path / "out", FolderOptions(size=16))
    assert not (tmp_path / "out").exists()
    said = []
    build_folder(folder, tmp_path / "out", FolderOptions(size=16, skip_broken=True), said.append)
    assert len(read_rows(tmp_path / "out/images.parquet")) == 3 and "broken.png" in said[0]


def test_killed_folder_build_goes_on_where_it_was(tmp_path, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    for index, picture in enumerate(noise):
        Image.fromarray(picture).save(source / f"item_{index:03d}.png")
    options = FolderOptions(size=8)
    build_folder(source, tmp_path / "whole", options)
    dying = (
        "import os, signal, sys; from pathlib import Path; from dit_suite.data import folder\n"
        "convert, calls = folder._picture, []\n"
        "def counted(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 200: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return convert(*arguments)\n"
        "folder._picture = counted\n"
        "folder.build_folder(Path(sys.argv[1]), Path(sys.argv[2]), folder.FolderOptions(size=8))\n"
    )
    command = [sys.executable, "-c", dying, str(source), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=120).returncode == -signal.SIGKILL
    assert not (tmp_path / "out/images.parquet").exists()
    assert len(list((tmp_path / "out/parts").glob("images-*.parquet"))) == 1
    convert, converted = folder_builder._picture, []

    def counted(path, options):
        converted.append(path.name)
        return convert(path, options)

    monkeypatch.setattr(folder_builder, "_picture", counted)
    build_folder(source, tmp_path / "out", options)
    assert len(converted) == 300 - 128 and converted[0] == "item_128.png"
    for name in ("images.parquet", "README.md", "labels.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # another split needs no new pictures; another file needs its part only; a part without files goes
    build_folder(source, tmp_path / "out", FolderOptions(size=8, salt="other"))
    assert len(converted) == 172
    Image.new("RGB", (8, 8)).save(source / "item_140.png")
    build_folder(source, tmp_path / "out", options)
    assert len(converted) == 172 + 128
    for path in sorted(source.iterdir())[100:]:
        path.unlink()
    assert len(read_rows(build_folder(source, tmp_path / "out", options))) == 100
    assert len(list((tmp_path / "out/parts").iterdir())) == 1


def test_packages_of_clips_are_kept_when_others_are_chosen(tmp_path):
    archive = tmp_path / "a.tgz"
    archive.write_bytes(b"1234")
    one, all_four = AnimationOptions(parts=(1,)), AnimationOptions()
    assert part_key(one, "p==1", archive) == part_key(all_four, "p==1", archive)
    assert part_key(one, "p==1", archive) != part_key(AnimationOptions(parts=(1,), size=32), "p==1", archive)


def test_video_folder_becomes_clips(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    frames = np.stack([np.full((32, 48, 3), 10 * k, np.uint8) for k in range(20)])
    iio.imwrite(folder / "fade_1.mp4", frames, fps=10, macro_block_size=16)
    build_folder(folder, tmp_path / "out", FolderOptions(size=16, every=2, frames=8, heldout=0.0))
    row = read_rows(tmp_path / "out/clips.parquet")[0]
    assert row["num_frames"] == 8 and row["label"] == "fade"
    clip = decode_clip(row["clip"], "clip").float().mean((1, 2, 3))
    assert clip.shape == (8,) and (clip.diff() > 12).all()


def test_a_clip_keeps_its_pace_where_nothing_moves(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    grey = [40] * 6 + [200] * 6
    frames = np.stack([np.full((32, 32, 3), value, np.uint8) for value in grey])
    iio.imwrite(folder / "blink.mp4", frames, fps=10, macro_block_size=16)
    build_folder(folder, tmp_path / "out", FolderOptions(size=16, every=1, heldout=0.0))
    row = read_rows(tmp_path / "out/clips.parquet")[0]
    clip = decode_clip(row["clip"], "clip", row["num_frames"]).float().mean((1, 2, 3))
    assert len(clip) == row["num_frames"] == 12
    assert (clip[:6] < 80).all() and (clip[6:] > 160).all()


def test_pictures_are_upright_and_on_white(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    halves = Image.new("RGB", (16, 16), "white")
    halves.paste("black", (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left half is then the upper one
    halves.save(folder / "a.png", exif=exif)
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(folder / "b.png")
    build_folder(folder, tmp_path / "out", FolderOptions(size=16, heldout=0.0))
    turned, clear = (decode_picture(row["image"], "row") for row in read_rows(tmp_path / "out/images.parquet"))
    assert turned[:, :7].max() == 0 and turned[:, 9:].min() == 255
    assert clear.min() == 255


def test_a_damaged_package_is_named(tmp_path):
    path = tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__, "package/other.json")
    with pytest.raises(ValueError, match=r"a.tgz holds no icons.json"):
        read_json(path, "icons.json")
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"a.tgz is a damaged package"):
        read_json(path, "icons.json")


def test_centre_crop_keeps_the_middle():
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200
    crop = centre_crop(Image.fromarray(wide), 20)
    assert crop.shape == (20, 20, 3) and crop[:, 2:-2].min() > 180


def test_clips_keep_every_frame_even_equal_ones():
    frames = [np.full((8, 8, 3), 50 * (k // 2), np.uint8) for k in range(8)]
    buffer = io.BytesIO()
    pictures = [Image.fromarray(np.concatenate([f, np.full((8, 1, 3), i, np.uint8)], 1)) for i, f in enumerate(frames)]
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=42, lossless=True)
    kept, duration = clip_frames(buffer.getvalue(), 16, 2)
    assert len(kept) == 4 and duration == 8 * 42 and kept[0].shape == (16, 16, 3)
    from dit_suite.data.anim64 import _convert

    data, count, _ = _convert(buffer.getvalue(), 16, 1, 100)
    assert count == 8 and len(decode_clip(data, "clip", 8)) == 8
    still = encode_clip([kept[0]] * 3 + [kept[3]], 90, 84)
    whole = decode_clip(still, "clip", 4)
    assert torch.equal(whole[0], whole[2]) and not torch.equal(whole[2], whole[3])
    with pytest.raises(ValueError, match="clip has 2 pictures, which can't be 1 frames"):
        decode_clip(still, "clip", 1)
    exact = decode_clip(encode_clip(kept, 100, 84), "clip").permute(0, 2, 3, 1).numpy()
    assert np.array_equal(exact, np.stack(kept))


def test_player_turns_to_the_deeper_side_near_a_wall():
    depth = np.full((120, 160), 5, np.uint8)
    depth[:, :80] = 9
    player = DepthPlayer(np.random.default_rng(0))
    assert {player.act(depth) for _ in range(10)} == {2} and BUTTONS[2] == (0, 1, 0)
    depth = depth[:, ::-1]
    assert DepthPlayer(np.random.default_rng(0)).act(depth) == 3
    far = DepthPlayer(np.random.default_rng(1))
    actions = [far.act(np.full((120, 160), 100, np.uint8)) for _ in range(400)]
    assert set(actions) == set(range(6)) and np.equal(actions[1:], actions[:-1]).mean() > 0.6


def test_recording_is_deterministic_and_leaves_nothing_behind(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom")
    monkeypatch.chdir(tmp_path)
    options = FreedoomOptions(scenarios=("my_way_home",), frames=80, episode_frames=50)
    paths = [build_freedoom(tmp_path / name, options) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    other = build_freedoom(tmp_path / "c", FreedoomOptions(**{**options.to_kwargs(), "seed": 1}))
    rows, changed = read_rows(paths[0]), read_rows(other)
    assert rows[0]["frames"] != changed[0]["frames"]
    assert [len(row["actions"]) for row in rows] == [50, 30] and rows[0]["episode"] != rows[1]["episode"]
    frames = np.frombuffer(rows[0]["frames"], np.uint8).reshape(-1, 48, 64, 3)
    assert len(frames) == 50 and still_share(frames) < 0.2
    source = open_source(DataSection(kind="actions", path=str(tmp_path / "a"), frames=8, split="all"))
    assert len(source) == 43 + 23 and source.sample_shape == (3, 8, 48, 64)
    assert "Freedoom" in (tmp_path / "a/NOTICE").read_text()


def test_every_level_on_offer_comes_with_vizdoom_and_can_be_recorded(tmp_path):
    """The small health-gathering room is another level than the maze of the same name; both are on offer."""
    vizdoom = pytest.importorskip("vizdoom")
    assert all((Path(vizdoom.scenarios_path) / f"{name}.cfg").is_file() for name in SCENARIOS)
    rooms = "health_gathering", "health_gathering_supreme"
    path = build_freedoom(tmp_path, FreedoomOptions(scenarios=rooms, frames=12, episode_frames=12))
    rows = read_rows(path)
    assert [row["scenario"] for row in rows] == list(rooms)
    first, second = (np.frombuffer(row["frames"], np.uint8).astype(int) for row in rows)
    assert np.abs(first - second).mean() > 2


def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match="scenarios must be one of"):
        FreedoomOptions(scenarios=("my_own.wad",))


def test_command_line_reports_bad_input_in_one_line(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), "emoji64"]
    command += ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and "--download" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()

"""Sources: what they read, and what they refuse before any work."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dit_suite.evaluation.sources import FolderSource, NpzSource, is_statistics_file, open_source
from dit_suite.video import write_video


def test_folder_npz_and_compressed_npz_hold_the_same_pictures(tmp_path, make_squares, make_folder, make_npz):
    pictures = make_squares(12, 0)
    np.savez_compressed(tmp_path / "small.npz", arr_0=pictures)
    places = [make_folder(tmp_path / "run", pictures), make_npz(tmp_path / "all.npz", pictures), tmp_path / "small.npz"]
    for place in places:
        source = open_source(place)
        assert (len(source), source.shape) == (12, (24, 24, 3))
        assert np.array_equal(source.read([3, 0, 11]), pictures[[3, 0, 11]])


def test_an_uncompressed_npz_is_mapped_and_not_read(tmp_path, make_squares, make_npz):
    source = NpzSource(make_npz(tmp_path / "all.npz", make_squares(4, 0)))
    assert isinstance(source.array, np.memmap)


def test_numbered_files_are_ordered_by_number_across_sub_folders(tmp_path, make_squares):
    pictures = make_squares(3, 0)
    for number, place in ((0, "000000.png"), (1, "z/000001.png"), (2, "000002.png")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.fromarray(pictures[number]).save(tmp_path / place)
    assert np.array_equal(FolderSource(tmp_path).read(range(3)), pictures)


def test_the_contact_sheet_of_a_run_is_no_sample(tmp_path, make_squares, make_folder):
    folder = make_folder(tmp_path / "run", make_squares(3, 0))
    Image.new("RGB", (96, 96)).save(folder / "sheet.png")
    with pytest.raises(ValueError, match="sheet.png is 96x96"):
        FolderSource(folder)
    (folder / "run.json").write_text("{}")
    assert len(FolderSource(folder)) == 3


def test_transparency_is_put_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert FolderSource(tmp_path).read([0]).min() == 255


def test_incomplete_and_stale_folders_are_refused(tmp_path, make_squares, make_folder):
    folder = make_folder(tmp_path / "run", make_squares(6, 0))
    with pytest.raises(ValueError, match="holds 6 files, expected 5"):
        FolderSource(folder, expected=5)
    with pytest.raises(ValueError, match="2 samples are missing, the first is 6"):
        FolderSource(folder, expected=8)
    (folder / "000003.png").unlink()
    with pytest.raises(ValueError, match="1 samples are missing, the first is 3"):
        FolderSource(folder)
    (folder / "copy").mkdir()
    Image.fromarray(make_squares(1, 0)[0]).save(folder / "copy" / "000002.png")
    with pytest.raises(ValueError, match="sample 2 twice"):
        FolderSource(folder)


def test_empty_missing_damaged_and_mixed_folders_are_refused(tmp_path, make_squares, make_folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        open_source(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_source(tmp_path / "nowhere")
    damaged = make_folder(tmp_path / "damaged", make_squares(3, 0))
    content = (damaged / "000001.png").read_bytes()
    (damaged / "000001.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="000001.png is damaged"):
        open_source(damaged)
    mixed = make_folder(tmp_path / "mixed", make_squares(2, 0))
    Image.new("RGB", (10, 12)).save(mixed / "000002.png")
    with pytest.raises(ValueError, match="000002.png is 12x10 but 000000.png is 24x24"):
        open_source(mixed)


def test_wrong_npz_files_are_refused(tmp_path, make_squares):
    pictures = make_squares(4, 0)
    np.savez(tmp_path / "key.npz", images=pictures)
    np.savez(tmp_path / "float.npz", arr_0=pictures / 255)
    np.savez(tmp_path / "nchw.npz", arr_0=pictures.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "samples_5x24x24x3.npz", arr_0=pictures)
    np.savez(tmp_path / "none.npz", arr_0=pictures[:0])
    (tmp_path / "text.npz").write_text("no zip")
    whole = (tmp_path / "key.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name, words in (
        ("key.npz", "no sample npz.*no arr_0"),
        ("float.npz", "float64"),
        ("nchw.npz", "expected uint8"),
        ("samples_5x24x24x3.npz", "its name denies"),
        ("none.npz", "no samples"),
        ("text.npz", "no sample npz"),
        ("cut.npz", "no sample npz"),
    ):
        with pytest.raises(ValueError, match=words):
            open_source(tmp_path / name)
    with pytest.raises(ValueError, match="holds 4 samples, expected 9"):
        NpzSource(_rewritten(tmp_path, pictures), expected=9)


def _rewritten(folder, pictures):
    path = folder / "samples_4x24x24x3.npz"
    np.savez(path, arr_0=pictures)
    return path


def test_parquet_by_split(tmp_path, make_squares):
    pictures, encoded = make_squares(4, 0), []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="WEBP", lossless=True)
        encoded.append(buffer.getvalue())
    table = pa.table({"image": encoded, "split": ["train", "heldout", "train", "pairs"]})
    pq.write_table(table, tmp_path / "set.parquet")
    assert np.array_equal(open_source(tmp_path / "set.parquet").read(range(4)), pictures)
    assert np.array_equal(open_source(f"{tmp_path}/set.parquet:heldout+pairs").read(range(2)), pictures[[1, 3]])
    with pytest.raises(ValueError, match="no split 'test'; it has heldout, pairs, train"):
        open_source(f"{tmp_path}/set.parquet:test")
    pq.write_table(pa.table({"image": [b"no picture"]}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="picture 0 .* damaged"):
        open_source(tmp_path / "bad.parquet")


def test_clips_are_read_whole(tmp_path):
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    frames[..., 0] = np.arange(5)[:, None, None] * 50
    write_video(frames, tmp_path / "000000.gif")
    source = FolderSource(tmp_path, clips=True)
    assert source.shape == (5, 16, 16, 3)
    assert np.abs(source.read([0])[0].astype(int) - frames).max() <= 4


def test_statistics_files_are_told_from_samples(tmp_path, make_squares, make_npz):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert is_statistics_file(tmp_path / "stats.npz")
    assert not is_statistics_file(make_npz(tmp_path / "all.npz", make_squares(2, 0)))
    assert not is_statistics_file(tmp_path)

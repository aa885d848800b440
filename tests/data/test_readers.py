"""Batches from tables: values, windows, alignment, captions, and clear errors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dit_suite.data.captions import CaptionStates, all_captions, captions_of, save_states
from dit_suite.data.draws import Draws
from dit_suite.data.emoji64 import SCHEMA, lossless_webp
from dit_suite.data.labels import LabelTable
from dit_suite.data.procedural import shapes_set, sprites_set
from dit_suite.data.readers import ActionWindows, ClipRows, ImageRows, open_source, pick_caption, shift_on_white
from dit_suite.data.section import DataSection
from dit_suite.data.tables import read_rows, write_table
from dit_suite.files import replacing_folder

FIXTURE = Path(__file__).parents[1] / "fixtures/emoji.parquet"


def _draws(count: int, step: int = 0) -> Draws:
    return Draws(0, step, torch.arange(count))


@pytest.fixture
def folder(tmp_path) -> Path:
    """The fixture as a data set folder with a label table."""
    rows = read_rows(FIXTURE)
    write_table(tmp_path / "images.parquet", rows, SCHEMA, {})
    LabelTable(tuple(sorted({row["style"] for row in rows})), tuple(sorted({row["group"] for row in rows}))).save(
        tmp_path
    )
    return tmp_path


def test_images_come_with_labels_and_captions(folder):
    source = open_source(DataSection(kind="images", path=str(folder), split="train"))
    rows = [row for row in read_rows(FIXTURE) if row["split"] == "train"]
    assert len(source) == len(rows) and source.sample_shape == (3, 64, 64)
    batch = source.fetch(torch.tensor([5, 0]), _draws(2))
    from dit_suite.data.readers import decode_picture

    expected = decode_picture(rows[5]["image"], "row").float() / 127.5 - 1
    assert torch.equal(batch["samples"][0], expected)
    table = LabelTable.load(folder)
    assert batch["class_labels"].tolist() == [table.id_of(rows[k]["style"], rows[k]["group"]) for k in (5, 0)]
    assert batch["captions"][0] in captions_of(rows[5])
    assert source.class_names[0] == f"{table.styles[0]}/{table.groups[0]}"


def test_splits_and_styles_select_rows(folder):
    everything = open_source(DataSection(path=str(folder), split="all"))
    parts = [open_source(DataSection(path=str(folder), split=name)) for name in ("train", "heldout", "pairs")]
    assert len(everything) == 172 == sum(map(len, parts))
    noto = open_source(DataSection(path=str(folder), split="all", styles=("noto",), size=16))
    assert len(noto) == 28 and noto.sample_shape == (3, 16, 16)


def test_chosen_groups_and_styles_narrow_the_classes(folder):
    section = DataSection(path=str(folder), split="all", styles=("noto", "fluent-3d"), groups=("food-drink",))
    source = open_source(section)
    rows = [row for row in read_rows(FIXTURE) if row["group"] == "food-drink" and row["style"] in ("fluent-3d", "noto")]
    assert len(source) == len(rows) > 0
    assert source.num_classes == 2 and source.class_names == {0: "fluent-3d/food-drink", 1: "noto/food-drink"}
    assert source.labels.tolist() == [int(row["style"] == "noto") for row in rows]
    with pytest.raises(ValueError, match="no group 'cutlery'; it has .*food-drink"):
        open_source(DataSection(path=str(folder), groups=("cutlery",)))
    with pytest.raises(ValueError, match="no style 'emojione'"):
        open_source(DataSection(path=str(folder), styles=("emojione",)))
    with pytest.raises(ValueError, match="no rows in split 'test' with style noto and group food-drink"):
        open_source(DataSection(path=str(folder), split="test", styles=("noto",), groups=("food-drink",)))
    table = LabelTable.load(folder)
    assert table.narrowed() == table
    with pytest.raises(ValueError, match="the label table has no group 'cutlery'"):
        table.narrowed(groups=("cutlery",))


def test_errors_are_clear(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare_data.py"):
        open_source(DataSection(path=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="no rows in split 'test'"):
        open_source(DataSection(path=str(folder), split="test"))
    with pytest.raises(ValueError, match="data.kind must be one of"):
        open_source(DataSection(kind="pictures"))
    rows = read_rows(FIXTURE)[:3]
    rows[1]["image"] = b"not a picture"
    rows[1]["split"] = rows[0]["split"] = "train"
    broken = tmp_path / "broken"
    write_table(broken / "images.parquet", rows, SCHEMA, {})
    with pytest.raises(ValueError, match="row 1 can't be read as a picture"):
        open_source(DataSection(path=str(broken), split="all"))
    (broken / "images.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        open_source(DataSection(path=str(broken)))


def test_shift_fills_with_white():
    pixels = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    moved = shift_on_white(pixels, _draws(64), 2)
    white_rows = (moved[:, 0] == 255).all(dim=2).sum(dim=1)
    white_columns = (moved[:, 0] == 255).all(dim=1).sum(dim=1)
    assert set(white_rows.tolist()) == set(white_columns.tolist()) == {0, 1, 2}
    picture = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    for step in range(20):
        shifted = shift_on_white(picture, _draws(1, step), 1)
        inner = shifted[0, 0, 1:-1, 1:-1].long()
        assert len({int(v) for v in (inner - picture[0, 0, 1:-1, 1:-1].long()).flatten()}) == 1


def test_flip_turns_half_of_the_pictures():
    picture = torch.zeros(200, 3, 2, 2, dtype=torch.uint8)
    picture[..., 0] = 255
    source = ImageRows(picture, DataSection(flip=True))
    turned = source.fetch(torch.arange(200), _draws(200))["samples"][:, 0, 0, 1] > 0
    assert 70 < int(turned.sum()) < 130


def test_caption_odds():
    assert pick_caption(("a", "b", "c"), (0.5, 0.5, 0.0), 0.49) == "a"
    assert pick_caption(("a", "b", "c"), (0.5, 0.5, 0.0), 0.51) == "b"
    assert pick_caption(("a",), (0.0, 1.0), 0.3) == "a"
    row = {"label": "red apple", "style": "fluent-3d", "tags": ["apple", "fruit", "food"]}
    assert captions_of(row) == ("red apple", "red apple, 3d style", "red apple, fruit, food")
    assert all_captions([row]) == ["", "red apple", "red apple, 3d style"]


@pytest.mark.parametrize(("storage", "tolerance"), [("float16", 2e-3), ("int8", 0.02)])
def test_caption_states_round_trip(storage, tolerance, tmp_path):
    generator = torch.Generator().manual_seed(0)
    captions, states = ["", "red apple"], [torch.randn(n, 16, generator=generator) for n in (2, 5)]
    path = tmp_path / "captions.safetensors"
    save_states(path, captions, states, storage)
    cached = CaptionStates(path, max_length=8)
    found, mask = cached.lookup(["red apple", "", "red apple"])
    assert mask.tolist() == [[1] * 5 + [0] * 3, [1] * 2 + [0] * 6, [1] * 5 + [0] * 3]
    assert (found[0, :5] - states[1]).abs().max() < tolerance and found[0, 5:].abs().max() == 0
    with pytest.raises(ValueError, match="'pear' has no cached states"):
        cached.lookup(["pear"])
    with pytest.raises(FileNotFoundError, match="prepare_data.py captions"):
        CaptionStates(tmp_path / "none.safetensors")
    path.write_bytes(b"12345678 nothing")
    with pytest.raises(ValueError, match="not a caption state file"):
        CaptionStates(path)


def test_clip_windows_stay_inside_and_short_clips_wrap():
    clips = [torch.full((n, 3, 4, 4), 0, dtype=torch.uint8) for n in (5, 20)]
    for index, clip in enumerate(clips):
        clip[:, 0, 0, 0] = torch.arange(len(clip), dtype=torch.uint8) + 100 * index
    source = ClipRows(clips, DataSection(kind="clips", frames=8, split="all"))
    starts = set()
    for step in range(60):
        samples = source.fetch(torch.tensor([0, 1]), _draws(2, step))["samples"]
        assert samples.shape == (2, 3, 8, 4, 4)
        values = ((samples[:, 0, :, 0, 0] + 1) * 127.5).round().long()
        assert values[0].tolist() == [k % 5 for k in range(8)]
        assert (values[1].diff() == 1).all() and values[1, 0] >= 100 and values[1, -1] < 120
        starts.add(int(values[1, 0]))
    assert starts == set(range(100, 113))


def test_action_windows_are_aligned_and_never_cross_an_episode():
    frames = torch.zeros(12, 3, 2, 2, dtype=torch.uint8)
    frames[:, 0, 0, 0] = torch.arange(12, dtype=torch.uint8)
    actions = torch.arange(12) % 5
    episodes = torch.tensor([0] * 7 + [1] * 5)
    source = ActionWindows(frames, actions, episodes, DataSection(kind="actions", frames=4))
    assert source.starts.tolist() == [0, 1, 2, 3, 7, 8]
    batch = source.fetch(torch.arange(6), _draws(6))
    first = ((batch["samples"][:, 0, :, 0, 0] + 1) * 127.5).round().long()
    for row, start in enumerate(source.starts.tolist()):
        assert first[row].tolist() == list(range(start, start + 4))
        begins = start in (0, 7)
        assert batch["actions"][row, 0] == (-1 if begins else actions[start - 1])
        assert batch["actions"][row, 1:].tolist() == actions[start : start + 3].tolist()
    with pytest.raises(ValueError, match="no episode is as long"):
        ActionWindows(frames, actions, episodes, DataSection(frames=8))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"kind": "sprites", "flip": True}, "flip"),
        ({"kind": "square", "translate": 2}, "translate"),
        ({"kind": "clips", "size": 8}, "size"),
        ({"kind": "actions", "size": 8}, "size"),
    ],
)
def test_settings_that_a_kind_would_not_heed_are_refused(given, name):
    with pytest.raises(ValueError, match=f"data.{name} is for pictures: a set of kind {given['kind']}"):
        open_source(DataSection(count=2, frames=4, **given))


@pytest.mark.parametrize("kind", ["shapes", "sprites", "square"])
def test_procedural_sets_hold_samples_out(kind):
    """No held-out sample is among twice as many training samples; the same split is the same set; no other is there."""

    def samples(split, count=20):
        source = open_source(DataSection(kind=kind, split=split, count=count, size=16, frames=4))
        found = source.fetch(torch.arange(len(source)), _draws(len(source)))["samples"]
        return {row.numpy().tobytes() for row in found}

    train, held_out = samples("train", 40), samples("heldout")
    assert len(held_out) > 15 and samples("heldout") == held_out
    if kind != "square":  # the game has so few states that two of its players may do the same for a while
        assert not train & held_out
    assert not held_out <= train
    with pytest.raises(ValueError, match="is train or heldout, got 'pairs'"):
        samples("pairs")


def test_shapes_and_sprites_look_like_their_captions():
    pixels, labels, captions = shapes_set(32, 24)
    assert labels.tolist() == list(range(16)) * 2 and captions[0] == "red circle" and captions[7] == "yellow square"
    means = pixels.float().mean((2, 3))
    assert all(means[k, 0] > means[k, 1] for k in range(0, 32, 4)) and all(means[k, 2] > means[k, 0] for k in (2, 6))
    clips, _, _ = sprites_set(8, 12, 24)
    darkest = clips.float().mean(2).flatten(2).argmin(-1)
    assert (darkest.diff(dim=1) != 0).any(dim=1).all()
    assert clips.shape == (8, 12, 3, 24, 24) and (clips[:, :, :, 0, 0] > 200).all()


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "set"
    with replacing_folder(target) as part:
        (part / "a").write_text("1")
    with pytest.raises(RuntimeError, match="stop"), replacing_folder(target) as part:
        (part / "b").write_text("2")
        raise RuntimeError("stop")
    assert [path.name for path in target.iterdir()] == ["a"] and len(list(tmp_path.iterdir())) == 1


def test_lossless_storage_is_lossless():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    from dit_suite.data.readers import decode_picture

    assert np.array_equal(decode_picture(lossless_webp(pixels), "x").permute(1, 2, 0).numpy(), pixels)

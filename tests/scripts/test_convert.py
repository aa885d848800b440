"""convert.py end to end: every file format, exit status, and a folder that samples like the fixture says."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file

import dit_suite
from dit_suite.converters import ConversionError, discover, read_checkpoint
from dit_suite.golden import read_fixture, section
from dit_suite.golden.dit import FORWARD_TOLERANCE
from tests.tiny import tiny_vae

ROOT = Path(__file__).parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("convert_script", ROOT / "scripts" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


main = load_script().main


@pytest.fixture(scope="module")
def fixture() -> tuple[dict, dict]:
    return read_fixture(ROOT / "tests" / "golden" / "dit_forward.safetensors")


@pytest.fixture(scope="module")
def weights(fixture: tuple) -> dict[str, torch.Tensor]:
    return section(fixture[0], "state_dict")


def save_bare(weights: dict, folder: Path) -> Path:
    torch.save(weights, folder / "bare.pt")
    return folder / "bare.pt"


def save_old_format(weights: dict, folder: Path) -> Path:
    torch.save(weights, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def save_training(weights: dict, folder: Path) -> Path:
    """What the official training script writes, with another network under `model`."""
    other = {f"module.{key}": value + 1 for key, value in weights.items()}
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    content = {"model": other, "ema": wrapped, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-XL/2")}
    torch.save(content, folder / "training.pt")
    return folder / "training.pt"


def save_safetensors(weights: dict, folder: Path) -> Path:
    save_file(weights, folder / "bare.safetensors")
    return folder / "bare.safetensors"


@pytest.mark.parametrize("save", [save_bare, save_old_format, save_training, save_safetensors])
def test_a_converted_folder_gives_the_official_outputs(save, weights: dict, fixture: tuple, tmp_path: Path) -> None:
    source = save(weights, tmp_path)
    assert main(["--from", "dit", "--num-heads", "4", str(source), str(tmp_path / "out")]) == 0
    pipe = dit_suite.load_pipeline(tmp_path / "out")
    given, expected = section(fixture[0], "input"), section(fixture[0], "output")
    with torch.no_grad():
        sample = pipe.transformer(given["x"], given["t"], given["y"]).sample
    torch.testing.assert_close(sample, expected["sample"], atol=FORWARD_TOLERANCE, rtol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, "out"])


def test_labels_sampler_and_schedule_are_saved(weights: dict, tmp_path: Path) -> None:
    source = save_bare(weights, tmp_path)
    (tmp_path / "names.json").write_text(json.dumps({"3": "tench"}))
    flags = ["--labels", str(tmp_path / "names.json"), "--sampler", "ddpm", "--noise-schedule", "squaredcos_cap_v2"]
    assert main(["--from", "dit", "--num-heads", "4", *flags, str(source), str(tmp_path / "out")]) == 0
    pipe = dit_suite.load_pipeline(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.get_label_ids("tench") == [3]
    assert pipe.scheduler.config.variance_type == "learned_range"
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert pipe("tench", 2, output_type="latent").images.isfinite().all()


def test_a_folder_of_diffusers_own_class_gets_official_numbers(tmp_path: Path) -> None:
    """Weights that diffusers runs with shifted frequencies run here with the official ones."""
    torch.manual_seed(0)
    stock = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=4,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
            if "norm1.emb" in name:
                parameter.copy_(dict(stock.named_parameters())[name.replace("blocks.1", "blocks.0")])
    DiTPipeline(stock, tiny_vae(), DDIMScheduler()).save_pretrained(tmp_path / "stock")
    index = json.loads((tmp_path / "stock" / "model_index.json").read_text())
    index["id2label"] = {"1": "goldfish"}
    (tmp_path / "stock" / "model_index.json").write_text(json.dumps(index))

    assert main(["--from", "dit", str(tmp_path / "stock"), str(tmp_path / "out")]) == 0
    pipe = dit_suite.load_pipeline(tmp_path / "out")
    assert pipe.vae is not None and pipe.get_label_ids("goldfish") == [1]
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([500, 999]), torch.tensor([1, 4])
    with torch.no_grad():
        ours, theirs = pipe.transformer(x, t, y).sample, stock(x, t, y).sample
        assert (ours - theirs).abs().max() > 1e-2
        for block in stock.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
        torch.testing.assert_close(ours, stock(x, t, y).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "position"])
def test_a_key_that_does_not_fit_leaves_no_folder(
    change: str, weights: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled = dict(weights)
    if change == "missing":
        del spoiled["blocks.1.attn.proj.weight"]
    elif change == "unexpected":
        spoiled["blocks.0.attn.q_norm.weight"] = torch.ones(12)
    elif change == "shape":
        spoiled["blocks.1.attn.proj.weight"] = torch.ones(48, 47)
    else:
        spoiled["pos_embed"] = spoiled["pos_embed"] * 1.01
    source = save_bare(spoiled, tmp_path)
    assert main(["--from", "dit", "--num-heads", "4", str(source), str(tmp_path / "out")]) != 0
    message = capsys.readouterr().err
    assert "attn" in message or "pos_embed" in message
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


class Payload:
    """A pickle that would create a file when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Payload(tmp_path / "owned")}, tmp_path / "evil.pt")
    assert main(["--from", "dit", str(tmp_path / "evil.pt"), str(tmp_path / "out")]) == 1
    assert "cannot be read as plain weights" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists() and not (tmp_path / "out").exists()


def test_a_full_folder_is_not_overwritten(weights: dict, tmp_path: Path) -> None:
    source = save_bare(weights, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep")
    assert main(["--from", "dit", "--num-heads", "4", str(source), str(tmp_path / "out")]) == 1
    assert (tmp_path / "out" / "precious.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"x", "must be a .pt"),
        ("a.pt", b"not a checkpoint", "cannot be read"),
        ("a.safetensors", b"not a checkpoint", "cannot be read"),
        ("a.pt", {}, "no state dict"),
        ("a.pt", {"model": {"a": 3}}, "not a tensor"),
    ],
)
def test_unreadable_files(name: str, content, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ConversionError, match=message):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.pt")


def test_list_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(discover()) >= {"dit"}
    with pytest.raises(SystemExit) as usage:
        main(["--from", "dit"])
    assert usage.value.code == 2

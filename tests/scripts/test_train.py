"""scripts/train.py: bad input gets one sentence and leaves nothing behind."""

import pytest
import yaml

from scripts.train import main
from tests.training.conftest import tiny_values


@pytest.fixture
def call(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values(tmp_path / "run")))
    return ["--config", str(path)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.batchsize=3", "run: RunSection has no option 'batchsize'"),
        ("nothing.lr=3", "the config has no key 'nothing'"),
        ("optimizer.lr", "an override looks like key=value"),
        ("optimizer.lr=fast", "optimizer: lr must be float, got 'fast'"),
        ("data.styles=[a", "'data.styles=[a' is not valid YAML: while parsing"),
        ("data.split=pairs", "is train or heldout, got 'pairs'"),
        ("technique=nope", "there is no technique 'nope'"),
        ("model.options.bogus=1", "DiTModel has no option 'bogus'"),
        ("model.options.num_attention_heads=0", "DiTModel can't be built with these options: integer"),
        ("model.options.num_classes=3", "the network has 3 classes, but the data set has 16"),
    ],
)
def test_bad_settings_get_one_sentence(call, tmp_path, capsys, override, message):
    assert main([*call, override]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no config"),
        (b"a: [1", "other.yaml is not valid YAML: while parsing a flow sequence"),
        (b"\xff\xfe\x00", "other.yaml is not valid YAML"),
        (b"- 1", "other.yaml must hold a mapping"),
        (b"name: x", "the config needs 'task'"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, capsys, content, message):
    path = tmp_path / "other.yaml"
    if content is not None:
        path.write_bytes(content)
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_in_the_place_of_the_run_is_refused(call, tmp_path, capsys):
    (tmp_path / "taken").write_text("x")
    assert main([*call, f"run.output={tmp_path / 'taken' / 'run'}"]) == 2
    assert "taken is a file; choose a folder" in capsys.readouterr().err

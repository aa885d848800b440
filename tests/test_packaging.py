"""The wheel: every package in it, `pipelines` only inside `dit_suite`, and a bundled model that opens."""

import importlib
import operator
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dit_suite.grafting

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources (building in place leaves files behind), unpacked."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    ignored = shutil.ignore_patterns("__pycache__", *(p.name for p in (ROOT / "checkpoints").iterdir() if p.is_dir()
                                                      and p.name != "emoji-pixart-64"))  # fmt: skip
    for name in ("dit_suite", "pipelines", "checkpoints"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        place,
        source,
    ]
    subprocess.run(command, check=True, timeout=300, capture_output=True, cwd=place)
    (path,) = place.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(place / "unpacked")
    return place / "unpacked"


def test_package_list_is_complete():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    present = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "dit_suite").rglob("__init__.py")} | {
        "dit_suite.pipelines",
        "dit_suite.bundled",
    }
    assert set(listed) == present


def test_wheel_has_one_top_level_package_and_one_model(wheel):
    tops = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"dit_suite"}
    models = {path.parent.name for path in (wheel / "dit_suite" / "bundled").glob("*/model_index.json")}
    assert models == {"emoji-pixart-64"}
    for name in ("LICENSE", "NOTICE"):
        assert list(wheel.glob(f"*.dist-info/**/{name}"))


def test_wheel_opens_its_model(wheel, tmp_path):
    script = (
        "import importlib.util, dit_suite, sys\n"
        "assert dit_suite.__file__.startswith(sys.argv[1]), dit_suite.__file__\n"
        "pipe = dit_suite.load_pipeline('emoji-pixart-64')\n"
        "assert type(pipe).__module__ == 'dit_suite.pipelines.pipeline_text_to_image'\n"
        "assert importlib.util.find_spec('pipelines') is None\n"
    )
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    result = subprocess.run(
        [sys.executable, "-c", script, str(wheel)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["dit_suite", "dit_suite.grafting"])
def test_public_names_can_be_imported(package):
    module = importlib.import_module(package)
    for name in set(module.__all__) - {"__version__"}:
        assert getattr(module, name).__name__ == name
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no_such_name"):
        operator.attrgetter("no_such_name")(module)


def test_names_that_the_docs_put_into_a_package_are_there():
    text = (ROOT / "docs" / "grafting.md").read_text().replace("\n", " ")
    (sentence,) = re.findall(r"`GraftPlan`, [^.]*? are in `dit_suite\.grafting`", text)
    names = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", sentence)) - {"dit_suite"}
    assert {"GraftPlan", "graft", "detect_operators"} <= names <= set(dit_suite.grafting.__all__)


def test_entry_points_name_things_that_exist():
    """vLLM-Omni finds the sparse plug-ins by these names."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    points = groups["vllm_omni.sparse_attn"]
    assert sorted(points) == ["dit_suite_adaspa", "dit_suite_vmoba"]
    for name, target in points.items():
        module, _, attribute = target.partition(":")
        plugin = getattr(importlib.import_module(module), attribute)
        assert callable(plugin) and attribute == name.removeprefix("dit_suite_")

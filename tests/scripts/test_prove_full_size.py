"""The official layouts behind the full-size proof, checked without their memory."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights

from dit_suite.converters import acdit, dit, pt_dit, tarflow
from dit_suite.models.acdit import ACDiTTransformer3DModel
from dit_suite.models.dit import DiTModel, dit_config
from dit_suite.models.pt_dit import PT_DIT_SIZES, PTDiTTransformer3DModel
from dit_suite.models.tarflow import TarFlowModel

SCRIPT = Path(__file__).parents[2] / "scripts" / "prove_full_size.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prove_full_size", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def empty(layout: dict) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in layout.items()}


@pytest.mark.parametrize("name", ["dit", "pt_dit", "lego", "tarflow", "acdit"])
def test_layouts_have_the_published_sizes(script, name: str) -> None:
    network = script.NETWORKS[name]
    counts = script.count_learned(network.layout())
    assert min(abs(count / 1e6 - network.millions) for count in counts) < 0.06


def test_converted_layouts_are_the_networks(script) -> None:
    """The layouts follow the published descriptions; the converters must turn each into all of our tensors."""
    with init_empty_weights():
        xl = {"num_layers": 28, "num_attention_heads": 18, "block_size": 256}
        pairs = {
            "dit": (dit.rename_from_official, DiTModel(**dit_config("DiT-XL/2"))),
            "pt_dit": (pt_dit.convert_keys, PTDiTTransformer3DModel(**PT_DIT_SIZES["XL"], sample_size=128)),
            "acdit": (acdit.rename_keys, ACDiTTransformer3DModel(**xl)),
            "tarflow": (
                tarflow.to_diffusers_keys,
                TarFlowModel(hidden_size=1024, num_blocks=8, num_layers=8, num_classes=1000),
            ),
        }
    for name, (rename, model) in pairs.items():
        found = {key: tuple(value.shape) for key, value in rename(empty(script.NETWORKS[name].layout())).items()}
        assert found == {key: tuple(value.shape) for key, value in model.state_dict().items()}, name


def test_a_failing_stage_fails_the_proof(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([(0, 1.0, 0.5), (1, 1.0, 0.5)])
    monkeypatch.setattr(script, "run_stage", lambda command: next(results))
    assert not script.prove("dit", tmp_path, memory_gb=1.0)
    monkeypatch.setattr(script, "run_stage", lambda command: (0, 1.0, 2.0))
    assert not script.prove("dit", tmp_path, memory_gb=1.0), "too much memory is a failure"


def test_a_stage_is_measured(script) -> None:
    status, seconds, peak = script.run_stage(["-c", "import sys; block = bytearray(200_000_000); sys.exit(3)"])
    assert status == 3 and seconds > 0 and 0.2 < peak < 2.0

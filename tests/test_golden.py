"""Every golden fixture in tests/golden through the family that answers for it, and the machinery itself."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dit_suite.golden import Family, Result, compare, discover, family_of, read_fixture

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = discover()
FIXTURES = [path for path in sorted(GOLDEN.glob("*.safetensors")) if family_of(path, FAMILIES)]
SMALLEST = {
    family.name: min((p for p in FIXTURES if family_of(p, FAMILIES) is family), key=lambda p: p.stat().st_size)
    for family in FAMILIES
    if any(family_of(p, FAMILIES) is family for p in FIXTURES)
}


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_fixture(path: Path) -> None:
    tensors, config = read_fixture(path)
    results = family_of(path, FAMILIES).check(tensors, config)
    assert results
    assert [result for result in results if not result.passed] == []


def test_every_fixture_has_a_family() -> None:
    assert [path.name for path in sorted(GOLDEN.glob("*.safetensors")) if path not in FIXTURES] == []


@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_a_changed_output_is_noticed(name: str) -> None:
    path = SMALLEST[name]
    tensors, config = read_fixture(path)
    for key, value in tensors.items():
        if key.startswith("output."):
            tensors[key] = ~value if value.dtype == torch.bool else value + 1
    results = family_of(path, FAMILIES).check(tensors, config)
    assert [result for result in results if not result.passed]


def test_the_longest_prefix_wins_and_a_foreign_name_has_no_family() -> None:
    families = (Family("a", ("dit_",), lambda *_: []), Family("b", ("dit_video_",), lambda *_: []))
    assert family_of("x/dit_video_1.safetensors", families).name == "b"
    assert family_of("x/dit_forward.safetensors", families).name == "a"
    assert family_of("x/switch_dit_forward.safetensors", families) is None


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([1.0], [1.0, 2.0], math.inf),
        ([math.nan], [1.0], math.inf),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([math.inf], [1.0], math.inf),
    ],
)
def test_compare(actual: list[float], expected: list[float], error: float) -> None:
    result = compare("x", torch.tensor(actual), torch.tensor(expected), 0.1)
    assert result.error == error
    assert result.passed == (error <= 0.1)


def test_relative_error_is_over_the_largest_magnitude() -> None:
    assert compare("x", torch.tensor([1.0, 9.0]), torch.tensor([0.0, 10.0]), 0.2, relative=True).error == 0.1
    assert not Result("x", math.nan, 1.0).passed


def _main() -> object:
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    try:
        import verify_golden
    finally:
        sys.path.pop(0)
    return verify_golden.main


def test_script_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = _main()
    good = GOLDEN / "dit_forward.safetensors"
    assert main([str(good)]) == 0
    assert "sample" in capsys.readouterr().out

    tensors, config = read_fixture(good)
    tensors["output.sample"] = tensors["output.sample"] + 1e-3
    bad = tmp_path / "dit_wrong.safetensors"
    save_file(tensors, bad, metadata={"config": json.dumps(config)})
    assert main([str(good), str(bad)]) == 1
    assert "FAILED sample" in capsys.readouterr().out

    save_file({"x": torch.zeros(1)}, tmp_path / "dit_no_fixture.safetensors")
    (tmp_path / "dit_garbage.safetensors").write_bytes(b"no safetensors here")
    save_file(tensors, tmp_path / "unknown_name.safetensors", metadata={"config": json.dumps(config)})
    for name in ("dit_no_fixture", "dit_garbage", "unknown_name", "dit_absent"):
        assert main([str(tmp_path / f"{name}.safetensors")]) == 2
        assert name in capsys.readouterr().err

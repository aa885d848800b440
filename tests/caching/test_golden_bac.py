"""The recorded fixtures of the reference implementation."""

from pathlib import Path

import pytest

from dit_suite.golden import read_fixture
from dit_suite.golden.bac import check

FIXTURES = sorted((Path(__file__).resolve().parent.parent / "golden").glob("bac_*.safetensors"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_fixture(path: Path) -> None:
    results = check(*read_fixture(path))
    assert len(results) > 15
    assert [result for result in results if not result.passed] == []

"""What the repository promises of itself: file sizes, tracked tree, and nothing unfinished."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    return [path for path in (ROOT / name.decode() for name in names if name) if path.is_file()]


def test_sizes(tracked):
    assert sum(path.stat().st_size for path in tracked) < 150_000_000
    assert max(path.stat().st_size for path in tracked) < 14_700_000
    for path in tracked:
        if path.suffix == ".py":
            assert len(path.read_text("utf-8").splitlines()) <= 600, path


def test_nothing_unfinished(tracked):
    pattern = re.compile(r"NotImplementedError|\bTODO\b|\bFIXME\b|\bXXX\b|# noqa|type: ignore|except:\s*$")
    for path in tracked:
        if path.suffix == ".py" and path.name != "test_repository.py":
            found = pattern.search(path.read_text("utf-8"))
            assert found is None, f"{path}: {found.group()}"


def test_no_generic_modules(tracked):
    assert not [path for path in tracked if path.name in ("utils.py", "helpers.py", "misc.py")]


def test_readme_names_real_files():
    text = (ROOT / "README.md").read_text("utf-8")
    names = re.findall(r"(?:scripts|configs|docs|checkpoints)/[\w./-]+\.\w+", text)
    assert names
    for name in names:
        assert (ROOT / name).is_file(), name


def test_no_two_packages_import_each_other(tracked):
    """Imports inside functions count."""
    uses = set()
    for path in tracked:
        inside = path.relative_to(ROOT).parts
        if path.suffix == ".py" and inside[0] == "dit_suite" and len(inside) > 2:
            found = re.findall(r"^\s*from dit_suite\.(\w+)\.\w+", path.read_text("utf-8"), re.MULTILINE)
            uses |= {(inside[1], other) for other in found if other != inside[1]}
    assert ("training", "data") in uses
    both = {pair for pair in uses if pair[::-1] in uses and pair[0] < pair[1]}
    assert not both, both

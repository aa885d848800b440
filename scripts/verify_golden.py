"""Recomputes golden fixtures with this project's code and prints the largest error of every output.

    python scripts/verify_golden.py tests/golden/dit_forward.safetensors ...

The family is chosen by the file's name. Exit status: 0 when every output is within tolerance, 1 when one is not, 2 when
a file cannot be read or belongs to no family.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit_suite.golden import Family, discover, family_of, read_fixture  # noqa: E402

"""Options check themselves and give flags, dictionaries and field descriptions."""

import argparse
from dataclasses import FrozenInstanceError, dataclass

import pytest

from dit_suite.options import Options, fields_of, option


@dataclass(frozen=True)
class Sample(Options):
    steps: int = option(20, "number of steps", minimum=1, maximum=100)
    scale: float = option(4.0, "strength in %", minimum=0.0)
    mode: str = option("fast", "how", choices=("fast", "slow"))
    sizes: tuple[int, ...] = option((1, 2), "sizes", minimum=0)
    width: int | None = option(None, "pixels")
    dry: bool = option(False, "do nothing")

    def validate(self) -> None:
        if self.mode == "slow" and self.steps < 5:
            raise ValueError(f"slow mode needs at least 5 steps, got {self.steps}")


def test_round_trip():
    options = Sample(steps=7, scale=2, sizes=[3, 4], width=9)
    assert options.scale == 2.0 and options.sizes == (3, 4)
    assert Sample.from_dict(options.to_dict()) == options
    with pytest.raises(FrozenInstanceError):
        options.steps = 8


def test_flags_round_trip():
    parser = argparse.ArgumentParser()
    Sample.add_arguments(parser)
    args = parser.parse_args(["--steps", "9", "--sizes", "5", "6", "--dry", "--mode", "slow"])
    assert Sample.from_namespace(args) == Sample(steps=9, sizes=(5, 6), dry=True, mode="slow")
    assert Sample.from_namespace(parser.parse_args([])) == Sample()
    assert Sample.from_namespace(parser.parse_args(["--dry", "false"])).dry is False
    text = " ".join(parser.format_help().split())
    assert "number of steps (default: 20)" in text and "strength in % (default: 4.0)" in text
    assert "pixels (default" not in text  # no default to tell


def test_other_defaults_than_the_class_has():
    """A flag wins over them, the help tells them, and values that do not fit are refused."""
    defaults = Sample().changed({"steps": 9, "width": 5, "sizes": [3]})
    assert defaults == Sample(steps=9, width=5, sizes=(3,))
    parser = argparse.ArgumentParser()
    Sample.add_arguments(parser, defaults)
    assert Sample.from_namespace(parser.parse_args([]), defaults) == defaults
    found = Sample.from_namespace(parser.parse_args(["--steps", "20", "--scale", "1"]), defaults)
    assert found == Sample(steps=20, scale=1.0, width=5, sizes=(3,))
    text = " ".join(parser.format_help().split())
    assert "number of steps (default: 9)" in text and "pixels (default: 5)" in text and "(default: 4.0)" in text
    for values, message in (({"speed": 1}, "has no option 'speed'"), ({"steps": 0}, "steps must be between")):
        with pytest.raises(ValueError, match=message):
            defaults.changed(values)


def test_fields_describe_controls():
    steps, scale, mode, sizes, width, dry = fields_of(Sample)
    assert (steps.kind, steps.minimum, steps.maximum, steps.flag) == (int, 1, 100, "--steps")
    assert mode.choices == ("fast", "slow") and sizes.is_tuple and width.optional and dry.kind is bool


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be between 1 and 100, got 0"),
        ({"steps": 2.5}, "steps must be int, got 2.5"),
        ({"steps": True}, "steps must be int, got True"),
        ({"steps": None}, "steps must be int, got None"),
        ({"scale": -1}, "scale must be at least 0, got -1.0"),
        ({"scale": float("nan")}, "scale must be a number"),
        ({"mode": "odd"}, "mode must be one of fast, slow, got 'odd'"),
        ({"sizes": (1, -1)}, "sizes must be at least 0, got -1"),
        ({"sizes": "12"}, "sizes must be a list of int, got '12'"),
        ({"mode": "slow", "steps": 4}, "slow mode needs at least 5 steps, got 4"),
        ({"speed": 1}, "Sample has no option 'speed'"),
    ],
)
def test_bad_values_get_one_sentence(values, message):
    with pytest.raises(ValueError, match=message):
        Sample.from_dict(values)


def test_unsupported_types_are_a_programming_error():
    @dataclass(frozen=True)
    class Odd(Options):
        table: dict = option(None, "a dictionary")

    with pytest.raises(TypeError, match="an option may be"):
        fields_of(Odd)

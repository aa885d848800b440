"""Options are written once: a frozen dataclass that checks itself, and gives flags, UI controls and metadata."""

import argparse
import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any

_SCALARS = (bool, int, float, str)


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple | None = None,
    advanced: bool = False,
    label: str | None = None,
) -> Any:
    """A dataclass field with the text and limits that its flag, its UI control and its validation share.

    Args:
        default: value when nothing is given.
        help: one line for `--help` and for the control's tooltip.
        minimum, maximum: inclusive limits (each element of a tuple is held to them).
        choices: accepted values.
        advanced: the UI folds the control away.
        label: what the UI calls it (default: the field's name in words).
    """
    limits = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices, "advanced": advanced}
    return field(default=default, metadata=limits | {"label": label})


@dataclass(frozen=True)
class OptionField:
    """What a flag or a UI control needs to know about one option."""

    name: str
    kind: type
    is_tuple: bool
    optional: bool
    default: Any
    help: str
    minimum: float | None
    maximum: float | None
    choices: tuple | None
    advanced: bool
    label: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> Any:
        """The value that `text` stands for: "none" is None, parts of a tuple are separated by `;`.

        Raises:
            ValueError: the text is no such value.
        """
        if self.optional and text.lower() == "none":
            return None
        if self.is_tuple:
            return tuple(self._parse_one(part.strip()) for part in text.split(";") if part.strip())
        return self._parse_one(text)

    def _parse_one(self, text: str) -> Any:
        try:
            return _parse_bool(text) if self.kind is bool else self.kind(text)
        except (ValueError, argparse.ArgumentTypeError):
            raise ValueError(f"{self.name} must be {self.kind.__name__}, got {text!r}") from None


def _field_type(annotation: Any) -> tuple[type, bool, bool]:
    """Splits `int`, `int | None` or `tuple[int, ...] | None` into (scalar type, is a tuple, may be None)."""
    optional = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [a for a in typing.get_args(annotation) if a is not type(None)]
        optional = len(members) < len(typing.get_args(annotation))
        (annotation,) = members
    is_tuple = typing.get_origin(annotation) is tuple
    if is_tuple:
        annotation = typing.get_args(annotation)[0]
    if annotation not in _SCALARS:
        raise TypeError(f"an option may be bool, int, float, str, a tuple of these, or None, not {annotation!r}")
    return annotation, is_tuple, optional


def fields_of(cls: type["Options"]) -> tuple[OptionField, ...]:
    """The options of a class in their order of definition."""
    hints = typing.get_type_hints(cls)
    found = []
    for item in dataclasses.fields(cls):
        kind, is_tuple, optional = _field_type(hints[item.name])
        limits = {key: item.metadata.get(key) for key in ("minimum", "maximum", "choices")}
        found.append(
            OptionField(
                name=item.name,
                kind=kind,
                is_tuple=is_tuple,
                optional=optional,
                default=item.default,
                help=item.metadata.get("help", ""),
                advanced=bool(item.metadata.get("advanced")),
                label=item.metadata.get("label") or item.name.replace("_", " ").capitalize(),
                **limits,
            )
        )
    return tuple(found)


def _checked_scalar(spec: OptionField, value: Any) -> Any:
    if spec.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wrong_type = not isinstance(value, spec.kind) or (spec.kind is not bool and isinstance(value, bool))
    if wrong_type:
        raise ValueError(f"{spec.name} must be {spec.kind.__name__}, got {value!r}")
    if spec.choices is not None and value not in spec.choices:
        raise ValueError(f"{spec.name} must be one of {', '.join(map(str, spec.choices))}, got {value!r}")
    if spec.kind is float and value != value:
        raise ValueError(f"{spec.name} must be a number, got nan")
    low, high = spec.minimum, spec.maximum
    if (low is not None and value < low) or (high is not None and value > high):
        if low is not None and high is not None:
            accepted = f"between {low:g} and {high:g}"
        else:
            accepted = f"at least {low:g}" if low is not None else f"at most {high:g}"
        raise ValueError(f"{spec.name} must be {accepted}, got {value!r}")
    return value


def _checked(spec: OptionField, value: Any) -> Any:
    if value is None:
        if not spec.optional:
            raise ValueError(f"{spec.name} must be {spec.kind.__name__}, got None")
        return None
    if not spec.is_tuple:
        return _checked_scalar(spec, value)
    if isinstance(value, str) or not isinstance(value, (tuple, list)):
        raise ValueError(f"{spec.name} must be a list of {spec.kind.__name__}, got {value!r}")
    return tuple(_checked_scalar(spec, item) for item in value)


def _parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"true or false expected, got {text!r}")


@dataclass(frozen=True)
class Options:
    """Base of every options dataclass. Fields are checked when an instance is made (`ValueError` names the value)."""

    def __post_init__(self) -> None:
        for spec in fields_of(type(self)):
            object.__setattr__(self, spec.name, _checked(spec, getattr(self, spec.name)))
        self.validate()

    def validate(self) -> None:
        """Cross-field checks of a subclass; raises `ValueError` with one sentence."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; tuples become lists."""
        values = {spec.name: getattr(self, spec.name) for spec in fields_of(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for a call whose names equal the field names."""
        return {spec.name: getattr(self, spec.name) for spec in fields_of(type(self))}

    @classmethod
    def from_dict(cls, values: typing.Mapping[str, Any]) -> typing.Self:
        """Builds the options; an unknown key raises `ValueError` naming the accepted ones."""
        known = [spec.name for spec in fields_of(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__} has no option {unknown[0]!r}; it accepts {', '.join(known)}")
        return cls(**values)

    def changed(self, values: typing.Mapping[str, Any]) -> typing.Self:
        """These options with some values replaced; errors as for `from_dict`."""
        return type(self).from_dict({**self.to_dict(), **values})

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, defaults: "Options | None" = None) -> None:
        """Adds one flag per field. A flag that is not given leaves no trace in the namespace.

        Args:
            parser: what gets the flags.
            defaults: options of this class whose values the help tells, where they are not the class's own.
        """
        for spec in fields_of(cls):
            kind = _parse_bool if spec.kind is bool else spec.kind
            extra: dict[str, Any] = {"nargs": "*"} if spec.is_tuple else {}
            if spec.kind is bool and not spec.is_tuple:
                extra = {"nargs": "?", "const": True}
            if spec.choices is not None:
                extra["choices"] = spec.choices
            default = spec.default if defaults is None else getattr(defaults, spec.name)
            text = spec.help if default == spec.default else re.sub(r" \(default: [^)]*\)", "", spec.help)
            if default not in (None, "") and "(default: " not in text:
                text = f"{text} (default: {default})"
            given = {"dest": spec.name, "type": kind, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
            parser.add_argument(spec.flag, **given, **extra)

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace, defaults: "Options | None" = None) -> typing.Self:
        """Builds the options from the flags that were given; the rest comes from `defaults`, else from the class."""
        given = {spec.name: vars(namespace)[spec.name] for spec in fields_of(cls) if spec.name in namespace}
        return cls(**given) if defaults is None else defaults.changed(given)

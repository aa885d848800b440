"""Gradio controls from option dataclasses: one control per field, with the field's limits and help text."""

from typing import Any

import gradio as gr

from dit_suite.options import OptionField, Options, fields_of


def control_for(spec: OptionField, default: Any, limit: float | None = None) -> gr.components.Component:
    """The control of one option.

    Args:
        spec: the option.
        default: the value it shows at first.
        limit: a lower maximum that this server sets.
    """
    label = spec.label
    maximum = spec.maximum if limit is None else min(limit, spec.maximum or limit)
    if spec.is_tuple:
        text = "" if default is None else ", ".join(map(str, default))
        return gr.Textbox(value=text, label=label, info=f"{spec.help} (comma-separated)")
    if spec.choices is not None:
        return gr.Dropdown(list(spec.choices), value=default, label=label, info=spec.help)
    if spec.kind is bool:
        return gr.Checkbox(value=default, label=label, info=spec.help)
    if spec.kind is str:
        return gr.Textbox(value=default or "", label=label, info=spec.help)
    if spec.optional:  # not a Number: the page turns an empty one into 0
        text = "" if default is None else str(default)
        return gr.Textbox(value=text, label=label, info=spec.help, placeholder="default", max_lines=1)
    bounds = {"minimum": spec.minimum, "maximum": maximum}
    if None in bounds.values():
        step = {"precision": 0} if spec.kind is int else {"step": 0.01}
        return gr.Number(value=default, label=label, info=spec.help, **bounds, **step)
    step = 1 if spec.kind is int else 0.05 if spec.maximum - spec.minimum <= 2 else 0.1
    return gr.Slider(value=default, step=step, label=label, info=spec.help, **bounds)


def within(options: Options, limits: dict[str, float]) -> Options:
    """The options with values beyond a limit of the server lowered to it."""
    values = options.to_dict()
    return options.changed(
        {name: limit for name, limit in limits.items() if values.get(name) is not None and values[name] > limit}
    )


def build_controls(defaults: Options, limits: dict[str, float]) -> list[gr.components.Component]:
    """Controls of every option, in order, that show `defaults`; the ones marked advanced sit in a folded panel."""
    specs, shown = fields_of(type(defaults)), within(defaults, limits)

    def controls(advanced: bool) -> dict[str, gr.components.Component]:
        chosen = [spec for spec in specs if spec.advanced is advanced]
        return {spec.name: control_for(spec, getattr(shown, spec.name), limits.get(spec.name)) for spec in chosen}

    made = controls(advanced=False)
    if any(spec.advanced for spec in specs):
        with gr.Accordion("Advanced", open=False):
            made |= controls(advanced=True)
    return [made[spec.name] for spec in specs]


def options_from_values(cls: type[Options], values: list[Any]) -> Options:
    """The options that the controls show.

    Raises:
        ValueError: a value does not fit its option.
    """
    given = {}
    for spec, value in zip(fields_of(cls), values, strict=True):
        if spec.is_tuple:
            parts = [part for part in str(value or "").replace(",", " ").split() if part]
            given[spec.name] = _numbers(spec, parts) if parts or not spec.optional else None
        elif spec.optional and (value is None or str(value).strip() == ""):
            given[spec.name] = None
        elif spec.kind is int and isinstance(value, float) and value.is_integer():
            given[spec.name] = int(value)
        elif spec.optional and isinstance(value, str):
            given[spec.name] = spec.parse(value.strip())
        else:
            given[spec.name] = value
    return cls(**given)


def _numbers(spec: OptionField, parts: list[str]) -> tuple:
    try:
        return tuple(spec.kind(part) for part in parts)
    except ValueError:
        raise ValueError(f"{spec.name} must be {spec.kind.__name__}s with commas between, got {parts}") from None


def values_from_options(options: Options) -> list[Any]:
    """What the controls must show for these options, in the order of `build_controls`."""
    values = []
    for spec in fields_of(type(options)):
        value = getattr(options, spec.name)
        if spec.is_tuple:
            value = "" if value is None else ", ".join(map(str, value))
        elif spec.optional and spec.kind is not bool and spec.choices is None:
            value = "" if value is None else str(value)
        values.append(value)
    return values

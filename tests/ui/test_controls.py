"""Controls from options: what they show, and what comes back from the page."""

import gradio as gr
import pytest

from dit_suite.caching.plan import BACConfig
from dit_suite.call_options import TextToImageOptions, TextToVideoOptions
from dit_suite.options import fields_of
from dit_suite.registry import ACCELERATIONS, TECHNIQUES
from dit_suite.ui.controls import control_for, options_from_values, values_from_options, within
from dit_suite.ui.settings import PUBLIC_LIMITS

CLASSES = {row.options_class() for row in TECHNIQUES} | {row.config_class() for row in ACCELERATIONS}


@pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_defaults_come_back_from_the_controls(cls):
    """An empty gr.Number sends 0 once the page has drawn it, so no option without a value may be one."""
    controls = [control_for(spec, spec.default) for spec in fields_of(cls)]
    assert not [c.label for c in controls if isinstance(c, (gr.Number, gr.Slider)) and c.value is None]
    assert options_from_values(cls, [c.value for c in controls]) == cls()
    assert options_from_values(cls, values_from_options(cls())) == cls()


def test_typed_numbers_are_read():
    values = dict(
        zip([s.name for s in fields_of(TextToImageOptions)], values_from_options(TextToImageOptions()), strict=True)
    )
    typed = values | {"height": " 96 ", "shift": "2.5", "width": ""}
    found = options_from_values(TextToImageOptions, list(typed.values()))
    assert (found.height, found.shift, found.width) == (96, 2.5, None)
    for text, message in (
        ("tall", "height must be int, got 'tall'"),
        ("3", "height must be between 8 and 4096, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            options_from_values(TextToImageOptions, list((values | {"height": text}).values()))


def test_values_shown_come_back():
    for options in (BACConfig(flop_fraction=0.25), TextToVideoOptions(num_frames=8, height=32)):
        assert options_from_values(type(options), values_from_options(options)) == options


def test_values_beyond_the_servers_limits_are_lowered():
    limits = PUBLIC_LIMITS.of_options
    assert within(TextToVideoOptions(num_inference_steps=90, height=32), limits) == TextToVideoOptions(
        num_inference_steps=50, height=32
    )
    assert within(BACConfig(), limits) == BACConfig()


def test_labels_are_words():
    labels = {spec.name: spec.label for spec in fields_of(TextToVideoOptions)}
    assert labels["num_inference_steps"] == "Steps" and labels["negative_prompt"] == "Negative prompt"

"""The acceleration panel: it shows the plug-ins that fit the chosen model, and refuses the others."""

from dataclasses import replace

import gradio as gr
import pytest

from dit_suite.caching.plan import BACConfig
from dit_suite.call_options import TextToImageOptions
from dit_suite.registry import TECHNIQUES
from dit_suite.ui.catalog import Offer
from dit_suite.ui.controls import values_from_options
from dit_suite.ui.engine import Engine
from dit_suite.ui.generate_tab import build_generate_tab
from dit_suite.ui.settings import Limits
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def tab(folder, tmp_path_factory):
    """A tab with one model of every technique; only "pixart" can be opened, and ACDiT's has no cache profile."""
    offers = [
        Offer(folder if row.name == "pixart" else row.name, row, ("a",), False, () if row.name == "acdit" else (20,))
        for row in TECHNIQUES
    ]
    with gr.Blocks():
        return build_generate_tab(Engine(tmp_path_factory.mktemp("output"), Limits()), offers, "image", Limits())


def values(tab, **chosen):
    """What the controls hold: defaults, and the plug-ins in `chosen` switched on with their options."""
    found = [value for cls in tab.option_classes for value in values_from_options(cls())]
    for row in tab.accelerations():
        config = chosen.get(row.name)
        found += [config is not None, *values_from_options(config or row.config_class()())]
    assert len(found) == len(tab.all_controls())
    return found


def parse(tab, model, **chosen):
    return tab.parse(model, "red apple", "a", 3, "default", None, values(tab, **chosen))


def test_the_first_models_plug_ins_are_shown(tab, folder):
    assert next(iter(tab.offers)) == folder
    assert {name: group.visible for name, group in tab.plugin_groups.items()} == {
        "bac": True, "adaspa": False, "vmoba": False
    }  # fmt: skip


@pytest.mark.parametrize("name", [row.name for row in TECHNIQUES if row.name != "pixart"])
def test_a_model_shows_the_plug_ins_that_fit(tab, name):
    updates = tab.on_model(name)
    rows = [row.name for row in tab.accelerations()]
    shown, switches = updates[-2 * len(rows) : -len(rows)], updates[-len(rows) :]
    fitting = {row for row, update in zip(rows, shown, strict=True) if update["visible"]}
    none = {"tarflow": set(), "lego": set(), "acdit": set()}
    expected = (none | {"wan": {"bac", "adaspa", "vmoba"}}).get(name, {"bac"})
    assert fitting == expected
    off = {row for row, update in zip(rows, switches, strict=True) if update.get("value", True) is False}
    assert off == set(rows) - expected
    assert len(updates) == 5 + len(tab.groups) + 2 * len(rows)


def test_choosing_a_model_shows_the_options_it_recommends(tab, folder):
    """Only the controls of its class change, and no value exceeds the server's limit."""
    recommended = TextToImageOptions(num_inference_steps=400, guidance_scale=2.0)
    offer = tab.offers[folder]
    tab.offers[folder] = replace(offer, recommended=recommended)
    try:
        shown = tab.show_defaults(folder)
    finally:
        tab.offers[folder] = offer
    position = 0
    for cls in tab.option_classes:
        own, position = shown[position : position + len(tab.controls[cls])], position + len(tab.controls[cls])
        if cls is TextToImageOptions:
            assert own == values_from_options(replace(recommended, num_inference_steps=200))
        else:
            assert own == [gr.skip()] * len(own)
    assert position == len(shown)


def test_a_chosen_plug_in_reaches_the_job(tab, folder):
    config = BACConfig(flop_fraction=0.5, granularity="block")
    assert parse(tab, folder, bac=config).accelerations == {"bac": config}
    assert parse(tab, folder).accelerations == {}


def test_a_plug_in_that_does_not_fit_is_refused(tab, folder):
    from dit_suite.attention.adaspa import AdaSpaConfig

    with pytest.raises(ValueError, match="AdaSpa sparse attention does not fit .*; the plug-ins that do: bac"):
        parse(tab, folder, adaspa=AdaSpaConfig())
    with pytest.raises(ValueError, match="BAC caching does not fit tarflow; the plug-ins that do: none"):
        parse(tab, "tarflow", bac=BACConfig())

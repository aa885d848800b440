"""The Video tab's start image: shown where the model takes one, kept beside the clip, and loaded again with it."""

import gradio as gr
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from dit_suite.metadata import read_record
from dit_suite.sampling import StartImage
from dit_suite.ui.catalog import offers
from dit_suite.ui.engine import Engine, Finished, StopFlag
from dit_suite.ui.generate_tab import build_generate_tab
from dit_suite.ui.page import build_page, history, launch_arguments
from dit_suite.ui.settings import Limits, ServerSettings
from dit_suite.video import read_video
from tests.tiny import tiny_text_to_video


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, channels in (("plain", 3), ("starting", 7)):
        tiny_text_to_video(channels).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("plain", "starting")}


def _tab(engine, models):
    found = {offer.name: offer for offer in offers(tuple(models.values()))}
    with gr.Blocks():
        tab = build_generate_tab(engine, [found[name] for name in models.values()], "video", Limits())
    return tab


def _parse(tab, model, start_image):
    values = [c.value for c in tab.all_controls()]
    return tab.parse(model, "red sun", None, 5, "default", start_image, values)


def test_start_image_from_upload_to_clip_and_back(models, tmp_path):
    engine = Engine(tmp_path / "made", Limits())
    tab = _tab(engine, models)
    assert [offer.takes_start_image for offer in tab.offers.values()] == [False, True]
    upload = tmp_path / "upload.png"
    Image.fromarray(np.full((8, 8, 3), (255, 0, 0), np.uint8)).save(upload)

    assert _parse(tab, models["plain"], str(upload)).start_image is None
    with pytest.raises(ValueError, match="needs a start image"):
        _parse(tab, models["starting"], None)
    job = _parse(tab, models["starting"], str(upload))
    upload.unlink()
    (done,) = [event for event in engine.run(job, 1, StopFlag()) if isinstance(event, Finished)]
    assert history(engine.output) == [str(done.path)]

    loaded = tab.load_settings(str(done.path))
    start = loaded[6]
    assert start == job.start_image.path
    again = tab.parse(loaded[0], loaded[1], None, loaded[3], loaded[5], start, [c.value for c in tab.all_controls()])
    (second,) = [event for event in engine.run(again, 1, StopFlag()) if isinstance(event, Finished)]
    assert np.array_equal(read_video(second.path), read_video(done.path))


def test_start_image_through_the_endpoint(models, tmp_path):
    settings = ServerSettings(output=tmp_path / "made", models=tuple(models.values()))
    page = build_page(settings)
    _, url, _ = page.launch(**launch_arguments(settings) | {"prevent_thread_lock": True, "quiet": True})
    try:
        client = Client(url, verbose=False)
        upload = tmp_path / "upload.png"
        Image.fromarray(np.full((8, 8, 3), (255, 0, 0), np.uint8)).save(upload)
        steps, name = {"num_inference_steps": 1}, "/generate_video"
        (clip,), _ = client.predict("red sun", models["starting"], 5, 1, steps, handle_file(upload), api_name=name)
        assert read_record(clip)["start_image"]["sha256"] == StartImage.of_file(upload).sha256
        (plain,), info = client.predict("red sun", models["plain"], 5, 1, steps, api_name=name)
        assert info["finished"] == 1 and not read_record(plain).get("start_image")
        with pytest.raises(AppError, match="start image"):
            client.predict("red sun", models["plain"], 5, 1, steps, handle_file(upload), api_name=name)
    finally:
        page.close()

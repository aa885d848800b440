"""The page in a real browser: generate, stop, load settings, reload. Needs Debian's chromium and playwright."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_suite.metadata import read_record
from dit_suite.ui.page import build_page, launch_arguments
from dit_suite.ui.settings import ServerSettings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def server(output):
    settings = ServerSettings(output=output)
    page = build_page(settings)
    _, url, _ = page.launch(**launch_arguments(settings) | {"prevent_thread_lock": True, "quiet": True})
    yield url
    page.close()


@pytest.fixture(scope="module")
def page(server):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(server)
        page.locator("#image-generate").wait_for()
        yield page
        browser.close()


def made(output):
    return sorted(output.rglob("*.png"), key=lambda p: p.stat().st_mtime_ns)


def fill(page, selector, value):
    box = page.locator(f"{selector} input[type=number], {selector} textarea").first
    box.fill(str(value))
    box.press("Tab")


def status(page, pattern):
    page.locator("#image-status", has_text=re.compile(pattern)).wait_for()


def set_steps(page, steps):
    box = page.get_by_label("number input for Steps").first
    box.fill(str(steps))
    box.press("Tab")


def test_generate(page, output):
    fill(page, "#image-prompt", "red apple, flat style")
    fill(page, "#image-seed", 7)
    set_steps(page, 4)
    page.get_by_role("button", name="Advanced").first.click()  # controls without a value are drawn now
    page.get_by_label("Height").first.wait_for()
    page.locator("#image-generate").click()
    status(page, "1 of 1 done")
    (path,) = made(output)
    record = read_record(path)
    assert (record["seed"], record["condition"], record["options"]["num_inference_steps"]) == (
        7,
        "red apple, flat style",
        4,
    )
    assert page.locator("#image-used input").input_value() == "7"
    assert page.locator("#image-results img").count() >= 1


def test_stop_keeps_what_is_finished(page, output):
    before = len(made(output))
    set_steps(page, 6)
    fill(page, "#image-count", 16)
    page.locator("#image-generate").click()
    status(page, "[1-9] of 16 done|Sample [2-9] of 16")
    page.locator("#image-stop").click()
    status(page, "Stopped; [0-9]+ finished kept")
    finished = len(made(output)) - before
    assert 1 <= finished < 16
    assert f"{finished} finished kept" in page.locator("#image-status").inner_text()


def test_load_settings_gives_the_same_pixels(page, output):
    """Another model shows the options it recommends; the file then brings back its own model and options."""
    expect = pytest.importorskip("playwright.sync_api").expect
    steps = page.locator("input[aria-label^='number input for Steps']:visible")
    first = made(output)[0]
    fill(page, "#image-prompt", "something else")
    page.locator("#image-model input").click()
    page.get_by_role("option", name=re.compile("emoji-lego-64")).click()
    page.get_by_label("Skipping (t_break)").first.wait_for()
    expect(steps).to_have_value("10")
    page.locator("#image-upload input[type=file]").set_input_files(str(first))
    status(page, "Settings loaded")
    expect(steps).to_have_value("4")
    assert page.locator("#image-prompt textarea").input_value() == "red apple, flat style"
    assert page.locator("#image-seed input").input_value() == "7"
    count = len(made(output))
    page.locator("#image-generate").click()
    status(page, "1 of 1 done")
    again = made(output)[-1]
    assert len(made(output)) == count + 1
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(first)))


def test_an_error_is_one_sentence_and_the_next_request_works(page, output):
    fill(page, "#image-prompt", "")
    page.locator("#image-generate").click()
    status(page, "Not done: type a prompt first")
    fill(page, "#image-prompt", "burger")
    count = len(made(output))
    page.locator("#image-generate").click()
    status(page, "1 of 1 done")
    assert len(made(output)) == count + 1


def test_history_survives_a_reload(page, output):
    page.reload()
    page.get_by_role("tab", name="History").click()
    page.locator("#history img").first.wait_for()
    page.wait_for_function(f"document.querySelectorAll('#history img').length >= {min(len(made(output)), 6)}")


def test_download_keeps_the_metadata(server, output):
    """The gallery serves the very file."""
    import httpx

    path = made(output)[-1]
    response = httpx.get(f"{server}gradio_api/file={path}", timeout=60)
    assert response.status_code == 200 and response.content == path.read_bytes()


def test_other_files_are_not_served(server):
    import httpx

    for path in ("/etc/passwd", Path("app.py").resolve(), Path("checkpoints/index.json").resolve()):
        assert httpx.get(f"{server}gradio_api/file={path}", timeout=60).status_code == 403

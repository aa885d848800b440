"""The Play tab in a real browser: arrow keys reach the game, the square obeys, frames reach the page."""

import io

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from dit_suite.benchmarks.play import COUNT_PICTURES, FLAGS, find_browser
from dit_suite.ui.play_tab import PlayContext, build_play_tab

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with gr.Blocks() as blocks:
        rooms = build_play_tab(PlayContext(("moving-square-nfd",), tmp_path_factory.mktemp("games")))
    _, url, _ = blocks.queue().launch(
        prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", ssr_mode=False, enable_monitoring=False
    )
    yield url, rooms
    blocks.close()


@pytest.fixture(scope="module")
def page(server):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(server[0])
        page.locator("#play-action-4").wait_for()
        yield page
        browser.close()


def until(page, condition, seconds: float = 60.0) -> None:
    for _ in range(int(seconds * 20)):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not happen in time")


def column(page) -> float:
    """Where the bright square is, from left (0) to right (1), in the picture that the page shows."""
    source = page.locator("#play-stage img").first.evaluate("image => image.src")
    picture = Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")
    bright = np.asarray(picture).max(axis=2).astype(float)
    weight = np.clip(bright - 100, 0, None).sum(axis=0)
    return float((weight * np.arange(len(weight))).sum() / weight.sum() / len(weight))


def hold(page, player, key: str, action: int, frames: int) -> None:
    """Holds a key until so many frames were made under its action."""
    page.keyboard.down(key)
    until(page, lambda: player.held == action)
    first = len(player.session.actions)
    until(page, lambda: len(player.session.actions) >= first + frames)
    page.wait_for_timeout(300)
    page.keyboard.up(key)
    until(page, lambda: player.held == 0)


def test_arrow_keys_move_the_square_on_the_page(server, page):
    page.locator("#play-start").click()
    page.locator("#play-stage img").first.wait_for()
    page.evaluate(COUNT_PICTURES)
    (player,) = server[1].players
    hold(page, player, "ArrowLeft", 3, 6)
    until(page, lambda: column(page) < 0.35)  # a busy page may still show an older frame
    hold(page, player, "ArrowRight", 4, 6)
    until(page, lambda: column(page) > 0.6)
    assert page.evaluate("window.shown") > 5
    assert {3, 4} <= set(player.session.actions)


def test_typing_in_a_field_steers_nothing_and_stop_ends_the_game(server, page):
    (player,) = server[1].players
    page.get_by_label("Seed").first.focus()
    page.keyboard.down("ArrowRight")
    page.wait_for_timeout(300)
    page.keyboard.up("ArrowRight")
    assert player.held == 0
    page.get_by_role("button", name="Stop").click()
    until(page, player.stopped.is_set)
    page.wait_for_timeout(500)  # the frame under way is finished
    made = len(player.session.actions)
    page.wait_for_timeout(400)
    assert len(player.session.actions) == made


def start_from(page, rooms, tile: int):
    """Clicks a start picture and Play; the player of the new game once it has a frame."""
    page.locator("#play-starts button.thumbnail-item").nth(tile).click()
    page.wait_for_timeout(1000)
    before = rooms.players
    page.locator("#play-start").click()
    until(page, lambda: rooms.players != before and rooms.players[0].session.actions)
    return rooms.players[0]


def test_a_picture_picks_the_start_frame_and_the_last_one_dreams(server, page):
    """The game starts from the picture that was clicked; its number is that of --start-frame."""
    tiles = page.locator("#play-starts button.thumbnail-item")
    assert tiles.count() == 9
    for tile, number in ((5, 5), (8, None), (2, 2)):
        player = start_from(page, server[1], tile)
        assert player.session.options.start_frame == number
        if number is not None:
            source = tiles.nth(tile).locator("img").evaluate("image => image.src")
            picture = Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")
            assert np.array_equal(np.asarray(picture)[8::16, 8::16], player.session.frames[0])
        page.get_by_role("button", name="Stop").click()
        until(page, player.stopped.is_set)
        page.wait_for_timeout(500)

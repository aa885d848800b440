"""Frames per second of the Play tab: in the model's loop, and as pictures that a real browser has shown.

The loop is `PlaySession.step` without waiting for the clock of the game, decoding included. The browser is Chromium
through playwright, on the machine of the server; the player holds keys and changes them. Without Chromium those rows
say so.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from dit_suite.benchmarks.next_frame import action_stream
from dit_suite.schedulers.speculative import TOGETHER

NAME = "play"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
KEYS = ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp")
COUNT_PICTURES = """() => {
  window.shown = 0;
  document.querySelector("#play-stage").addEventListener("load", event => {
    if (event.target.tagName === "IMG") window.shown += 1;
  }, true);
}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmark."""
    parser.add_argument("--model", default="moving-square-nfd", help="bundled name or folder")
    parser.add_argument("--passes", type=int, nargs="*", default=[], help="passes per frame (default: as trained)")
    parser.add_argument("--frames", type=int, default=120, help="frames of the loop")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long the browser plays")
    parser.add_argument("--speed", type=int, default=60, help="frames a second that the browser's player asks for")
    parser.add_argument("--persistence", type=float, default=0.9, help="chance that the player of the loop repeats")
    parser.add_argument("--fixed-passes", choices=("off", "eager", "compiled"), default="off", help="of the loop")
    parser.add_argument("--device", default="cpu")


def loop_rate(pipe: Any, passes: int, speculation: str, args: argparse.Namespace) -> dict[str, Any]:
    """Frames per second of a session that is stepped as fast as it goes."""
    from dit_suite.ui.play import PlayOptions, PlaySession

    options = PlayOptions(num_inference_steps=passes, speculation=speculation, fixed_passes=args.fixed_passes)
    session = PlaySession(pipe, options)
    actions = [a.index(1.0) for a in action_stream(len(session.action_names), args.frames + 5, args.persistence)]
    for action in actions[:5]:
        session.step(action)
    begin = time.perf_counter()
    for action in actions[5:]:
        session.step(action)
    rate = args.frames / (time.perf_counter() - begin)
    return {"where": "loop", "passes": passes, "speculation": speculation, "fps": rate}


def find_browser() -> str | None:
    """The Chromium of this machine."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def browser_rate(passes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Pictures a second that Chromium loads while somebody plays with the arrow keys.

    Raises:
        FileNotFoundError: no Chromium, or no playwright.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise FileNotFoundError("the browser rows need playwright: pip install playwright") from None
    import gradio as gr

    from dit_suite.ui.play import PlayOptions
    from dit_suite.ui.play_tab import PlayContext, build_play_tab

    executable = find_browser()
    if executable is None:
        raise FileNotFoundError("the browser rows need Chromium (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder, gr.Blocks() as blocks:
        rooms = build_play_tab(PlayContext((args.model,), Path(folder), args.device))
        _, url, _ = blocks.queue().launch(
            prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", ssr_mode=False, enable_monitoring=False
        )
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
                page = browser.new_page()
                page.set_default_timeout(120_000)
                page.goto(url)
                for label, value in (("Passes per frame", passes), ("Frames per second", args.speed)):
                    box = page.get_by_label(f"number input for {label}").first
                    box.fill(str(value))
                    box.press("Tab")
                page.locator("#play-start").click()
                page.locator("#play-stage img").first.wait_for()
                page.wait_for_timeout(2000)
                page.evaluate(COUNT_PICTURES)
                begin = time.perf_counter()
                (player,) = rooms.players
                made = len(player.session.actions)
                turn = 0
                while time.perf_counter() - begin < args.seconds:
                    page.keyboard.down(KEYS[turn % 4])
                    page.wait_for_timeout(800)
                    page.keyboard.up(KEYS[turn % 4])
                    turn += 1
                seconds = time.perf_counter() - begin
                shown, made = page.evaluate("window.shown"), len(player.session.actions) - made
                browser.close()
        finally:
            blocks.close()
    stats = player.session.stats()
    return {
        "where": "browser", "passes": passes, "speculation": PlayOptions().speculation, "fps": shown / seconds,
        "frames_made_per_s": made / seconds, "hit_rate": stats.hit_rate,
    }  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The loop with and without speculation, then the browser."""
    import torch

    import dit_suite

    pipe = dit_suite.load_pipeline(args.model, device=args.device)
    rows, passes = [], args.passes or [pipe.config.default_steps]
    for count in passes:
        rows += [loop_rate(pipe, count, mode, args) for mode in ("off", *TOGETHER)]
    for count in passes:
        try:
            rows.append(browser_rate(count, args))
        except FileNotFoundError as error:
            rows.append({"where": f"browser: {error}", "passes": count})
    return {"model": args.model, "threads": torch.get_num_threads(), "rows": rows}

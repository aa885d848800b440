"""The whole page: tabs from the registry's tasks, the history, and the API endpoints."""

from pathlib import Path
from typing import Any

import gradio as gr

import dit_suite
from dit_suite.ui.catalog import offers
from dit_suite.ui.compare_tab import build_compare_endpoint, build_compare_tab, comparable
from dit_suite.ui.endpoints import build_endpoints
from dit_suite.ui.engine import START_IMAGES, Engine
from dit_suite.ui.generate_tab import build_generate_tab
from dit_suite.ui.play_tab import PlayContext, build_play_tab
from dit_suite.ui.settings import ServerSettings

HISTORY = 60
# Small pictures fill their frame with sharp pixels instead of lying in it as stamps. On a phone the results come right
# below the Generate button, the options after them.
STYLE = """
#image-preview img, #video-preview img, #compare-difference img {
  width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated
}
@media (max-width: 700px) {
  .ask {display: contents !important}
  .ask > * {flex: 1 1 100% !important}
  .see {order: 1}
  .tune {order: 2}
}
"""


def history(output: Path) -> list[str]:
    """The newest files of the output folder."""
    files = [p for p in output.rglob("*") if p.suffix in (".png", ".mp4") and not p.name.startswith(".")]
    files = [p for p in files if p.parent.name != START_IMAGES]
    return [str(p) for p in sorted(files, key=lambda p: p.stat().st_mtime_ns, reverse=True)[:HISTORY]]


def build_page(settings: ServerSettings) -> gr.Blocks:
    """The Blocks of the app, with its queue set; `launch_arguments` holds what goes to `launch`.

    Raises:
        ValueError, FileNotFoundError: a model given in the settings can't be opened.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    engine = Engine(settings.output, settings.limits, settings.device)
    available = offers(settings.models)
    images = [offer for offer in available if offer.technique.task.endswith("to-image")]
    videos = [offer for offer in available if offer.technique.task == "text-to-video"]
    games = tuple(offer.name for offer in available if offer.technique.task == "action-to-video")
    with gr.Blocks(title="dit_suite", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(
            f"# dit_suite {dit_suite.__version__}\n"
            "Efficient diffusion transformers: choose a model, say what it shall show, press Generate. "
            "Compare shows what a speed-up changes; Play is a game that a model dreams."
        )
        with gr.Tabs():
            if images:
                with gr.Tab("Image"):
                    build_generate_tab(engine, images, "image", settings.limits)
            if videos:
                with gr.Tab("Video"):
                    build_generate_tab(engine, videos, "video", settings.limits)
            if comparable(available):
                with gr.Tab("Compare"):
                    build_compare_tab(engine, comparable(available))
            if games:
                with gr.Tab("Play"):
                    build_play_tab(PlayContext(games, settings.output, settings.device, lock=engine.lock))
            if not settings.public:
                with gr.Tab("History") as tab:
                    gallery = gr.Gallery(
                        label="Newest first",
                        columns=6,
                        format="png",
                        elem_id="history",
                        buttons=["download", "fullscreen"],
                    )
                    refresh = gr.Button("Refresh")

                    def show() -> list[str]:
                        return history(settings.output.resolve())

                    for trigger in (tab.select, refresh.click, page.load):
                        trigger(show, None, [gallery], api_visibility="private", queue=False)
        build_endpoints(engine, available)
        if comparable(available):
            build_compare_endpoint(engine, comparable(available))
    page.queue(max_size=settings.limits.max_queue, default_concurrency_limit=1)
    return page


def launch_arguments(settings: ServerSettings) -> dict[str, Any]:
    """Keyword arguments of `Blocks.launch` for these settings."""
    return {
        "server_name": settings.host,
        "server_port": settings.port,
        "share": settings.share,
        "auth": settings.auth,
        "allowed_paths": [str(settings.output.resolve())],
        "show_error": True,
        "ssr_mode": False,
        "enable_monitoring": False,
        "max_file_size": "20mb",
        "theme": gr.themes.Soft(),
        "css": STYLE,
    }

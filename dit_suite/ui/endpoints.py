"""Named API endpoints with stable names, apart from the controls of the page."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from dit_suite.registry import acceleration
from dit_suite.ui.catalog import Offer
from dit_suite.ui.engine import Engine, Finished, Progress, StopFlag, make_job, resolve_seed
from dit_suite.ui.generate_tab import DEVICE_QUEUE


def run_request(
    engine: Engine, offers: dict[str, Offer], condition: str, model: str, seed: Any, count: Any, options: Any,
    progress: gr.Progress, start_image: str | None = None,
) -> Iterator[tuple[list[str], dict[str, Any]]]:  # fmt: skip
    """Makes the samples of one API request; yields the files so far and a description."""
    if model not in offers:
        raise ValueError(f"model must be one of {', '.join(offers)}, got {model!r}")
    if not isinstance(options or {}, dict):
        raise ValueError(f"options must be a JSON object, got {options!r}")
    settings = dict(options or {})
    scheduler = settings.pop("scheduler", None)
    plugins = {
        name: acceleration(name).config_class().from_dict(values)
        for name, values in settings.pop("accelerations", {}).items()
    }
    technique = offers[model].technique
    given: Any = (
        int(condition) if technique.options_class().condition != "prompt" and condition.isdigit() else condition
    )
    start = engine.keep_start_image(start_image) if start_image else None
    chosen = offers[model].defaults.changed(settings)
    job = make_job(model, given, chosen, resolve_seed(seed), scheduler, plugins, start)
    info = {"seed": job.seed, "model": model, "technique": technique.name, "options": job.options.to_dict()}
    paths: list[str] = []
    for event in engine.run(job, int(count), StopFlag()):
        if isinstance(event, Progress):
            progress(event.fraction, desc=f"{event.finished + 1} of {event.count}")
        elif isinstance(event, Finished):
            paths.append(str(event.path))
        yield paths, info | {"finished": len(paths)}


def build_endpoints(engine: Engine, offers: list[Offer]) -> None:
    """Adds `/generate_image`, `/generate_video` and `/list_models` to the present Blocks."""
    by_media: dict[str, dict[str, Offer]] = {"image": {}, "video": {}}
    for offer in offers:
        by_media["image" if offer.technique.task.endswith("image") else "video"][offer.name] = offer
    for media, own in by_media.items():
        if own:
            _generate_endpoint(engine, own, media)

    def list_models() -> list[dict]:
        """Names, techniques, conditions, labels and options of the models on offer."""
        return [
            {
                "name": offer.name,
                "technique": offer.technique.name,
                "task": offer.technique.task,
                "condition": offer.technique.options_class().condition,
                "labels": list(offer.labels),
                "options": offer.defaults.to_dict(),
                "accelerations": list(offer.technique.accelerations),
            }
            for offer in offers
        ]

    gr.api(list_models, api_name="list_models", queue=False)


def _generate_endpoint(engine: Engine, offers: dict[str, Offer], media: str) -> None:
    def generate(
        prompt: str, model: str, seed: float, count: float, options: Any, start_image: str | None = None,
        progress: gr.Progress = gr.Progress(),
    ) -> Iterator[tuple]:  # fmt: skip
        try:
            yield from run_request(engine, offers, prompt, model, seed, count, options, progress, start_image)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Row(visible=False):
        inputs = [
            gr.Textbox(label="prompt"),
            gr.Textbox(value=next(iter(offers)), label="model"),
            gr.Number(value=-1, precision=0, label="seed"),
            gr.Number(value=1, precision=0, label="count"),
            gr.JSON(value={}, label="options"),
        ]
        if media == "video":
            inputs.append(gr.Image(type="filepath", label="start_image"))
        outputs = [gr.File(file_count="multiple", label="files"), gr.JSON(label="info")]
        button = gr.Button("run")
    button.click(generate, inputs, outputs, api_name=f"generate_{media}", **DEVICE_QUEUE)

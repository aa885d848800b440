"""The Compare tab: one seed, a baseline and up to three variants; time, evaluations, PSNR, SSIM, a difference map."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from dit_suite.sampling import SamplingJob, parse_acceleration
from dit_suite.ui.catalog import Offer, choices
from dit_suite.ui.engine import Engine, Finished, StopFlag, Stopped, make_job, resolve_seed
from dit_suite.ui.generate_tab import DEVICE_QUEUE

MAX_VARIANTS = 3
SHOWN_VARIANTS = 2
FEWER_STEPS = 0.35  # about the work that BAC spends by default
GAIN = 4
COLUMNS = ("variant", "seconds", "times faster", "network evaluations", "PSNR (dB)", "SSIM")


@dataclass(frozen=True)
class Result:
    """One column of the comparison."""

    name: str
    path: Path
    seconds: float
    evaluations: int


def variant_job(baseline: SamplingJob, text: str) -> SamplingJob:
    """The baseline's job changed as `text` says: `steps=N`, or a plug-in as in `sample.py --accelerate`.

    Raises:
        ValueError: neither form, or a value out of range.
    """
    if text.startswith("steps="):
        try:
            steps = int(text.removeprefix("steps="))
        except ValueError:
            raise ValueError(f"steps must be a whole number, got {text!r}") from None
        return replace(baseline, options=replace(baseline.options, num_inference_steps=steps))
    name, config = parse_acceleration(text)
    if name not in baseline.row.accelerations:
        raise ValueError(f"{name} does not fit {baseline.model}; it takes {', '.join(baseline.row.accelerations)}")
    return replace(baseline, accelerations={name: config})


def difference_map(first: np.ndarray, second: np.ndarray, gain: int = GAIN) -> Image.Image:
    """|first - second| times `gain`, as a picture."""
    difference = np.abs(first.astype(np.int16) - second.astype(np.int16)) * gain
    return Image.fromarray(difference.clip(0, 255).astype(np.uint8))


def compare(
    engine: Engine, baseline: SamplingJob, variants: list[str], stop: StopFlag
) -> Iterator[tuple[list[Result], list[list[Any]]]]:
    """Makes the baseline's and every variant's sample; yields the results so far and the rows of the table.

    Every pipeline evaluates its network once beforehand, so that nobody is charged for opening and warming up.

    Raises:
        ValueError: a variant can't be made (all are checked before the first is run).
    """
    jobs = [("baseline", baseline), *((text, variant_job(baseline, text)) for text in variants)]
    results: list[Result] = []
    for name, job in jobs:
        engine.warm_up(job)
        for event in engine.run(job, 1, stop):
            if isinstance(event, Stopped):
                return
            if isinstance(event, Finished):
                results.append(Result(name, event.path, event.seconds, event.evaluations))
        yield results, table(results)


def table(results: list[Result]) -> list[list[Any]]:
    """Rows under `COLUMNS`; PSNR and SSIM are to the baseline."""
    import torch

    from dit_suite.evaluation.pairs import psnr, ssim

    def tensor(path: Path) -> torch.Tensor:
        return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)[None]

    rows = []
    first = results[0]
    for result in results:
        quality: list[Any] = ["-", "-"]
        if result is not first:
            pair = tensor(result.path), tensor(first.path)
            quality = [round(float(psnr(*pair)), 2), round(float(ssim(*pair)), 4)]
        speed = round(first.seconds / result.seconds, 2)
        rows.append([result.name, round(result.seconds, 2), speed, result.evaluations, *quality])
    return rows


def suggestions(offer: Offer, limit: int) -> tuple[int, list[str]]:
    """Steps of the baseline and variants with which the first press works on this model.

    Args:
        offer: the model.
        limit: most steps that this server allows.

    Returns:
        the largest step count with a BAC profile (else the model's default), and variants, likely ones first.
    """
    default = getattr(offer.defaults, "num_inference_steps", limit)
    allowed = [steps for steps in offer.profile_steps if steps <= limit]
    steps = max(allowed) if allowed else min(default, limit)
    fewer = f"steps={max(1, round(FEWER_STEPS * steps))}"
    if not allowed:
        return steps, [fewer, f"steps={max(1, steps // 2)}"]
    return steps, ["bac", fewer, "bac:flop_fraction=0.5", "bac:flop_fraction=0.25"]


@dataclass
class CompareTab:
    """The state and handlers of the tab.

    Attributes:
        engine: makes the samples.
        offers: the models, by name.
        stops: the stop flag of each visitor's present run.
    """

    engine: Engine
    offers: dict[str, Offer]
    stops: dict[str, StopFlag] = field(default_factory=dict)

    def baseline_job(self, model: str, prompt: str, seed: Any, steps: Any) -> SamplingJob:
        """The job of the baseline; `ValueError` for a model that is not offered or steps out of range."""
        options = {"num_inference_steps": int(steps)}
        return make_job(model, prompt, offered(self.offers, model).defaults.changed(options), resolve_seed(seed))

    def switched(self, name: str) -> list[Any]:
        """Steps and variants that fit the model, for the slider and the dropdowns."""
        steps, texts = suggestions(self.offers[name], self.engine.limits.max_steps)
        shown = [gr.update(choices=texts, value=texts[i] if i < SHOWN_VARIANTS else None) for i in range(MAX_VARIANTS)]
        return [steps, *shown]

    def run(self, request: gr.Request, model: str, prompt: str, seed: Any, steps: Any, *texts: Any) -> Iterator[tuple]:
        """Yields (status, table, bars, picker of the variant shown, names and files) as results come in."""
        import pandas

        flag = self.stops[request.session_hash] = StopFlag()
        chosen = [text.strip() for text in texts if text and text.strip()]
        try:
            job = self.baseline_job(model, prompt, seed, steps)
            yield "Running the baseline ...", gr.skip(), gr.skip(), gr.skip(), []
            for results, measured in compare(self.engine, job, chosen, flag):
                frame = pandas.DataFrame(
                    {"variant": [r.name for r in results], "seconds": [r.seconds for r in results]}
                )
                names = [r.name for r in results[1:]]
                text = f"{len(results)} of {len(chosen) + 1} done, seed {job.seed}"
                picker = gr.update(choices=names, value=names[0] if names else None)
                bars = gr.BarPlot(frame, sort=frame["variant"].tolist())
                yield text, measured, bars, picker, [(r.name, str(r.path)) for r in results]
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            yield f"Not done: {error}", gr.skip(), gr.skip(), gr.skip(), gr.skip()
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            flag.set()
            self.stops.pop(request.session_hash, None)

    def halt(self, request: gr.Request) -> str:
        """Stops this visitor's run at its next step."""
        if request.session_hash in self.stops:
            self.stops[request.session_hash].set()
            return "Stopping at the next step ..."
        return "Nothing is running."


def offered(offers: dict[str, Offer], model: str) -> Offer:
    """The offer called `model`; `ValueError` lists the names when there is none."""
    if model not in offers:
        raise ValueError(f"model must be one of {', '.join(offers)}, got {model!r}")
    return offers[model]


def show(name: str | None, results: list[tuple[str, str]]) -> tuple[Any, Any]:
    """The files of baseline and variant for the slider, and their difference map; None without such a variant."""
    paths = dict(results)
    if name not in paths:
        return None, None
    pair = [np.asarray(Image.open(paths[key]).convert("RGB")) for key in ("baseline", name)]
    return (paths["baseline"], paths[name]), difference_map(*pair)


def _question(offers: list[Offer], max_steps: int) -> tuple[list[gr.components.Component], gr.Button, gr.Button]:
    """Model, prompt, seed, steps and the variants; the buttons that run and stop."""
    first = offers[0]
    first_steps, first_variants = suggestions(first, max_steps)
    model = gr.Dropdown(choices(offers), value=first.name, label="Model", elem_id="compare-model")
    prompt = gr.Textbox("woman astronaut, 3d style", label="Prompt", elem_id="compare-prompt")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=-1, elem_id="compare-seed")
        steps = gr.Slider(
            2, max_steps, value=first_steps, step=1, label="Steps of the baseline", elem_id="compare-steps"
        )
    variants = [
        gr.Dropdown(
            first_variants, value=first_variants[i] if i < SHOWN_VARIANTS else None, allow_custom_value=True,
            label=f"Variant {i + 1}", elem_id=f"compare-variant-{i + 1}",
            info="choose, or type steps=N or PLUG-IN:key=value,key=value" if i == 0 else None,
        )
        for i in range(MAX_VARIANTS)
    ]  # fmt: skip
    with gr.Row():
        button = gr.Button("Compare", variant="primary", elem_id="compare-run")
        stop = gr.Button("Stop", variant="stop")
    return [model, prompt, seed, steps, *variants], button, stop


def _answer() -> tuple[list[gr.components.Component], list[gr.components.Component]]:
    """Status, table, bars and the picker of a variant, which a run fills; slider and difference, which follow it."""
    status = gr.Markdown("Ready.", elem_id="compare-status")
    rows = gr.Dataframe(headers=list(COLUMNS), label="Measured", interactive=False, elem_id="compare-table")
    bars = gr.BarPlot(x="variant", y="seconds", y_lim=[0, None], title="Seconds per sample", height=180)
    picker = gr.Dropdown([], label="Show beside the baseline", elem_id="compare-shown")
    slider = gr.ImageSlider(label="Baseline | variant", format="png", height=320, elem_id="compare-slider")
    difference = gr.Image(
        label=f"Difference times {GAIN}", format="png", height=200, interactive=False, elem_id="compare-difference"
    )
    return [status, rows, bars, picker], [slider, difference]


def build_compare_tab(engine: Engine, offers: list[Offer]) -> None:
    """Builds the tab inside the present Blocks context."""
    tab = CompareTab(engine, {offer.name: offer for offer in offers})
    gr.Markdown(
        "The same picture made in several ways: the baseline runs every step, a variant saves work. "
        "PSNR and SSIM say how close its picture is to the baseline's (higher is closer)."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            inputs, button, stop = _question(offers, engine.limits.max_steps)
        with gr.Column(scale=3, min_width=320):
            measured, pictures = _answer()
    state = gr.State([])
    model, (status, picker) = inputs[0], (measured[0], measured[-1])
    done = button.click(tab.run, inputs, [*measured, state], api_visibility="private", **DEVICE_QUEUE)
    model.change(tab.switched, [model], inputs[3:], api_visibility="private", queue=False)
    for trigger in (done.then, picker.change):
        trigger(show, [picker, state], pictures, api_visibility="private", queue=False)
    stop.click(tab.halt, None, [status], api_visibility="private", queue=False)


def build_compare_endpoint(engine: Engine, offers: list[Offer]) -> None:
    """Adds `/compare`: the same measurement for programs."""
    by_name = {offer.name: offer for offer in offers}

    def run(
        prompt: str, model: str, seed: float, options: Any, variants: Any
    ) -> Iterator[tuple[list[str], list[dict]]]:
        try:
            offer = offered(by_name, model)
            if not isinstance(variants, list) or len(variants) > MAX_VARIANTS:
                raise ValueError(f"variants must be a list of at most {MAX_VARIANTS} texts, got {variants!r}")
            job = make_job(model, prompt, offer.defaults.changed(options or {}), resolve_seed(seed))
            for results, rows in compare(engine, job, [str(text) for text in variants], StopFlag()):
                yield [str(r.path) for r in results], [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Row(visible=False):
        inputs = [
            gr.Textbox(label="prompt"),
            gr.Textbox(value=next(iter(by_name)), label="model"),
            gr.Number(value=-1, precision=0, label="seed"),
            gr.JSON(value={}, label="options"),
            gr.JSON(value=[], label="variants"),
        ]
        outputs = [gr.File(file_count="multiple", label="files"), gr.JSON(label="rows")]
        gr.Button("run").click(run, inputs, outputs, api_name="compare", **DEVICE_QUEUE)


def comparable(offers: list[Offer]) -> list[Offer]:
    """Models that make pictures from text and take a plug-in."""
    return [row for row in offers if row.technique.task == "text-to-image" and row.technique.accelerations]

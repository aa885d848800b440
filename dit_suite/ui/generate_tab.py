"""The Image and Video tabs: condition, model, seed, count and the model's own options; progress, preview, stop."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from dit_suite.metadata import read_record
from dit_suite.options import Options
from dit_suite.registry import ACCELERATIONS, Acceleration
from dit_suite.sampling import SamplingJob, job_of_record
from dit_suite.ui.catalog import Offer, choices
from dit_suite.ui.controls import build_controls, options_from_values, values_from_options, within
from dit_suite.ui.engine import Engine, Finished, Progress, StopFlag, Stopped, make_job, resolve_seed, single_job
from dit_suite.ui.settings import Limits

DEVICE_QUEUE = {"concurrency_id": "device", "concurrency_limit": 1}
EXAMPLES = {
    "image": ("red apple, flat style", "woman astronaut, 3d style", "rainbow, gradient style", "burger"),
    "video": ("red heart", "grinning face"),
}


@dataclass
class GenerateTab:
    """The state and handlers of one tab.

    Attributes:
        engine: runs the requests.
        offers: the checkpoints of this tab, by name.
        stops: the stop flag of each visitor's present run.
        controls, groups: the controls of every options class, and the group that shows or hides them.
        plugins, plugin_groups: likewise for every plug-in, its switch first.
    """

    engine: Engine
    offers: dict[str, Offer]
    media: str
    stops: dict[str, StopFlag] = field(default_factory=dict)
    controls: dict[type[Options], list[gr.components.Component]] = field(default_factory=dict)
    groups: dict[type[Options], gr.Group] = field(default_factory=dict)
    plugins: dict[str, tuple[gr.Checkbox, list[gr.components.Component]]] = field(default_factory=dict)
    plugin_groups: dict[str, gr.Group] = field(default_factory=dict)

    @property
    def option_classes(self) -> list[type[Options]]:
        return list(dict.fromkeys(offer.technique.options_class() for offer in self.offers.values()))

    def accelerations(self) -> list[Acceleration]:
        """Plug-ins that fit one of the tab's models."""
        wanted = {name for offer in self.offers.values() for name in offer.accelerations}
        return [row for row in ACCELERATIONS if row.name in wanted]

    def option_controls(self) -> list[gr.components.Component]:
        """The controls of every options class, in order."""
        return [control for cls in self.option_classes for control in self.controls[cls]]

    def all_controls(self) -> list[gr.components.Component]:
        """Every option control and plug-in control, in the order that `parse` expects."""
        found = self.option_controls()
        for row in self.accelerations():
            switch, controls = self.plugins[row.name]
            found += [switch, *controls]
        return found

    def parse(
        self, model: str, prompt: str, label: Any, seed: Any, scheduler: str, start_image: str | None, values: list[Any]
    ) -> SamplingJob:
        """The job that the controls describe; `ValueError` for anything out of range."""
        if model not in self.offers:
            raise ValueError(f"model must be one of {', '.join(self.offers)}, got {model!r}")
        offer, position, options = self.offers[model], 0, None
        for cls in self.option_classes:
            count = len(self.controls[cls])
            if cls is offer.technique.options_class():
                options = options_from_values(cls, values[position : position + count])
            position += count
        accelerations = {}
        for row in self.accelerations():
            count = len(self.plugins[row.name][1])
            enabled, chosen = values[position], values[position + 1 : position + 1 + count]
            position += 1 + count
            if enabled:
                if row.name not in offer.accelerations:
                    fitting = ", ".join(offer.accelerations) or "none"
                    raise ValueError(f"{row.title} does not fit {model}; the plug-ins that do: {fitting}")
                accelerations[row.name] = options_from_values(row.config_class(), chosen)
        condition = self._condition(offer, prompt, label)
        own = scheduler in ("", None, "default") or not offer.takes_scheduler
        chosen_scheduler = None if own else scheduler
        start = None
        if offer.takes_start_image:
            if not start_image:
                raise ValueError("this model needs a start image: choose one first")
            start = self.engine.keep_start_image(start_image)
        return make_job(model, condition, options, resolve_seed(seed), chosen_scheduler, accelerations, start)

    def on_model(self, name: str) -> list[Any]:
        """Updates of prompt, examples, label, start image, scheduler, option groups, plug-in groups and their switches.

        A plug-in that does not fit is hidden and switched off.
        """
        technique = self.offers[name].technique
        text, labels = technique.options_class().condition == "prompt", self.offers[name].labels
        rows = [row.name in self.offers[name].accelerations for row in self.accelerations()]
        return [
            gr.update(visible=text),
            gr.update(visible=text),
            gr.update(choices=list(labels), value=next(iter(labels), None), visible=not text),
            gr.update(visible=self.offers[name].takes_start_image),
            gr.update(visible=self.offers[name].takes_scheduler),
            *(gr.update(visible=cls is technique.options_class()) for cls in self.option_classes),
            *(gr.update(visible=fits) for fits in rows),
            *(gr.skip() if fits else gr.update(value=False) for fits in rows),
        ]

    def show_defaults(self, name: str) -> list[Any]:
        """What the option controls show when this model is chosen: the options it recommends; others stay."""
        chosen = within(self.offers[name].defaults, self.engine.limits.of_options)
        values = []
        for cls in self.option_classes:
            values += values_from_options(chosen) if cls is type(chosen) else [gr.skip()] * len(self.controls[cls])
        return values

    @staticmethod
    def _condition(offer: Offer, prompt: str, label: Any) -> Any:
        if offer.technique.options_class().condition == "prompt":
            if not (prompt or "").strip():
                raise ValueError("type a prompt first")
            return prompt.strip()
        if label in (None, ""):
            raise ValueError("choose a class first")
        return int(label) if str(label).isdigit() else label

    def generate(
        self, model: str, prompt: str, label: Any, seed: Any, count: Any, scheduler: str, start_image: str | None,
        *values: Any, request: gr.Request, progress: gr.Progress,
    ) -> Iterator[tuple]:  # fmt: skip
        """Yields (gallery, preview, status, seed) while the samples are made."""
        stop = StopFlag()
        self.stops[request.session_hash] = stop
        paths: list[str] = []
        try:
            job = self.parse(model, prompt, label, seed, scheduler, start_image, list(values))
            yield gr.skip(), None, "Opening the model ...", job.seed
            for event in self.engine.run(job, int(count), stop):
                if isinstance(event, Finished):
                    paths.append(str(event.path))
                    yield paths, None, f"{len(paths)} of {count} done (last one {event.seconds:.1f} s)", job.seed
                elif isinstance(event, Stopped):
                    yield paths, None, f"Stopped; {event.finished} finished kept.", job.seed
                elif isinstance(event, Progress):
                    progress(event.fraction, desc=f"{event.finished + 1} of {event.count}")
                    yield gr.skip(), event.preview or gr.skip(), str(event), job.seed
                else:
                    yield (gr.skip(),) * 4
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            yield gr.skip(), None, f"Not done: {error}", gr.skip()
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            stop.set()
            if self.stops.get(request.session_hash) is stop:
                del self.stops[request.session_hash]

    def stop(self, request: gr.Request) -> str:
        """Stops this visitor's run at its next step."""
        flag = self.stops.get(request.session_hash)
        if flag is None:
            return "Nothing is running."
        flag.set()
        return "Stopping at the next step ..."

    def load_settings(self, path: str | None) -> list[Any]:
        """What the controls must show to make the sample in this file again."""
        blank = [gr.skip()] * (7 + len(self.all_controls()) + 1)
        if path is None:
            return blank
        try:
            record = read_record(path)
            job, indices = job_of_record(record)
            job = single_job(job, record["index"])
            if job.start_image is not None:
                job.start_image.open()
            if job.model not in self.offers:
                raise ValueError(f"the file was made with {job.model}, which is not offered here")
        except (ValueError, KeyError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        is_prompt = job.options.condition == "prompt"
        values: list[Any] = [
            job.model,
            job.conditions[0] if is_prompt else gr.skip(),
            gr.skip() if is_prompt else str(job.conditions[0]),
            job.seed,
            1,
            job.scheduler or "default",
            job.start_image.path if job.start_image else None,
        ]
        for cls in self.option_classes:
            same = cls is type(job.options)
            values += values_from_options(job.options) if same else [gr.skip()] * len(self.controls[cls])
        for row in self.accelerations():
            config = job.accelerations.get(row.name)
            values.append(config is not None)
            values += values_from_options(config) if config else [gr.skip()] * len(self.plugins[row.name][1])
        note = "Settings loaded; press Generate to make the same sample again."
        if len(indices) > 1:
            note += f" It was made in a batch of {len(indices)}, alone a pixel may differ by one level."
        return [*values, note]


@dataclass
class Question:
    """The controls that every model has, and the buttons."""

    model: gr.Dropdown
    prompt: gr.Textbox
    examples: gr.Examples
    label: gr.Dropdown
    start_image: gr.Image
    seed: gr.Number
    count: gr.Slider
    generate: gr.Button
    stop: gr.Button


@dataclass
class Answer:
    """Where a run shows what it makes."""

    status: gr.Markdown
    used: gr.Textbox
    preview: gr.Image
    results: gr.Gallery


def _question(tab: GenerateTab, limits: Limits) -> Question:
    offers, media, examples_of_tab = list(tab.offers.values()), tab.media, EXAMPLES[tab.media]
    first = offers[0]
    model = gr.Dropdown(choices(offers), value=first.name, label="Model", elem_id=f"{media}-model")
    uses_text = first.technique.options_class().condition == "prompt"
    prompt = gr.Textbox(
        label="Prompt", info="what it shall show; Shift + Enter generates", lines=2, visible=uses_text,
        value=examples_of_tab[0], elem_id=f"{media}-prompt", max_length=limits.max_prompt,
        placeholder="for example: burger, 3d style",
    )  # fmt: skip
    examples = gr.Examples([[text] for text in examples_of_tab], [prompt], api_visibility="private")
    examples.dataset.label, examples.dataset.visible = "Examples", uses_text
    label = gr.Dropdown(
        list(first.labels), label="Class", visible=not uses_text, allow_custom_value=True,
        value=first.labels[0] if first.labels else None, elem_id=f"{media}-label",
    )  # fmt: skip
    start_image = gr.Image(
        label="Start image: the first frame", type="filepath", height=160, sources=["upload", "clipboard"],
        visible=first.takes_start_image, elem_id=f"{media}-start-image",
    )  # fmt: skip
    with gr.Row():
        seed = gr.Number(-1, label="Seed", info="-1: a random one", precision=0, minimum=-1, elem_id=f"{media}-seed")
        count = gr.Slider(1, limits.max_count, value=1, step=1, label="Count", elem_id=f"{media}-count")
    with gr.Row():
        generate = gr.Button("Generate", variant="primary", elem_id=f"{media}-generate")
        stop = gr.Button("Stop", variant="stop", elem_id=f"{media}-stop")
    return Question(model, prompt, examples, label, start_image, seed, count, generate, stop)


def _tuning(tab: GenerateTab, limits: Limits) -> tuple[gr.Dropdown, gr.File]:
    """Fills `tab.controls` and `tab.plugins`; returns the scheduler's dropdown and the upload of an earlier file."""
    offers, media = list(tab.offers.values()), tab.media
    first = offers[0]
    for cls in tab.option_classes:
        with gr.Group(visible=cls is first.technique.options_class()) as tab.groups[cls]:
            shown_first = next(offer.defaults for offer in offers if type(offer.defaults) is cls)
            tab.controls[cls] = build_controls(shown_first, limits.of_options)
    with gr.Accordion("Scheduler and acceleration", open=False):
        scheduler = gr.Dropdown(
            ["default", "flow-euler", "flow-heun", "ddim", "ddpm", "dpm-solver", "unipc"], value="default",
            label="Scheduler", info="default: the checkpoint's own", visible=first.takes_scheduler,
        )  # fmt: skip
        for row in tab.accelerations():
            with gr.Group(visible=row.name in first.accelerations) as tab.plugin_groups[row.name]:
                switch = gr.Checkbox(False, label=row.title, elem_id=f"{media}-{row.name}")
                tab.plugins[row.name] = (switch, build_controls(row.config_class()(), {}))
    upload = gr.File(
        label="Load settings from a file made here", file_types=[".png", ".mp4", ".gif"], type="filepath",
        height=170, elem_id=f"{media}-upload",
    )  # fmt: skip
    return scheduler, upload


def _answer(media: str) -> Answer:
    status = gr.Markdown("Ready.", elem_id=f"{media}-status")
    used = gr.Textbox(
        label="Seed used", interactive=False, max_lines=1, placeholder="none yet", elem_id=f"{media}-used"
    )
    preview = gr.Image(
        label="In progress", height=192, interactive=False, format="png", buttons=[], elem_id=f"{media}-preview"
    )
    pictures = {"columns": 4, "format": "png", "object_fit": "contain", "buttons": ["download", "fullscreen"]}
    clips = {"columns": 2, "buttons": ["download"]}
    results = gr.Gallery(label="Results", elem_id=f"{media}-results", **(pictures if media == "image" else clips))
    return Answer(status, used, preview, results)


def build_generate_tab(engine: Engine, offers: list[Offer], media: str, limits: Limits) -> GenerateTab:
    """Builds the controls of a tab inside the present Blocks context and wires them up."""
    tab = GenerateTab(engine, {offer.name: offer for offer in offers}, media)
    with gr.Row():
        with gr.Column(scale=2, min_width=320, elem_classes="ask"):
            with gr.Column():
                ask = _question(tab, limits)
            with gr.Column(elem_classes="tune"):
                scheduler, upload = _tuning(tab, limits)
        with gr.Column(scale=3, min_width=320, elem_classes="see"):
            see = _answer(media)

    def on_generate(
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),
        *values: Any,
    ) -> Iterator[tuple]:
        yield from tab.generate(*values, request=request, progress=progress)

    inputs = [
        ask.model, ask.prompt, ask.label, ask.seed, ask.count, scheduler, ask.start_image, *tab.all_controls(),
    ]  # fmt: skip
    shown = [ask.prompt, ask.examples.dataset, ask.label, ask.start_image, scheduler]
    shown += [*tab.groups.values(), *tab.plugin_groups.values(), *(switch for switch, _ in tab.plugins.values())]
    ask.model.change(tab.on_model, [ask.model], shown, api_visibility="private", queue=False)
    # on input, not on change: settings loaded from a file bring their own values along
    ask.model.input(tab.show_defaults, [ask.model], tab.option_controls(), api_visibility="private", queue=False)
    gr.on(
        [ask.generate.click, ask.prompt.submit], on_generate, inputs, [see.results, see.preview, see.status, see.used],
        api_visibility="private", show_progress_on=[see.status], **DEVICE_QUEUE,
    )  # fmt: skip
    ask.stop.click(tab.stop, None, [see.status], api_visibility="private", queue=False)
    upload.upload(tab.load_settings, [upload], [*inputs, see.status], api_visibility="private", queue=False)
    return tab

"""The training config: a YAML file, `key=value` overrides, and frozen dataclasses that refuse unknown keys.

    name: emoji-pixart-64          # names the run and the saved checkpoint
    task: text-to-image            # chooses how conditions are made (dit_suite.training.conditioning)
    technique: pixart              # row of the registry whose pipeline saves and previews the model
    model: {name: PixArtTransformer2DModel, options: {...}, call: {...}}
    scheduler: {name: FlowMatchEulerDiscreteScheduler, options: {...}}
    objective: {name: rectified_flow, options: {...}}
    data: {...}  condition: {...}  optimizer: {...}  ema: {...}  run: {...}

A part with `name` is a class: a registry name, a diffusers class, or `module:Class`; `options` are its arguments.
`model: {from: FOLDER}` takes class, options and weights from a checkpoint instead (`dit_suite.training.start`).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dit_suite.data.section import DataSection
from dit_suite.options import Options, fields_of, option

TASKS = ("unconditional", "class-to-image", "class-to-video", "text-to-image", "text-to-video", "action-to-video")


@dataclass(frozen=True)
class Part:
    """A class by name with its constructor arguments.

    Attributes:
        name: registry name, diffusers class name, or `module:Class`.
        options: keyword arguments.
        call: constant keyword arguments of every forward call (models only).
        weight: factor of an auxiliary loss.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "options": dict(self.options), "call": dict(self.call), "weight": self.weight}


@dataclass(frozen=True)
class ConditionSection(Options):
    """What the network is told."""

    dropout: float = option(0.1, "share of conditions dropped for guidance", minimum=0.0, maximum=1.0)
    null_label: int | None = option(None, "class id of a dropped label (default: the number of classes)")
    states: str = option("", "cached caption states (default: captions.safetensors in the data folder)")
    max_length: int = option(24, "tokens per caption", minimum=1, maximum=512)


@dataclass(frozen=True)
class OptimizerSection(Options):
    """AdamW and the shape of its learning rate: warm-up, constant, decay over the last share of the steps."""

    lr: float = option(1e-3, "peak learning rate", minimum=0.0)
    beta1: float = option(0.9, "first moment", minimum=0.0, maximum=1.0)
    beta2: float = option(0.99, "second moment", minimum=0.0, maximum=1.0)
    eps: float = option(1e-8, "added to the denominator", minimum=0.0)
    weight_decay: float = option(0.01, "decoupled weight decay", minimum=0.0)
    decay_matrices_only: bool = option(True, "no weight decay on biases, norms and other one-dimensional tensors")
    clip: float = option(1.0, "largest gradient norm; 0 turns clipping off", minimum=0.0)
    warmup_steps: int = option(200, "linear warm-up", minimum=0)
    decay: str = option("linear", "shape of the decay", choices=("none", "linear", "cosine"))
    decay_share: float = option(0.4, "share of the steps that decay", minimum=0.0, maximum=1.0)
    final_lr: float = option(0.0, "learning rate at the end, as a share of the peak", minimum=0.0, maximum=1.0)
    only: tuple[str, ...] = option((), "train only parameters whose names begin with one of these (default: all)")


@dataclass(frozen=True)
class EmaSection(Options):
    """diffusers' EMAModel."""

    decay: float = option(0.9995, "largest decay; 0 turns the average off", minimum=0.0, maximum=1.0)
    warmup: bool = option(False, "use the library's warm-up formula instead of (1 + step) / (10 + step)")


@dataclass(frozen=True)
class RunSection(Options):
    """How long, how large, where."""

    output: str = option("", "folder of the run (default: runs/<name>)")
    seed: int = option(0, "seed of weights, data order, noise, timesteps and dropout", minimum=0, maximum=2**31)
    max_steps: int = option(0, "optimizer steps; 0 derives them from max_minutes", minimum=0)
    max_minutes: float = option(0.0, "stop, save and export after this long; 0 means no limit", minimum=0.0)
    batch_size: int = option(64, "samples per optimizer step over all processes", minimum=1)
    accumulation: int = option(1, "micro-batches per optimizer step", minimum=1)
    precision: str = option("no", "autocast dtype", choices=("no", "bf16"))
    parallel: str = option("ddp", "how parameters are spread", choices=("ddp", "fsdp"))
    find_unused_parameters: bool = option(False, "DDP: some parameters get no gradient in a step (routed experts)")
    compile: bool = option(False, "torch.compile the network")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    log_every: int = option(10, "steps between log lines", minimum=1)
    save_every: int = option(500, "steps between resumable states", minimum=1)
    export_every: int = option(0, "steps between checkpoints kept in <output>/checkpoints; 0 keeps the last", minimum=0)
    preview_every: int = option(0, "steps between sample grids; 0 turns them off", minimum=0)
    preview_steps: int = option(20, "denoising steps of a sample grid", minimum=1)
    preview_count: int = option(8, "samples of a grid", minimum=1, maximum=256)
    preview_guidance: float = option(3.0, "guidance of a sample grid", minimum=0.0)
    preview_prompts: tuple[str, ...] = option((), "captions of a grid (default: spread over the data)")
    peak_tflops: float = option(0.0, "peak of the device for the MFU in the log; 0 takes it from a table", minimum=0.0)

    def validate(self) -> None:
        if not self.max_steps and not self.max_minutes:
            raise ValueError("give run.max_steps or run.max_minutes (or --max-minutes)")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} must divide batch_size {self.batch_size}")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run; see the module's text for the file."""

    name: str
    task: str
    technique: str
    model: Part
    scheduler: Part
    objective: Part
    data: DataSection
    run: RunSection
    condition: ConditionSection = field(default_factory=ConditionSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    ema: EmaSection = field(default_factory=EmaSection)
    attention: Part | None = None
    auxiliary: Part | None = None
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    init_from: str = ""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if not isinstance(self.name, str) or not self.name or "/" in self.name:
            raise ValueError(f"name must be a plain word, got {self.name!r}")

    @property
    def output(self) -> Path:
        """Folder of the run."""
        return Path(self.run.output or f"runs/{self.name}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the YAML file."""
        plain: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            plain[item.name] = value.to_dict() if isinstance(value, Part | Options) else value
        return plain

    def with_classes(self, count: int) -> "TrainConfig":
        """The config with `model.options.num_classes: null` replaced by the data set's number of classes."""
        if self.model.options.get("num_classes", 0) is not None:
            return self
        model = dataclasses.replace(self.model, options={**self.model.options, "num_classes": count})
        return dataclasses.replace(self, model=model)

    def identity(self) -> str:
        """JSON of everything that decides the numbers: a state may only be resumed by a run with the same identity."""
        plain = self.to_dict()
        free = (
            "output",
            "max_minutes",
            "log_every",
            "save_every",
            "export_every",
            "peak_tflops",
            "compile",
            "parallel",
            "accumulation",
        )
        plain["run"] = {
            key: value for key, value in plain["run"].items() if key not in free and not key.startswith("preview_")
        }
        for section, key in (("data", "path"), ("condition", "states")):
            plain[section] = {name: value for name, value in plain[section].items() if name != key}
        return json.dumps(plain, sort_keys=True, default=str)


_SECTIONS: Mapping[str, type[Options]] = {
    "data": DataSection,
    "condition": ConditionSection,
    "optimizer": OptimizerSection,
    "ema": EmaSection,
    "run": RunSection,
}
_PARTS = ("model", "scheduler", "objective", "attention", "auxiliary")


def _part(key: str, value: Any) -> Part | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"{key} must be a name or a mapping with a name, got {value!r}")
    known = [item.name for item in dataclasses.fields(Part)]
    for unknown in sorted(set(value) - set(known)):
        raise ValueError(f"{key} has no key {unknown!r}; it accepts {', '.join(known)}")
    for inner in ("options", "call"):
        if not isinstance(value.get(inner) or {}, Mapping):
            raise ValueError(f"{key}.{inner} must be a mapping, got {value[inner]!r}")
    weight = value.get("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        raise ValueError(f"{key}.weight must be a number, got {weight!r}")
    for inner, owner, idle in (("call", "model", not value.get("call")), ("weight", "auxiliary", weight == 1.0)):
        if key != owner and not idle:
            raise ValueError(f"{key}.{inner} has no effect: only {owner} has one")
    return Part(value["name"], dict(value.get("options") or {}), dict(value.get("call") or {}), float(weight))


def _worded(section: type[Options], given: Mapping[str, Any]) -> dict[str, Any]:
    """YAML 1.1 reads the bare word `no` as false; an option with the choice "no" gets its word back."""
    worded = {spec.name for spec in fields_of(section) if "no" in (spec.choices or ())}
    return {key: "no" if value is False and key in worded else value for key, value in given.items()}


def config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Builds and checks a config.

    Raises:
        ValueError: an unknown or missing key, or a value out of range; the sentence names the key.
    """
    known = [item.name for item in dataclasses.fields(TrainConfig)]
    for unknown in sorted(set(values) - set(known)):
        raise ValueError(f"the config has no key {unknown!r}; it accepts {', '.join(known)}")
    for needed in ("name", "task", "technique", "model", "scheduler", "objective"):
        if not values.get(needed):
            raise ValueError(f"the config needs {needed!r}")
    built: dict[str, Any] = dict(values)
    for key in _PARTS:
        if key in values:
            built[key] = _part(key, values[key])
    for key, section in _SECTIONS.items():
        given = values.get(key) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{key} must be a mapping, got {given!r}")
        try:
            built[key] = section.from_dict(_worded(section, given))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return TrainConfig(**built)


def override(values: dict[str, Any], assignment: str) -> None:
    """Applies one `a.b.c=value` to a nested dictionary; the value is read as YAML.

    Raises:
        ValueError: no "=" in the assignment, or a key on the way is not a mapping.
    """
    path, found, text = assignment.partition("=")
    if not found or not path:
        raise ValueError(f"an override looks like key=value, got {assignment!r}")
    *parents, last = path.split(".")
    place = values
    for name in parents:
        if place.get(name) is None:
            place[name] = {}
        elif isinstance(place[name], str):
            place[name] = {"name": place[name]}
        place = place[name]
        if not isinstance(place, dict):
            raise ValueError(f"{assignment!r}: {name} is not a mapping")
    place[last] = _numbers(_read_yaml(text, repr(assignment)))


def _read_yaml(text: str | bytes, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; such strings become floats."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and applies overrides.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or not a valid config.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {path}")
    values = _read_yaml(path.read_bytes(), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping")
    values = _numbers(values)
    for assignment in overrides:
        override(values, assignment)
    from dit_suite.training.start import start_from_checkpoint

    return config_from_dict(start_from_checkpoint(values))


def config_text(config: TrainConfig) -> str:
    """The config as YAML that `load_config` reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, list | tuple) else value

    return yaml.safe_dump(plain(config.to_dict()), sort_keys=False, allow_unicode=True)

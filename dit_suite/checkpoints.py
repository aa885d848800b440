"""Finding, checking and opening checkpoints.

A checkpoint is a folder in diffusers layout (`model_index.json` and one folder per component). `load_pipeline` opens it
with the explicit class from the registry: `DiffusionPipeline.from_pretrained` looks for classes inside diffusers only
and can't find ours. Weights are safetensors, every key must match, and no code from a checkpoint is ever run.
"""

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_suite.hashing import sha256_of
from dit_suite.options import Options
from dit_suite.registry import Technique, resolve, technique_of_class

SHARD_SIZE = "9MB"
SAMPLING_FILE = "sampling.json"  # call options that suit this checkpoint better than those of its technique
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk.

    Attributes:
        name: what it is called.
        folder: where it lies.
        technique: what opens it.
        weights_sha256: hash of its weights.
        defaults: call options where the user gives none: those of the technique, changed as `sampling.json` of the
            folder says.
    """

    name: str
    folder: Path
    technique: Technique
    weights_sha256: str
    defaults: Options


def makes_clips(path_or_name: str | os.PathLike) -> bool:
    """Whether the samples of a checkpoint are clips: its technique's task says so, or its network has several frames.

    Raises:
        ValueError, FileNotFoundError: as `find_folder`; or the folder holds no pipeline.
    """
    _, folder = find_folder(path_or_name)
    model_index = _read_model_index(folder)
    row = technique_of_class(model_index["_class_name"], _component_class(model_index, "transformer"))
    config = folder / "transformer" / "config.json"
    frames = json.loads(config.read_text("utf-8")).get("num_frames") if config.is_file() else None
    return not row.task.endswith("to-image") or (frames or 1) > 1


def bundled_root() -> Path:
    """The folder of the bundled checkpoints: inside an installed package, or `checkpoints/` of a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "bundled"
    return inside if (inside / "index.json").is_file() else package.parent / "checkpoints"


def bundled_index() -> dict[str, dict[str, Any]]:
    """Rows of `checkpoints/index.json` by name."""
    path = bundled_root() / "index.json"
    return json.loads(path.read_text("utf-8"))["checkpoints"] if path.is_file() else {}


def weights_sha256(folder: Path) -> str:
    """One hash over all safetensors of a checkpoint by relative path; cache profiles (`bac/`) are no weights."""
    digest = hashlib.sha256()
    weights = [p for p in folder.rglob("*.safetensors") if p.relative_to(folder).parts[0] != "bac"]
    for path in sorted(weights, key=lambda p: p.relative_to(folder).as_posix()):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def _bundled_folder(name: str, row: dict[str, Any]) -> Path:
    places = [bundled_root() / name]
    if os.environ.get("DIT_SUITE_CHECKPOINTS"):
        places.append(Path(os.environ["DIT_SUITE_CHECKPOINTS"]) / name)
    for place in places:
        if (place / "model_index.json").is_file():
            return place
    if row.get("hub_id"):
        return _download(row["hub_id"], row["hub_revision"])
    looked = " or ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"checkpoint {name!r} is not in {looked}; it comes with the repository (checkpoints/{name}), "
        "or set DIT_SUITE_CHECKPOINTS to a folder that holds it"
    )


def _download(hub_id: str, revision: str) -> Path:
    """Copies one revision of a hub repository to the local cache and says its licence and size.

    Raises:
        FileNotFoundError: it can't be downloaded, and no copy is on this machine.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True)
    except Exception as error:  # no connection, or no such repository or revision: the client's errors share no base
        try:
            folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise FileNotFoundError(f"{hub_id}@{revision} can't be downloaded: {error}") from error
        print(f"{hub_id}@{revision}: the hub does not answer, so the copy on this machine is used", file=sys.stderr)
        return folder
    licence = (info.card_data or {}).get("license", "not stated")
    wanted = [f for f in info.siblings or [] if f.rfilename.endswith((".json", ".safetensors", ".txt", ".model"))]
    size = sum(f.size or 0 for f in wanted) / 1e6
    print(f"{hub_id}@{revision}: licence {licence}, {size:.0f} MB", file=sys.stderr)
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[f.rfilename for f in wanted]))


def find_folder(path_or_name: str | os.PathLike) -> tuple[str, Path]:
    """Resolves a folder, a bundled name or `owner/name@revision` to (name, local folder).

    Raises:
        ValueError: the name is none of these, or a hub id comes without a revision.
        FileNotFoundError: a known checkpoint is not on this machine.
    """
    text = os.fspath(path_or_name)
    if Path(text).is_dir():
        folder = Path(text).resolve()
        return folder.name, folder
    index = bundled_index()
    if text in index:
        return text, _bundled_folder(text, index[text])
    hub_id, _, revision = text.partition("@")
    if _HUB_ID.match(hub_id):
        if not revision:
            raise ValueError(
                f"{text!r} is no folder here; for a hub repository pin a revision, as in {hub_id}@<commit>"
            )
        return text, _download(hub_id, revision)
    raise ValueError(
        f"there is no checkpoint {text!r}: give a folder, owner/name@revision, or one of {', '.join(sorted(index))}"
    )


def _read_model_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no model_index.json, so it is not a pipeline folder")
    try:
        model_index = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(model_index, dict) or not isinstance(model_index.get("_class_name"), str):
        raise ValueError(f"{path} names no pipeline class")
    return model_index


def _component_class(model_index: dict[str, Any], component: str) -> str | None:
    entry = model_index.get(component)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _refuse_pickles(folder: Path) -> None:
    for component in sorted(p for p in folder.iterdir() if p.is_dir()):
        files = [p for p in component.iterdir() if p.is_file()]
        pickles = [p for p in files if p.suffix in _PICKLES]
        if pickles and not any(p.suffix == ".safetensors" for p in files):
            raise ValueError(f"{pickles[0]} is a pickle, which may run code; only safetensors weights are opened")


def _read_defaults(folder: Path, technique: Technique) -> Options:
    """The technique's call options with the values of the folder's `sampling.json`, if there is one."""
    defaults, path = technique.options_class()(), folder / SAMPLING_FILE
    if not path.is_file():
        return defaults
    try:
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it must hold a JSON object, got {values!r}")
        return defaults.changed(values)
    except ValueError as error:
        raise ValueError(f"{path} can't be used: {error}") from None


def find_checkpoint(path_or_name: str | os.PathLike) -> Checkpoint:
    """Finds a checkpoint and checks what can be checked without building the network.

    Raises:
        ValueError: unknown name, no pipeline folder, unknown pipeline or network class, pickled weights, a
            `sampling.json` that does not fit the technique, or a bundled checkpoint whose weights differ from the
            index.
        FileNotFoundError: the checkpoint is not on this machine.
    """
    name, folder = find_folder(path_or_name)
    model_index = _read_model_index(folder)
    technique = technique_of_class(model_index["_class_name"], _component_class(model_index, "transformer"))
    _refuse_pickles(folder)
    digest = weights_sha256(folder)
    expected = bundled_index().get(name, {}).get("sha256") if os.fspath(path_or_name) == name else None
    if expected and digest != expected:
        raise ValueError(f"the weights in {folder} have sha256 {digest}, checkpoints/index.json says {expected}")
    return Checkpoint(name, folder, technique, digest, _read_defaults(folder, technique))


def _network_class(model_index: dict[str, Any], technique: Technique) -> type:
    """The class of the network that a pipeline folder names."""
    name = _component_class(model_index, "transformer")
    return resolve(technique.networks[name]) if name else technique.model_class()


def check_weights(module: Any, folder: Path) -> None:
    """Every tensor in `folder` must be a parameter or buffer of `module`, and every parameter must be in a file.

    Raises:
        ValueError: names the first missing and unexpected keys.
    """
    from safetensors import safe_open

    stored: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            stored |= set(file.keys())
    expected = set(module.state_dict())
    missing, unexpected = sorted(expected - stored), sorted(stored - expected)
    if missing or unexpected:
        detail = [f"{len(missing)} missing ({missing[0]}, ...)"] if missing else []
        detail += [f"{len(unexpected)} unexpected ({unexpected[0]}, ...)"] if unexpected else []
        raise ValueError(f"the weights in {folder} do not fit {type(module).__name__}: keys {' and '.join(detail)}")


def open_network(checkpoint: Checkpoint) -> Any:
    """The network of a checkpoint that `find_checkpoint` returned, alone: float32, in evaluation mode.

    Raises:
        ValueError: there are no weights, or their keys do not match exactly.
    """
    from dit_suite.compact_weights import is_compact, load_network

    model_index = _read_model_index(checkpoint.folder)
    cls = _network_class(model_index, checkpoint.technique)
    folder = checkpoint.folder / "transformer"
    try:
        network = load_network(cls, folder)
    except OSError as error:
        raise ValueError(f"{folder} can't be opened as {cls.__name__}: {error}") from error
    if not is_compact(folder):
        check_weights(network, folder)
    return network


def check_device(device: Any) -> None:
    """Refuses (`ValueError`) a device that torch does not know or can't reach on this machine."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device {str(device)!r} can't be used on this machine: {reason}") from None


def open_pipeline(checkpoint: Checkpoint, dtype: Any = None, device: Any = None) -> Any:
    """Builds the pipeline of a checkpoint that `find_checkpoint` returned. See `load_pipeline`."""
    import torch
    from diffusers import ModelMixin

    from dit_suite.compact_weights import is_compact

    if device is not None:
        check_device(device)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype such as torch.bfloat16, got {dtype!r}")
    model_index = _read_model_index(checkpoint.folder)
    _network_class(model_index, checkpoint.technique)  # diffusers looks for it in modules that are imported
    given: dict[str, Any] = {}
    source = model_index.get("text_encoder_source")
    if source and _component_class(model_index, "text_encoder") is None:
        from dit_suite.text_encoders import TextEncoderSource, load_text_encoder

        given = load_text_encoder(TextEncoderSource.from_dict(source))
        given["text_encoder"].to(dtype or torch.float32)
    pipeline_class = checkpoint.technique.pipeline_class()
    if is_compact(checkpoint.folder / "transformer"):
        given["transformer"] = open_network(checkpoint)
        if dtype not in (None, torch.float32):
            given["transformer"].to(dtype)
    try:
        pipe = pipeline_class.from_pretrained(
            checkpoint.folder, dtype=dtype or torch.float32, use_safetensors=True, local_files_only=True, **given
        )
    except (OSError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{checkpoint.folder} can't be opened as {pipeline_class.__name__}: {error}") from error
    for name, module in pipe.components.items():
        if name not in given and isinstance(module, ModelMixin) and (checkpoint.folder / name).is_dir():
            check_weights(module, checkpoint.folder / name)
    pipe.set_progress_bar_config(disable=None)
    return pipe.to(device) if device is not None else pipe


def load_pipeline(path_or_name: str | os.PathLike, dtype: Any = None, device: Any = None) -> Any:
    """Opens a checkpoint as a ready pipeline.

    Args:
        path_or_name: a bundled name ("emoji-pixart-64"), a folder written by `save_pretrained`, or a hub repository at
            a pinned revision ("owner/name@commit"), which is downloaded first, its licence and size said.
        dtype: torch dtype of the networks (default float32).
        device: where to put the pipeline (default: left on the CPU).

    Raises:
        ValueError: the name is unknown, the folder is not a pipeline of this suite, its keys do not match exactly, or
            its weights are pickles; or the device can't be used, or the dtype is none.
        FileNotFoundError: a known checkpoint, or the text encoder it names, is not on this machine.
    """
    return open_pipeline(find_checkpoint(path_or_name), dtype=dtype, device=device)

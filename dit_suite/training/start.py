"""Training that starts from a finished checkpoint: `model: {from: FOLDER}` in a config.

FOLDER is anything `load_pipeline` opens: a bundled name, a folder, or a hub repository at a pinned revision. Class,
options and weights of the network come from there (with a graft plan, if it has one), and so do technique, task,
scheduler and the pipeline's own settings where the config does not give them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_suite.checkpoints import find_checkpoint


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"model.from: there is no {path}")
    return json.loads(path.read_text("utf-8"))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("_")}


def start_from_checkpoint(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `model.from` carried out; configs without it come back as they are.

    Raises:
        ValueError: no such checkpoint, or `init_from` is given beside it.
        FileNotFoundError: a known checkpoint is not on this machine.
    """
    values = dict(values)
    model = values.get("model")
    if not isinstance(model, Mapping) or "from" not in model:
        return values
    if values.get("init_from"):
        raise ValueError("give model.from or init_from, not both")
    checkpoint = find_checkpoint(str(model["from"]))
    row, folder = checkpoint.technique, checkpoint.folder
    config = _read(folder / "transformer" / "config.json")
    options = {**_plain(config), **(model.get("options") or {})}
    values["model"] = {
        **{key: value for key, value in model.items() if key != "from"},
        "name": model.get("name") or row.networks[config["_class_name"]],
        "options": options,
    }
    values["init_from"] = str(folder)
    index = _read(folder / "model_index.json")
    values.setdefault("technique", row.name)
    values.setdefault("task", row.task)
    if "scheduler" not in values:
        scheduler = _read(folder / "scheduler" / "scheduler_config.json")
        library, name = index["scheduler"]
        name = name if library == "diffusers" else f"{library}:{name}"
        values["scheduler"] = {"name": name, "options": _plain(scheduler)}
    settings = {key: value for key, value in _plain(index).items() if not isinstance(value, list)}
    values["pipeline"] = {**settings, **(values.get("pipeline") or {})}
    return values

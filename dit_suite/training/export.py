"""The trained pipeline as a folder that `load_pipeline` opens, and sample grids on the way."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

from dit_suite.checkpoints import SHARD_SIZE
from dit_suite.data.labels import FILE_NAME as LABEL_FILE
from dit_suite.data.labels import LabelTable
from dit_suite.files import replacing_folder, write_json
from dit_suite.metadata import write_png
from dit_suite.schedulers.generators import sample_generators
from dit_suite.training.build import construct, make_pipeline
from dit_suite.training.config import TrainConfig


def export(
    config: TrainConfig,
    tensors: dict[str, torch.Tensor],
    target: Path,
    about: dict[str, Any],
    class_names: Mapping[int, str] | None = None,
) -> Path:
    """Writes the pipeline with these weights (safetensors in small shards) and `training.json`: settings, no paths.

    Args:
        config: of the run.
        tensors: whole state dict of the network.
        target: folder to write; replaced as a whole.
        about: steps, losses and the like.
        class_names: of the data set.
    """
    fresh = construct(config.model)
    fresh.load_state_dict(tensors)
    pipe = make_pipeline(config, fresh.eval(), class_names)
    with replacing_folder(target) as folder:
        pipe.save_pretrained(folder, max_shard_size=SHARD_SIZE, safe_serialization=True)
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)
        settings = json.loads(config.identity())
        settings["init_from"] = Path(settings["init_from"]).name
        objective = settings["objective"]["options"]
        if "teacher" in objective:
            objective["teacher"] = Path(objective["teacher"]).name
        write_json({"config": settings, **about}, folder / "training.json")
        data = Path(config.data.path)
        if config.data.path and (data / LABEL_FILE).is_file():
            LabelTable.load(data).narrowed(config.data.styles, config.data.groups).save(folder)
    return target


def as_grid(samples: Any) -> torch.Tensor:
    """Pictures `(count, 3, height, width)`, or clips `(count, frames, 3, height, width)` with one row per clip."""
    if isinstance(samples, np.ndarray):
        samples = torch.from_numpy(samples)
        samples = samples.movedim(-1, -3)
    samples = samples.detach().float().cpu().clamp(0, 1)
    columns = samples.shape[1] if samples.ndim == 5 else max(1, int(len(samples) ** 0.5 + 0.999))
    flat = samples.flatten(0, 1) if samples.ndim == 5 else samples
    return (make_grid(flat, nrow=columns, padding=2, pad_value=1.0) * 255).round().to(torch.uint8)


def preview(config: TrainConfig, network: torch.nn.Module, conditions: dict[str, Any]) -> torch.Tensor:
    """A grid of samples, uint8 (3, height, width), with the network as it is; sample i has seed + i."""
    pipe = make_pipeline(config, network)
    pipe.set_progress_bar_config(disable=True)
    count = config.run.preview_count
    wanted = {
        **conditions,
        "num_inference_steps": config.run.preview_steps,
        "guidance_scale": config.run.preview_guidance,
        "num_frames": config.data.frames,
        "generator": sample_generators(config.run.seed, range(count)),
        "output_type": "pt",
        "return_dict": False,
    }
    known = inspect.signature(type(pipe).__call__).parameters
    if not conditions:
        wanted["batch_size"] = count
    samples = pipe(**{key: value for key, value in wanted.items() if key in known})[0]
    return as_grid(samples)


def save_picture(path: Path, grid: torch.Tensor) -> None:
    """Writes a grid as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(Image.fromarray(grid.permute(1, 2, 0).numpy()), path, None)

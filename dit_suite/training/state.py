"""Resumable states: weights, average and optimizer moments as whole tensors, whatever way they were spread.

A state folder appears under its final name only when it is complete, so a killed run leaves the last whole one. Because
tensors are stored whole, a run may go on with another number of processes.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from dit_suite.files import replacing_folder

KEEP = 2


@dataclass
class Progress:
    """What a state says about the run.

    Attributes:
        step: optimizer steps done.
        total: steps of the whole run; 0 as long as it has not been derived from the time limit.
        pending: losses since the last log line.
        identity: the config's identity.
        last_loss: of the last step.
    """

    step: int = 0
    total: int = 0
    pending: list[dict[str, float]] = field(default_factory=list)
    identity: str = ""
    last_loss: float | None = None

    def collect(self, losses: list[dict[str, float]]) -> None:
        """Adds the losses of further steps."""
        if losses:
            self.pending = self.pending + losses
            self.last_loss = losses[-1]["loss"]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on the CPU; every process of a sharded tensor must call."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def spread_like(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device, and with the sharding, of `reference`."""
    if isinstance(reference, DTensor):
        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
    return value.to(reference.device)


def network_tensors(network: torch.nn.Module, ema: EMAModel | None = None) -> dict[str, torch.Tensor]:
    """The network's whole state dict; with `ema` the parameters are the averaged ones."""
    averaged: dict[str, torch.Tensor] = {}
    if ema is not None:
        names = [name for name, _ in network.named_parameters()]
        averaged = dict(zip(names, ema.shadow_params, strict=True))
    return {name: whole(averaged.get(name, value)).clone().contiguous() for name, value in network.state_dict().items()}


def _moments(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = whole(value).clone().contiguous()
    return found


def _load_moments(network: torch.nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, torch.Tensor]) -> None:
    for name, parameter in network.named_parameters():
        prefix = f"{name}/"
        entries = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        for key, value in entries.items():
            fused = optimizer.param_groups[0].get("fused")
            optimizer.state[parameter][key] = (
                (value.to(parameter.device) if fused else value) if key == "step" else spread_like(value, parameter)
            )


def states(folder: Path) -> list[Path]:
    """Complete state folders, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def save_state(
    folder: Path,
    accelerator: Accelerator,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    progress: Progress,
    weighting: torch.nn.Module | None = None,
) -> None:
    """Writes `folder/step_XXXXXXXX` and drops all but the newest two. Every process must call."""
    tensors = {"model": network_tensors(network), "optimizer": _moments(network, optimizer)}
    about: dict[str, Any] = {
        "step": progress.step,
        "total": progress.total,
        "pending": progress.pending,
        "identity": progress.identity,
        "last_loss": progress.last_loss,
    }
    if ema is not None:
        names = [name for name, _ in network.named_parameters()]
        tensors["ema"] = {n: whole(v).clone().contiguous() for n, v in zip(names, ema.shadow_params, strict=True)}
        about["ema_step"] = ema.optimization_step
    if weighting is not None:
        tensors["weighting"] = network_tensors(weighting) | _moments(weighting, optimizer)
    if accelerator.is_main_process:
        with replacing_folder(folder / f"step_{progress.step:08d}") as part:
            for name, each in tensors.items():
                save_file(each, part / f"{name}.safetensors")
            (part / "state.json").write_text(json.dumps(about), "utf-8")
        for old in states(folder)[:-KEEP]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_state(
    folder: Path,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    identity: str,
    weighting: torch.nn.Module | None = None,
) -> Progress:
    """Restores the newest state of a run; a fresh `Progress` when there is none.

    Raises:
        ValueError: the state belongs to a run with other settings.
    """
    found = states(folder)
    if not found:
        return Progress(identity=identity)
    newest = found[-1]
    about = json.loads((newest / "state.json").read_text("utf-8"))
    if about["identity"] != identity:
        raise ValueError(
            f"{folder.parent} holds a run with other settings ({_difference(about['identity'], identity)}); "
            "choose another run.output, or delete that folder"
        )
    stored = load_file(newest / "model.safetensors")
    with torch.no_grad():
        for name, value in network.state_dict().items():
            value.copy_(spread_like(stored[name], value))
        if ema is not None:
            averages = load_file(newest / "ema.safetensors")
            for (name, _), shadow in zip(network.named_parameters(), ema.shadow_params, strict=True):
                shadow.copy_(spread_like(averages[name], shadow))
            ema.optimization_step = about["ema_step"]
    _load_moments(network, optimizer, load_file(newest / "optimizer.safetensors"))
    if weighting is not None:
        stored = load_file(newest / "weighting.safetensors")
        weighting.load_state_dict({name: stored[name] for name in weighting.state_dict()})
        _load_moments(weighting, optimizer, stored)
    return Progress(about["step"], about["total"], about["pending"], identity, about.get("last_loss"))


def _difference(old: str, new: str) -> str:
    """The first setting in which two identities differ."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix.rstrip("."): value}
        merged: dict[str, Any] = {}
        for key, each in value.items():
            merged |= flat(each, f"{prefix}{key}.")
        return merged

    before, after = flat(json.loads(old)), flat(json.loads(new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            return f"{key} was {before.get(key)!r}, now {after.get(key)!r}"
    return "the files differ"

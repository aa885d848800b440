"""The log of a run: JSON lines, tensorboard, throughput, and how much of the device is used."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from dit_suite.files import write_text

# Dense bfloat16 peaks in TFLOP/s from the makers' data sheets.
PEAKS = (
    ("H200", 989.0), ("H100 PCIe", 756.0), ("H100", 989.0), ("A100", 312.0), ("L40S", 362.0), ("L40", 181.0),
    ("L4", 121.0), ("4090", 165.0),
)  # fmt: skip


def peak_tflops(device: torch.device, configured: float) -> float:
    """Peak of the device in TFLOP/s: the configured one, or from the table; 0 when unknown."""
    if configured or device.type != "cuda":
        return configured
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), 0.0)


def flops_per_sample(step: Callable[[], torch.Tensor], count: int) -> float:
    """Floating-point operations of one forward and backward pass, per sample; `step` returns the loss of `count`."""
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops() / count


def _is_up_to(line: str, start: int) -> bool:
    """Whether a line of the log belongs to a step that is not done again; a line cut short by a kill does not."""
    try:
        return json.loads(line)["step"] <= start
    except json.JSONDecodeError:
        return False


class Monitor:
    """Collects losses and writes a line now and then. Only the main process writes.

    Args:
        folder: of the run.
        start: step that the run goes on from; later lines of an earlier attempt are dropped.
        main: whether this process writes.
    """

    def __init__(self, folder: Path, start: int, main: bool) -> None:
        self.path, self.main = folder / "log.jsonl", main
        self.writer = None
        self.clock, self.samples = time.perf_counter(), 0
        if not main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text("utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _is_up_to(line, start)]
        write_text(self.path, "".join(line + "\n" for line in kept))
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def rate(self, samples: int) -> float:
        """Samples per second since the last call."""
        now = time.perf_counter()
        found = samples / max(now - self.clock, 1e-9)
        self.clock = now
        return found

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line, and one point per value in tensorboard."""
        if not self.main or self.writer is None:
            return
        line: dict[str, Any] = {"step": step, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, grid: torch.Tensor) -> None:
        """A sample grid, uint8 (3, height, width)."""
        if self.writer is not None:
            self.writer.add_image("samples", grid, step)

    def close(self) -> None:
        """Flushes tensorboard."""
        if self.writer is not None:
            self.writer.close()

"""The result of an evaluation: one JSON line, and a few lines for people."""

import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from dit_suite.evaluation.statistics import ExtractorTag
from dit_suite.metadata import versions


@dataclass
class Report:
    """Everything one evaluation found; `to_json_line` is what is stored.

    `metrics` maps a name to its value, `intervals` to its bootstrap interval, `floor` to the value two sets of real
    samples get. `comparison` holds verdicts against a baseline run, `pairs` per-pair summaries; `features` is None
    where none were needed.
    """

    features: ExtractorTag | None
    samples: dict[str, Any]
    reference: dict[str, Any] | None
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, dict[str, float]] = field(default_factory=dict)
    floor: dict[str, dict[str, float]] = field(default_factory=dict)
    pairs: dict[str, dict[str, float]] = field(default_factory=dict)
    comparison: list[dict[str, Any]] = field(default_factory=list)
    memorisation: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        parts = {
            "metrics": self.metrics,
            "n_samples": self.samples["samples"],
            "n_reference": self.reference["samples"] if self.reference else None,
            "details": self.details,
            "intervals": self.intervals,
            "floor": self.floor,
            "pairs": self.pairs,
            "comparison": self.comparison,
            "memorisation": self.memorisation,
            "warnings": self.warnings,
            "features": asdict(self.features) if self.features else None,
            "samples": shortened(self.samples),
            "reference": shortened(self.reference) if self.reference else None,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "software": versions(),
            "seconds": round(self.seconds, 1),
        }
        return {key: value for key, value in parts.items() if value not in ({}, [], None)}

    def to_json_line(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def lines(self) -> list[str]:
        """The result in words, one metric a line."""
        n, found = self.samples["samples"], []
        against = f" vs {self.reference['samples']}" if self.reference else ""
        for name, value in self.metrics.items():
            line = f"{name} (N={n}{against}): {value:.6g}"
            if name in self.intervals:
                interval = self.intervals[name]
                line += f"  [{interval['low']:.6g}, {interval['high']:.6g}] at {interval['level']:.0%}"
            if name in self.floor:
                line += f"  real-vs-real floor {self.floor[name]['value']:.6g} (N={self.floor[name]['n']})"
            found.append(line)
        for name, row in self.pairs.items():
            found.append(f"{name} to the baseline: mean {row['mean']:.5g}, worst 5 % {row['worst_5_percent']:.5g}")
        for row in self.comparison:
            line = f"{row['metric']}: {row['verdict']} ({row['baseline']:.6g} -> {row['run']:.6g}"
            if row["relative"]:
                relative = row["relative"]
                line += f", {relative['value']:+.2%} [{relative['low']:+.2%}, {relative['high']:+.2%}]"
            found.append(line + f", margin {row['margin']:.0%})")
        for name, value in self.memorisation.items():
            if name != "closest":
                found.append(f"nearest training sample, {name}: {value:.6g}")
        return found


def shortened(description: dict[str, Any]) -> dict[str, Any]:
    """A source's description with a long list of conditions replaced by its count and hash."""
    job = description.get("job")
    if not job or len(job.get("conditions", ())) <= 8:
        return description
    digest = sha256(json.dumps(job["conditions"]).encode()).hexdigest()
    brief = {**job, "conditions": {"count": len(job["conditions"]), "sha256": digest}}
    return {**description, "job": brief}


def hardware() -> str:
    """The accelerator, or the processor and its core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def append_line(path: str | Path, line: str) -> None:
    """Adds one line to a results file (created if needed)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")

"""What calibration leaves behind: how alike the outputs of a model's parts are from step to step."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dit_suite.files import write_atomically

FORMAT = "bac-profile/1"


def similarity_matrix(features: torch.Tensor | np.ndarray, metric: str) -> np.ndarray:
    """(K, K) matrix of "cosine" similarities or "l1", "l2", "mse" distances between the rows of `features` (K, D)."""
    rows = torch.as_tensor(features).double()
    if metric == "cosine":
        unit = torch.nn.functional.normalize(rows, dim=1, eps=1e-30)
        return (unit @ unit.T).numpy()
    if metric == "l1":
        return torch.cdist(rows, rows, p=1).numpy()
    difference = torch.stack([((rows - row) ** 2).sum(1) for row in rows])
    if metric == "mse":
        return (difference / rows.shape[1]).numpy()
    if metric == "l2":
        return difference.sqrt().numpy()
    raise ValueError(f"metric must be cosine, l1, l2 or mse, got {metric!r}")


def block_error(features: torch.Tensor) -> float:
    """Mean absolute difference between the outputs of two different steps: what ranks a unit for bubbling (K, D)."""
    rows = features.double()
    steps, size = rows.shape
    if steps < 2:
        return 0.0
    return float(torch.cdist(rows, rows, p=1).sum() / (size * steps * (steps - 1)))


def model_fingerprint(model: torch.nn.Module, samples: int = 4096) -> str:
    """A hash of a model's class, parameter names, shapes and values.

    Up to `samples` values of each tensor enter it, rounded to bfloat16, so that loading the same weights in another
    floating-point type does not change it.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        stride = max(1, flat.numel() // samples)
        values = flat[::stride][:samples].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class UnitInfo:
    """Name, kind, depth and cost of one cacheable unit, as met during calibration."""

    name: str
    kind: str
    layer: int
    flops: float
    error: float


@dataclass(frozen=True)
class SimilarityProfile:
    """Calibration results of one (model, scheduler, step count).

    Attributes:
        model: class name; `fingerprint`: see `model_fingerprint`.
        scheduler: class name and config of the scheduler, empty where only a model was given.
        timesteps: the scheduler's value of every network evaluation of a branch, in order: K of them.
        positions: (step index, evaluation) of each; second-order schedulers evaluate twice a step.
        num_inference_steps: length of the step plan.
        units: everything recorded, in order of first execution.
        total_flops: of one network evaluation at the calibration size.
        gram: per guidance branch (units, K, K) float64 inner products of the outputs, averaged over the runs.
        cosine: per guidance branch (units, K, K), mean of the runs' cosine similarities.
        num_runs: pipeline calls that were averaged.
        notes: guidance scale, sample shape and whatever else the caller wants to keep.
        quality: measured rows for schedules chosen by PSNR: recipe (`BACConfig.recipe`), budget, flop_fraction, psnr
            and psnr_min in dB, pictures.
        interpolated_from: step count of the profile this one was interpolated from, or None.
    """

    model: str
    fingerprint: str
    scheduler: dict[str, Any]
    num_inference_steps: int
    timesteps: tuple[float, ...]
    positions: tuple[tuple[int, int], ...]
    units: tuple[UnitInfo, ...]
    total_flops: float
    gram: dict[str, np.ndarray] = field(repr=False)
    cosine: dict[str, np.ndarray] = field(repr=False)
    num_runs: int = 1
    notes: dict[str, Any] = field(default_factory=dict)
    quality: tuple[dict[str, Any], ...] = ()
    interpolated_from: int | None = None

    @property
    def num_evaluations(self) -> int:
        """K: network evaluations per run and guidance branch."""
        return len(self.timesteps)

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(self.gram)

    def granularity(self, wanted: str) -> str:
        """ "auto" becomes "stack" where the profile has one and "block" where it has none."""
        if wanted != "auto":
            return wanted
        return "stack" if any(unit.kind == "stack" for unit in self.units) else "block"

    def select(self, granularity: str) -> list[int]:
        """Indices of the units of one granularity.

        Raises:
            ValueError: the profile has none (a stack whose blocks don't follow one another directly is left out).
        """
        if granularity == "stack":
            chosen = [i for i, unit in enumerate(self.units) if unit.kind == "stack"]
        elif granularity == "block":
            chosen = [i for i, unit in enumerate(self.units) if unit.kind == "block"]
        else:
            parts = [i for i, u in enumerate(self.units) if u.kind in ("sa", "ca", "ffn")]
            owners = {self.units[i].layer for i in parts}
            whole = [i for i, u in enumerate(self.units) if u.kind == "block" and u.layer not in owners]
            chosen = sorted(parts + whole)
        if not chosen:
            raise ValueError(
                f"this profile of {self.model} has no unit of granularity {granularity!r}"
                + ("; its blocks don't follow one another directly, use 'block'" if granularity == "stack" else "")
            )
        return chosen

    def matrices(self, metric: str, unit: int, branches: Sequence[str]) -> np.ndarray:
        """(K, K) of one unit, averaged over guidance branches; "l2" is the root mean square over the runs."""
        if metric == "cosine":
            return np.mean([self.cosine[b][unit] for b in branches], axis=0)
        gram = self.inner_products(unit, branches)
        power = np.diag(gram)
        return np.sqrt(np.maximum(power[:, None] + power[None] - 2 * gram, 0.0))

    def inner_products(self, unit: int, branches: Sequence[str]) -> np.ndarray:
        """(K, K) inner products of one unit's outputs, summed over guidance branches."""
        return np.sum([self.gram[b][unit] for b in branches], axis=0)

    def interpolate(self, num_inference_steps: int, timesteps: Sequence[float] | None = None) -> "SimilarityProfile":
        """A guess of the profile at another step count, labelled as such; calibrating there is better.

        Outputs at a new step are taken as the linear blend of the two recorded neighbours, over the timestep where the
        new `timesteps` are given and over the relative position in the run otherwise.

        Raises:
            ValueError: the scheduler evaluates twice a step, or there are not as many timesteps as steps.
        """
        evaluations = {evaluation for _, evaluation in self.positions}
        if evaluations != {0}:
            raise ValueError("a profile of a second-order scheduler can't be interpolated; calibrate anew")
        if timesteps is None:
            grid = np.linspace(0, len(self.timesteps) - 1, num_inference_steps)
            new_times = np.interp(grid, np.arange(len(self.timesteps)), self.timesteps)
        else:
            if len(timesteps) != num_inference_steps:
                raise ValueError(f"{num_inference_steps} steps need as many timesteps, got {len(timesteps)}")
            new_times = np.asarray([float(t) for t in timesteps])
            grid = np.interp(-new_times, -np.asarray(self.timesteps), np.arange(len(self.timesteps)))
        lower = np.minimum(np.floor(grid).astype(int), len(self.timesteps) - 1)
        upper = np.minimum(lower + 1, len(self.timesteps) - 1)
        blend = np.zeros((num_inference_steps, len(self.timesteps)))
        rows = np.arange(num_inference_steps)
        np.add.at(blend, (rows, lower), 1 - (grid - lower))
        np.add.at(blend, (rows, upper), grid - lower)
        gram = {branch: blend @ values @ blend.T for branch, values in self.gram.items()}
        cosine = {}
        for branch, values in gram.items():
            norm = np.sqrt(np.maximum(np.einsum("ukk->uk", values), 1e-60))
            cosine[branch] = values / (norm[:, :, None] * norm[:, None, :])
        return dataclasses.replace(
            self,
            num_inference_steps=num_inference_steps,
            timesteps=tuple(float(t) for t in new_times),
            positions=tuple((k, 0) for k in range(num_inference_steps)),
            gram=gram,
            cosine=cosine,
            quality=(),
            interpolated_from=self.interpolated_from or self.num_inference_steps,
        )

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file (temporary name first)."""
        path = Path(path)
        tensors = {}
        for branch in self.gram:
            tensors[f"gram.{branch}"] = torch.from_numpy(self.gram[branch]).double().contiguous()
            tensors[f"cosine.{branch}"] = torch.from_numpy(self.cosine[branch]).float().contiguous()
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("gram", "cosine")}
        facts["units"] = [dataclasses.asdict(unit) for unit in self.units]
        facts["format"] = FORMAT
        path.parent.mkdir(parents=True, exist_ok=True)
        content = save(tensors, metadata={"profile": json.dumps(facts)})
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "SimilarityProfile":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file, or it is something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no BAC profile {path}")
        try:
            with safe_open(path, framework="np") as file:
                facts = json.loads((file.metadata() or {})["profile"])
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
            wanted = [f.name for f in dataclasses.fields(UnitInfo)]
            facts["units"] = tuple(UnitInfo(**{name: unit[name] for name in wanted}) for unit in facts["units"])
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path.name} is not a BAC profile: {error!r}") from error
        if facts.pop("format", None) != FORMAT:
            raise ValueError(f"{path.name} is not a {FORMAT} file")
        facts["positions"] = tuple((int(step), int(evaluation)) for step, evaluation in facts["positions"])
        facts["timesteps"] = tuple(facts["timesteps"])
        facts["quality"] = tuple(facts["quality"])
        by_kind: dict[str, dict[str, np.ndarray]] = {"gram": {}, "cosine": {}}
        for name, value in tensors.items():
            kind, _, branch = name.partition(".")
            by_kind[kind][branch] = value.astype(np.float64)
        return cls(**facts, **by_kind)

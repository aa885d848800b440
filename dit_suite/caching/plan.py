"""From a calibration profile and a budget to a schedule: what to recompute at which step, and how to fill the gaps."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_suite.caching.block_probe import GRANULARITIES
from dit_suite.caching.profile import SimilarityProfile
from dit_suite.caching.schedule import (
    MAXIMISED,
    adaptive_schedule,
    adjacent_schedule,
    bubbling_union,
    forecast_costs,
    forecast_schedule,
    forecast_weights,
    mask_of,
    rank_blocks,
    spread_schedule,
    step_lengths,
)
from dit_suite.files import write_text
from dit_suite.options import Options, option

FORMAT = "bac-schedule/1"
PREDICTORS = ("reuse", "linear", "fitted")
OBJECTIVES = ("squares", "sum")
EVERY_BRANCH = "*"


@dataclass(frozen=True)
class BACConfig(Options):
    """How to spend the compute of a sampling run. At most one of the three budgets may be given.

    The defaults are this project's: one schedule for the whole stack of blocks (or for all blocks, where something
    happens between them), skipped steps forecast by fitted weights. `BACConfig.reference(budget)` is the published
    method.
    """

    budget: int | None = option(
        None, "computed steps of each unit, the first included", minimum=1, label="Computed steps"
    )
    flop_fraction: float | None = option(
        None,
        "share of the full FLOPs to spend (0.35 without budget)",
        minimum=0.0,
        maximum=1.0,
        label="Share of the work",
    )
    psnr: float | None = option(
        None, "dB to the un-cached run (calibrate_bac.py measures it)", minimum=0.0, label="PSNR"
    )
    schedule: str = option("shared", "one schedule for all, or one each", choices=("shared", "per_block", "uniform"))
    granularity: str = option("auto", "what is cached (auto: stack, else block)", choices=("auto", *GRANULARITIES))
    predictor: str = option("fitted", "what stands in at skipped steps (linear, fitted: ours)", choices=PREDICTORS)
    order: int = option(2, "computed outputs a fitted forecast draws on", minimum=1, maximum=4, advanced=True)
    objective: str = option(
        "squares",
        "what a schedule of linear or fitted forecasts minimises: squared errors times a step's way, or plain errors",
        choices=OBJECTIVES,
        advanced=True,
    )
    metric: str = option(
        "l2", "likeness of two steps (counts with reuse or adjacent)", choices=("l2", "cosine"), advanced=True
    )
    similarity: str = option(
        "anchor", "score form (adjacent leaves objective out)", choices=("anchor", "adjacent"), advanced=True
    )
    bubble: int = option(0, "units the bubbling union enlarges (-1: all; per_block only)", minimum=-1, advanced=True)
    per_branch: bool = option(False, "a schedule of its own for each guidance pass (ours)", advanced=True)
    update_last: bool = option(False, "always compute the last step", advanced=True)
    cache_dtype: str = option(
        "same", "type of the cached tensors", choices=("same", "bfloat16", "float16"), advanced=True
    )
    cache_device: str = option("same", "where they wait", choices=("same", "cpu"), advanced=True)
    profile: str | None = option(None, "profile file (default: the one of the bundle)", advanced=True)
    interpolate: bool = option(False, "guess a schedule for a step count without a profile of its own")

    def validate(self) -> None:
        given = [name for name in ("budget", "flop_fraction", "psnr") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of budget, flop_fraction and psnr, not {' and '.join(given)}")
        if self.predictor != "reuse" and self.order < 2:
            raise ValueError(f"predictor {self.predictor!r} needs order 2 or more, got {self.order}")

    @classmethod
    def reference(cls, budget: int | None = None, **changes: Any) -> "BACConfig":
        """The published method: per sub-block, cosine, three bubbled units, plain reuse."""
        paper = {"schedule": "per_block", "granularity": "subblock", "predictor": "reuse", "order": 1}
        return cls(**{"budget": budget, **paper, "metric": "cosine", "bubble": 3, **changes})

    def recipe(self) -> dict[str, Any]:
        """The fields that decide the schedule, without budget, storage and file."""
        leave = ("budget", "flop_fraction", "psnr", "profile", "interpolate", "cache_dtype", "cache_device")
        return {key: value for key, value in self.to_dict().items() if key not in leave}


@dataclass(frozen=True)
class BranchPlan:
    """Update steps of every unit, and for every skipped step the weights of its newest computed outputs."""

    steps: tuple[tuple[int, ...], ...]
    weights: tuple[dict[int, tuple[float, ...]], ...] = field(repr=False)


@dataclass(frozen=True)
class BACSchedule:
    """A finished schedule, bound to one model, scheduler and step count; a small JSON file.

    Attributes:
        blocks, types, layers: the units in order of execution.
        branches: plan per guidance branch; "*" serves every branch without one of its own.
        selected: units that the bubbling union enlarged.
        compute_fraction: executed FLOPs over the FLOPs of the un-cached run.
    """

    model: str
    fingerprint: str
    scheduler: dict[str, Any]
    num_inference_steps: int
    timesteps: tuple[float, ...]
    positions: tuple[tuple[int, int], ...]
    config: dict[str, Any]
    blocks: tuple[str, ...]
    types: tuple[str, ...]
    layers: tuple[int, ...]
    branches: dict[str, BranchPlan]
    selected: tuple[int, ...]
    compute_fraction: float
    interpolated_from: int | None = None

    def __post_init__(self) -> None:
        count = len(self.timesteps)
        for branch in self.branches.values():
            if len(branch.steps) != len(self.blocks):
                raise ValueError(f"the schedule lists {len(self.blocks)} units but steps for {len(branch.steps)}")
            for name, steps in zip(self.blocks, branch.steps, strict=True):
                if not steps or steps[0] != 0:
                    raise ValueError(f"the schedule of {name} must start with step 0")
                if list(steps) != sorted(set(steps)) or steps[-1] >= count:
                    raise ValueError(f"the steps of {name} must rise strictly and stay below {count}")

    @property
    def granularity(self) -> str:
        return self.config["granularity"]

    def plan(self, branch: str) -> BranchPlan:
        """The plan of a guidance branch."""
        return self.branches.get(branch) or self.branches[EVERY_BRANCH]

    def mask(self, branch: str = EVERY_BRANCH) -> np.ndarray:
        """(units, K) booleans, True where a unit is computed."""
        return mask_of(self.plan(branch).steps, len(self.timesteps))

    def save(self, path: str | Path) -> Path:
        """Writes JSON (temporary name first)."""
        path = Path(path)
        facts = dataclasses.asdict(self)
        for branch in facts["branches"].values():
            branch["weights"] = [
                {str(k): [round(w, 7) for w in v] for k, v in unit.items()} for unit in branch["weights"]
            ]
        write_text(path, json.dumps({"format": FORMAT, **facts}) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "BACSchedule":
        """Reads and checks a schedule.

        Raises:
            FileNotFoundError, ValueError: no such file, or the sentence says what is wrong with it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no BAC schedule {path}")
        try:
            facts = json.loads(path.read_text("utf-8"))
            if facts.pop("format") != FORMAT:
                raise ValueError(f"{path.name} is not a {FORMAT} file")
            facts["branches"] = {
                name: BranchPlan(
                    tuple(tuple(int(k) for k in steps) for steps in branch["steps"]),
                    tuple({int(k): tuple(w) for k, w in unit.items()} for unit in branch["weights"]),
                )
                for name, branch in facts["branches"].items()
            }
            facts["positions"] = tuple((int(a), int(b)) for a, b in facts["positions"])
            for key in ("timesteps", "blocks", "types", "layers", "selected"):
                facts[key] = tuple(facts[key])
            return cls(**facts)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path.name} is not a BAC schedule: {error!r}") from error


def _unit_steps(
    profile: SimilarityProfile, config: BACConfig, units: Sequence[int], branches: Sequence[str], budget: int
) -> tuple[list[list[int]], list[int]]:
    """Update steps of each unit (before forecasting weights) and the indices that bubbling enlarged."""
    maximise = config.metric in MAXIMISED
    count = profile.num_evaluations

    def solve(matrices: Any, gram: Any) -> list[int]:
        if config.similarity == "adjacent":
            return adjacent_schedule(matrices(), budget, maximise)
        if config.predictor == "reuse":
            return adaptive_schedule(matrices(), budget, maximise)[0]
        costs = forecast_costs(gram(), config.predictor, profile.timesteps)
        if config.objective == "squares":
            costs = (costs * step_lengths(profile.timesteps)) ** 2
        return forecast_schedule(costs, budget)[0]

    if config.schedule == "uniform":
        steps = [spread_schedule(count, budget)] * len(units)
    elif config.schedule == "shared":
        shared = solve(
            lambda: np.sum([profile.matrices(config.metric, u, branches) for u in units], axis=0),
            lambda: np.sum([profile.inner_products(u, branches) for u in units], axis=0),
        )
        steps = [shared] * len(units)
    else:
        steps = [
            solve(
                lambda u=u: profile.matrices(config.metric, u, branches),
                lambda u=u: profile.inner_products(u, branches),
            )
            for u in units
        ]
    chosen = len(units) if config.bubble < 0 else min(config.bubble, len(units))
    info = [profile.units[u] for u in units]
    selected = rank_blocks([u.error for u in info], chosen)
    if config.schedule == "per_block" and selected:
        steps = bubbling_union(steps, [u.kind for u in info], [u.layer for u in info], selected)
    if config.update_last:
        steps = [sorted({*s, count - 1}) for s in steps]
    return [list(s) for s in steps], selected


def _branch_plan(
    profile: SimilarityProfile, config: BACConfig, units: Sequence[int], branches: Sequence[str], steps: list[list[int]]
) -> BranchPlan:
    weights = []
    for unit, chosen in zip(units, steps, strict=True):
        gram = profile.inner_products(unit, branches)
        filled = {}
        for step in sorted(set(range(profile.num_evaluations)) - set(chosen)):
            anchors = [c for c in reversed(chosen) if c < step][: config.order if config.predictor != "reuse" else 1]
            filled[step] = tuple(forecast_weights(gram, anchors, step, config.predictor, profile.timesteps))
        weights.append(filled)
    return BranchPlan(tuple(tuple(s) for s in steps), tuple(weights))


def _with_budget(profile: SimilarityProfile, config: BACConfig, budget: int) -> BACSchedule:
    config = dataclasses.replace(config, granularity=profile.granularity(config.granularity))
    units = profile.select(config.granularity)
    info = [profile.units[u] for u in units]
    groups = {b: (b,) for b in profile.branches} if config.per_branch else {EVERY_BRANCH: profile.branches}
    plans, selected = {}, []
    for name, branches in groups.items():
        steps, selected = _unit_steps(profile, config, units, branches, budget)
        plans[name] = _branch_plan(profile, config, units, branches, steps)
    if config.per_branch and len(profile.branches) == 1:
        plans = {EVERY_BRANCH: next(iter(plans.values()))}
    flops = np.array([u.flops for u in info])
    count = profile.num_evaluations
    skipped = np.mean([(~mask_of(plan.steps, count)).sum(1) @ flops for plan in plans.values()])
    return BACSchedule(
        model=profile.model,
        fingerprint=profile.fingerprint,
        scheduler=profile.scheduler,
        num_inference_steps=profile.num_inference_steps,
        timesteps=profile.timesteps,
        positions=profile.positions,
        config={**config.to_dict(), "budget": budget},
        blocks=tuple(u.name for u in info),
        types=tuple(u.kind for u in info),
        layers=tuple(u.layer for u in info),
        branches=plans,
        selected=tuple(selected) if config.schedule == "per_block" else (),
        compute_fraction=float(1.0 - skipped / (profile.total_flops * count)),
        interpolated_from=profile.interpolated_from,
    )


def build_schedule(profile: SimilarityProfile, config: BACConfig) -> BACSchedule:
    """The schedule that `config` asks for, from a calibration profile.

    A FLOP fraction takes the largest budget whose executed share, bubbling included, stays within it; a PSNR target the
    smallest budget that reached it when the profile's quality was measured with the same recipe.

    Raises:
        ValueError: the budget can't be met.
    """
    count = profile.num_evaluations
    if config.budget is not None:
        if config.budget > count:
            raise ValueError(f"the budget of {config.budget} computed steps is more than the {count} of this profile")
        return _with_budget(profile, config, config.budget)
    if config.psnr is not None:
        rows = [row for row in profile.quality if row["recipe"] == config.recipe()]
        good = [row for row in rows if row["psnr"] >= config.psnr]
        if not good:
            best = max((row["psnr"] for row in rows), default=None)
            have = f"the best measured is {best:.1f} dB" if best is not None else "none was measured for this recipe"
            raise ValueError(
                f"no measured schedule reaches {config.psnr:g} dB ({have}); calibrate_bac.py --psnr {config.psnr:g} "
                "measures until one does"
            )
        return _with_budget(profile, config, min(row["budget"] for row in good))
    target = 0.35 if config.flop_fraction is None else config.flop_fraction
    low, high = 1, count
    cheapest = _with_budget(profile, config, 1)
    if cheapest.compute_fraction > target:
        raise ValueError(
            f"no schedule of {profile.model} at {count} evaluations fits {target:.2f} of the FLOPs; "
            f"a single computed step already takes {cheapest.compute_fraction:.2f}"
        )
    found = cheapest
    while low < high:
        middle = (low + high + 1) // 2
        candidate = _with_budget(profile, config, middle)
        if candidate.compute_fraction <= target:
            low, found = middle, candidate
        else:
            high = middle - 1
    return found

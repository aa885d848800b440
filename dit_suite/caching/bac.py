"""BAC as a plug-in: `apply_bac(pipe, ...)` makes a trained transformer reuse its own outputs across sampling steps.

Source: "Block-wise Adaptive Caching for Accelerating Diffusion Policy" (arXiv 2506.13456). What is computed at which
step is fixed beforehand by a schedule; the cached forward is in `cache_hooks`, the making of schedules in `plan`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import HookRegistry

from dit_suite.caching.block_probe import GRANULARITIES, find_blocks, find_units, stream_layout
from dit_suite.caching.cache_hooks import BlockHook, Engine, Stack, StackHook, SubBlockHook
from dit_suite.caching.plan import BACConfig, BACSchedule, build_schedule
from dit_suite.caching.profile import SimilarityProfile, model_fingerprint
from dit_suite.caching.recorder import scheduler_facts
from dit_suite.schedulers.root_hook import attach_root_hook

HOOK_NAME = "dit_suite_bac"
_OTHER_CACHES = ("fbc_", "mag_cache_", "taylorseer_cache", "pyramid_attention_", "faster_cache_", "sea_cache_")

Plan = BACSchedule | BACConfig | SimilarityProfile | str | Path


class BACHandle:
    """A BAC cache on one transformer; also a context manager that removes itself."""

    def __init__(
        self,
        model: torch.nn.Module,
        pipeline: Any,
        schedules: dict[int, BACSchedule],
        guess: Callable[[int], BACSchedule] | None = None,
    ) -> None:
        self.model: torch.nn.Module | None = model
        self.schedules = schedules
        first = next(iter(schedules.values()))
        self.config = BACConfig.from_dict({**first.config, "flop_fraction": None, "psnr": None})
        self._engine = Engine(schedules, self.config, guess)
        self._hooked: list[torch.nn.Module] = []
        self._eager: dict[torch.nn.Module, Any] = {}
        self._root = attach_root_hook(model, pipeline)
        try:
            self._register(first)
        except BaseException:
            self.remove()
            raise
        if hasattr(model, "_cache_config"):
            model._cache_config = self.config

    def _register(self, schedule: BACSchedule) -> None:
        units = {unit.name: unit for size in GRANULARITIES for unit in find_units(self.model, size)}
        blocks = {block.name: block for block in find_blocks(self.model)}
        for index, name in enumerate(schedule.blocks):
            if name not in units:
                raise ValueError(f"the BAC schedule names {name}, which {type(self.model).__name__} does not have")
            unit = units[name]
            if unit.kind == "stack":
                stack, last = Stack(), len(unit.modules) - 1
                for i, module in enumerate(unit.modules):
                    layout = stream_layout(module)
                    hook = StackHook(self._engine, index, f"{name}.{i}", layout, stack, i == 0, i == last)
                    self._hook(module, hook)
            elif unit.kind == "block":
                layout = stream_layout(blocks[name].module)
                self._hook(unit.modules[0], BlockHook(self._engine, index, "block", name, layout))
            else:
                self._hook(unit.modules[0], SubBlockHook(self._engine, index, unit.kind, name))

    def _hook(self, module: torch.nn.Module, hook: Any) -> None:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK_NAME)
        self._hooked.append(module)
        HookRegistry.check_if_exists_or_initialize(self.model).invalidate_child_registries_cache()

    def compile(self, **options: Any) -> "BACHandle":
        """Compiles what is computed (`torch.compile(..., **options)`) and leaves the deciding outside of the graphs.

        Each hooked module is compiled by itself, so `fullgraph=True` works and no step causes a recompilation.
        """
        self._require_live()
        for module in self._hooked:
            reference = module._diffusers_hook.get_hook(HOOK_NAME).fn_ref
            self._eager.setdefault(module, reference.original_forward)
            reference.original_forward = torch.compile(self._eager[module], **options)
        return self

    def stats(self) -> dict[str, Any]:
        """Computed and reused units by kind since the last reset, executed share of the FLOPs, cached bytes.

        `compute_fraction` is the schedule's, per step count; `cached_bytes` counts live runs, `peak_bytes` is the most
        so far.
        """
        kinds = sorted({kind for kind, _ in self._engine.counts})
        return {
            "runs": self._engine.runs,
            "computed": {kind: self._engine.counts[(kind, "computed")] for kind in kinds},
            "reused": {kind: self._engine.counts[(kind, "reused")] for kind in kinds},
            "compute_fraction": {count: s.compute_fraction for count, s in self.schedules.items()},
            "interpolated_from": {n: s.interpolated_from for n, s in self.schedules.items() if s.interpolated_from},
            "cached_bytes": self._engine.cached_bytes(),
            "peak_bytes": self._engine.peak_bytes,
        }

    def summary(self) -> str:
        """`stats()` as a few lines to print."""
        facts = self.stats()
        lines = []
        for count, schedule in self.schedules.items():
            guess = f" (interpolated from {schedule.interpolated_from} steps)" if schedule.interpolated_from else ""
            lines.append(
                f"BAC, {count} steps{guess}: {schedule.granularity}, {self.config.predictor}, "
                f"{schedule.compute_fraction:.3f} of the FLOPs"
            )
        lines += [f"{k}: {facts['computed'][k]} computed, {facts['reused'][k]} reused" for k in facts["computed"]]
        lines.append(f"cache: {facts['peak_bytes'] / 2**20:.1f} MiB at most, over {facts['runs']} runs")
        return "\n".join(lines)

    def reset(self) -> None:
        """Drops every cached tensor and the statistics, and ends the runs under way; the schedule stays."""
        self._root.reset()
        self._engine.states.clear()
        self._engine.counts.clear()
        self._engine.runs = self._engine.peak_bytes = 0

    def remove(self) -> None:
        """Takes the cache off; the model is then as it was before. Calling it again does nothing."""
        model, self.model = self.model, None
        if model is None:
            return
        for module in self._hooked:
            registry = module._diffusers_hook
            if module in self._eager:
                registry.get_hook(HOOK_NAME).fn_ref.original_forward = self._eager[module]
            registry.remove_hook(HOOK_NAME, recurse=False)
            if not registry.hooks:
                del module._diffusers_hook
                if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
                    del module.forward
        self._hooked.clear()
        self.reset()
        HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
        self._root.remove()
        registry = model.__dict__.get("_diffusers_hook")
        if registry is not None and not registry.hooks:
            del model._diffusers_hook
        if getattr(model, "_cache_config", None) is self.config:
            model._cache_config = None

    def _require_live(self) -> None:
        if self.model is None:
            raise ValueError("this BAC cache has been removed; apply it again")

    def __enter__(self) -> "BACHandle":
        self._require_live()
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def apply_bac(target: Any, plan: Plan | Sequence[Plan] | None = None, *, profile: Any = None) -> BACHandle:
    """Puts a BAC cache on a pipeline's transformer.

    Args:
        target: a pipeline with a `transformer`, or the transformer itself.
        plan: a schedule (or its JSON file), a profile (or its file), a `BACConfig`, or several schedules for several
            step counts, between which each run chooses by its own. Default: `BACConfig()`.
        profile: the profile, or profiles, a `BACConfig` builds its schedules from; default those of the bundled
            checkpoint that the pipeline was loaded from.

    Raises:
        ValueError: the plan belongs to another model or scheduler, another cache is active, the model is compiled, or
            there is no profile for it.
    """
    pipeline = target if hasattr(target, "transformer") else None
    model = getattr(target, "transformer", target)
    check_free(model, pipeline)
    schedules = {s.num_inference_steps: s for s in _schedules(pipeline, plan, profile)}
    print_of_model = model_fingerprint(model)
    for schedule in schedules.values():
        check_belongs(schedule, model, print_of_model, pipeline)
    return BACHandle(model, pipeline, schedules, _guesser(pipeline, plan, profile))


def check_free(model: torch.nn.Module, pipeline: Any = None) -> None:
    """Refuses (`ValueError`) a compiled model and one with an active cache."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"BAC needs a pipeline with a transformer or a transformer, got {type(model).__name__}")
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError("the model is compiled; apply BAC to the plain model and then call handle.compile(...)")
    if getattr(pipeline, "_is_cached", False) or getattr(model, "_is_cached", False):
        raise ValueError("cache-dit is active on this pipeline; disable it before applying BAC")
    for name, module in model.named_modules():
        registry = module.__dict__.get("_diffusers_hook")
        for hook in registry.hooks if registry is not None else ():
            if hook == HOOK_NAME:
                raise ValueError("BAC is already applied to this model; call handle.remove() first")
            if hook.startswith(_OTHER_CACHES):
                raise ValueError(
                    f"another cache ({hook} on {name or 'the model'}) is active; disable it before applying BAC"
                )
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(f"{type(model._cache_config).__name__} is active; call disable_cache() before applying BAC")


def check_belongs(schedule: BACSchedule, model: torch.nn.Module, fingerprint: str, pipeline: Any) -> None:
    """Refuses (`ValueError`) a schedule that was calibrated with another model or another scheduler."""
    if schedule.model != type(model).__name__:
        raise ValueError(f"the BAC schedule was made for {schedule.model}, this model is {type(model).__name__}")
    if schedule.fingerprint != fingerprint:
        raise ValueError(
            f"the BAC schedule was made for other weights of {schedule.model} (fingerprint {schedule.fingerprint[:8]}, "
            f"this model has {fingerprint[:8]}); calibrate again with scripts/calibrate_bac.py"
        )
    here = scheduler_facts(getattr(pipeline, "scheduler", None))
    if here and schedule.scheduler and here["class"] != schedule.scheduler["class"]:
        raise ValueError(
            f"the BAC schedule was made for the scheduler {schedule.scheduler['class']}, "
            f"this pipeline has {here['class']}"
        )


def _schedules(pipeline: Any, plan: Any, profile: Any) -> list[BACSchedule]:
    if isinstance(plan, (list, tuple)):
        return [schedule for item in plan for schedule in _schedules(pipeline, item, profile)]
    if isinstance(plan, (str, Path)):
        plan = BACSchedule.load(plan) if str(plan).endswith(".json") else SimilarityProfile.load(plan)
    if isinstance(plan, BACSchedule):
        return [plan]
    if isinstance(plan, SimilarityProfile):
        return [build_schedule(plan, BACConfig())]
    config = BACConfig() if plan is None else plan
    if not isinstance(config, BACConfig):
        raise ValueError(f"a BAC plan is a schedule, a profile, a BACConfig or a file, got {type(plan).__name__}")
    return [build_schedule(item, config) for item in _profiles(pipeline, config, profile)]


def _guesser(pipeline: Any, plan: Any, profile: Any) -> Callable[[int], BACSchedule] | None:
    """What makes a schedule for a step count without a profile, where the config asks for it: from the profile with the
    next larger step count (else the largest), at the timesteps that the pipeline's scheduler has set for the run."""
    if not (isinstance(plan, BACConfig) and plan.interpolate):
        return None
    profiles = sorted(_profiles(pipeline, plan, profile), key=lambda item: item.num_inference_steps)

    def guess(num_steps: int) -> BACSchedule:
        chosen = next((item for item in profiles if item.num_inference_steps >= num_steps), profiles[-1])
        timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", ())
        known = [float(t) for t in timesteps] if len(timesteps) == num_steps else None
        return build_schedule(chosen.interpolate(num_steps, known), plan)

    return guess


def _profiles(pipeline: Any, config: BACConfig, profile: Any) -> list[SimilarityProfile]:
    given = profile if profile is not None else config.profile
    if given is None:
        return bundled_profiles(pipeline)
    items = given if isinstance(given, (list, tuple)) else [given]
    return [item if isinstance(item, SimilarityProfile) else SimilarityProfile.load(item) for item in items]


def bundled_profiles(pipeline: Any) -> list[SimilarityProfile]:
    """The profiles in the `bac/` folder of the checkpoint that a pipeline was loaded from, one per step count.

    Raises:
        ValueError: there are none.
    """
    place = Path(str(getattr(getattr(pipeline, "config", None), "_name_or_path", "")))
    files = sorted((place / "bac").glob("profile-*.safetensors")) if str(place) not in ("", ".") else []
    if not files:
        raise ValueError(
            "there is no BAC profile for this model; make one with scripts/calibrate_bac.py or ProfileRecorder and "
            "pass it as profile=..."
        )
    return [SimilarityProfile.load(file) for file in files]

"""Calibration: record a model's outputs over un-cached sampling runs and turn them into a `SimilarityProfile`."""

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from dit_suite.caching.block_probe import CacheUnit, StreamLayout, find_blocks, find_units, stream_layout
from dit_suite.caching.profile import SimilarityProfile, UnitInfo, block_error, model_fingerprint, similarity_matrix
from dit_suite.caching.streams import added_streams, flat_tensors, read_streams, split_streams
from dit_suite.schedulers.root_hook import attach_root_hook
from dit_suite.step_plan import StepContext, current_step


class FlopMeter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


class ProfileRecorder:
    """Watches every unit of a transformer while the caller samples without a cache.

    A part that does not run exactly once in every evaluation is left out of the profile. Where the first evaluation
    of a run carries more tokens than the others (it writes a key-value cache), the second stands in for it; the first
    is computed in any schedule. Passes that only write such a cache (`extras["write"]`) are not looked at.

    with ProfileRecorder(pipe) as recorder:
        for prompt in prompts:
            pipe(prompt, num_inference_steps=40)
    profile = recorder.profile()

    Args:
        target: a pipeline with a `transformer`, or the transformer.
        max_elements: values of each output that are kept; more give a more exact profile for more memory.

    Raises:
        ValueError: nothing to cache in this model, or (from `profile`) runs that differ in their steps.
    """

    def __init__(self, target: Any, max_elements: int = 65536) -> None:
        self._pipeline = target if hasattr(target, "transformer") else None
        self.model: torch.nn.Module = getattr(target, "transformer", target)
        self._max_elements = max_elements
        self._units: dict[str, CacheUnit] = {}
        for granularity in ("subblock", "block", "stack"):
            self._units |= {unit.name: unit for unit in find_units(self.model, granularity)}
        self._blocks = find_blocks(self.model)
        self._order: dict[str, None] = {}
        self._flops: dict[str, float] = {}
        self._total_flops = 0.0
        self._broken: set[str] = set()
        self._run: object | None = None
        self._context: StepContext | None = None
        self._features: dict[str, dict[str, list[torch.Tensor]]] = {}
        self._steps: dict[str, list[tuple[int, int, float]]] = {}
        self._plan: list[tuple[int, int, float]] | None = None
        self._num_steps = 0
        self._sums: dict[str, dict[str, list]] = {}
        self._runs = 0
        self._indices: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._scheduler: dict[str, Any] = {}
        self._meter: FlopMeter | None = None
        self._entered: dict[str, Any] = {}

    def __enter__(self) -> "ProfileRecorder":
        self._scheduler = scheduler_facts(getattr(self._pipeline, "scheduler", None))
        self._handles.append(attach_root_hook(self.model, self._pipeline))
        self._watch(self.model, self._before_model, self._after_model)
        layouts = {block.name: stream_layout(block.module) for block in self._blocks}
        last: dict[str, str] = {block.container: block.name for block in self._blocks}
        first: dict[str, str] = {}
        for block in self._blocks:
            first.setdefault(block.container, block.name)
            self._watch_block(block.name, block.module, block.container, layouts[block.name], first, last)
        for unit in self._units.values():
            if unit.kind in ("sa", "ca", "ffn"):
                self._watch_part(unit)
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self._handles.clear()
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self._meter = None

    def _watch(self, module: torch.nn.Module, before: Any, after: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _watch_part(self, unit: CacheUnit) -> None:
        def before(module: Any, args: tuple, kwargs: dict) -> None:
            self._begin(unit.name)

        def after(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            self._keep(unit.name, flat_tensors(output))

        self._watch(unit.modules[0], before, after)

    def _watch_block(
        self, name: str, module: Any, container: str, layout: StreamLayout, first: dict[str, str], last: dict[str, str]
    ) -> None:
        def before(module: Any, args: tuple, kwargs: dict) -> None:
            entering = read_streams(layout, args, kwargs)
            if name == first[container]:
                self._begin(container)
                self._entered[container] = entering
            elif self._entered.get(f"{container} end") is None or any(
                a is not b for a, b in zip(entering, self._entered[f"{container} end"], strict=False) if b is not None
            ):
                self._broken.add(container)
            self._begin(name)
            self._entered[name] = entering

        def after(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            leaving = split_streams(layout, output)
            self._keep(name, _present(added_streams(self._entered.pop(name), leaving)))
            self._entered[f"{container} end"] = leaving
            if name == last[container]:
                entering = self._entered.pop(container)
                if container not in self._broken:
                    self._keep(container, _present(added_streams(entering, leaving)))
                self._entered.pop(f"{container} end")

        self._watch(module, before, after)

    def _before_model(self, module: Any, args: tuple, kwargs: dict) -> None:
        if not self._total_flops:
            self._meter = FlopMeter()
            self._meter.__enter__()

    def _note_evaluation(self) -> StepContext | None:
        """Books the evaluation under way when its first unit is reached; None in a pass that only writes a cache."""
        context = current_step()
        if context is None:
            raise ValueError("calibration needs a sampling loop: this model was called outside of one")
        if context.extras.get("write"):
            return None
        if context is not self._context:
            if context.run is not self._run:
                self._finish_run()
            self._context, self._run = context, context.run
            self._num_steps = max(context.num_steps, context.step_index + 1, self._num_steps)
            step = (context.step_index, context.evaluation, context.timestep)
            self._steps.setdefault(context.branch, []).append(step)
        return context

    def _after_model(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self._total_flops, self._meter = float(self._meter.total), None

    def _begin(self, name: str) -> None:
        if self._note_evaluation() is None:
            return
        self._order.setdefault(name)
        if self._meter is not None:
            self._flops[name] = self._flops.get(name, 0.0) - self._meter.total

    def _keep(self, name: str, tensors: list[torch.Tensor]) -> None:
        context = self._note_evaluation()
        if context is None:
            return
        if self._meter is not None:
            self._flops[name] += self._meter.total
        kept = torch.cat([self._thin(t.detach().flatten()) for t in tensors])
        self._features.setdefault(context.branch, {}).setdefault(name, []).append(kept)

    def _thin(self, values: torch.Tensor) -> torch.Tensor:
        """At most `max_elements` of the values, always the same ones, scaled so that inner products keep their size."""
        size = values.numel()
        if size <= self._max_elements:
            return values.to("cpu", torch.float32, copy=True)
        if size not in self._indices:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: self._max_elements]
            self._indices[size] = order.sort().values
        picked = values[self._indices[size].to(values.device)].to("cpu", torch.float32)
        return picked * (size / self._max_elements) ** 0.5

    def _finish_run(self) -> None:
        if not self._steps:
            return
        plan = next(iter(self._steps.values()))
        if any(steps != plan for steps in self._steps.values()) or (self._plan or plan) != plan:
            raise ValueError("the calibration runs differ in their steps; use one scheduler and one step count")
        self._plan = plan
        for branch, units in self._features.items():
            for name, rows in units.items():
                if len(rows) != len(plan) or len({row.numel() for row in rows[1:]}) > 1:
                    self._broken.add(name)
                    continue
                if rows[0].numel() != rows[-1].numel():
                    rows = [rows[min(1, len(rows) - 1)], *rows[1:]]
                features = torch.stack(rows)
                entry = self._sums.setdefault(branch, {}).setdefault(name, [0.0, 0.0, 0.0])
                wide = features.double()
                entry[0] = entry[0] + (wide @ wide.T).numpy()
                entry[1] = entry[1] + similarity_matrix(features, "cosine")
                entry[2] = entry[2] + block_error(features)
        self._runs += 1
        self._steps, self._features = {}, {}

    def profile(self, notes: dict[str, Any] | None = None) -> SimilarityProfile:
        """The averages of all runs seen so far."""
        self._finish_run()
        if self._plan is None:
            raise ValueError("no sampling run was recorded")
        branches = list(self._sums)
        names = [n for n in self._order if n not in self._broken and all(n in self._sums[b] for b in branches)]
        layers: dict[str, int] = {}
        for name in self._order:
            if name in {block.name for block in self._blocks}:
                layers[name] = len(layers)
        units = tuple(self._info(name, layers, branches) for name in names)
        gram = {b: np.stack([self._sums[b][n][0] / self._runs for n in names]) for b in branches}
        cosine = {b: np.stack([self._sums[b][n][1] / self._runs for n in names]) for b in branches}
        return SimilarityProfile(
            model=type(self.model).__name__,
            fingerprint=model_fingerprint(self.model),
            scheduler=self._scheduler,
            num_inference_steps=self._num_steps,
            timesteps=tuple(t for _, _, t in self._plan),
            positions=tuple((step, evaluation) for step, evaluation, _ in self._plan),
            units=units,
            total_flops=self._total_flops,
            gram=gram,
            cosine=cosine,
            num_runs=self._runs,
            notes=dict(notes or {}),
        )

    def _info(self, name: str, layers: dict[str, int], branches: list[str]) -> UnitInfo:
        unit = self._units[name]
        owner = next((b.name for b in self._blocks if name == b.name or name.startswith(b.name + ".")), None)
        layer = layers[owner] if owner is not None else min(layers[b.name] for b in self._blocks if b.container == name)
        error = float(np.mean([self._sums[b][name][2] / self._runs for b in branches]))
        return UnitInfo(name, unit.kind, layer, self._flops[name], error)


def _present(streams: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return [stream for stream in streams if stream is not None]


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """Class and JSON-able config of a scheduler, or an empty dict for None."""
    if scheduler is None:
        return {}
    config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    simple = {k: v for k, v in config.items() if isinstance(v, (bool, int, float, str)) or v is None}
    return {"class": type(scheduler).__name__, "config": simple}

"""The step context for pipelines that are not ours: a hook on the root of a diffusers model.

diffusers' pipelines announce the guidance branch, and in newer releases the step, through `model.cache_context(...)`.
Where they do, the hook believes them. Where they do not, it counts: a changed timestep is a new step, a repeated one is
another branch or evaluation of the same step. A run is new where the pipeline's scheduler has got new timesteps, where
the timestep jumps back against the direction of travel, and after an error in the model. diffusers resets stateful
hooks at the end of a pipeline call, which ends the run here too. Networks of one pipeline that take over from each
other (Wan 2.2) are counted together.

Tokens may have timesteps of their own (a given first frame is clean, its timestep is 0; frames may be denoised one
after the other). A step is then told by their mean, and the timestep published is the largest.

A loop of one's own around a bare model shows none of this when it is left between its first evaluation and the second,
and the next one starts at the same timestep: call `RootHookHandle.reset` (every plug-in's `reset` does) before it.
"""

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

from dit_suite.step_plan import Run, StepContext, current_step, publish_step

HOOK_NAME = "dit_suite_step"
_UNNAMED_BRANCHES = ("batched", "uncond")


class _NoState(BaseState):
    """diffusers hands the cache context only to hooks that own a state manager; this one keeps nothing in it."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass
class _Progress:
    """Where one thread's run stands; `plan` is the tensor of timesteps that its scheduler had set, if known."""

    plan: Any = None
    run: Run = field(default_factory=Run)
    step_index: int = 0
    timestep: float | None = None
    announced_index: int | None = None
    direction: int = 0
    evaluation: int = 0
    seen: list[str] = field(default_factory=list)

    def _next_step(self) -> None:
        self.step_index += 1
        self.evaluation = 0
        self.seen = []

    def advance(self, timestep: float, name: str | None, announced_index: int | None) -> "_Progress":
        """The progress after one more evaluation at a (mean) `timestep`; a new object where a new run starts."""
        if self.timestep is None:
            return self._record(timestep, name, announced_index)
        change = (timestep > self.timestep) - (timestep < self.timestep)
        if announced_index is not None:
            if self.announced_index is not None and announced_index < self.announced_index:
                return _Progress(self.plan)._record(timestep, name, announced_index)
            if announced_index != self.announced_index:
                self._next_step()
            elif change or name in self.seen:
                self.evaluation += 1
                self.seen = []
        elif change:
            if self.direction and change != self.direction:
                return _Progress(self.plan)._record(timestep, name, announced_index)
            self.direction = change
            self._next_step()
        elif self._branch(name) in self.seen:
            self.evaluation += 1
            self.seen = []
        return self._record(timestep, name, announced_index)

    def _branch(self, name: str | None) -> str:
        if name is None:
            return _UNNAMED_BRANCHES[min(len(self.seen), 1)]
        return name if name in ("cond", "uncond") else "batched"

    def _record(self, timestep: float, name: str | None, announced_index: int | None) -> "_Progress":
        self.seen.append(self._branch(name))
        self.timestep = timestep
        if announced_index is not None:
            self.announced_index = self.step_index = announced_index
        return self

    @property
    def branch(self) -> str:
        return self.seen[-1]


class _Runs:
    """Where the run of each thread stands; the networks of one pipeline have one of these together."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Ends the runs of all threads."""
        self._local = threading.local()

    @property
    def progress(self) -> _Progress | None:
        return getattr(self._local, "progress", None)

    @progress.setter
    def progress(self, progress: _Progress | None) -> None:
        self._local.progress = progress


class _StepHook(ModelHook):
    _is_stateful = True

    def __init__(self, parameters: tuple[str, ...]) -> None:
        super().__init__()
        self.users = 0
        self.pipeline: Any = None
        self.manager = StateManager(_NoState)
        self.runs = _Runs()
        self._parameters = parameters

    def join(self, pipeline: Any) -> None:
        """Takes the steps from a pipeline, in one count with its other networks."""
        self.pipeline = pipeline
        for module in getattr(pipeline, "__dict__", {}).values():
            hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
            other = hooks.get(HOOK_NAME)
            if other is not None and other is not self and other.pipeline is pipeline:
                self.runs = other.runs

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.runs.progress = None
        self.manager.reset()
        return module

    def _announced(self) -> tuple[str | None, int | None, int | None]:
        try:
            context = self.manager.context
        except ValueError:
            return None, None, None
        name, index, count = (getattr(context, key, None) for key in ("name", "step_index", "num_inference_steps"))
        return name, index, count

    def _context(self, args: tuple, kwargs: dict[str, Any]) -> StepContext | None:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        timestep = given.get("timestep")
        if timestep is None:
            return None
        timesteps = torch.as_tensor(timestep).detach().cpu().double()
        value, mean = float(timesteps.max()), float(timesteps.mean())
        name, index, count = self._announced()
        plan = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        progress = self.runs.progress
        if progress is None or progress.plan is not plan:
            progress = _Progress(plan)
        progress = self.runs.progress = progress.advance(mean, name, index)
        if count is None:
            count = getattr(self.pipeline, "_num_timesteps", None) or (0 if plan is None else len(plan))
        return StepContext(progress.step_index, count, value, progress.branch, progress.evaluation, progress.run)

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if current_step() is not None:
            return self.fn_ref.original_forward(*args, **kwargs)
        context = self._context(args, kwargs)
        if context is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        try:
            with publish_step(context):
                return self.fn_ref.original_forward(*args, **kwargs)
        except BaseException:
            self.runs.progress = None
            raise


class RootHookHandle:
    """Keeps the hook on `module` until every handle is removed; the last one leaves no trace."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module: torch.nn.Module | None = module

    def reset(self) -> None:
        """The next evaluation starts a new run."""
        if self._module is not None:
            HookRegistry.check_if_exists_or_initialize(self._module).get_hook(HOOK_NAME).runs.forget()

    def remove(self) -> None:
        """Gives this handle back; calling it again does nothing."""
        module, self._module = self._module, None
        if module is None:
            return
        registry = HookRegistry.check_if_exists_or_initialize(module)
        hook = registry.get_hook(HOOK_NAME)
        hook.users -= 1
        if hook.users == 0:
            remove_diffusers_hook(module, HOOK_NAME)


def remove_diffusers_hook(module: torch.nn.Module, name: str) -> None:
    """Removes one hook; the last one leaves neither a registry nor a shadowed `forward` behind.

    A wrapper that accelerate put around the hook later (`enable_model_cpu_offload`) stays in place.
    """
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None:
        return
    outer = module.__dict__.get("forward")
    registry.remove_hook(name, recurse=False)
    wrapper = getattr(outer, "func", None)
    if getattr(wrapper, "__module__", None) == "accelerate.hooks" and module.forward is not outer:
        module._old_forward, module.forward = module.forward, outer
    if not registry.hooks:
        del module._diffusers_hook
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward


def attach_root_hook(module: torch.nn.Module, pipeline: Any = None) -> RootHookHandle:
    """Publishes a `StepContext` around every forward of `module` that runs outside our own pipelines.

    Args:
        module: a diffusers model whose forward takes `timestep`.
        pipeline: the pipeline that owns it, if known; tells the number of steps.

    Raises:
        ValueError: the model's forward has no `timestep` argument.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    hook = registry.get_hook(HOOK_NAME)
    if hook is None:
        parameters = tuple(inspect.signature(module.forward).parameters)
        if "timestep" not in parameters:
            raise ValueError(f"{type(module).__name__}.forward takes no timestep, so its sampling steps can't be told")
        hook = _StepHook(parameters)
        registry.register_hook(hook, HOOK_NAME)
    hook.users += 1
    if pipeline is not None:
        hook.join(pipeline)
    return RootHookHandle(module)

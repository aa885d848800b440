"""Sparse attention as a plug-in: `apply_adaspa(pipe, ...)`, `apply_vmoba(pipe, ...)`, and off again without a trace."""

import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook

from dit_suite.attention.adaspa import AdaSpaConfig
from dit_suite.attention.calls import AttentionCall
from dit_suite.attention.layouts import TokenLayout, read_layout, rule_for
from dit_suite.attention.methods import AdaSpaMethod, StayDense, VMoBAMethod, smallest_useful
from dit_suite.attention.routes import HOOK_NAME, DispatchRoute, ModuleRoute, route_for
from dit_suite.attention.vmoba import VMoBAConfig
from dit_suite.schedulers.root_hook import attach_root_hook, remove_diffusers_hook

_SCOPE_HOOK = "dit_suite_attention_scope"


@dataclass
class _Scope:
    """One forward pass of a transformer, on one thread."""

    layout: TokenLayout | None
    calls: Counter = field(default_factory=Counter)
    masks: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)


class _ScopeHook(ModelHook):
    """Reads the token layout from the arguments of the transformer's forward."""

    def __init__(self, attachment: "_Attachment") -> None:
        super().__init__()
        self._attachment = attachment

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        local, rule = self._attachment.local, self._attachment.rule
        before = getattr(local, "scope", None)
        local.scope = _Scope(read_layout(module, rule, args, kwargs))
        self._attachment.last_layout = local.scope.layout
        try:
            out = self.fn_ref.original_forward(*args, **kwargs)
        finally:
            local.scope = before
        self._attachment.note_layers_not_reached()
        return out


@dataclass(frozen=True)
class LayerSupport:
    """What the plug-in would do with one attention module."""

    name: str
    supported: bool
    route: str
    reason: str


def self_attention_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Path and module of every self-attention over the video tokens, in the order in which layers are numbered."""
    rule = rule_for(model)
    if rule is None:
        return []
    return [(name, m) for name, m in model.named_modules() if rule.matches(name) and _is_attention(m)]


def _is_attention(module: torch.nn.Module) -> bool:
    """Not so where a graft put another operator into an attention's place."""
    return hasattr(module, "processor") and hasattr(module, "to_q")


def supported(model: torch.nn.Module) -> list[LayerSupport]:
    """Every attention module of a model: whether the plug-in would run it sparse, by which route, or why not.

    Args:
        model: a diffusers transformer, or a pipeline that has one.

    Raises:
        ValueError: it is neither.
    """
    rows = []
    for transformer in _transformers(model):
        rule = rule_for(transformer)
        for name, module in transformer.named_modules():
            if not _is_attention(module):
                continue
            if rule is None:
                reason = f"the token layout of {type(transformer).__name__} is not known"
            elif not rule.matches(name):
                reason = "not a self-attention over the video tokens"
            else:
                rows.append(LayerSupport(name, True, route_for(module).kind, f"text {rule.text} in the sequence"))
                continue
            rows.append(LayerSupport(name, False, "none", reason))
    return rows


def _transformers(target: Any) -> list[torch.nn.Module]:
    """The networks of a pipeline, or the one given; of a compiled one the module that was compiled."""
    found = [target]
    if not isinstance(target, torch.nn.Module):
        found = [getattr(target, name, None) for name in ("transformer", "transformer_2")]
        found = [m for m in found if isinstance(m, torch.nn.Module)]
    if not found:
        raise ValueError(f"{type(target).__name__} is no transformer and has none")
    return [getattr(m, "_orig_mod", m) for m in found]


class _Attachment:
    """The hooks and routes on one transformer."""

    def __init__(
        self,
        model: torch.nn.Module,
        number: int,
        pipeline: Any,
        attend: Callable,
        note: Callable[[str], None],
        chosen: set | None,
    ) -> None:
        self.model, self.rule, self.number = model, rule_for(model), number
        self.local = threading.local()
        self.last_layout: TokenLayout | None = None
        self._attend, self._note = attend, note
        self._routes: dict[type, DispatchRoute | ModuleRoute] = {}
        self._unreached: set[int] = set()
        self._root = attach_root_hook(model, pipeline)
        try:
            HookRegistry.check_if_exists_or_initialize(model).register_hook(_ScopeHook(self), _SCOPE_HOOK)
            for layer, (_, module) in enumerate(self_attention_layers(model)):
                if chosen is None or layer in chosen:
                    self._take(module, layer)
            self._refresh()
        except BaseException:
            self.remove()
            raise

    def _take(self, module: torch.nn.Module, layer: int) -> None:
        kind = route_for(module)
        if kind not in self._routes:
            self._routes[kind] = kind(f"dit_suite:{id(self)}", self._intercept)
        self._routes[kind].take(module, layer)
        self._unreached.add(layer)

    def _intercept(self, layer: int, *call: Any) -> torch.Tensor:
        self._unreached.discard(layer)
        return self._attend(self, layer, *call)

    def note_layers_not_reached(self) -> None:
        """Counts the layers that run dense without the method being asked (their processor went another way).

        A layer that was reached once may be skipped later: step caches do that.
        """
        lost: dict[int, str] = {}
        for route in self._routes.values():
            lost |= route.lost()
        never = self._unreached - set(lost)
        for reason in (*lost.values(), *["an attention processor does not call torch's attention"] * len(never)):
            self._note(reason)

    def reset(self) -> None:
        self._root.reset()

    def _refresh(self) -> None:
        HookRegistry.check_if_exists_or_initialize(self.model).invalidate_child_registries_cache()

    def remove(self) -> None:
        for route in self._routes.values():
            route.remove()
        self._routes.clear()
        if _SCOPE_HOOK in getattr(self.model.__dict__.get("_diffusers_hook"), "hooks", {}):
            remove_diffusers_hook(self.model, _SCOPE_HOOK)
        self._root.remove()
        if "_diffusers_hook" in self.model.__dict__:
            self._refresh()


class SparseAttentionHandle:
    """A sparse method on the transformers of a pipeline; also a context manager that removes itself.

    With `keep_state` the method keeps its tables and counts when the handle is removed, so that it can go on.
    """

    def __init__(
        self, target: Any, method: Any, layers: tuple[int, ...] | None = None, *, keep_state: bool = False
    ) -> None:
        models = _transformers(target)
        pipeline = None if isinstance(target, torch.nn.Module) else target
        for model in models:
            _check_free(model)
        self.method = method
        self._keep_state = keep_state
        self.fallbacks: Counter = Counter()
        self._warned: set[str] = set()
        self._attachments: list[_Attachment] = []
        chosen = None if layers is None else set(layers)
        try:
            for number, model in enumerate(models):
                self._attachments.append(_Attachment(model, number, pipeline, self._attend, self._note, chosen))
        except BaseException:
            self.remove()
            raise

    def _attend(
        self,
        attachment: _Attachment,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        dense: Callable[[], torch.Tensor],
        reason: str | None,
    ) -> torch.Tensor:
        """Under autocast the method gets its tensors in autocast's type, as torch's attention would, and runs outside.

        Otherwise autocast would turn the method's own float32 arithmetic (block scores, log-sum-exps) into bfloat16.
        """
        device = query.device.type
        if not torch.is_autocast_enabled(device):
            return self._run(attachment, layer, query, key, value, mask, scale, dense, reason)
        dtype = torch.get_autocast_dtype(device)
        cast = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))

        def dense_as_before() -> torch.Tensor:
            with torch.autocast(device, dtype):
                return dense()

        with torch.autocast(device, enabled=False):
            return self._run(attachment, layer, *cast, mask, scale, dense_as_before, reason)

    def _run(
        self,
        attachment: _Attachment,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        dense: Callable[[], torch.Tensor],
        reason: str | None,
    ) -> torch.Tensor:
        scope = getattr(attachment.local, "scope", None)
        if scope is None and self.method.trainable and torch.is_grad_enabled():
            # Gradient checkpointing runs a block again in the backward pass, outside the transformer's forward.
            scope = _Scope(attachment.last_layout)
        try:
            if reason is not None:
                raise StayDense(reason)
            layout = self._layout(scope, query)
            text_valid = self._text_valid(scope, layout, mask, query)
            if not self.method.trainable and torch.is_grad_enabled() and query.requires_grad:
                raise ValueError(f"{self.method.name} is for inference only: call the model under torch.no_grad()")
            item = scope.calls[layer]
            scope.calls[layer] += 1
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            call = AttentionCall(attachment.number, layer, item, query, key, value, layout, text_valid, scale, dense)
            return self.method.attend(call)
        except StayDense as why:
            self._note(str(why))
            return dense()

    def _layout(self, scope: _Scope | None, query: torch.Tensor) -> TokenLayout:
        if scope is None:
            raise StayDense("attention was called outside the transformer's forward")
        if scope.layout is None:
            raise StayDense("the token grid could not be read from the transformer's arguments")
        length = query.shape[2]
        if scope.layout.spans(length) is None:
            raise StayDense(f"a sequence of {length} tokens does not fit the grid {scope.layout.grid}")
        least = smallest_useful(self.method, query.device)
        if scope.layout.video_tokens < least:
            raise StayDense(
                f"{scope.layout.video_tokens} video tokens are fewer than {least}, below which dense attention is "
                "faster (min_tokens)"
            )
        return scope.layout

    def _text_valid(
        self, scope: _Scope, layout: TokenLayout, mask: torch.Tensor | None, query: torch.Tensor
    ) -> torch.Tensor | None:
        """Which text keys a mask allows; one that does more than hide text padding keeps the call dense."""
        if mask is None:
            return None
        if id(mask) not in scope.masks:
            # The mask is kept beside its result, so that its id cannot be given to another tensor meanwhile.
            scope.masks[id(mask)] = (mask, self._read_mask(layout, mask, query))
        return scope.masks[id(mask)][1]

    def _read_mask(self, layout: TokenLayout, mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor | None:
        batch, length = query.shape[0], query.shape[2]
        keys_only = mask.dtype == torch.bool and mask.numel() == batch * length and mask.shape[-1] == length
        if not keys_only:
            raise StayDense(f"an attention mask of {mask.dtype} {tuple(mask.shape)} is more than text padding")
        flat = mask.reshape(batch, length)
        video, text = layout.spans(length)
        if not bool(flat[:, video].all()):
            raise StayDense("the attention mask hides video tokens")
        return None if bool(flat[:, text].all()) else flat[:, text]

    def _note(self, reason: str) -> None:
        self.fallbacks[reason] += 1
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"{self.method.name} stays dense: {reason}", RuntimeWarning, stacklevel=2)

    def stats(self) -> dict[str, Any]:
        """The method's counts, and how often calls stayed dense for want of something, by reason."""
        facts = {"method": self.method.name, "config": self.method.config.to_dict()}
        return {**facts, **self.method.stats(), "fallbacks": dict(self.fallbacks)}

    def reset(self) -> None:
        """Drops all state and all counts; the next call starts anew."""
        self.method.reset()
        self.fallbacks.clear()
        for attachment in self._attachments:
            attachment.reset()

    def remove(self) -> None:
        """Takes the plug-in off; the models are then as they were before. Calling it again does nothing."""
        for attachment in reversed(self._attachments):
            attachment.remove()
        self._attachments.clear()
        if not self._keep_state:
            self.method.reset()

    def __enter__(self) -> "SparseAttentionHandle":
        if not self._attachments:
            raise ValueError(f"this {self.method.name} plug-in has been removed; apply it again")
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def _check_free(model: torch.nn.Module) -> None:
    """Refuses (`ValueError`) a model whose layout is unknown or that has no self-attention (a graft exchanged it), and
    one that already has a sparse plug-in."""
    if rule_for(model) is None:
        raise ValueError(
            f"the token layout of {type(model).__name__} is not known to the plug-in (see dit_suite.attention.layouts)"
        )
    if not self_attention_layers(model):
        raise ValueError(f"this {type(model).__name__} has no self-attention that could become sparse")
    if "timestep" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(f"{type(model).__name__}.forward takes no timestep")
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None and {_SCOPE_HOOK, HOOK_NAME} & set(registry.hooks):
            raise ValueError(
                "a sparse attention plug-in is already applied to this model, it takes one; call handle.remove() first"
            )


def apply_adaspa(
    target: Any, config: AdaSpaConfig | None = None, *, layers: tuple[int, ...] | None = None
) -> SparseAttentionHandle:
    """Puts AdaSpa on a pipeline's transformers (or on one transformer).

    Args:
        target: a diffusers video pipeline, or a transformer that `supported` knows.
        config: options; default `AdaSpaConfig()`.
        layers: layer numbers to run sparse; default all.

    Returns:
        A handle with `stats()`, `reset()`, `remove()`, usable as a context manager.

    Raises:
        ValueError: the model's token layout is unknown, or a sparse plug-in is already applied.
    """
    return SparseAttentionHandle(target, AdaSpaMethod(config or AdaSpaConfig()), layers)


def apply_vmoba(
    target: Any, config: VMoBAConfig | None = None, *, layers: tuple[int, ...] | None = None
) -> SparseAttentionHandle:
    """Puts VMoBA on a pipeline's transformers (or on one transformer). Gradients flow, so it also serves training.

    Args:
        target: a diffusers video pipeline, or a transformer that `supported` knows.
        config: options; default `VMoBAConfig.training_free()`. For training use `VMoBAConfig.trained()`.
        layers: layer numbers to run sparse; default all (layers that the config keeps dense stay dense).

    Returns:
        A handle with `stats()`, `reset()`, `remove()`, usable as a context manager.

    Raises:
        ValueError: the model's token layout is unknown, or a sparse plug-in is already applied.
    """
    return SparseAttentionHandle(target, VMoBAMethod(config or VMoBAConfig.training_free()), layers)

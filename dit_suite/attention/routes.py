"""Two ways to stand between a diffusers attention module and its kernel, both reversible.

Models that call diffusers' dispatcher get one registered backend, which the processors of the layers name. Models that
call torch's attention directly (CogVideoX, Mochi) get a hook on the attention module that intercepts exactly that call
while the module runs. No module, class or function is patched.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dit_suite.schedulers.root_hook import remove_diffusers_hook

HOOK_NAME = "dit_suite_attention"

# (layer, query, key, value, mask, scale, call it dense, why it has to be dense) -> output; tensors are (batch, heads,
# seq, head_dim), the reason is None where the method may run.
Intercept = Callable[
    [
        int,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor | None,
        float | None,
        Callable[[], torch.Tensor],
        str | None,
    ],
    torch.Tensor,
]

_UNSET = object()


@dataclass(frozen=True)
class _Taken:
    """One module of a `DispatchRoute`: its layer number, and what its processor had before."""

    layer: int
    processor: Any
    before: Any
    previous: Any


def _unlike_plain_attention(query: torch.Tensor, key: torch.Tensor, dropout: float, causal: bool) -> str | None:
    """Why a call is not the plain self-attention that the methods know; None if it is."""
    if dropout:
        return "an attention call has dropout"
    if causal:
        return "an attention call is causal"
    if query.shape != key.shape:
        return f"keys of {tuple(key.shape)} are not shaped like queries of {tuple(query.shape)}"
    return None


def dispatches(module: torch.nn.Module) -> bool:
    """Whether the module's processor hands its tensors to diffusers' dispatcher."""
    return hasattr(getattr(module, "processor", None), "_attention_backend")


def _private_backend(name: str) -> AttentionBackendName:
    """A backend name that is in no public list: only the processor that holds it can ask for it."""
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name, name
    return member


class DispatchRoute:
    """One backend for all attention modules of a model that dispatch; a hook on each tells which one is running.

    All share a name because torch.compile makes a variant of its code for every name that it meets.
    """

    kind = "dispatcher"

    def __init__(self, name: str, intercept: Intercept) -> None:
        self._name = _private_backend(name)
        self._intercept = intercept
        self._running = threading.local()
        self._taken: dict[torch.nn.Module, _Taken] = {}
        self._hooks: list[RemovableHandle] = []
        attention_dispatch._AttentionBackendRegistry.register(self._name)(self._backend())

    def _backend(self) -> Callable:
        @torch.compiler.disable
        def backend(
            query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
            _parallel_config=None,
        ):  # fmt: skip
            taken: _Taken = self._running.taken

            def dense() -> torch.Tensor:
                return dispatch_attention_fn(
                    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                    backend=taken.previous, parallel_config=_parallel_config,
                )  # fmt: skip

            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            reason = _unlike_plain_attention(q, k, dropout_p, is_causal)
            if _parallel_config is not None:
                reason = "an attention call is split over several devices (context parallelism)"
            out = self._intercept(taken.layer, q, k, v, attn_mask, scale, lambda: dense().transpose(1, 2), reason)
            return out.transpose(1, 2)

        return backend

    def take(self, module: torch.nn.Module, layer: int) -> None:
        """Sends the attention of `module` through here, as layer number `layer`."""
        processor = module.processor
        shared = next((t for t in self._taken.values() if t.processor is processor), None)
        before = processor.__dict__.get("_attention_backend", _UNSET) if shared is None else shared.before
        previous = processor._attention_backend if shared is None else shared.previous
        self._taken[module] = _Taken(layer, processor, before, previous)
        processor._attention_backend = self._name
        self._hooks.append(module.register_forward_pre_hook(self._enter))

    @torch.compiler.disable
    def _enter(self, module: torch.nn.Module, args: tuple) -> None:
        self._running.taken = self._taken[module]

    def lost(self) -> dict[int, str]:
        """Layers that no longer come through here, and why."""
        reasons = {}
        for module, taken in self._taken.items():
            if module.processor is not taken.processor:
                reasons[taken.layer] = "an attention processor was replaced after the plug-in was applied"
            elif taken.processor._attention_backend is not self._name:
                reasons[taken.layer] = "an attention backend was chosen after the plug-in was applied"
        return reasons

    def remove(self) -> None:
        """Restores the processors (not where another backend was chosen since) and forgets the backend."""
        for hook in self._hooks:
            hook.remove()
        for taken in self._taken.values():
            if taken.processor._attention_backend is not self._name:
                continue
            if taken.before is _UNSET:
                del taken.processor._attention_backend
            else:
                taken.processor._attention_backend = taken.before
        registry = attention_dispatch._AttentionBackendRegistry
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(self._name, None)


class _InterceptMode(TorchFunctionMode):
    """Hands scaled_dot_product_attention calls to `intercept` while an attention module runs."""

    def __init__(self, intercept: Intercept, layer: int) -> None:
        super().__init__()
        self._intercept, self._layer = intercept, layer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs

        def dense() -> torch.Tensor:
            return func(*args, **kwargs)

        query, key, value = (given[name] for name in names[:3])
        reason = _unlike_plain_attention(query, key, given.get("dropout_p"), given.get("is_causal"))
        mask, scale = given.get("attn_mask"), given.get("scale")
        return self._intercept(self._layer, query, key, value, mask, scale, dense, reason)


class _InterceptHook(ModelHook):
    def __init__(self, intercept: Intercept, layer: int) -> None:
        super().__init__()
        self._intercept, self._layer = intercept, layer

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _InterceptMode(self._intercept, self._layer):
            return self.fn_ref.original_forward(*args, **kwargs)


class ModuleRoute:
    """Hooks around the attention modules of a model that call torch's attention themselves."""

    kind = "module"

    def __init__(self, name: str, intercept: Intercept) -> None:
        self._intercept = intercept
        self._modules: list[torch.nn.Module] = []

    def take(self, module: torch.nn.Module, layer: int) -> None:
        """Sends the attention of `module` through here, as layer number `layer`."""
        hook = _InterceptHook(self._intercept, layer)
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK_NAME)
        self._modules.append(module)

    def lost(self) -> dict[int, str]:
        """Nothing takes a hook away unseen."""
        return {}

    def remove(self) -> None:
        """Takes the hooks off."""
        for module in reversed(self._modules):
            remove_diffusers_hook(module, HOOK_NAME)


def dispatcher_accepts_private_backends() -> bool:
    """Tries, once per call, whether this diffusers release runs a backend that is registered under a private name."""
    name = _private_backend(f"dit_suite_probe_{threading.get_ident()}")
    registry = attention_dispatch._AttentionBackendRegistry
    try:
        registry.register(name)(lambda query, key, value: value)
        value = torch.ones(1, 1, 1, 1)
        return dispatch_attention_fn(value, value, value, backend=name) is value
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    finally:
        for table in ("_backends", "_constraints", "_supported_arg_names"):
            getattr(registry, table, {}).pop(name, None)


def route_for(module: torch.nn.Module) -> type[DispatchRoute] | type[ModuleRoute]:
    """The route for an attention module."""
    return DispatchRoute if dispatches(module) and dispatcher_accepts_private_backends() else ModuleRoute

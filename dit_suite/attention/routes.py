"""Two ways to stand between a diffusers attention module and its kernel, both reversible.

Models that call diffusers' dispatcher get one registered backend per layer, named by the layer's own processor. Models
that call torch's attention directly (CogVideoX, Mochi) get a hook on the attention module that intercepts exactly that
call while the module runs. No module, class or function is patched.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch.overrides import TorchFunctionMode

from dit_suite.schedulers.root_hook import remove_diffusers_hook

HOOK_NAME = "dit_suite_attention"

# (query, key, value, mask, scale, call it dense) -> output; tensors are (batch, heads, seq, head_dim).
Intercept = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float | None, Callable[[], torch.Tensor]],
    torch.Tensor,
]


def dispatches(module: torch.nn.Module) -> bool:
    """Whether the module's processor hands its tensors to diffusers' dispatcher."""
    return hasattr(getattr(module, "processor", None), "_attention_backend")


def _private_backend(name: str) -> AttentionBackendName:
    """A backend name that is in no public list: only the processor that holds it can ask for it."""
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name, name
    return member


class DispatchRoute:
    """A backend of its own for one attention module's processor."""

    kind = "dispatcher"

    def __init__(self, module: torch.nn.Module, name: str, intercept: Intercept) -> None:
        self._processor = module.processor
        self._before = self._processor.__dict__.get("_attention_backend", self)
        previous = self._processor._attention_backend
        self._name = _private_backend(name)

        @torch.compiler.disable
        def backend(
            query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
            _parallel_config=None,
        ):  # fmt: skip
            def dense() -> torch.Tensor:
                return dispatch_attention_fn(
                    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                    backend=previous, parallel_config=_parallel_config,
                )  # fmt: skip

            plain = dropout_p == 0.0 and not is_causal and _parallel_config is None
            if not plain or query.shape != key.shape:
                return dense()
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            return intercept(q, k, v, attn_mask, scale, lambda: dense().transpose(1, 2)).transpose(1, 2)

        attention_dispatch._AttentionBackendRegistry.register(self._name)(backend)
        self._processor._attention_backend = self._name

    def remove(self) -> None:
        """Restores the processor and takes the backend out of the registry."""
        if self._before is self:
            del self._processor._attention_backend
        else:
            self._processor._attention_backend = self._before
        registry = attention_dispatch._AttentionBackendRegistry
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(self._name, None)


class _InterceptMode(TorchFunctionMode):
    """Hands scaled_dot_product_attention calls to `intercept` while an attention module runs."""

    def __init__(self, intercept: Intercept) -> None:
        super().__init__()
        self._intercept = intercept

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs

        def dense() -> torch.Tensor:
            return func(*args, **kwargs)

        query, key = given["query"], given["key"]
        plain = not given.get("dropout_p") and not given.get("is_causal") and query.shape == key.shape
        if not plain:
            return dense()
        return self._intercept(query, key, given["value"], given.get("attn_mask"), given.get("scale"), dense)


class _InterceptHook(ModelHook):
    def __init__(self, intercept: Intercept) -> None:
        super().__init__()
        self._intercept = intercept

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _InterceptMode(self._intercept):
            return self.fn_ref.original_forward(*args, **kwargs)


class ModuleRoute:
    """A hook around one attention module that calls torch's attention itself."""

    kind = "module"

    def __init__(self, module: torch.nn.Module, name: str, intercept: Intercept) -> None:
        self._module = module
        HookRegistry.check_if_exists_or_initialize(module).register_hook(_InterceptHook(intercept), HOOK_NAME)

    def remove(self) -> None:
        """Takes the hook off the module."""
        remove_diffusers_hook(self._module, HOOK_NAME)


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

"""AdaSpa and VMoBA as sparse-attention plug-ins of vLLM-Omni. Experimental.

vLLM-Omni's `SPARSE_ATTN` dispatcher (its RFCs 2233 and 4661, pull request 4493) loads one callable from the entry-point
group `vllm_omni.sparse_attn` and calls it for every self-attention:

    fn(query, key, value, params, is_causal, softmax_scale) -> output      # (batch, seq, heads, head_dim) throughout

`params` carries the kernel's own settings (here: the fields of `AdaSpaConfig` or `VMoBAConfig`, plus `text` and
`num_layers`) and what the framework knows: `denoise_step_idx` and `total_denoise_steps`, `latent_shape` and
`patch_size`. It names neither the layer nor the guidance branch, so a call is recognised by its place among the calls
of its step: the n-th call of every step is taken for the same layer and branch. Do not combine this adapter with step
caches that skip layers. Anything it cannot place runs dense, is counted, and is warned about once.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from dit_suite.attention.adaspa import AdaSpaConfig
from dit_suite.attention.calls import AttentionCall
from dit_suite.attention.layouts import TokenLayout
from dit_suite.attention.methods import AdaSpaMethod, StayDense, VMoBAMethod, smallest_useful
from dit_suite.attention.partition import Grid
from dit_suite.attention.vmoba import VMoBAConfig
from dit_suite.options import Options, fields_of
from dit_suite.step_plan import Run, StepContext, publish_step


@dataclass
class _Place:
    """Where one thread stands in its denoising loop."""

    run: Run = field(default_factory=Run)
    step: int = -1
    calls: int = 0

    def next_call(self, step: int) -> int:
        """The number of this call within its step; a step that goes back starts a new run."""
        if step < self.step:
            self.run = Run()
        if step != self.step:
            self.step, self.calls = step, 0
        self.calls += 1
        return self.calls - 1


def _same_for_all(value: Any, name: str) -> int | None:
    """One number from an int or a per-sample tensor; samples at different steps cannot share a call."""
    if value is None:
        return None
    values = torch.as_tensor(value).flatten().tolist()
    if any(v != values[0] for v in values):
        raise StayDense(f"the samples of the batch have different {name}")
    return int(values[0])


def _triple(value: Any) -> tuple[int, int, int]:
    rows = torch.as_tensor(value).reshape(-1, 3)
    if bool((rows != rows[0]).any()):
        raise StayDense("the samples of the batch have different sizes")
    return tuple(int(v) for v in rows[0])


def token_grid(params: Mapping[str, Any]) -> Grid:
    """The token grid (frames, rows, columns) from `latent_shape` and `patch_size`.

    Raises:
        StayDense: the framework published none.
    """
    if params.get("latent_shape") is None or params.get("patch_size") is None:
        raise StayDense("the framework published no latent_shape and patch_size")
    shape, patch = _triple(params["latent_shape"]), _triple(params["patch_size"])
    if min(patch) < 1:
        raise StayDense(f"a patch of {patch} holds nothing")
    return tuple(n // p for n, p in zip(shape, patch, strict=True))


class VllmOmniAttention:
    """A callable with the signature of vLLM-Omni's plug-ins around one of our methods."""

    capabilities = {"supports_attention_mask": False, "supports_full_attn_spans": False}

    def __init__(self, name: str, config_class: type[Options], method_class: Callable[[Any], Any]) -> None:
        self.name = name
        self._config_class = config_class
        self._method_class = method_class
        self._fields = frozenset(spec.name for spec in fields_of(config_class))
        self._local = threading.local()
        self._warned: set[str] = set()

    def _state(self) -> Any:
        if not hasattr(self._local, "place"):
            self._local.place, self._local.methods, self._local.fallbacks = _Place(), {}, Counter()
        return self._local

    def _method(self, params: Mapping[str, Any]) -> Any:
        config = self._config_class.from_dict({key: params[key] for key in params if key in self._fields})
        methods = self._state().methods
        if config not in methods:
            methods[config] = self._method_class(config)
        return methods[config]

    @torch.compiler.disable
    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: Mapping[str, Any],
        is_causal: bool = False,
        softmax_scale: float | None = None,
    ) -> torch.Tensor:
        """Attention of `(batch, seq, heads, head_dim)` tensors; see the module's text for `params`.

        Raises:
            ValueError: an option in `params` is out of its range.
        """
        scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))

        def dense() -> torch.Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )

        method = self._method(params)
        try:
            out = self._attend(method, q, k, v, params, is_causal, scale, dense)
        except StayDense as reason:
            self._note(str(reason))
            out = dense()
        return out.transpose(1, 2)

    def _attend(
        self,
        method: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: Mapping[str, Any],
        is_causal: bool,
        scale: float,
        dense: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        step = _same_for_all(params.get("denoise_step_idx"), "denoise_step_idx")
        if step is None:
            raise StayDense("the framework published no denoise_step_idx")
        place = self._state().place
        number = place.next_call(step)
        total = _same_for_all(params.get("total_denoise_steps"), "total_denoise_steps") or 0
        if is_causal or query.shape != key.shape:
            raise StayDense("causal attention, cross-attention and grouped queries are not covered")
        layout = TokenLayout(token_grid(params), params.get("text", "none"))
        if layout.spans(query.shape[2]) is None:
            raise StayDense(f"a sequence of {query.shape[2]} tokens does not fit the grid {layout.grid}")
        least = smallest_useful(method, query.device)
        if layout.video_tokens < least:
            raise StayDense(f"{layout.video_tokens} video tokens are fewer than {least} (min_tokens)")
        layers = int(params.get("num_layers") or 0)
        layer, item = (number % layers, number // layers) if layers else (number, 0)
        call = AttentionCall(0, layer, item, query, key, value, layout, None, scale, dense)
        with torch.no_grad(), publish_step(StepContext(step, total, float(step), run=place.run)):
            return method.attend(call)

    def _note(self, reason: str) -> None:
        self._state().fallbacks[reason] += 1
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"{self.name} stays dense: {reason}", RuntimeWarning, stacklevel=3)

    def stats(self) -> dict[str, Any]:
        """What this thread's calls did: the method's counts (of its one configuration) and reasons to stay dense."""
        state = self._state()
        return {"methods": [m.stats() for m in state.methods.values()], "fallbacks": dict(state.fallbacks)}

    def reset(self) -> None:
        """Forgets this thread's runs and counts."""
        self._local.__dict__.clear()


# The dispatcher takes these objects from the entry points; what they remember is kept per thread.
adaspa = VllmOmniAttention("AdaSpa", AdaSpaConfig, AdaSpaMethod)
vmoba = VllmOmniAttention("VMoBA", VMoBAConfig, VMoBAMethod)

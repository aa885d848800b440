"""How local the attention of every layer is, measured while a model samples: which layers to graft first."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dit_suite.caching.block_probe import find_blocks
from dit_suite.grafting.plan import band_locality
from dit_suite.grafting.surgery import operator_name


class AttentionLocality:
    """Watches the self-attention of every block.

    with AttentionLocality(pipe.transformer, band=32) as locality:
        pipe(prompts, ...)
    locality.values()

    Args:
        model: with one kind of blocks whose attention has `to_q`, `to_k` and `heads`.
        band: tokens to either side that count as near (the paper: 32 of 256).
        grid: near means within `band` rows and columns of the picture instead (ours).

    Raises:
        ValueError: a block's attention has no such projections.
    """

    def __init__(self, model: nn.Module, band: int, grid: bool = False) -> None:
        self.band, self.grid = band, grid
        self._modules = []
        for block in find_blocks(model):
            attention = getattr(block.module, operator_name(block.module, "attention"))
            if not all(hasattr(attention, name) for name in ("to_q", "to_k", "heads")):
                raise ValueError(f"{type(attention).__name__} has no projections whose locality could be measured")
            self._modules.append(attention)
        self._sums = [0.0] * len(self._modules)
        self._counts = [0] * len(self._modules)
        self._handles: list[Any] = []

    def __enter__(self) -> "AttentionLocality":
        for layer, module in enumerate(self._modules):
            self._handles.append(module.register_forward_pre_hook(self._watch(layer), with_kwargs=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, layer: int) -> Any:
        def watch(module: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            with torch.no_grad():
                q, k = (projection(x).unflatten(-1, (module.heads, -1)).transpose(1, 2)
                        for projection in (module.to_q, module.to_k))  # fmt: skip
                weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
                self._sums[layer] += float(band_locality(weights, self.band, self.grid).mean())
            self._counts[layer] += 1

        return watch

    def values(self) -> list[float]:
        """Mean share of near attention per layer, over heads, samples and steps.

        Raises:
            ValueError: the model has not run yet.
        """
        if not all(self._counts):
            raise ValueError("no attention was seen: run the model inside the block")
        return [total / count for total, count in zip(self._sums, self._counts, strict=True)]

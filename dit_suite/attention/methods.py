"""AdaSpa and VMoBA as the plug-in runs them: per layer, per step, per guidance branch."""

import math
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from dit_suite.attention import adaspa
from dit_suite.attention.adaspa import AdaSpaConfig, LayerReport, LayerState, SearchResult
from dit_suite.attention.block_mass import search_backend
from dit_suite.attention.block_sparse import WorkCounter, block_sparse_attention, choose_backend, count_pairs
from dit_suite.attention.calls import AttentionCall
from dit_suite.attention.merge import attention_with_lse
from dit_suite.attention.partition import Partition, auto_tile, partition_on
from dit_suite.attention.vmoba import VMoBAConfig, vmoba_attention
from dit_suite.step_plan import current_step

# Measured on a 2-core CPU: from half of the blocks on, gathering them costs as much as dense attention.
_CPU_BREAK_EVEN = 0.5


class StayDense(Exception):
    """A method cannot run a call; the text says why. The plug-in counts it and warns once."""


def smallest_useful(method: "AdaSpaMethod | VMoBAMethod", device: torch.device) -> int:
    """Tokens below which a method stays dense: below this, selection costs more than it saves."""
    if method.config.min_tokens is not None:
        return method.config.min_tokens
    return method.smallest["cuda" if device.type == "cuda" else "elsewhere"]


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _names(rows: Iterable[Mapping[str, Any]], key: str) -> str | None:
    """What the layers' reports say under `key`, each name once."""
    return ", ".join(sorted({row[key] for row in rows if row[key] is not None})) or None


def _most(dense: int, sparse: int, density: float | None) -> float | None:
    """How much less attention all calls computed than dense ones would have: no gain in time can be higher."""
    if not sparse:
        return None
    return adaspa.estimate_speedup(1.0, dense / (dense + sparse), density)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class AdaSpaMethod:
    """Search, reuse and sparse attention; inference only.

    State lives per run, guidance branch, transformer, layer and call; a run's state dies with the run.
    """

    name = "AdaSpa"
    trainable = False
    smallest: ClassVar[Mapping[str, int]] = {"cuda": 16384, "elsewhere": 2048}

    def __init__(self, config: AdaSpaConfig) -> None:
        self.config = config
        self._runs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._reports: dict[tuple[int, int], LayerReport] = {}
        self._advised = False

    def reset(self) -> None:
        with self._lock:
            self._runs.clear()
            self._reports.clear()

    def _state(self, run: Any, key: tuple) -> LayerState:
        with self._lock:
            layers = self._runs.setdefault(run, {})
            return layers.setdefault(key, LayerState())

    def _report(self, call: AttentionCall) -> LayerReport:
        with self._lock:
            return self._reports.setdefault(call.where, LayerReport())

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """The layer's output at the current step: dense, dense with a search, or sparse."""
        step = current_step()
        if step is None:
            raise StayDense("no sampling step is known")
        try:
            searches = self.config.searches(step.num_steps)
        except ValueError as error:
            raise StayDense(str(error)) from None
        self._refuse_what_gains_nothing(call)
        state = self._state(step.run, (call.model, step.branch, call.layer, call.item, tuple(call.query.shape)))
        report = self._report(call)
        phase = self._phase(state, step.step_index, searches)
        if phase == "dense":
            report.dense_calls += 1
            return call.dense()
        if phase == "fused" or (phase == "cached" and not self.config.lse_cache):
            out = self._fused(call, state, report)
        else:
            out = self._sparse(call, state, report, search=phase == "cached")
        if phase != "sparse":
            state.searches_done = sum(s <= step.step_index for s in searches)
            state.last_step = step.step_index
        return out

    def _refuse_what_gains_nothing(self, call: AttentionCall) -> None:
        kept = 1.0 - self.config.sparsity
        if self.config.min_tokens is None and call.query.device.type == "cpu" and kept >= _CPU_BREAK_EVEN:
            raise StayDense(
                f"keeping {kept:.0%} of the blocks saves no time on a CPU, it does below half of them (a number for "
                "min_tokens makes it run)"
            )

    def planned_searches(self, num_steps: int) -> int:
        """Searches of one layer in a run of `num_steps`, beside those that every sparse step holds."""
        return len(self.config.searches(num_steps))

    def _phase(self, state: LayerState, step: int, searches: tuple[int, ...]) -> str:
        return adaspa.phase_of(state, step, searches)

    def _choose(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        key: torch.Tensor,
        lse: torch.Tensor,
        kept_apart: torch.Tensor | None,
    ) -> SearchResult:
        """The table for video tokens in block order; `lse` is the cached log-sum-exp of their rows."""
        return adaspa.search(query, key, lse, self.config, self._block_size(call), call.scale, kept_apart)

    def _block_size(self, call: AttentionCall) -> int:
        return self.config.block_size or (128 if call.query.device.type == "cuda" else 64)

    def _order(self, call: AttentionCall) -> Partition | None:
        if self.config.token_order == "native":
            return None
        tile = self.config.tile or auto_tile(call.layout.grid, self._block_size(call))
        return partition_on(call.layout.grid, tuple(tile), call.query.device)

    def _fused(self, call: AttentionCall, state: LayerState, report: LayerReport) -> torch.Tensor:
        """Dense output; its log-sum-exp is cached and the first table is made."""
        report.fused_searches += 1
        if call.query.device.type == "cpu" and call.text_tokens == 0:
            # The kernel behind torch's own attention on CPU also tells the log-sum-exp: one pass gives both.
            out, lse = attention_with_lse(call.query, call.key, call.value, call.scale)
        else:
            out = call.dense()
            query, key, value = call.video()
            lse = attention_with_lse(query, key, value, call.scale)[1]
            if call.text_tokens:
                lse = torch.logaddexp(lse, call.text_part[1])
        state.lse = lse.to(adaspa.LSE_DTYPES[self.config.lse_dtype])
        self._search(call, state, report, self._order(call))
        return out

    def _search(self, call: AttentionCall, state: LayerState, report: LayerReport, order: Partition | None) -> None:
        _synchronize(call.query.device)
        start = time.perf_counter()
        query, key = (t if order is None else order.permute(t, 2) for t in call.video()[:2])
        lse = state.lse.float()
        kept_apart = None
        if call.text_tokens:
            share = torch.exp(call.text_part[1].float() - lse).sum(-1)
            kept_apart = share + call.text_counts()[:, None].to(share.dtype)
        lse = lse if order is None else order.permute(lse, 2)
        block = self._block_size(call)
        report.search = search_backend(query, block, self.config.search_impl)
        state.result = self._choose(call, query, key, lse, kept_apart)
        _synchronize(query.device)
        report.search_seconds += time.perf_counter() - start
        report.record_search(state.result)
        length = query.shape[2]
        pairs = count_pairs(state.result.table, state.result.counts, length, length, block)
        report.density.add(call.density(pairs))
        self._advise(call)

    def _advise(self, call: AttentionCall) -> None:
        """Says once that so many blocks save no time on this device."""
        kept = 1.0 - self.config.sparsity
        if self._advised or call.query.device.type != "cpu" or kept < _CPU_BREAK_EVEN:
            return
        self._advised = True
        warnings.warn(
            f"{self.name} keeps {kept:.0%} of the blocks: on a CPU that saves no time (it does below half of them)",
            RuntimeWarning,
            stacklevel=2,
        )

    def _sparse(self, call: AttentionCall, state: LayerState, report: LayerReport, search: bool) -> torch.Tensor:
        order = self._order(call)
        if search:
            report.cached_searches += 1
            self._search(call, state, report, order)
        report.sparse_calls += 1
        query, key, value = call.video()
        result, block = state.result, self._block_size(call)
        report.backend = self.config.backend
        if report.backend == "auto":
            report.backend = choose_backend(query, key, block).name
        out = block_sparse_attention(
            query,
            key,
            value,
            result.table,
            result.counts,
            block,
            scale=call.scale,
            backend=report.backend,
            return_lse=call.text_tokens > 0,
            order=None if order is None else order.order,
        )
        out, lse = out if call.text_tokens else (out, None)
        return call.join(out, lse)

    def stats(self) -> dict[str, Any]:
        """Calls by kind, density, recall, tiers, search time and the kernel used: per layer and over all layers."""
        with self._lock:
            reports = dict(sorted(self._reports.items()))
        layers = [
            {
                "model": model,
                "layer": layer,
                "backend": r.backend,
                "search": r.search,
                "dense_calls": r.dense_calls,
                "fused_searches": r.fused_searches,
                "cached_searches": r.cached_searches,
                "sparse_calls": r.sparse_calls,
                "density": r.density.value,
                "recall_before_tiers": r.recall_before.value,
                "recall": r.recall.value,
                "tiers": dict(sorted(r.tiers.items())),
                "search_seconds": r.search_seconds,
            }
            for (model, layer), r in reports.items()
        ]
        totals = ("dense_calls", "fused_searches", "cached_searches", "sparse_calls", "search_seconds")
        means = ("density", "recall_before_tiers", "recall")
        summary = {name: sum(row[name] for row in layers) for name in totals}
        summary |= {name: _mean(row[name] for row in layers if row[name] is not None) for name in means}
        dense = summary["dense_calls"] + summary["fused_searches"]
        summary["attention_speedup_at_most"] = _most(dense, summary["sparse_calls"], summary["density"])
        return {"backend": _names(layers, "backend"), "search": _names(layers, "search"), **summary, "layers": layers}


class VMoBAMethod:
    """Mixture-of-block attention; stateless, exact, differentiable."""

    name = "VMoBA"
    trainable = True
    # On an H200 it lost at 32,768 tokens and won at 75,600.
    smallest: ClassVar[Mapping[str, int]] = {"cuda": 65536, "elsewhere": 4096}

    def __init__(self, config: VMoBAConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._reports: dict[tuple[int, int], dict[str, Any]] = {}

    def reset(self) -> None:
        with self._lock:
            self._reports.clear()

    def _report(self, call: AttentionCall) -> dict[str, Any]:
        with self._lock:
            empty = {"backend": None, "dense_calls": 0, "sparse_calls": 0, "density": 0.0}
            return self._reports.setdefault(call.where, empty)

    def _step_is_dense(self, call: AttentionCall) -> bool:
        training = torch.is_grad_enabled() and call.query.requires_grad
        if training or self.config.dense_first_steps == 0.0:
            return False
        step = current_step()
        if step is None or step.num_steps < 1:
            raise StayDense("dense_first_steps is a share of the run, but the number of steps is unknown")
        return step.step_index < math.ceil(self.config.dense_first_steps * step.num_steps - 1e-9)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """The layer's output: dense in the first steps and layers the config names, else mixture-of-block."""
        report = self._report(call)
        if self.config.kind(call.layer) is None or self._step_is_dense(call):
            report["dense_calls"] += 1
            return call.dense()
        return call.join(*self._sparse(call, report))

    def _sparse(self, call: AttentionCall, report: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of the video queries over the video keys they selected."""
        counter = WorkCounter()
        out, lse = vmoba_attention(
            *call.video(),
            call.layout.grid,
            self.config,
            call.layer,
            scale=call.scale,
            counter=counter,
            return_lse=True,
        )
        report["backend"] = counter.backend
        report["sparse_calls"] += 1
        report["density"] += call.density(counter.pairs)
        return out, lse

    def stats(self) -> dict[str, Any]:
        """Calls by kind, density and the kernel used (varlen or a loop over blocks): per layer and over all layers.

        Recall is not told: it would take the dense weights.
        """
        with self._lock:
            reports = sorted(self._reports.items())
        layers = [
            {
                "model": model,
                "layer": layer,
                "kind": self.config.kind(layer),
                "backend": r["backend"],
                "dense_calls": r["dense_calls"],
                "sparse_calls": r["sparse_calls"],
                "density": r["density"] / r["sparse_calls"] if r["sparse_calls"] else None,
            }
            for (model, layer), r in reports
        ]
        dense, sparse = (sum(row[kind] for row in layers) for kind in ("dense_calls", "sparse_calls"))
        density = _mean(row["density"] for row in layers if row["density"] is not None)
        return {
            "backend": _names(layers, "backend"),
            "dense_calls": dense,
            "sparse_calls": sparse,
            "density": density,
            "attention_speedup_at_most": _most(dense, sparse, density),
            "layers": layers,
        }

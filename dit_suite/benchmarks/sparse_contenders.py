"""The methods that the sparse attention benchmark compares on a trained video model."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dit_suite.attention.adaspa import AdaSpaConfig
from dit_suite.attention.mask_rules import RuleMethod
from dit_suite.attention.methods import AdaSpaMethod, VMoBAMethod
from dit_suite.attention.vmoba import VMoBAConfig


@dataclass
class Contender:
    """One row: how to build the method, and what was measured."""

    name: str
    setting: str
    build: Callable[[], Any]
    clips: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """Mean of a number over the clips that have it."""
        values = [clip[name] for clip in self.clips if clip[name] is not None]
        return statistics.mean(values) if values else None


def _adaspa(**changes: Any) -> Callable[[], AdaSpaMethod]:
    return lambda: AdaSpaMethod(AdaSpaConfig(min_tokens=0, **changes))


def _rival(name: str, order: str, sparsity: float, every_step: bool, tile: tuple[int, ...] | None) -> Callable:
    def build() -> RuleMethod:
        config = AdaSpaConfig(sparsity=sparsity, token_order=order, tile=tile, head_adaptive=False, min_tokens=0)
        return RuleMethod(name, config, every_step=every_step)

    return build


def contenders(args: argparse.Namespace) -> list[Contender]:
    """The rows of the table, filtered by `--methods`."""
    rows = [
        Contender(f"adaspa-{order}", f"sparsity {s:g}", _adaspa(sparsity=s, token_order=order))
        for s in args.sparsities
        for order in ("tile", "native")
    ]
    rows.append(Contender("vmoba", "training-free", lambda: VMoBAMethod(VMoBAConfig.training_free(min_tokens=0))))
    for s in args.rival_sparsity:
        rows += [
            Contender("adaspa-block-128", f"sparsity {s:g}", _adaspa(sparsity=s, block_size=128)),
            Contender("adaspa-one-tier", f"sparsity {s:g}", _adaspa(sparsity=s, head_adaptive=False)),
            Contender("radial", f"sparsity {s:g}", _rival("radial", "native", s, False, None)),
            Contender("sliding-tile", f"sparsity {s:g}", _rival("sliding-tile", "tile", s, False, (4, 4, 4))),
            Contender("antidiagonal", f"sparsity {s:g}", _rival("antidiagonal", "tile", s, True, None)),
            Contender("oracle", f"sparsity {s:g}", _rival("oracle", "tile", s, True, None)),
        ]
    if "all" in args.methods:
        return rows
    unknown = set(args.methods) - {label for row in rows for label in _labels(row)}
    if unknown:
        known = ", ".join(dict.fromkeys(row.name for row in rows))
        raise ValueError(f"there is no method {sorted(unknown)[0]!r}; the methods are {known}")
    return [row for row in rows if _labels(row) & set(args.methods)]


def _labels(row: Contender) -> set[str]:
    """What `--methods` may call a row: its name, or name:sparsity."""
    return {row.name, f"{row.name}:{row.setting.removeprefix('sparsity ')}"}

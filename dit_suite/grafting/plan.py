"""Graft plans as data: which layers get which operator, and which pairs of blocks run side by side."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_suite.grafting.operators import (
    GatedLinearAttention,
    Hyena,
    Hyena2D,
    Mamba2,
    Mlp,
    MlpHyenaX,
    MultiHeadAttention,
    Operator,
    PooledAttention2D,
    SlidingWindowAttention,
    SlidingWindowAttention2D,
    grid_side,
)
from dit_suite.options import Options, option

ATTENTION_KINDS = (
    "mha", "hyena_se", "hyena_x", "hyena_y", "swa", "mamba2", "gla", "hyena_se_2d", "hyena_x_2d", "hyena_y_2d",
    "swa_2d", "pool_2d",
)  # fmt: skip
MLP_KINDS = ("mlp", "mlp_hyena_x")
INHERITING_KINDS = ("mha", "swa", "swa_2d", "pool_2d", "mlp")
_PUBLISHED_WINDOW, _PUBLISHED_BAND = 4, 32
Locality = Callable[[int, bool], Sequence[float]]


@dataclass(frozen=True)
class OperatorSpec(Options):
    """One operator by name, with the sizes it needs."""

    kind: str = option("hyena_x", "operator", choices=(*ATTENTION_KINDS, *MLP_KINDS))
    ratio: float | None = option(None, "hidden width over width of an MLP (mlp 4, mlp_hyena_x 2)", minimum=0.25)
    window: int = option(_PUBLISHED_WINDOW, "tokens to either side (swa), rows and columns (swa_2d)", minimum=0)
    d_state: int = option(64, "state width of mamba2", minimum=1)
    head_dim: int = option(16, "head width of mamba2", minimum=1)
    init: str = option("fresh", "first weights; inherit (ours): from what is exchanged", choices=("fresh", "inherit"))

    def validate(self) -> None:
        if self.init == "inherit" and self.kind not in INHERITING_KINDS:
            kinds = ", ".join(INHERITING_KINDS)
            raise ValueError(f"{self.kind} shares no weights with what it replaces; {kinds} can inherit")

    @property
    def is_mlp(self) -> bool:
        return self.kind in MLP_KINDS


def build_operator(spec: OperatorSpec, dim: int, num_tokens: int, heads: int) -> Operator:
    """A freshly initialised operator of width `dim` for sequences of `num_tokens`."""
    if spec.kind.startswith("hyena"):
        short, inner = ("_se" in spec.kind or "_x" in spec.kind), ("_se" in spec.kind or "_y" in spec.kind)
        return (Hyena2D if spec.kind.endswith("_2d") else Hyena)(dim, short, inner)
    makers = {
        "mha": lambda: MultiHeadAttention(dim, heads),
        "swa": lambda: SlidingWindowAttention(dim, heads, spec.window),
        "swa_2d": lambda: SlidingWindowAttention2D(dim, heads, spec.window),
        "pool_2d": lambda: PooledAttention2D(dim, heads),
        "mamba2": lambda: Mamba2(dim, spec.d_state, spec.head_dim),
        "gla": lambda: GatedLinearAttention(dim, heads),
        "mlp": lambda: Mlp(dim, spec.ratio or 4.0),
        "mlp_hyena_x": lambda: MlpHyenaX(dim, num_tokens, spec.ratio or 2.0),
    }
    return makers[spec.kind]()


@dataclass(frozen=True)
class GraftPlan:
    """Which operators are exchanged and which blocks are paired.

    Attributes:
        attention, mlp: operator per layer index.
        pairs: (first, second) layers that run side by side; see `surgery.ParallelPair`.
        pair_init: "residual_sum" or "average".

    Raises:
        ValueError: an operator in the place of the other kind, or pairs that are no neighbours or overlap.
    """

    attention: Mapping[int, OperatorSpec] = field(default_factory=dict)
    mlp: Mapping[int, OperatorSpec] = field(default_factory=dict)
    pairs: tuple[tuple[int, int], ...] = ()
    pair_init: str = "residual_sum"

    def __post_init__(self) -> None:
        for name, layers, wanted in (("attention", self.attention, False), ("mlp", self.mlp, True)):
            for layer, spec in layers.items():
                if spec.is_mlp != wanted:
                    raise ValueError(f"{spec.kind} can't take the place of the {name} of layer {layer}")
        used = [layer for pair in self.pairs for layer in pair]
        if len(set(used)) != len(used) or any(b != a + 1 for a, b in self.pairs):
            raise ValueError("pairs must be neighbouring layers, each used once")
        if self.pair_init not in ("residual_sum", "average"):
            raise ValueError(f"pair_init must be residual_sum or average, got {self.pair_init!r}")

    def check_depth(self, depth: int) -> None:
        """Raises `ValueError` where the plan names a layer the model does not have."""
        layers = [*self.attention, *self.mlp, *(layer for pair in self.pairs for layer in pair)]
        if layers and (min(layers) < 0 or max(layers) >= depth):
            raise ValueError(f"the plan names layer {max(layers)}, the model has {depth} layers (0 to {depth - 1})")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the inverse of `from_dict`."""
        facts: dict[str, Any] = {}
        for name in ("attention", "mlp"):
            specs = getattr(self, name)
            facts[name] = {str(layer): _short(spec) for layer, spec in sorted(specs.items())}
        return {**facts, "pairs": [list(pair) for pair in self.pairs], "pair_init": self.pair_init}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], depth: int | None = None, locality: Locality | None = None
    ) -> "GraftPlan":
        """Reads a plan: operators per layer, or for a model of `depth` layers by rule.

        A rule is {"kind": ..., "layers": "all" | [...] | {"interleave": ratio} | {"local": ratio, "band": tokens}}.
        The last takes the layers whose attention is most local; `locality(band, grid)` measures them.
        """
        unknown = set(values) - {"attention", "mlp", "pairs", "pair_init"}
        if unknown:
            raise ValueError(f"a graft plan has no {sorted(unknown)[0]!r}; it has attention, mlp, pairs and pair_init")
        parts = {name: _specs(values.get(name) or {}, depth, locality) for name in ("attention", "mlp")}
        pairs = values.get("pairs") or ()
        if pairs == "all":
            pairs = [(i, i + 1) for i in range(0, _known(depth) - 1, 2)]
        plan = cls(
            **parts, pairs=tuple((int(a), int(b)) for a, b in pairs), pair_init=values.get("pair_init", "residual_sum")
        )
        if depth is not None:
            plan.check_depth(depth)
        return plan

    @classmethod
    def load(cls, path: str | Path, depth: int, locality: Locality | None = None) -> "GraftPlan":
        """Reads a YAML or JSON plan for a model of `depth` layers; see `from_dict`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file can't be read, or the plan does not fit.
        """
        import yaml

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no graft plan {path}")
        text = path.read_text("utf-8")
        try:
            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} can't be read as a graft plan: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path.name} is not a graft plan")
        return cls.from_dict(values, depth, locality)


def _short(spec: OperatorSpec) -> dict[str, Any]:
    default = OperatorSpec(kind=spec.kind).to_dict()
    return {"kind": spec.kind} | {k: v for k, v in spec.to_dict().items() if v != default[k]}


def _known(depth: int | None) -> int:
    if depth is None:
        raise ValueError("a plan by rule needs the depth of the model")
    return depth


def _specs(values: Mapping[str, Any], depth: int | None, locality: Locality | None) -> dict[int, OperatorSpec]:
    if "kind" not in values:
        return {int(layer): OperatorSpec.from_dict(spec) for layer, spec in values.items()}
    rule = dict(values)
    layers = rule.pop("layers", "all")
    if layers == "all":
        chosen = list(range(_known(depth)))
    elif isinstance(layers, Mapping) and "local" in layers:
        if locality is None:
            raise ValueError("the plan takes the most local layers, which have to be measured: graft with graft.py")
        shares = locality(int(layers.get("band", _PUBLISHED_BAND)), bool(layers.get("grid", False)))
        chosen = most_local(shares, max(1, round(float(layers["local"]) * _known(depth))))
    elif isinstance(layers, Mapping):
        chosen = interleaved(_known(depth), float(layers["interleave"]))
    else:
        chosen = [int(layer) for layer in layers]
    return {layer: OperatorSpec.from_dict(rule) for layer in chosen}


def interleaved(depth: int, ratio: float) -> list[int]:
    """Evenly spread layer indices: ratio 1/2 gives 1, 3, 5, ...; 3/4 leaves out every fourth, beginning with 0."""
    if not 0 < ratio <= 1:
        raise ValueError(f"the share of layers must be in (0, 1], got {ratio}")
    return [i for i in range(depth) if int((i + 1) * ratio + 1e-9) > int(i * ratio + 1e-9)]


def band_locality(attention: torch.Tensor, band: int, grid: bool = False) -> torch.Tensor:
    """Mean share of attention that stays within `band` tokens: (..., N, N) row-stochastic maps to (...).

    With `grid` (ours) within `band` rows and columns of the square that the tokens form.
    """
    tokens = attention.shape[-1]
    place = torch.arange(tokens, device=attention.device)
    near = (place[:, None] - place[None]).abs() <= band
    if grid:
        side = grid_side(tokens)
        row, column = place // side, place % side
        near = ((row[:, None] - row).abs() <= band) & ((column[:, None] - column).abs() <= band)
    return (attention * near).sum(dim=(-2, -1)) / tokens


def most_local(locality: Sequence[float], count: int) -> list[int]:
    """The `count` layers whose attention is most local, in ascending order of their index."""
    order = sorted(range(len(locality)), key=lambda layer: (-locality[layer], layer))
    return sorted(order[:count])


_HYENA = {(True, True): "hyena_se", (True, False): "hyena_x", (False, True): "hyena_y"}


def detect_operators(state: Mapping[str, torch.Tensor]) -> GraftPlan:
    """The plan of a published grafted checkpoint, from its key names and shapes alone.

    Full attention and MLPs of ratio 4 count as not grafted; the window of sliding-window attention is not recorded
    there, the published one is assumed.
    """
    attention, mlp = {}, {}
    layers = sorted({int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", key) for key in state) if m})
    for layer in layers:
        attn = {
            k.removeprefix(f"blocks.{layer}.attn."): v
            for k, v in state.items()
            if k.startswith(f"blocks.{layer}.attn.")
        }
        inner = {
            k.removeprefix(f"blocks.{layer}.mlp."): v for k, v in state.items() if k.startswith(f"blocks.{layer}.mlp.")
        }
        if "A_log" in attn:
            heads, width = len(attn["A_log"]), len(attn["norm.weight"])
            states = (len(attn["conv1d.bias"]) - width) // 2
            attention[layer] = OperatorSpec(kind="mamba2", d_state=states, head_dim=width // heads)
        elif "Wqkv.weight" in attn:
            attention[layer] = OperatorSpec(kind="swa")
        elif "in_proj.weight" in attn:
            attention[layer] = OperatorSpec(kind=_HYENA["short_filter.weight" in attn, "inner_filter.weight" in attn])
        if "in_proj.weight" in inner:
            dim, hidden = inner["out_proj.weight"].shape
            mlp[layer] = OperatorSpec(kind="mlp_hyena_x", ratio=hidden / dim)
        elif "fc1.weight" in inner:
            hidden, dim = inner["fc1.weight"].shape
            if hidden != 4 * dim:
                mlp[layer] = OperatorSpec(kind="mlp", ratio=hidden / dim)
    return GraftPlan(attention, mlp)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())

"""Carrying out a graft plan on a transformer: operators exchanged, pairs of blocks laid side by side."""

from typing import Any

import torch
from torch import nn

from dit_suite.caching.block_probe import find_blocks
from dit_suite.grafting.plan import GraftPlan, build_operator

ATTENTION_NAMES = ("attn", "attn1")
MLP_NAMES = ("ff", "mlp")


class ParallelPair(nn.Module):
    """Two neighbouring blocks that read the same input and are merged by a learned projection (depth to width).

    With `residual`, y = x + W [A(x) - x; B(x) - x], first equal to x plus both increments; otherwise
    y = W [A(x); B(x)], first their mean.
    """

    def __init__(self, first: nn.Module, second: nn.Module, dim: int, residual: bool) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.merge = nn.Linear(2 * dim, dim)
        self.residual = residual
        with torch.no_grad():
            eye = torch.eye(dim) * (1.0 if residual else 0.5)
            self.merge.weight.copy_(torch.cat([eye, eye], dim=1))
            self.merge.bias.zero_()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(batch, tokens, width) to the same shape; further arguments go to both blocks."""
        branches = [block(hidden_states, *args, **kwargs) for block in (self.first, self.second)]
        if not self.residual:
            return self.merge(torch.cat(branches, dim=-1))
        return hidden_states + self.merge(torch.cat([branch - hidden_states for branch in branches], dim=-1))


def operator_name(block: nn.Module, target: str) -> str:
    """Name of a block's self-attention ("attention") or feed-forward ("mlp") module.

    Raises:
        ValueError: the block has no such module.
    """
    for name in ATTENTION_NAMES if target == "attention" else MLP_NAMES:
        if isinstance(getattr(block, name, None), nn.Module):
            return name
    raise ValueError(f"{type(block).__name__} has no {target} that could be exchanged")


def block_list(model: nn.Module) -> nn.ModuleList:
    """The model's single list of blocks.

    Raises:
        ValueError: there are none or several.
    """
    containers = list(dict.fromkeys(block.container for block in find_blocks(model)))
    if len(containers) != 1:
        raise ValueError(f"grafting needs one list of blocks, {type(model).__name__} has {len(containers)}")
    return model.get_submodule(containers[0])


def layout(plan: GraftPlan, depth: int) -> list[str]:
    """Where each original layer lies below the list of blocks after pairing: "3", or "1.first"."""
    first = {a: "first" for a, _ in plan.pairs}
    second = {b: "second" for _, b in plan.pairs}
    places, index = [], -1
    for layer in range(depth):
        if layer not in second:
            index += 1
        role = first.get(layer) or second.get(layer)
        places.append(f"{index}.{role}" if role else str(index))
    return places


def apply_plan(model: nn.Module, plan: GraftPlan, dim: int, num_tokens: int, heads: int) -> None:
    """Exchanges operators and pairs blocks of `model` in place; the new parts are freshly initialised."""
    blocks = block_list(model)
    plan.check_depth(len(blocks))
    for target, specs in (("attention", plan.attention), ("mlp", plan.mlp)):
        for layer, spec in specs.items():
            block = blocks[layer]
            setattr(block, operator_name(block, target), build_operator(spec, dim, num_tokens, heads))
    if not plan.pairs:
        return
    kept, second = [], dict(plan.pairs)
    skip = set(second.values())
    for layer, block in enumerate(blocks):
        if layer in second:
            kept.append(ParallelPair(block, blocks[second[layer]], dim, plan.pair_init == "residual_sum"))
        elif layer not in skip:
            kept.append(block)
    container = next(block.container for block in find_blocks(model))
    parent, _, name = container.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(kept))


def transplant(original: nn.Module, grafted: nn.Module, plan: GraftPlan) -> list[str]:
    """Copies every weight that both models have; returns the names in `grafted` that stay freshly initialised.

    Raises:
        ValueError: something other than a grafted operator or a merge would be left without its weights.
    """
    container = next(block.container for block in find_blocks(original))
    blocks = block_list(original)
    places = layout(plan, len(blocks))
    removed = {f"{container}.{layer}.{operator_name(blocks[layer], 'attention')}." for layer in plan.attention}
    removed |= {f"{container}.{layer}.{operator_name(blocks[layer], 'mlp')}." for layer in plan.mlp}
    state = {}
    for key, value in original.state_dict().items():
        if key.startswith(tuple(removed)):
            continue
        if key.startswith(f"{container}."):
            layer, _, rest = key.removeprefix(f"{container}.").partition(".")
            key = f"{container}.{places[int(layer)]}.{rest}"
        state[key] = value
    result = grafted.load_state_dict(state, strict=False)
    fresh = operator_prefixes(grafted, plan, len(blocks))
    lost = [key for key in result.missing_keys if not key.startswith(fresh)]
    if result.unexpected_keys or lost:
        raise ValueError(f"the graft does not fit {type(original).__name__}: {[*result.unexpected_keys, *lost][0]}")
    return list(result.missing_keys)


def operator_places(grafted: nn.Module, plan: GraftPlan, depth: int) -> dict[tuple[str, int], str]:
    """Dotted name in the grafted model of every exchanged operator, by (target, original layer)."""
    container = next(block.container for block in find_blocks(grafted))
    places = layout(plan, depth)
    found = {}
    for target, specs in (("attention", plan.attention), ("mlp", plan.mlp)):
        for layer in specs:
            path = f"{container}.{places[layer]}"
            found[(target, layer)] = f"{path}.{operator_name(grafted.get_submodule(path), target)}"
    return found


def operator_prefixes(grafted: nn.Module, plan: GraftPlan, depth: int) -> tuple[str, ...]:
    """Name prefixes of everything in the grafted model that has no counterpart in the original."""
    container = next(block.container for block in find_blocks(grafted))
    merges = {f"{container}.{place.partition('.')[0]}.merge." for place in layout(plan, depth) if "." in place}
    return (*(f"{name}." for name in operator_places(grafted, plan, depth).values()), *sorted(merges))


def copy_attention(original: nn.Module, operator: nn.Module) -> None:
    """Gives a `MultiHeadAttention` the weights of a diffusers-style attention (the exact self-graft)."""
    with torch.no_grad():
        for leaf in ("weight", "bias"):
            parts = [getattr(getattr(original, name), leaf) for name in ("to_q", "to_k", "to_v")]
            getattr(operator.qkv, leaf).copy_(torch.cat(parts))
            getattr(operator.proj, leaf).copy_(getattr(original.to_out[0], leaf))

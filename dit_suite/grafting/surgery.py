"""Carrying out a graft plan on a transformer: operators exchanged, pairs of blocks laid side by side."""

from collections.abc import Mapping
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


def seed_operators(
    grafted: nn.Module, plan: GraftPlan, depth: int, seed: int, dim: int, num_tokens: int, heads: int
) -> None:
    """Starts the operators of every original layer l anew from `seed + l`; the global generator stays as it is."""
    for (target, layer), place in operator_places(grafted, plan, depth).items():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + layer)
            operator = build_operator(getattr(plan, target)[layer], dim, num_tokens, heads)
        grafted.get_submodule(place).load_state_dict(operator.state_dict())


def operator_prefixes(grafted: nn.Module, plan: GraftPlan, depth: int) -> tuple[str, ...]:
    """Name prefixes of everything in the grafted model that has no counterpart in the original."""
    container = next(block.container for block in find_blocks(grafted))
    merges = {f"{container}.{place.partition('.')[0]}.merge." for place in layout(plan, depth) if "." in place}
    return (*(f"{name}." for name in operator_places(grafted, plan, depth).values()), *sorted(merges))


def _weights(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    bias = linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
    return linear.weight, bias


def _fill(target: nn.Linear, *sources: nn.Linear) -> None:
    """Gives a projection the rows of one or several others."""
    weights, biases = zip(*(_weights(source) for source in sources), strict=True)
    target.weight.copy_(torch.cat(weights))
    target.bias.copy_(torch.cat(biases))


@torch.no_grad()
def copy_attention(original: nn.Module, operator: nn.Module) -> None:
    """Gives an attention operator the projections of the attention it replaces.

    For full attention this is the exact self-graft; a window or pooled keys change what the same projections give.
    """
    q, k, v, out = original.to_q, original.to_k, original.to_v, original.to_out[0]
    if hasattr(operator, "Wkv"):
        _fill(operator.Wq, q)
        _fill(operator.Wkv, k, v)
    else:
        _fill(operator.qkv if hasattr(operator, "qkv") else operator.Wqkv, q, k, v)
    _fill(operator.proj if hasattr(operator, "proj") else operator.out_proj, out)


@torch.no_grad()
def copy_mlp(original: nn.Module, operator: nn.Module) -> None:
    """Gives a narrower MLP the hidden units of the original that weigh most (norm of row in times column out).

    Raises:
        ValueError: the original is no MLP with a tanh GELU, or has fewer hidden units than the operator.
    """
    first, second = original.net[0], original.net[2]
    if getattr(first, "approximate", None) != "tanh":
        raise ValueError(f"an MLP can inherit from one with a tanh GELU, not from {type(first).__name__}")
    rows, biases = _weights(first.proj)
    hidden = operator.fc1.out_features
    if hidden > len(rows):
        raise ValueError(f"an MLP of {hidden} hidden units can't inherit from one of {len(rows)}")
    importance = rows.norm(dim=1) * second.weight.norm(dim=0)
    kept = importance.topk(hidden).indices.sort().values
    operator.fc1.weight.copy_(rows[kept])
    operator.fc1.bias.copy_(biases[kept])
    operator.fc2.weight.copy_(second.weight[:, kept])
    operator.fc2.bias.copy_(_weights(second)[1])


def inherit(original: nn.Module, grafted: nn.Module, plan: GraftPlan) -> None:
    """Initialises the operators whose spec says `init: inherit` from what they replace (an addition of this project).

    Raises:
        ValueError: the exchanged module is of a kind whose weights can't be taken over.
    """
    blocks = block_list(original)
    for (target, layer), place in operator_places(grafted, plan, len(blocks)).items():
        if getattr(plan, target)[layer].init != "inherit":
            continue
        source = getattr(blocks[layer], operator_name(blocks[layer], target))
        copy = copy_mlp if target == "mlp" else copy_attention
        try:
            copy(source, grafted.get_submodule(place))
        except AttributeError as error:
            raise ValueError(f"nothing can be inherited from {type(source).__name__}: {error}") from None


def pair_places(grafted: nn.Module, plan: GraftPlan, depth: int) -> dict[int, str]:
    """Dotted name in the grafted model of every pair, by its first original layer."""
    container = next(block.container for block in find_blocks(grafted))
    places = layout(plan, depth)
    return {first: f"{container}.{places[first].partition('.')[0]}" for first, _ in plan.pairs}


def branch_gate(block: nn.Module, target: str, args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a block multiplies its attention or MLP output with, (batch, 1, width), from the arguments of its call.

    Raises:
        ValueError: the block is neither adaLN-single (PixArt) nor adaLN-Zero with its own projection (DiT).
    """
    row = 2 if target == "attention" else 5
    if isinstance(getattr(block, "scale_shift_table", None), torch.Tensor):
        timestep = kwargs["timestep"]
        return (block.scale_shift_table[None] + timestep.reshape(len(timestep), 6, -1))[:, row : row + 1]
    if isinstance(getattr(block, "adaln", None), nn.Linear):
        conditioning = args[1] if len(args) > 1 else kwargs["conditioning"]
        return block.adaln(nn.functional.silu(conditioning)).chunk(6, dim=-1)[row][:, None]
    raise ValueError(f"the gates of {type(block).__name__} are not known; distil without scaled_pred")

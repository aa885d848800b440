"""Which parts of a diffusion transformer can be cached, found from its structure.

Three granularities. "subblock": the attention and feed-forward modules inside every transformer block, as in the paper.
"block": whole blocks, by what they add to the residual stream. "stack": a whole list of blocks, likewise.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

from diffusers.hooks._common import _ATTENTION_CLASSES, _FEEDFORWARD_CLASSES
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

from dit_suite.models.operator import Operator

GRANULARITIES = ("subblock", "block", "stack")

_FEED_FORWARD_NAMES = ("ff", "ffn", "mlp", "feed_forward", "ff_context", "ffn_context")
_CROSS_NAMES = ("attn2", "cross_attn", "cross_attention")


@dataclass(frozen=True)
class StreamLayout:
    """Where a block takes its token streams from and in which order it returns them.

    Attributes:
        arguments: names of the block's stream arguments, main stream first.
        positions: position of each stream among the block's positional arguments.
        outputs: index of each stream in the returned tuple; None for a block that returns one bare tensor, or its
            streams in the order of its arguments.
    """

    arguments: tuple[str, ...] = ("hidden_states",)
    positions: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Block:
    """One transformer block of a model."""

    name: str
    module: nn.Module
    container: str
    layer: int


@dataclass(frozen=True)
class CacheUnit:
    """Something with an output worth caching.

    Attributes:
        name: dotted name in the model.
        modules: the module, or for a stack all its blocks in order.
        kind: "sa", "ca", "ffn", "block" or "stack".
        layer: depth of the block it belongs to (the first block for a stack).
    """

    name: str
    modules: tuple[nn.Module, ...] = field(repr=False)
    kind: str
    layer: int


def _is_attention(module: nn.Module) -> bool:
    """Attention, or what was grafted into its place (a grafted feed-forward is told by its name before)."""
    known = (*_ATTENTION_CLASSES, nn.MultiheadAttention, Operator)
    return isinstance(module, known) or "Attention" in type(module).__name__


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    return isinstance(module, _FEEDFORWARD_CLASSES) or name in _FEED_FORWARD_NAMES


def _is_cross(name: str, module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) or name in _CROSS_NAMES


def _parts(block: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The cacheable children of a block in order of definition: (name, module, kind)."""
    found = []
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList):
            found += [(f"{name}.{i}.{n}", m, kind) for i, item in enumerate(child) for n, m, kind in _parts(item)]
        elif _is_feed_forward(name, child):
            found.append((name, child, "ffn"))
        elif _is_attention(child):
            found.append((name, child, "ca" if _is_cross(name, child) else "sa"))
        else:
            found += [(f"{name}.{n}", m, kind) for n, m, kind in _parts(child)]
    return found


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost module lists whose elements hold attention or a feed-forward."""

    def visit(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, nn.ModuleList) and len(child) and all(_parts(item) for item in child):
                yield path, child
            elif any(True for _ in child.children()):
                yield from visit(f"{path}.", child)

    yield from visit("", model)


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The transformer blocks of a model in order of definition.

    Text refiners and the like that hold blocks outside a list of the model's own are left out: only lists that are
    direct children count where there are any.

    Raises:
        ValueError: the model has no list of blocks with attention or a feed-forward in it.
    """
    lists = list(_block_lists(model))
    direct = [(name, blocks) for name, blocks in lists if "." not in name]
    chosen = direct or lists
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no list of transformer blocks that could be cached")
    found: list[Block] = []
    for name, blocks in chosen:
        found += [Block(f"{name}.{i}", block, name, len(found) + i) for i, block in enumerate(blocks)]
    return tuple(found)


def stream_layout(block: nn.Module) -> StreamLayout:
    """How a block carries its token streams.

    diffusers' registry knows for its own classes. Any other block is taken to return its first streams in the order in
    which its forward names them.
    """
    try:
        entry = TransformerBlockRegistry.get(type(block))
    except ValueError:
        parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        names = tuple(named[:2])
        return StreamLayout(names, tuple(range(len(names))))
    main, second = entry.return_hidden_states_index, entry.return_encoder_hidden_states_index
    if second is None:
        return StreamLayout((entry.hidden_states_argument_name,))
    names = (entry.hidden_states_argument_name, entry.encoder_hidden_states_argument_name or "encoder_hidden_states")
    return StreamLayout(names, (0, 1), (main, second))


def find_units(model: nn.Module, granularity: str) -> tuple[CacheUnit, ...]:
    """Everything of one granularity that can be cached, in order of definition.

    A block without a feed-forward module of its own (attention and MLP merged in one projection, as in Flux' single
    blocks) is one unit at "subblock" too.

    Raises:
        ValueError: unknown granularity, no blocks, or feed-forwards that run in chunks.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    blocks = find_blocks(model)
    if granularity == "stack":
        names = dict.fromkeys(block.container for block in blocks)
        stacks = [(name, [b for b in blocks if b.container == name]) for name in names]
        return tuple(CacheUnit(name, tuple(b.module for b in s), "stack", s[0].layer) for name, s in stacks)
    if granularity == "block":
        return tuple(CacheUnit(b.name, (b.module,), "block", b.layer) for b in blocks)
    units = []
    for block in blocks:
        if getattr(block.module, "_chunk_size", None) is not None:
            raise ValueError(
                f"{block.name} runs its feed-forward in chunks; call transformer.set_chunk_feed_forward(None) "
                'or use granularity="block"'
            )
        parts = _parts(block.module)
        if "ffn" in (kind for _, _, kind in parts):
            units += [CacheUnit(f"{block.name}.{name}", (m,), kind, block.layer) for name, m, kind in parts]
        else:
            units.append(CacheUnit(block.name, (block.module,), "block", block.layer))
    return tuple(units)

"""Starting weights for a small network from the layers of a trained PixArt network of the same width.

A start is made once, written as a network folder and named by `init_from` in a training config. What the two networks
share is copied; what they do not share is approximated:

- Modulation of a branch that has none in the student (PT-DiT's proxies) is averaged over noise levels and folded into
  the projections.
- A class-conditional student has no text attention; its mean contribution becomes a bias of the self-attention.
- Linear fits over all timesteps stand for the teacher's final modulation, which is not a linear layer there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from dit_suite.data.draws import Draws, Stream, shuffled_indices
from dit_suite.data.readers import open_source
from dit_suite.models.dit import DiTModel
from dit_suite.models.dit_blocks import AdaLNZeroBlock, Attention
from dit_suite.models.pt_dit import PTDiTTransformer3DModel, PTDiTTransformerBlock
from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel
from dit_suite.training.conditioning import make_conditioner
from dit_suite.training.config import TrainConfig
from dit_suite.training.objectives import interpolate

LEVELS = 64
RIDGE = 1e-6


def level_grid(device: torch.device | None = None) -> torch.Tensor:
    """Timesteps spread evenly over the noise levels, `(64,)` in (0, 1000)."""
    return 1000.0 * (torch.arange(LEVELS, device=device) + 0.5) / LEVELS


def spread_layers(depth: int, teacher_depth: int) -> list[int]:
    """`depth` teacher layers, evenly spaced, the first and the last among them."""
    if not 1 <= depth <= teacher_depth:
        raise ValueError(f"{depth} layers can't be taken from a teacher of {teacher_depth}")
    if depth == 1:
        return [0]
    return [round(index * (teacher_depth - 1) / (depth - 1)) for index in range(depth)]


def check_teacher(teacher: PixArtTransformer2DModel, student: nn.Module, layers: Sequence[int]) -> None:
    """Raises `ValueError` when shapes differ or a layer does not exist."""
    ours, theirs = student.config, teacher.config
    pairs = {
        "the width": (
            ours.num_attention_heads * ours.attention_head_dim,
            theirs.num_attention_heads * theirs.attention_head_dim,
        ),
        "num_attention_heads": (ours.num_attention_heads, theirs.num_attention_heads),
        "patch_size": (ours.patch_size, theirs.patch_size),
        "in_channels": (ours.in_channels, theirs.in_channels),
    }
    for name, (mine, other) in pairs.items():
        if mine != other:
            raise ValueError(f"{name} of the network is {mine}, of the teacher {other}: they must be equal")
    if len(layers) != ours.num_layers or not all(0 <= layer < theirs.num_layers for layer in layers):
        last = theirs.num_layers - 1
        raise ValueError(f"layers must name {ours.num_layers} of the teacher's layers 0 to {last}, got {list(layers)}")


def copy(target: nn.Module, source: nn.Module) -> None:
    """Copies all parameters of two modules of one layout, in float32."""
    target.load_state_dict({key: value.float() for key, value in source.state_dict().items()})


def copy_attention(target: Attention, source: nn.Module) -> None:
    """Projections of diffusers' attention into ours."""
    for name in ("to_q", "to_k", "to_v"):
        copy(getattr(target, name), getattr(source, name))
    copy(target.to_out[0], source.to_out[0])


def fold_modulation(linear: nn.Linear, shift: torch.Tensor, scale: torch.Tensor) -> None:
    """Makes `linear(x)` what `linear(x * (1 + scale) + shift)` was."""
    linear.bias += linear.weight @ shift
    linear.weight *= 1 + scale


@torch.no_grad()
def start_pixart(teacher: PixArtTransformer2DModel, student: PixArtTransformer2DModel, layers: Sequence[int]) -> None:
    """Fills a shallower PixArt from teacher layers; all else is copied. The dense twin of `start_pt_dit`.

    Raises:
        ValueError: the shapes differ.
    """
    check_teacher(teacher, student, layers)
    for name in ("pos_embed", "adaln_single", "caption_projection", "proj_out"):
        copy(getattr(student, name), getattr(teacher, name))
    student.scale_shift_table.copy_(teacher.scale_shift_table)
    for block, layer in zip(student.transformer_blocks, layers, strict=True):
        copy(block, teacher.transformer_blocks[layer])


@torch.no_grad()
def start_pt_dit(
    teacher: PixArtTransformer2DModel,
    student: PTDiTTransformer3DModel,
    layers: Sequence[int],
    global_share: float = 0.25,
) -> None:
    """Fills a PT-DiT from teacher layers.

    Self-attention over all tokens becomes two parts with the same projections: reading from the window means (the
    injection, with the average modulation and gate) and attention inside windows (with the exact modulation);
    `global_share` goes to the first. Proxy attention and shifted windows start as in a new network: they add nothing.

    Raises:
        ValueError: the shapes differ.
    """
    check_teacher(teacher, student, layers)
    copy(student.patch_embed.proj, teacher.pos_embed.proj)
    for name in ("adaln_single", "caption_projection", "proj_out"):
        copy(getattr(student, name), getattr(teacher, name))
    student.scale_shift_table.copy_(teacher.scale_shift_table)
    batch = {"batch_size": LEVELS, "hidden_dtype": torch.float32}
    added = {"resolution": None, "aspect_ratio": None}
    modulation = teacher.adaln_single(level_grid(), added, **batch)[0].reshape(LEVELS, 6, -1).mean(dim=0)
    for block, layer in zip(student.transformer_blocks, layers, strict=True):
        source = teacher.transformer_blocks[layer]
        shift, scale, gate, *_ = source.scale_shift_table + modulation
        start_pt_dit_block(block, source, shift, scale, gate, global_share)


def start_pt_dit_block(
    block: PTDiTTransformerBlock,
    source: nn.Module,
    shift: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    global_share: float,
) -> None:
    """One block of `start_pt_dit`; shift, scale and gate `(dim,)` are the teacher's averages."""
    block.scale_shift_table.copy_(source.scale_shift_table)
    copy_attention(block.attn2, source.attn2)
    copy(block.ff, source.ff)
    for attention in (block.attn1, block.pvisual_attn2, block.proxy_attn1):
        copy_attention(attention, source.attn1)
    for attention in (block.pvisual_attn2, block.proxy_attn1):
        for name in ("to_q", "to_k", "to_v"):
            fold_modulation(getattr(attention, name), shift, scale)
    block.linear_1_visual.weight.copy_(torch.diag(gate * global_share))
    block.linear_1_visual.bias.zero_()
    block.attn1.to_out[0].weight.mul_(1 - global_share)
    block.attn1.to_out[0].bias.mul_(1 - global_share)
    block.proxy_attn1.to_out[0].weight.zero_()
    block.proxy_attn1.to_out[0].bias.zero_()
    if block.shift_window:
        copy_attention(block.attn3, source.attn1)
        block.proxy_scale_shift_table.copy_(source.scale_shift_table[:3])
        block.linear_2.weight.zero_()
        block.linear_2.bias.zero_()


def level_batch(config: TrainConfig, teacher: PixArtTransformer2DModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pictures of the config's data set with noise at the levels of `level_grid`, and the arguments that tell the
    teacher their captions; what `mean_text` takes.

    Raises:
        FileNotFoundError, ValueError: the data set or its caption states are absent.
    """
    source = open_source(config.data)
    captioned = replace(config, task="text-to-image")
    draws = Draws(config.run.seed, 0, torch.arange(LEVELS))
    rows = shuffled_indices(config.run.seed, 0, LEVELS, len(source))
    fetched = source.fetch(rows, draws)
    noise = draws.normal(Stream.NOISE, fetched["samples"].shape[1:])
    noisy = interpolate(fetched["samples"], noise, level_grid() / 1000.0)
    return noisy, make_conditioner(captioned, source, teacher).arguments(fetched, draws)


@torch.no_grad()
def mean_text(
    teacher: PixArtTransformer2DModel, samples: torch.Tensor, condition: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """What every layer's text attention adds on average, each `(dim,)`.

    Args:
        teacher: the network.
        samples: noisy pictures, one per level of `level_grid`, `(64, C, H, W)`.
        condition: text states and mask of as many captions.
    """
    caught: list[torch.Tensor] = []
    handles = [
        block.attn2.register_forward_hook(lambda module, args, output: caught.append(output.mean(dim=(0, 1))))
        for block in teacher.transformer_blocks
    ]
    try:
        teacher(samples, timestep=level_grid(samples.device), **condition)
    finally:
        for handle in handles:
            handle.remove()
    return caught


def most_used_units(feed_forward: nn.Module, count: int) -> torch.Tensor:
    """The hidden units of a feed-forward layer with the largest weights (norm in times norm out), in order."""
    into, out = feed_forward.net[0].proj.weight.float(), feed_forward.net[2].weight.float()
    return (into.norm(dim=1) * out.norm(dim=0)).topk(count).indices.sort().values


def start_dit_block(
    block: AdaLNZeroBlock, source: nn.Module, shared: nn.Linear, gate: torch.Tensor, text: torch.Tensor
) -> None:
    """One block of `start_dit`: the gate `(LEVELS, dim)` of attention over levels, the mean text attention `(dim,)`."""
    copy(block.adaln, shared)
    block.adaln.bias += source.scale_shift_table.flatten()
    copy_attention(block.attn, source.attn1)
    block.attn.to_out[0].bias += text * gate.mean(dim=0) / gate.square().mean(dim=0)
    units = most_used_units(source.ff, block.ff.net[2].in_features)
    block.ff.net[0].proj.weight.copy_(source.ff.net[0].proj.weight[units])
    block.ff.net[0].proj.bias.copy_(source.ff.net[0].proj.bias[units])
    block.ff.net[2].weight.copy_(source.ff.net[2].weight[:, units])
    block.ff.net[2].bias.copy_(source.ff.net[2].bias)


@torch.no_grad()
def start_dit(
    teacher: PixArtTransformer2DModel,
    student: DiTModel | SwitchDiTTransformer2DModel,
    layers: Sequence[int],
    text: Sequence[torch.Tensor],
) -> None:
    """Fills a DiT or the DiT inside a Switch-DiT from teacher layers; `text` is what `mean_text` returns.

    Label embeddings start at zero and experts as in a new network, so that both kinds start as the same function.

    Raises:
        ValueError: the shapes differ.
    """
    check_teacher(teacher, student, layers)
    copy(student.patch_embed.proj, teacher.pos_embed.proj)
    embedder = teacher.adaln_single.emb.timestep_embedder
    copy(student.time_embed.linear_1, embedder.linear_1)
    copy(student.time_embed.linear_2, embedder.linear_2)
    student.label_embed.embedding_table.weight.zero_()
    shared = teacher.adaln_single.linear
    embedded = student.time_embed(level_grid())
    active = nn.functional.silu(embedded)
    gates = shared(active).chunk(6, dim=1)[2]
    for block, layer in zip(student.transformer_blocks, layers, strict=True):
        source = teacher.transformer_blocks[layer]
        start_dit_block(block, source, shared, gates + source.scale_shift_table[2], text[layer])
    final = student.final_layer
    columns = torch.cat([active, torch.ones(LEVELS, 1)], dim=1).double()
    ridge = RIDGE * torch.eye(columns.shape[1], dtype=columns.dtype)
    fit = torch.linalg.solve(columns.T @ columns + ridge, columns.T @ embedded.double()).float().T
    final.adaln.weight.copy_(torch.cat([fit[:, :-1]] * 2))
    final.adaln.bias.copy_(torch.cat([fit[:, -1] + row for row in teacher.scale_shift_table]))
    copy(final.linear, teacher.proj_out)

"""The PT-DiT block for inference on a CPU in float32: the same function with fewer products and passes over memory.

`PTDiTTransformerBlock.forward` is the definition; this is what it is equal to, up to rounding, once training, plug-ins
and other number types are out of the way:

- two linear layers in a row are one, `W2 (g (W1 x + b1)) + b2 = (W2 diag(g) W1) x + (W2 (g b1) + b2)`;
- a bias of the keys adds the same to all scores of a query and cancels in the softmax; a bias of the values passes
  through the attention, whose weights sum to one, and joins the bias of the output projection;
- a gate scales the rows of the weights before it, and the residual stream is what the last product is added to;
- where the text is short, queries are not projected: a score is `(x Wq) k = x (Wq k)`, an output `sum_j p_j (v_j Wo)`.

Multiplying weights pays where a sample has more than two tokens per feature; below that the blocks run as written. So
they do with hooks, adapters and other plug-ins, which therefore change the last bits of a large picture.
"""

from collections.abc import Iterable

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import nn

from dit_suite.models.dit_blocks import NORM_EPS, Attention, AttentionProcessor, CrossAttention, modulate
from dit_suite.models.shifted_windows import WindowLayout

# What a block is made of; anything else (adapters, quantised layers) has its own way to compute.
PARTS = (nn.Linear, nn.LayerNorm, nn.ModuleList, nn.Dropout, Attention, CrossAttention, FeedForward, GELU)


def is_untouched(block: nn.Module) -> bool:
    """Whether nothing watches, wraps or replaces a part of this block, and its weights are plain float32."""
    for part in block.modules():
        kind, own = type(part), vars(part)
        if kind not in PARTS and part is not block:
            return False
        if part._forward_hooks or part._forward_pre_hooks or part._compiled_call_impl or "forward" in own:
            return False
        weight = own["_parameters"].get("weight")
        if weight is not None and (type(weight) is not nn.Parameter or weight.dtype != torch.float32):
            return False
        if isinstance(part, Attention):
            processor = part.processor
            plain = type(processor) is AttentionProcessor and processor._attention_backend is None
            if not plain or part.fused_projections:
                return False
    return True


def can_run_lean(blocks: Iterable[nn.Module], tokens: torch.Tensor) -> bool:
    """Whether `lean_block` may stand for the blocks and pays for `tokens (batch, n, dim)`: float32 on a CPU, no
    gradients, no compiler, blocks untouched, more than two tokens per feature."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if tokens.device.type != "cpu" or tokens.dtype != torch.float32 or tokens.shape[1] <= 2 * tokens.shape[2]:
        return False
    return all(is_untouched(block) for block in blocks)


def normalized(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`modulate` of the normalised x, in one pass where the batch shares a modulation."""
    if len(shift) == 1:
        return nn.functional.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0], NORM_EPS)
    return modulate(normalized(x), shift, scale)


def product(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """`layer(x)` for `(batch, n, in)`. With the bias laid out first the product is added to it; given the bias as a
    vector, the same product takes up to a seventh longer where the output is wide."""
    out = layer.bias.expand(*x.shape[:-1], -1).contiguous()
    out.flatten(0, 1).addmm_(x.flatten(0, 1), layer.weight.T)
    return out


def attended(attn: Attention, x: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention before its output projection, without the biases of keys and values: `(batch, n, dim)`."""
    linear = nn.functional.linear
    query, key, value = product(x, attn.to_q), linear(source, attn.to_k.weight), linear(source, attn.to_v.weight)
    query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def output_bias(attn: Attention) -> torch.Tensor:
    """Bias of the output projection with the bias of the values in it, `(dim,)`."""
    return nn.functional.linear(attn.to_v.bias, attn.to_out[0].weight, attn.to_out[0].bias)


def add_linear(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """`residual + gate * (x weight^T + bias)`. The gate goes into the weights where they are fewer than the results.

    Args:
        residual: `(batch, n, out)`.
        x: `(batch, n, in)`.
        weight, bias: `(out, in)` and `(out,)`; with a leading batch dimension, or one of 1, for a matrix per sample.
        gate: `(batch or 1, out)`.
    """
    if gate is not None and weight.numel() > residual[0].numel():
        return torch.addcmul(residual, gate[:, None], nn.functional.linear(x, weight, bias))
    if gate is not None:
        weight, bias = gate[:, :, None] * weight, gate * bias
    if weight.ndim == 3 and len(weight) == 1:
        weight, bias = weight[0], bias[0]
    if weight.ndim == 2:
        out = residual + bias
        out.flatten(0, 1).addmm_(x.flatten(0, 1), weight.T)
        return out
    return (residual + bias[:, None]).baddbmm_(x, weight.mT)


def add_two_linears(
    residual: torch.Tensor, x: torch.Tensor, attn: Attention, last: nn.Linear, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """`residual + last(gate * to_out(x))` for what `attended` gave."""
    first, bias = attn.to_out[0].weight, output_bias(attn)
    if gate is not None:
        first, bias = gate[:, :, None] * first, gate * bias
    return add_linear(residual, x, last.weight @ first, nn.functional.linear(bias, last.weight, last.bias))


def add_text(
    residual: torch.Tensor, attn: Attention, text: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`residual + attn(residual, text, mask)`. With few text tokens m the projections of the queries move to the text:
    `2 heads m dim` products per token then, where two projections and two attention products take `2 dim (dim + m)`."""
    length, dim, heads = text.shape[1], residual.shape[2], attn.heads
    out, bias = attn.to_out[0], output_bias(attn)
    if heads * length >= dim + length:
        return add_linear(residual, attended(attn, residual, text, mask), out.weight, bias)
    scale = attn.head_dim**-0.5
    key, value = (
        nn.functional.linear(text, layer.weight).unflatten(-1, (heads, -1)).transpose(1, 2)
        for layer in (attn.to_k, attn.to_v)
    )
    reading = (key @ attn.to_q.weight.unflatten(0, (heads, -1))).flatten(1, 2)
    offset = (key @ attn.to_q.bias.unflatten(0, (heads, -1))[:, :, None]).flatten(1)
    scores = torch.baddbmm(offset[:, None], residual, reading.mT, beta=scale, alpha=scale)
    scores = scores.unflatten(-1, (heads, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask.transpose(1, 2), -torch.inf)
    writing = value @ out.weight.T.unflatten(0, (heads, -1))
    return (residual + bias).baddbmm_(scores.softmax(dim=-1).flatten(2), writing.flatten(1, 2))


def reordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`x.index_select(1, order)`, which copies a row at a time only along the first dimension."""
    if len(x) == 1:
        return x[0].index_select(0, order)[None]
    return x.index_select(1, order)


def add_shifted(
    residual: torch.Tensor, block: nn.Module, modulation: torch.Tensor, layout: WindowLayout
) -> torch.Tensor:
    """`residual + block.attend_shifted(residual, ...)`."""
    shift, scale, gate = (block.proxy_scale_shift_table + modulation[:, :3]).unbind(1)
    windows = modulated(reordered(residual, layout.order), shift, scale)
    windows = windows.unflatten(1, (-1, layout.window_tokens)).flatten(0, 1)
    mask = layout.mask.repeat(len(residual), 1, 1, 1)
    heads = attended(block.attn3, windows, windows, mask).reshape(residual.shape)
    return add_two_linears(residual, reordered(heads, layout.inverse), block.attn3, block.linear_2, gate)


def lean_attention(
    block: nn.Module, hidden_states: torch.Tensor, modulation: torch.Tensor, layout: WindowLayout
) -> torch.Tensor:
    """The three branches that stand for self-attention: proxies, windows, shifted windows."""
    shift, scale, gate = (block.scale_shift_table + modulation)[:, :3].unbind(1)
    proxies = block.extract_proxies(hidden_states, layout.window, layout.proxy_window)
    first, normed = block.proxy_attn1, normalized(proxies)
    mixed = attended(first, normed, normed)
    proxies = normalized(add_linear(proxies, mixed, first.to_out[0].weight, output_bias(first)))
    read = attended(block.pvisual_attn2, normalized(hidden_states), proxies)
    x = add_two_linears(hidden_states, read, block.pvisual_attn2, block.linear_1_visual)

    windows = modulated(x, shift, scale).unflatten(1, (-1, layout.window_tokens)).flatten(0, 1)
    heads = attended(block.attn1, windows, windows).reshape(x.shape)
    x = add_linear(x, heads, block.attn1.to_out[0].weight, output_bias(block.attn1), gate)
    return add_shifted(x, block, modulation, layout) if block.shift_window else x


def lean_block(
    block: nn.Module,
    hidden_states: torch.Tensor,
    modulation: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None,
    layout: WindowLayout,
) -> torch.Tensor:
    """What `PTDiTTransformerBlock.forward` computes; arguments and result are the same."""
    shift, scale, gate = (block.scale_shift_table + modulation)[:, 3:].unbind(1)
    x = lean_attention(block, hidden_states, modulation, layout)
    x = add_text(x, block.attn2, encoder_hidden_states, encoder_attention_mask)
    inner = torch.ops.aten.gelu_(product(modulated(x, shift, scale), block.ff.net[0].proj), approximate="tanh")
    return add_linear(x, inner, block.ff.net[2].weight, block.ff.net[2].bias, gate)

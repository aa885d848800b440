"""How the tokens of a pass over frames find their keys: by slices of a growing cache, or in buffers of one shape."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dit_suite.models.block_causal import BlockPattern, attend
from dit_suite.models.kv_cache import FrameCache

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class FrameAttention:
    """Frames read frames before them in the same pass and, with a cache, the frames cached before."""

    def __init__(self, pattern: BlockPattern, backend: str, cache: FrameCache | None, span: tuple[int, int, int]):
        self.pattern, self.backend, self.cache = pattern, backend, cache
        self.first_past, self.past_end, self.num_written = span

    def __call__(self, layer: int, heads: Heads) -> torch.Tensor:
        query, key, value = heads
        if self.cache is None:
            return attend(query, key, value, self.pattern, self.backend)
        past = self.cache.read(layer, self.first_past, self.past_end)
        keys = torch.cat([*(k for k, _ in past), key], dim=2)
        values = torch.cat([*(v for _, v in past), value], dim=2)
        if self.num_written:
            tokens = self.num_written * self.cache.block_size
            self.cache.write(layer, key[:, :, :tokens], value[:, :, :tokens])
        return attend(query, keys, values, self.pattern, self.backend)


class FixedInputs(NamedTuple):
    """What changes from pass to pass of one shape, as tensors, so that one compiled graph serves every frame.

    Attributes:
        cos, sin: rotary tables of the frames of the pass.
        readable: bool `(frames, slots + frames)`: which slots of the cache, then which frames of the pass, each reads.
        slots: int64 `(written,)`, the slots that take the leading frames of the pass.
        before, before_level: the frame before the first one of the pass and its level, `velocity_from_residual`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    readable: torch.Tensor
    slots: torch.Tensor
    before: torch.Tensor
    before_level: torch.Tensor


class FixedAttention:
    """Attention over the whole key-value buffer, masked: shapes do not depend on the frame's index.

    The pass writes its own keys behind the slots of the ring, where the buffer has scratch room, so that nothing is
    concatenated; the leading frames also go to their slots.
    """

    def __init__(self, buffer: torch.Tensor, block_size: int, inputs: FixedInputs):
        self.buffer, self.slots = buffer, inputs.slots
        frames, blocks = inputs.readable.shape
        self.block_size, self.ring = block_size, (blocks - frames) * block_size
        self.mask = inputs.readable.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)

    def __call__(self, layer: int, heads: Heads) -> torch.Tensor:
        query, key, value = heads
        end = self.ring + key.shape[2]
        own = self.buffer[layer, 0], self.buffer[layer, 1]
        for held, new in zip(own, (key, value), strict=True):
            held[:, :, self.ring : end] = new
        keys, values = (held[:, :, :end] for held in own)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask)
        written = self.slots.shape[0] * self.block_size
        if written:
            for held, new in zip(own, (key, value), strict=True):
                ring = held[:, :, : self.ring].unflatten(2, (-1, self.block_size))
                ring.index_copy_(2, self.slots, new[:, :, :written].unflatten(2, (-1, self.block_size)))
        return attended

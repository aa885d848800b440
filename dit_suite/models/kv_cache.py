"""Keys and values of finished blocks, in buffers that are allocated once.

Slots form a ring: block `b` lives in slot `b % num_slots`. A counter says how many blocks have been written, so rolling
back is setting it back: what lies beyond it may still be in memory and cannot be read. With `window` readable blocks
and `num_slots >= window + d`, writing `d` blocks ahead never touches a slot that is readable now.
"""

import torch


class BlockKVCache:
    """A preallocated cache for `num_layers` attention layers.

    Args:
        num_layers, num_heads, head_dim: of the network.
        batch_size: rows of keys.
        block_size: tokens in a block.
        num_slots: blocks that are kept; older ones are overwritten.
        scratch: blocks of room behind the slots, which belong to no block (`FixedAttention`).

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        block_size: int,
        num_slots: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        scratch: int = 0,
    ):
        if min(num_layers, batch_size, num_heads, head_dim, block_size) < 1 or num_slots < 0:
            raise ValueError("the sizes of a key-value cache must be positive")
        self.block_size, self.num_slots = block_size, num_slots
        self._length = self._high = self._base = 0
        shape = (num_layers, 2, batch_size, num_heads, (num_slots + scratch) * block_size, head_dim)
        self.buffer = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def length(self) -> int:
        """Blocks written and not rolled back; the next block to be written has this index."""
        return self._length

    @property
    def oldest(self) -> int:
        """Index of the oldest block still kept (a block overwritten by one since rolled back is gone for good)."""
        return max(self._base, self._high - self.num_slots)

    @property
    def num_layers(self) -> int:
        return self.buffer.shape[0]

    @property
    def batch_size(self) -> int:
        return self.buffer.shape[2]

    @property
    def nbytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()

    def _span(self, block: int) -> slice:
        slot = block % self.num_slots
        return slice(slot * self.block_size, (slot + 1) * self.block_size)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores the blocks that follow `length`, `(batch, heads, blocks * block_size, head_dim)`.

        They become readable with `advance`, once every layer has been written.
        """
        for i in range(key.shape[2] // self.block_size):
            own = slice(i * self.block_size, (i + 1) * self.block_size)
            self.buffer[layer, 0, :, :, self._span(self._length + i)] = key[:, :, own]
            self.buffer[layer, 1, :, :, self._span(self._length + i)] = value[:, :, own]

    def advance(self, num_blocks: int) -> None:
        """Makes the blocks just written readable."""
        self._length += num_blocks
        self._high = max(self._high, self._length)

    def truncate(self, length: int) -> None:
        """Rolls back to `length` blocks.

        Raises:
            ValueError: `length` is not between the first block and the present length.
        """
        if not self._base <= length <= self._length:
            raise ValueError(f"a cache of {self._length} blocks cannot be rolled back to {length}")
        self._length = length

    def reset(self, first: int = 0) -> None:
        """Forgets every block; the next one to be written has index `first`."""
        self._length = self._high = self._base = first

    def read(self, layer: int, first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of blocks `first .. last-1` in order: one `(key, value)` pair, or two where the ring wraps.

        Raises:
            IndexError: a block is not there (evicted, or beyond the length).
        """
        if first >= last:
            return []
        if first < self.oldest or last > self._length:
            raise IndexError(f"blocks {first}..{last - 1} asked, {self.oldest}..{self._length - 1} are kept")
        start, count, size = first % self.num_slots, last - first, self.block_size
        head = min(count, self.num_slots - start)
        spans = [slice(start * size, (start + head) * size)]
        if head < count:
            spans.append(slice(0, (count - head) * size))
        return [(self.buffer[layer, 0, :, :, span], self.buffer[layer, 1, :, :, span]) for span in spans]


class FrameCache(BlockKVCache):
    """Also keeps the frames themselves, as noisy as they were read, where the network needs the one before."""

    frames: torch.Tensor | None = None

    def keep_frames(self, shape: tuple[int, int, int]) -> None:
        """Allocates room for frames `(channels, height, width)`, a slot each."""
        size = (self.num_slots, self.batch_size)
        self.frames = torch.zeros(*size, *shape, device=self.buffer.device, dtype=self.buffer.dtype)
        self.levels = torch.ones(*size, device=self.buffer.device)

    def write_frames(self, frames: torch.Tensor, levels: torch.Tensor) -> None:
        """Stores the frames that follow `length`, `(batch, channels, count, height, width)`, levels `(batch, count)`.

        A cache without room for frames lets them go.
        """
        if self.frames is None:
            return
        for i in range(frames.shape[2]):
            slot = (self.length + i) % self.num_slots
            self.frames[slot], self.levels[slot] = frames[:, :, i], levels[:, i]

    def last_frame(self, frame: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last readable frame `(batch, channels, height, width)` and its level; the arguments if there is none."""
        if self.length <= self.oldest:
            return frame, level
        slot = (self.length - 1) % self.num_slots
        return self.frames[slot], self.levels[slot]

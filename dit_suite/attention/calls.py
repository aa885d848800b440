"""One intercepted attention call: video and text apart, and how their partial results come together again."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_suite.attention.layouts import TokenLayout
from dit_suite.attention.merge import attention_with_lse, merge_by_lse


@dataclass
class AttentionCall:
    """What a sparse method gets for one layer.

    Attributes:
        model, layer, item: which transformer of the pipeline, which layer, and the how-manieth call of that layer in
            this forward pass (models that attend sample by sample call more than once).
        query, key, value: `(batch, heads, seq, head_dim)`.
        layout: where the video tokens are.
        text_valid: bool `(batch, text tokens)`, or None where all text is real.
        scale: factor on the scores.
        dense: runs the untouched attention of the model.
    """

    model: int
    layer: int
    item: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: TokenLayout
    text_valid: torch.Tensor | None
    scale: float
    dense: Callable[[], torch.Tensor]

    @property
    def where(self) -> tuple[int, int]:
        return self.model, self.layer

    @functools.cached_property
    def spans(self) -> tuple[slice, slice]:
        return self.layout.spans(self.query.shape[2])

    @property
    def text_tokens(self) -> int:
        return self.spans[1].stop - self.spans[1].start

    def video(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of the video tokens in (t, y, x) order."""
        span = self.spans[0]
        return self.query[:, :, span], self.key[:, :, span], self.value[:, :, span]

    def _valid_text(self, sample: int) -> torch.Tensor | slice:
        return slice(None) if self.text_valid is None else self.text_valid[sample]

    def text_counts(self) -> torch.Tensor:
        """Real text tokens of every sample, `(batch,)`."""
        if self.text_valid is not None:
            return self.text_valid.sum(-1)
        return torch.full((self.query.shape[0],), self.text_tokens, device=self.query.device)

    @functools.cached_property
    def text_part(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the video queries over the real text keys: output and log-sum-exp."""
        video, text = self.spans
        query, key, value = self.query[:, :, video], self.key[:, :, text], self.value[:, :, text]
        if self.text_valid is None:
            return attention_with_lse(query, key, value, self.scale)
        parts = []
        for sample in range(query.shape[0]):
            some, valid = slice(sample, sample + 1), self._valid_text(sample)
            parts.append(attention_with_lse(query[some], key[some][:, :, valid], value[some][:, :, valid], self.scale))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _text_rows(self) -> torch.Tensor:
        """Dense attention of the text queries over all video and all real text."""
        video, text = self.spans
        mask = None
        if self.text_valid is not None:
            mask = self.text_valid.new_ones(self.query.shape[0], 1, 1, self.query.shape[2])
            mask[..., text] = self.text_valid[:, None, None]
        return F.scaled_dot_product_attention(
            self.query[:, :, text], self.key, self.value, attn_mask=mask, scale=self.scale
        )

    def join(self, video_out: torch.Tensor, video_lse: torch.Tensor | None) -> torch.Tensor:
        """The layer's output from the video queries' attention over video keys: text is always attended."""
        if self.text_tokens == 0:
            return video_out
        merged, _ = merge_by_lse([video_out, self.text_part[0]], [video_lse, self.text_part[1]])
        parts = [merged, self._text_rows()]
        return torch.cat(parts[::-1] if self.layout.text == "first" else parts, dim=2)

    def density(self, video_pairs: float) -> float:
        """Share of all query-key pairs that were computed, given the pairs among video tokens (all heads)."""
        batch, heads, length, _ = self.query.shape
        tokens = self.layout.video_tokens
        text_pairs = length * length - tokens * tokens
        return (video_pairs / (batch * heads) + text_pairs) / (length * length)

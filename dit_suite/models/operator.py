"""What stands in the place of an attention or feed-forward module: the base of the grafted operators."""

from typing import Any

import torch
from torch import nn


class Operator(nn.Module):
    """Base: accepts the call of an attention or feed-forward module and refuses what no operator can honour."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(batch, tokens, width) to the same shape.

        Raises:
            ValueError: a mask or a second sequence is given; a grafted operator has no use for either.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(f"{type(self).__name__} is no cross-attention and takes no attention mask")
        return self.mix(hidden_states)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """The operator itself."""
        raise TypeError(f"{type(self).__name__} defines no operator")

"""Teachers of distillation: the frozen networks of finished checkpoints."""

from functools import lru_cache

import torch

from dit_suite.checkpoints import find_checkpoint, open_network


@lru_cache(maxsize=2)
def load_teacher(name: str, device: str) -> torch.nn.Module:
    """The frozen network of a checkpoint that `load_pipeline` opens, kept for the batches that follow.

    Raises:
        ValueError: no name is given, or as `find_checkpoint` and `open_network`.
        FileNotFoundError: as `find_checkpoint`.
    """
    if not name:
        raise ValueError("distillation needs the teacher's checkpoint: set objective.options.teacher")
    return open_network(find_checkpoint(name)).to(device).requires_grad_(False)

"""Which samples are for training: pictures held out by concept and by (concept, style) pair, made ones by seed."""

import hashlib
from collections.abc import Sequence

TRAIN, HELDOUT, PAIRS = "train", "heldout", "pairs"


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


def split_of(concept: str, style: str, *, salt: str = "dit_suite", heldout: float = 0.05, pairs: float = 0.05) -> str:
    """The split of one picture, a pure function of its arguments.

    "heldout": the concept is held out in every style. "pairs": this concept is held out in this style only, so that
    both factors but not their combination are seen in training. "train": the rest.
    """
    if _fraction(f"{salt}/concept/{concept}") < heldout:
        return HELDOUT
    if _fraction(f"{salt}/pair/{concept}/{style}") < pairs:
        return PAIRS
    return TRAIN


def made_seed(split: str) -> int:
    """The seed of a set that is made on the fly: its training samples and the held-out ones are other draws.

    Raises:
        ValueError: such a set has no such split.
    """
    if split not in (TRAIN, HELDOUT):
        raise ValueError(f"data.split of a set that is made on the fly is {TRAIN} or {HELDOUT}, got {split!r}")
    return int(split == HELDOUT)


def assign_splits(
    items: Sequence[tuple[str, str]], *, salt: str = "dit_suite", heldout: float = 0.05, pairs: float = 0.05
) -> list[str]:
    """Splits of (concept, style) items; a pair whose concept would not be seen at all in training goes to training."""
    splits = [split_of(c, s, salt=salt, heldout=heldout, pairs=pairs) for c, s in items]
    seen = {concept for (concept, _), split in zip(items, splits, strict=True) if split == TRAIN}
    return [
        TRAIN if split == PAIRS and concept not in seen else split
        for (concept, _), split in zip(items, splits, strict=True)
    ]

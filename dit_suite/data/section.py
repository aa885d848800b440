"""The `data` section of a training config: which samples a data set gives."""

from dataclasses import dataclass

from dit_suite.options import Options, option


@dataclass(frozen=True)
class DataSection(Options):
    """Where the samples come from."""

    kind: str = option("images", "images, clips, actions, shapes, sprites, square, or module:function")
    path: str = option("", "folder that scripts/prepare_data.py wrote (procedural kinds need none)")
    split: str = option("train", "rows to use: train, heldout, pairs or all (procedural sets: train or heldout)")
    size: int = option(0, "resize to this side; 0 keeps the stored size", minimum=0, maximum=4096)
    frames: int = option(16, "frames of a clip", minimum=1, maximum=4096)
    stride: int = option(1, "take every stride-th frame of a clip", minimum=1, maximum=64)
    count: int = option(4096, "rows of a procedural set", minimum=1)
    styles: tuple[str, ...] = option((), "only these styles (default: all)")
    groups: tuple[str, ...] = option((), "only these groups (default: all)")
    captions: tuple[float, ...] = option((0.4, 0.6, 0.0), "odds of label, label + style, label + tags", minimum=0.0)
    translate: int = option(0, "random shift in pixels on white", minimum=0, maximum=64)
    flip: bool = option(False, "random horizontal flip (wrong for art with text or direction)")

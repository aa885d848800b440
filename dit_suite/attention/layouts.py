"""Where a model's self-attention keeps its video and its text: one row per class of diffusers or of this suite.

A row names the self-attention modules (a pattern on their module paths), where text stands in the sequence, and how to
read the token grid from the arguments of the model's forward. Anything not listed here stays dense.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dit_suite.attention.partition import Grid


@dataclass(frozen=True)
class TokenLayout:
    """The sequence of one forward pass: a grid of video tokens, and text before, after or nowhere.

    Attributes:
        grid: (frames, rows, columns) of tokens.
        text: "none", "first" or "last".
    """

    grid: Grid
    text: str = "none"

    @property
    def video_tokens(self) -> int:
        return math.prod(self.grid)

    def spans(self, length: int) -> tuple[slice, slice] | None:
        """(video, text) slices of a sequence of `length` tokens; None if the layout does not fit it."""
        text = length - self.video_tokens
        if text < 0 or (text > 0 and self.text == "none"):
            return None
        if self.text == "first":
            return slice(text, length), slice(0, text)
        return slice(0, self.video_tokens), slice(self.video_tokens, length)


@dataclass(frozen=True)
class LayoutRule:
    """How one model class lays out its tokens.

    Attributes:
        layers: pattern that the path of every self-attention module matches in full.
        text: where text stands in their sequences.
        grid: reads the token grid from (model, forward arguments by name); None if it can't be told.
    """

    layers: str
    text: str
    grid: Callable[[Any, Mapping[str, Any]], Grid | None]

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.layers, path) is not None


def _patch(config: Any, default_depth: int = 1) -> tuple[int, int, int]:
    """(frames, rows, columns) of a patch, from any of diffusers' three spellings."""
    sides = config.get("patch_size")
    if isinstance(sides, (tuple, list)):
        return tuple(sides)
    return config.get("patch_size_t") or default_depth, sides, sides


def _grid_of_video(frame_dim: int) -> Callable[[Any, Mapping[str, Any]], Grid | None]:
    """Grid of a model that gets a 5-D tensor with its frames in dimension `frame_dim`, rows and columns last."""

    def read(model: Any, given: Mapping[str, Any]) -> Grid | None:
        latents = given.get("hidden_states")
        if not isinstance(latents, torch.Tensor) or latents.ndim != 5:
            return None
        depth, height, width = _patch(model.config)
        return latents.shape[frame_dim] // depth, latents.shape[3] // height, latents.shape[4] // width

    return read


def _grid_of_sizes(model: Any, given: Mapping[str, Any]) -> Grid | None:
    """Grid of a model that gets packed tokens and their sizes as arguments (LTX)."""
    sizes = tuple(given.get(name) for name in ("num_frames", "height", "width"))
    return None if None in sizes else sizes


def _grid_of_ids(model: Any, given: Mapping[str, Any]) -> Grid | None:
    """Grid of a model that gets a row and a column number for every picture token (Flux)."""
    ids = given.get("img_ids")
    if not isinstance(ids, torch.Tensor):
        return None
    rows, columns = (ids.reshape(-1, ids.shape[-1])[:, 1:3].amax(0).long() + 1).tolist()
    return 1, rows, columns


def _grid_of_picture(model: Any, given: Mapping[str, Any]) -> Grid | None:
    """Grid of a model that gets a 4-D tensor: one frame."""
    latents = given.get("hidden_states")
    if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
        return None
    _, height, width = _patch(model.config)
    return 1, latents.shape[2] // height, latents.shape[3] // width


def _grid_of_proxies(model: Any, given: Mapping[str, Any]) -> Grid | None:
    """Grid of PT-DiT's proxy tokens, one for each window; None where windows have several proxies."""
    latents = given.get("hidden_states")
    if not isinstance(latents, torch.Tensor) or latents.ndim not in (4, 5):
        return None
    _, height, width = _patch(model.config)
    frames = latents.shape[2] if latents.ndim == 5 else 1
    grid = (frames, latents.shape[-2] // height, latents.shape[-1] // width)
    window, proxy_window, _ = model.resolve_windows(grid, given.get("compress_ratios"))
    if window != proxy_window:
        return None
    return tuple(size // ratio for size, ratio in zip(grid, window, strict=True))


_WAN = LayoutRule(r"blocks\.\d+\.attn1", "none", _grid_of_video(2))
_SIDE = r"((first|second)\.)?"  # of a depth-to-width pair (`grafting.surgery.ParallelPair`)
_DIT = LayoutRule(rf"transformer_blocks\.\d+\.{_SIDE}attn", "none", _grid_of_picture)

LAYOUTS: Mapping[str, LayoutRule] = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": LayoutRule(r"(vace_)?blocks\.\d+\.attn1", "none", _grid_of_video(2)),
    "SkyReelsV2Transformer3DModel": _WAN,
    "HunyuanVideoTransformer3DModel": LayoutRule(r"(single_)?transformer_blocks\.\d+\.attn", "last", _grid_of_video(2)),
    "LTXVideoTransformer3DModel": LayoutRule(r"transformer_blocks\.\d+\.attn1", "none", _grid_of_sizes),
    "CogVideoXTransformer3DModel": LayoutRule(r"transformer_blocks\.\d+\.attn1", "first", _grid_of_video(1)),
    "MochiTransformer3DModel": LayoutRule(r"transformer_blocks\.\d+\.attn1", "last", _grid_of_video(2)),
    "FluxTransformer2DModel": LayoutRule(r"(single_)?transformer_blocks\.\d+\.attn", "first", _grid_of_ids),
    "PixArtTransformer2DModel": LayoutRule(rf"transformer_blocks\.\d+\.{_SIDE}attn1", "none", _grid_of_picture),
    "DiTModel": _DIT,
    "SwitchDiTTransformer2DModel": _DIT,
    "PTDiTTransformer3DModel": LayoutRule(r"transformer_blocks\.\d+\.proxy_attn1", "none", _grid_of_proxies),
}


def rule_for(model: torch.nn.Module) -> LayoutRule | None:
    """The row of the model's class, or of the nearest base class that has one."""
    return next((LAYOUTS[base.__name__] for base in type(model).__mro__ if base.__name__ in LAYOUTS), None)


def forward_arguments(model: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `type(model).forward` by name."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def read_layout(model: torch.nn.Module, rule: LayoutRule, args: tuple, kwargs: Mapping[str, Any]) -> TokenLayout | None:
    """The layout of one forward pass, or None where the arguments do not tell."""
    grid = rule.grid(model, forward_arguments(model, args, kwargs))
    return None if grid is None or min(grid) < 1 else TokenLayout(grid, rule.text)

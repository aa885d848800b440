"""A comparison as one picture: a row per prompt, a column per method, and its difference to the first beside it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_suite.metadata import write_png

GAIN = 4
_GAP, _LINE, _FONT = 4, 17, 13


def comparison_picture(
    titles: Sequence[Sequence[str]], pictures: Sequence[Sequence[np.ndarray]], path: Path, scale: int = 2
) -> None:
    """Writes a PNG.

    Args:
        titles: lines of text above each method's column.
        pictures: per method, one uint8 (H, W, 3) picture per prompt; the first method is the reference.
        path: of the PNG.
        scale: enlargement, without smoothing.
    """
    height, width = (side * scale for side in pictures[0][0].shape[:2])
    head = _LINE * max(len(lines) for lines in titles) + _GAP
    rows, methods = len(pictures[0]), len(pictures)
    lefts = [0] + [width + 3 * _GAP + number * (2 * width + 4 * _GAP) for number in range(methods - 1)]
    canvas = Image.new("RGB", (lefts[-1] + (2 * width + _GAP if methods > 1 else width), head + rows * (height + _GAP)))
    canvas.paste("white", (0, 0, *canvas.size))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT)
    for left, lines, column in zip(lefts, titles, pictures, strict=True):
        for number, line in enumerate(lines):
            draw.text((left, number * _LINE), line, fill="black", font=font)
        for row, picture in enumerate(column):
            top, reference = head + row * (height + _GAP), pictures[0][row]
            tiles = [picture]
            if column is not pictures[0]:
                difference = np.abs(picture.astype(np.int16) - reference.astype(np.int16)) * GAIN
                tiles.append(difference.clip(0, 255).astype(np.uint8))
            for number, tile in enumerate(tiles):
                enlarged = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
                canvas.paste(enlarged, (left + number * (width + _GAP), top))
    write_png(canvas, path, None)

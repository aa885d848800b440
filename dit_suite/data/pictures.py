"""How pictures of any kind become opaque RGB: the same for training data and for samples that are evaluated."""

from PIL import Image


def on_white(picture: Image.Image) -> Image.Image:
    """The picture in RGB, transparency put on white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")

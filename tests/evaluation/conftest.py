"""Small pictures whose distribution is known: coloured squares on white."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def squares(count: int, seed: int, noise: float = 0.0, size: int = 24) -> np.ndarray:
    """uint8 `(count, size, size, 3)`; the same seed gives the same squares whatever the noise."""
    draws, noises = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    pictures = np.full((count, size, size, 3), 255.0)
    for picture in pictures:
        colour, corner, side = draws.integers(0, 255, 3), draws.integers(2, 12, 2), draws.integers(4, 12)
        picture[corner[1] : corner[1] + side, corner[0] : corner[0] + side] = colour
    pictures += noise * noises.standard_normal(pictures.shape)
    return pictures.clip(0, 255).astype(np.uint8)


def write_folder(folder: Path, pictures: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index:06d}.png")
    return folder


def write_npz(path: Path, pictures: np.ndarray) -> Path:
    np.savez(path, arr_0=pictures)
    return path


@pytest.fixture
def make_squares():
    return squares


@pytest.fixture
def make_folder():
    return write_folder


@pytest.fixture
def make_npz():
    return write_npz

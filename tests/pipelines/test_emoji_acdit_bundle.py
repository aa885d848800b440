"""The bundled ACDiT: what its card says it has learned, and that blocks are continued."""

import numpy as np
import pytest
import torch

import dit_suite
from dit_suite.checkpoints import find_checkpoint
from dit_suite.schedulers.generators import sample_generators


@pytest.fixture(scope="module")
def pipe():
    pipe = dit_suite.load_pipeline("emoji-acdit-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_at_most_eight_megabytes():
    folder = find_checkpoint("emoji-acdit-64").folder
    assert 3e6 < sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8e6


def saturation(pictures: np.ndarray) -> np.ndarray:
    return (pictures.max(-1) - pictures.min(-1)).mean((1, 2))


def test_white_ground_and_the_palette_of_a_class(pipe):
    labels = ["fluent-hc/smileys-emotion"] * 2 + ["noto/smileys-emotion"] * 2
    options = {"num_inference_steps": 6, "generator": sample_generators(0, range(4)), "output_type": "np"}
    pictures = pipe(labels, **options).images
    assert pictures.shape == (4, 64, 64, 3)
    corners = pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 0.9
    assert pictures[:, 20:44, 20:44].mean() < 0.8
    grey, yellow = saturation(pictures[:2]), saturation(pictures[2:])
    assert grey.max() < 0.15
    assert yellow.min() > grey.max() + 0.05


def test_a_given_top_half_is_kept_and_continued(pipe):
    """The rest of a picture follows from its upper half, and from another half another rest follows."""
    options = {"num_inference_steps": 6, "output_type": "latent"}
    free = pipe([4], generator=sample_generators(3, [0]), **options).images
    again = pipe([4], generator=sample_generators(3, [0]), prefix=free, num_prefix_blocks=2, **options).images
    assert torch.equal(again[..., :32, :], free[..., :32, :])
    torch.testing.assert_close(again[..., 32:, :], free[..., 32:, :], atol=1e-3, rtol=0)
    other = pipe([4], generator=sample_generators(3, [0]), prefix=-free, num_prefix_blocks=2, **options).images
    assert (other[..., 32:, :] - free[..., 32:, :]).abs().mean() > 0.05

"""Bits per dimension: the known value of an identity flow, independence of batches, messages."""

import math

import numpy as np
import pytest
import torch

from dit_suite.evaluation.bpd import bits_per_dim
from tests.models.test_tarflow import tiny_model


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 6, 6, 2), dtype=np.uint8))


def test_identity_flow():
    model = tiny_model()
    for block in model.blocks:
        torch.nn.init.zeros_(block.proj_out.weight)
        torch.nn.init.zeros_(block.proj_out.bias)
    black = [np.zeros((6, 6, 2), dtype=np.uint8)] * 3
    found = bits_per_dim(model, black)
    wanted = (0.5 * (1 - 1 / 256) ** 2 + 0.5 * math.log(2 * math.pi) + math.log(128)) / math.log(2)
    assert abs(found.mean - wanted) < 1e-3 and found.count == 3


def test_batches_do_not_matter_but_labels_and_seeds_do():
    model = tiny_model()
    one = bits_per_dim(model, pictures(5), [0, 1, 2, 0, 1], batch_size=2)
    two = bits_per_dim(model, pictures(5), [0, 1, 2, 0, 1], batch_size=5)
    assert abs(one.mean - two.mean) < 1e-5
    assert abs(bits_per_dim(model, pictures(5)).mean - one.mean) > 1e-4
    assert bits_per_dim(model, pictures(5), [0, 1, 2, 0, 1], seed=9).mean != one.mean
    assert set(one.to_dict()) == {"bpd", "bpd_standard_error", "bpd_samples"}


def test_bad_input():
    model = tiny_model()
    with pytest.raises(ValueError, match="at least one picture"):
        bits_per_dim(model, [])
    with pytest.raises(ValueError, match="uint8 pictures of shape"):
        bits_per_dim(model, [np.zeros((6, 6, 3), dtype=np.uint8)])
    with pytest.raises(ValueError, match="1 class labels"):
        bits_per_dim(model, pictures(2), [0])
    with pytest.raises(ValueError, match="float32"):
        bits_per_dim(tiny_model().bfloat16(), pictures(1))

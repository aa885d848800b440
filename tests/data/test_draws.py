"""The counter-based random numbers: known answers, independence of the batch, distribution."""

import pytest
import torch

from dit_suite.data.draws import Draws, Stream, philox, shuffled_indices


def _words(values, key):
    return [int(v) for v in philox([torch.tensor([v]) for v in values], key)]


def test_philox_known_answers():
    ones = 0xFFFFFFFF
    assert _words([0] * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _words([ones] * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert _words(pi, (0xA4093822, 0x299F31D0)) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_a_sample_does_not_depend_on_its_batch():
    whole = Draws(7, 3, torch.arange(10)).normal(Stream.NOISE, (3, 5))
    parts = [Draws(7, 3, torch.arange(a, a + 5)).normal(Stream.NOISE, (3, 5)) for a in (0, 5)]
    assert torch.equal(whole, torch.cat(parts))


def test_streams_steps_and_seeds_differ():
    def draw(seed, step, stream):
        return Draws(seed, step, torch.arange(4)).normal(stream, (8,))

    base = draw(1, 1, Stream.NOISE)
    for other in (draw(2, 1, Stream.NOISE), draw(1, 2, Stream.NOISE), draw(1, 1, Stream.EXTRA_NOISE)):
        assert not torch.equal(base, other)
    assert not torch.equal(draw(1, 1, Stream.NOISE), draw(1 + 2**32, 1, Stream.NOISE))


def test_moments():
    draws = Draws(0, 0, torch.arange(256))
    normal, uniform = draws.normal(Stream.NOISE, (1024,)), draws.uniform(Stream.TIMESTEP, (1024,))
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    assert abs((normal**4).mean() - 3) < 0.06
    assert abs(uniform.mean() - 0.5) < 0.003 and uniform.min() > 0 and uniform.max() < 1
    integers = draws.integers(Stream.TIMESTEP, 7, (1024,))
    share = torch.bincount(integers.flatten(), minlength=7) / integers.numel()
    assert integers.max() == 6 and (share - 1 / 7).abs().max() < 0.005


@pytest.mark.parametrize("high", [1, 7, 1000, 2**24])
def test_integers_are_the_floor_of_the_uniform(high):
    draws = Draws(3, 1, torch.arange(64))
    uniform = draws.uniform(Stream.WINDOW, (100,)).double()
    assert torch.equal(draws.integers(Stream.WINDOW, high, (100,)), (uniform * high).floor().long())
    rows = torch.arange(64) + high
    assert torch.equal(draws.integers(Stream.WINDOW, rows), (uniform[:, 0] * rows).floor().long())


def test_every_epoch_is_a_permutation_and_slices_agree():
    rows = shuffled_indices(5, 0, 30, 10)
    for epoch in range(3):
        assert sorted(rows[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert not torch.equal(rows[:10], rows[10:20])
    assert torch.equal(rows[7:19], shuffled_indices(5, 7, 12, 10))

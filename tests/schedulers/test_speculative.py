"""Speculative sampling and cached rollouts of a small random network."""

import pytest
import torch

from dit_suite.models.nfd import NFDTransformer3DModel
from dit_suite.schedulers.frame_sampler import FrameNoise, FrameSampler, FrameSamplerOptions
from dit_suite.schedulers.speculative import (
    PersistenceMeter,
    SpeculativeOptions,
    SpeculativeSampler,
    accepted_frames,
    best_draft_length,
)
from dit_suite.schedulers.trigflow import FrameFlowScheduler, TrigFlowScheduler

NUM_ACTIONS = 3
WINDOW = 4


def action(index: int) -> tuple[float, ...]:
    return tuple(float(i == index) for i in range(NUM_ACTIONS))


@pytest.fixture(scope="module")
def network() -> NFDTransformer3DModel:
    torch.manual_seed(0)
    model = NFDTransformer3DModel(
        3, 8, 8, 4, num_layers=2, num_attention_heads=2, attention_head_dim=16, num_actions=NUM_ACTIONS, window=WINDOW
    ).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def engine(model: NFDTransformer3DModel, ahead: int = 1, seed: int = 7, **options) -> FrameSampler:
    settings = FrameSamplerOptions(**{"num_inference_steps": 4, **options})
    sampler = FrameSampler(model, TrigFlowScheduler(), settings, [seed], ahead)
    first = torch.randn(1, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    sampler.extend(first, torch.zeros(1, 1, NUM_ACTIONS))
    return sampler


def plain(model: NFDTransformer3DModel, actions: list[int], **options) -> tuple[torch.Tensor, FrameSampler]:
    """Sequential sampling without the state machine."""
    sampler, frames = engine(model, **options), []
    for index in actions:
        vector = torch.tensor([action(index)])
        frame = sampler.draft(vector[:, None])[:, :, 0]
        sampler.append(frame, vector)
        frames.append(frame)
    return torch.stack(frames, dim=2), sampler


def speculate(model: NFDTransformer3DModel, actions: list[int], idle: int = 0, **options):
    settings = SpeculativeOptions(**options)
    machine = SpeculativeSampler(engine(model, settings.num_ahead), settings)
    frames = []
    for index in actions:
        frames.append(machine.tick(action(index)))
        for _ in range(idle):
            machine.idle()
    return torch.stack(frames, dim=2), machine


STREAM = [0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 1, 1, 1, 1]


def test_a_draft_of_one_is_plain_sampling_bit_for_bit(network):
    """N9."""
    expected, _ = plain(network, STREAM)
    for options in ({"speculation": "off"}, {"speculation": "joint", "draft_length": 1}):
        frames, machine = speculate(network, STREAM, **options)
        assert torch.equal(frames, expected)
        assert machine.stats.hits == 0
        assert machine.stats.drafts == len(STREAM)


@pytest.mark.parametrize("length", [2, 3, 5])
def test_running_ahead_is_plain_sampling_for_every_stream(network, length: int):
    """N11: whatever was drafted and thrown away."""
    expected, _ = plain(network, STREAM)
    frames, machine = speculate(network, STREAM, idle=length, speculation="run_ahead", draft_length=length)
    assert torch.equal(frames, expected)
    assert machine.stats.hits > 0
    assert machine.stats.discarded > 0


@pytest.mark.parametrize("length", [2, 3, 4])
def test_constant_action_hit_rate_drafts_and_passes(network, length: int):
    """N9, N12: hit rate (N-1)/N, ceil(frames/N) drafts, S passes of N frames each."""
    frames = 12
    _, machine = speculate(network, [1] * frames, speculation="joint", draft_length=length)
    stats, counts = machine.stats, machine.engine.counts
    assert stats.drafts == -(-frames // length)
    assert stats.hit_rate == pytest.approx((length - 1) / length)
    assert stats.discarded == 0
    assert counts.denoise_passes == 4 * stats.drafts
    assert counts.denoise_frames == 4 * stats.drafts * length
    assert counts.write_passes == 0


def test_plain_pass_counts_with_and_without_fused_writes(network):
    """N12: S passes a frame; a separate write pass per frame is counted apart."""
    fused, sampler = plain(network, STREAM)
    assert sampler.counts.denoise_passes == 4 * len(STREAM)
    assert sampler.counts.write_passes == 0
    assert sampler.counts.written_frames == len(STREAM)
    apart, sampler = plain(network, STREAM, fuse_write=False)
    assert sampler.counts.denoise_passes == 4 * len(STREAM)
    assert sampler.counts.write_passes == len(STREAM)
    torch.testing.assert_close(apart, fused, atol=1e-4, rtol=0)


def test_an_action_that_changes_every_frame_never_hits_and_gives_plain_frames(network):
    """N9: the first frame of a draft does not see the later ones, so it is the plain frame (other kernel shapes)."""
    stream = [0, 1, 2, 0, 1, 2, 0, 1]
    expected, _ = plain(network, stream)
    frames, machine = speculate(network, stream, speculation="joint", draft_length=3)
    assert machine.stats.hits == 0
    assert machine.stats.discarded == 2 * (len(stream) - 1)
    torch.testing.assert_close(frames, expected, atol=1e-4, rtol=0)


def test_rollback_leaves_the_cache_of_a_run_that_never_drafted(network):
    """N10: a draft leaves committed slots byte for byte, and after a miss both runs hold the same keys and values."""
    settings = SpeculativeOptions(speculation="joint", draft_length=3)
    machine = SpeculativeSampler(engine(network, 3), settings)
    for index in (0, 1, 2, 0):
        machine.tick(action(index))
    cache = machine.engine.cache
    before = [tuple(t.clone() for t in pair) for pair in cache.read(0, cache.length - 3, cache.length)]
    kept = cache.length
    machine.tick(action(1))
    after = cache.read(0, kept - 3, kept)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[0], new[0])
        assert torch.equal(old[1], new[1])
    _, sequential = plain(network, [0, 1, 2, 0, 1])
    assert sequential.cache.length == cache.length

    def readable(layer: int, c) -> torch.Tensor:
        return torch.cat([torch.cat(pair, dim=-1) for pair in c.read(layer, c.length - 3, c.length)], dim=2)

    for layer in range(2):
        torch.testing.assert_close(readable(layer, cache), readable(layer, sequential.cache), atol=1e-4, rtol=0)


def test_rolled_back_frames_cannot_be_read(network):
    sampler = engine(network, 2)
    vector = torch.tensor([action(0)])
    for _ in range(2):
        sampler.append(sampler.draft(vector[:, None])[:, :, 0], vector)
    sampler.rollback(2)
    assert sampler.cache.length == 1
    with pytest.raises(IndexError):
        sampler.cache.read(0, 0, 2)
    with pytest.raises(ValueError, match="cannot be rolled back to 9"):
        sampler.rollback(9)
    with pytest.raises(ValueError, match="between 1 and 2 frames"):
        sampler.draft(vector[:, None].expand(-1, 3, -1))


@pytest.mark.parametrize("scheduler", [TrigFlowScheduler, FrameFlowScheduler])
def test_noise_is_a_function_of_seed_and_frame(network, scheduler):
    first, second = FrameNoise([5, 6], (3, 8, 8)), FrameNoise([6], (3, 8, 8))
    assert torch.equal(first.initial(10, 3)[:, :, 2], first.initial(12, 1)[:, :, 0])
    assert torch.equal(first.renoise(4, 2, 1)[1:], second.renoise(4, 2, 1))
    purposes = torch.stack([first.initial(0, 1), first.context(0, 1), first.renoise(0, 1, 0), first.renoise(0, 1, 1)])
    assert purposes.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.35


def test_contexts_agree_until_the_window_is_full_and_stay_finite(network):
    """N16: rolling and recompute are equal up to frame W; memory does not grow; both are finite after 10 W frames."""
    stream = [i % 3 for i in range(10 * WINDOW)]
    rolling, sampler = plain(network, stream, num_inference_steps=2)
    size = sampler.cache.nbytes
    recompute, other = plain(network, stream, num_inference_steps=2, context_mode="recompute")
    none, _ = plain(network, stream[:6], num_inference_steps=2, context_mode="none")
    torch.testing.assert_close(rolling[:, :, : WINDOW - 1], recompute[:, :, : WINDOW - 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(none, recompute[:, :, :6], atol=1e-4, rtol=0)
    assert not torch.allclose(rolling[:, :, WINDOW:], recompute[:, :, WINDOW:], atol=1e-4)
    assert rolling.isfinite().all()
    assert recompute.isfinite().all()
    assert sampler.cache.nbytes == other.cache.nbytes == size
    assert len(sampler._frames) <= WINDOW + 2


def test_adaptive_length_follows_the_player(network):
    assert accepted_frames(0.9, 3) == pytest.approx(2.71)
    assert best_draft_length(0.2, 6, 0.5) == 1
    assert best_draft_length(0.99, 6, 0.5) == 6
    meter = PersistenceMeter()
    for _ in range(100):
        meter.update(action(0))
    assert meter.value > 0.95
    for i in range(100):
        meter.update(action(i % 3))
    assert meter.value < 0.1
    _, machine = speculate(network, [0] * 30, speculation="joint", draft_length=4, adaptive_draft=True)
    assert machine.draft_length() == 4
    assert machine.stats.hits > 10


def test_batched_clips_equal_single_ones(network):
    """Each clip has its own noise, whatever it is sampled with."""
    settings = FrameSamplerOptions(num_inference_steps=2)
    vectors = torch.tensor([[action(0)], [action(2)]])
    together = FrameSampler(network, TrigFlowScheduler(), settings, [3, 4]).draft(vectors)
    alone = FrameSampler(network, TrigFlowScheduler(), settings, [4]).draft(vectors[1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="draft_length must be between 1 and 16"):
        SpeculativeOptions(draft_length=0)
    with pytest.raises(ValueError, match="speculation must be one of"):
        SpeculativeOptions(speculation="always")
    with pytest.raises(ValueError, match="context_mode must be one of"):
        FrameSamplerOptions(context_mode="all")

"""Speculative sampling and cached rollouts of a small random network."""

import random
from contextlib import contextmanager

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
TOLERANCE = 1e-5  # of frames and keys that were computed in other shapes


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


def engine(
    model: NFDTransformer3DModel, ahead: int = 1, seed: int = 7, scheduler=TrigFlowScheduler, **options
) -> FrameSampler:
    settings = FrameSamplerOptions(**{"num_inference_steps": 4, **options})
    sampler = FrameSampler(model, scheduler(), settings, [seed], ahead)
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


def speculate(model: NFDTransformer3DModel, actions: list[int], idle: int = 0, sampling: dict | None = None, **options):
    settings = SpeculativeOptions(**options)
    machine = SpeculativeSampler(engine(model, settings.num_ahead, **(sampling or {})), settings)
    frames = []
    for index in actions:
        frames.append(machine.tick(action(index)))
        for _ in range(idle):
            machine.idle()
    return torch.stack(frames, dim=2), machine


@contextmanager
def network_calls(model: NFDTransformer3DModel):
    """Every call of the network while it is open: (frames given, frames of them written)."""
    calls: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args[0].shape[2], kwargs["num_written"])), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def random_stream(seed: int, length: int = 14) -> list[int]:
    """A player who keeps the action two times in three."""
    draw, stream = random.Random(seed), [0]
    while len(stream) < length:
        stream.append(stream[-1] if draw.random() < 2 / 3 else draw.randrange(NUM_ACTIONS))
    return stream


STREAM = [0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 1, 1, 1, 1]


def test_a_draft_of_one_is_plain_sampling_bit_for_bit(network):
    """N9."""
    expected, _ = plain(network, STREAM)
    for options in ({"speculation": "off"}, {"speculation": "joint", "draft_length": 1}):
        frames, machine = speculate(network, STREAM, **options)
        assert torch.equal(frames, expected)
        assert machine.stats.hits == 0
        assert machine.stats.drafts == len(STREAM)


@pytest.mark.parametrize("fuse_write", [True, False])
@pytest.mark.parametrize(("seed", "length"), [(0, 2), (1, 3), (2, 5)])
def test_running_ahead_is_plain_sampling_for_every_stream(network, seed: int, length: int, fuse_write: bool):
    """N11: whatever was drafted and thrown away, in no idle time, in one frame's, and in enough."""
    stream, sampling = random_stream(seed), {"num_inference_steps": 2, "fuse_write": fuse_write}
    expected, _ = plain(network, stream, **sampling)
    for idle in (0, 1, length):
        frames, machine = speculate(network, stream, idle, sampling, speculation="run_ahead", draft_length=length)
        assert torch.equal(frames, expected)
        assert (machine.stats.hits > 0) == (idle > 0)
        assert (machine.stats.discarded > 0) == (idle > 0)


@pytest.mark.parametrize("fuse_write", [True, False])
def test_staggered_drafts_of_one_pass_are_plain_sampling(network, fuse_write: bool):
    """Every frame is then denoised beside finished ones only; of more passes, the first frame of a draft still is."""
    sampling = {"num_inference_steps": 1, "fuse_write": fuse_write}
    expected, _ = plain(network, STREAM, **sampling)
    frames, machine = speculate(network, STREAM, sampling=sampling, speculation="staggered", draft_length=3)
    assert torch.allclose(frames, expected, atol=1e-5) and machine.stats.hits > 0

    expected, _ = plain(network, STREAM)
    frames, machine = speculate(network, STREAM, speculation="staggered", draft_length=1)
    assert torch.allclose(frames, expected, atol=1e-5) and machine.stats.hits == 0
    joint, _ = speculate(network, STREAM, speculation="joint", draft_length=3)
    frames, machine = speculate(network, STREAM, speculation="staggered", draft_length=3)
    assert machine.stats.hits == 7 and torch.allclose(frames[:, :, 0], expected[:, :, 0], atol=1e-5)
    errors = [(each[:, :, 1:3] - expected[:, :, 1:3]).square().mean() for each in (frames, joint)]
    assert 0 < errors[0] < errors[1]


def test_staggered_drafts_take_their_passes(network):
    """S + N - 1 passes; in pass p the frames up to p take part, at the levels of their own steps, then as context."""
    frames, levels = 6, []
    hook = network.register_forward_pre_hook(lambda module, args: levels.append(args[1][0].tolist()))
    try:
        with network_calls(network) as calls:
            _, machine = speculate(
                network, [1] * frames, sampling={"num_inference_steps": 2}, speculation="staggered", draft_length=3
            )
    finally:
        hook.remove()
    assert machine.stats.drafts == 2 and machine.stats.hits == 4
    assert calls == [(2, 1), (2, 0), (3, 0), (3, 0), (4, 3), (2, 0), (3, 0), (3, 0)]
    noise = machine.engine.options.context_noise
    high, low = (machine.engine.scheduler.noise_level(t) for t in machine.engine.timesteps)
    expected = [[noise, high], [low, high], [noise, low, high], [noise, noise, low]]
    assert all(one == pytest.approx(two) for one, two in zip(levels, expected, strict=False))


@pytest.mark.parametrize("frames", [12, 13])
@pytest.mark.parametrize("length", [2, 3, 4])
def test_constant_action_hit_rate_drafts_and_passes(network, length: int, frames: int):
    """N9, N12: ceil(frames/N) drafts of S passes of N frames each, all else hits: (N-1)/N where N divides the game."""
    with network_calls(network) as calls:
        _, machine = speculate(network, [1] * frames, speculation="joint", draft_length=length)
    stats, counts, drafts = machine.stats, machine.engine.counts, -(-frames // length)
    assert stats.drafts == drafts
    assert stats.hits == frames - drafts
    if frames == 12:
        assert stats.hit_rate == pytest.approx((length - 1) / length)
    assert stats.discarded == 0
    first, later = (length + 1, 1), (2 * length, length)  # the start frame, then a whole draft, is written on the way
    passes = [first, *[(length, 0)] * 3]
    assert calls == passes + [later, *[(length, 0)] * 3] * (drafts - 1)
    assert counts.denoise_passes == len(calls) == 4 * drafts
    assert counts.denoise_frames == sum(given - written for given, written in calls)
    assert counts.written_frames == sum(written for _, written in calls)
    assert counts.write_passes == 0


def test_plain_pass_counts_with_and_without_fused_writes(network):
    """N12: S passes a frame; a separate write pass per frame is counted apart."""
    with network_calls(network) as calls:
        fused, sampler = plain(network, STREAM)
    assert calls == [(2, 1), (1, 0), (1, 0), (1, 0)] * len(STREAM)
    assert sampler.counts.denoise_passes == 4 * len(STREAM)
    assert sampler.counts.write_passes == 0
    assert sampler.counts.written_frames == len(STREAM)
    with network_calls(network) as calls:
        apart, sampler = plain(network, STREAM, fuse_write=False)
    assert calls == [(1, 1), (1, 0), (1, 0), (1, 0), (1, 0)] * len(STREAM)
    assert sampler.counts.denoise_passes == 4 * len(STREAM)
    assert sampler.counts.write_passes == len(STREAM)
    torch.testing.assert_close(apart, fused, atol=1e-4, rtol=0)


def test_drafts_with_write_passes_of_their_own(network):
    """One write pass per draft, for all frames that the draft before brought; the game is that of fused writes."""
    fused, _ = speculate(network, STREAM, speculation="joint", draft_length=3)
    with network_calls(network) as calls:
        apart, machine = speculate(network, STREAM, sampling={"fuse_write": False}, speculation="joint", draft_length=3)
    counts, drafts = machine.engine.counts, machine.stats.drafts
    writes = [written for given, written in calls if written]
    assert all(given == written for given, written in calls if written)
    assert counts.write_passes == len(writes) == drafts
    assert counts.written_frames == sum(writes) == machine.engine.cache.length
    assert counts.denoise_passes == len(calls) - len(writes) == 4 * drafts
    torch.testing.assert_close(apart, fused, atol=1e-4, rtol=0)
    plainly, _ = plain(network, STREAM, fuse_write=False)
    alone, _ = speculate(network, STREAM, sampling={"fuse_write": False}, speculation="joint", draft_length=1)
    assert torch.equal(alone, plainly)


def test_an_action_that_changes_every_frame_never_hits_and_gives_plain_frames(network):
    """N9: the first frame of a draft does not see the later ones, so it is the plain frame (other kernel shapes)."""
    stream = [0, 1, 2, 0, 1, 2, 0, 1]
    expected, _ = plain(network, stream)
    frames, machine = speculate(network, stream, speculation="joint", draft_length=3)
    assert machine.stats.hits == 0
    assert machine.stats.discarded == 2 * (len(stream) - 1)
    torch.testing.assert_close(frames, expected, atol=TOLERANCE, rtol=0)


def readable(cache, last: int, count: int) -> torch.Tensor:
    """Keys and values of all layers of the `count` frames before `last`."""
    layers = [torch.cat([torch.cat(p, -1) for p in cache.read(n, last - count, last)], 2) for n in range(2)]
    return torch.stack(layers).clone()


@pytest.mark.parametrize(("mode", "idle"), [("joint", 0), ("run_ahead", 2)])
def test_drafts_leave_what_is_committed_and_the_cache_of_a_run_that_never_made_them(network, mode: str, idle: int):
    """N10, over hits, misses and a ring that wraps: committed slots stay byte for byte, through drafts and rollbacks;
    after every miss the window holds the keys and values of a clip that was given the frames shown and drafted none."""
    settings = SpeculativeOptions(speculation=mode, draft_length=3)
    machine, other = SpeculativeSampler(engine(network, 3), settings), engine(network)
    cache, kept, compared = machine.engine.cache, WINDOW - 1, 0
    for number, index in enumerate(STREAM):
        last = min(cache.length, number)  # frames written and shown
        count = min(last, kept)
        before = readable(cache, last, count) if count else None
        drafts = machine.stats.drafts
        frame = machine.tick(action(index))
        for _ in range(idle):
            machine.idle()
        if count:
            assert torch.equal(readable(cache, last, count), before)
        vector = torch.tensor([action(index)])
        other.draft(vector[:, None])  # writes what is unwritten; the frame is not used
        other.append(frame, vector)
        if mode == "joint" and machine.stats.drafts > drafts:
            assert cache.length == other.cache.length == number + 1
            count = min(number + 1, kept)
            found, expected = (readable(c, number + 1, count) for c in (cache, other.cache))
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
            compared += 1
    assert machine.stats.hits > 3
    assert machine.stats.discarded > 3
    assert cache.length > 2 * cache.num_slots
    assert compared == (0 if mode == "run_ahead" else machine.stats.drafts)


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


def test_noise_is_a_function_of_seed_and_frame():
    first, second = FrameNoise([5, 6], (3, 8, 8)), FrameNoise([6], (3, 8, 8))
    assert torch.equal(first.initial(10, 3)[:, :, 2], first.initial(12, 1)[:, :, 0])
    assert torch.equal(first.renoise(4, 2, 1)[1:], second.renoise(4, 2, 1))
    purposes = torch.stack([first.initial(0, 1), first.context(0, 1), first.renoise(0, 1, 0), first.renoise(0, 1, 1)])
    assert purposes.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.35
    many = first.initial(0, 40)
    assert float(many.mean()) == pytest.approx(0, abs=0.05)
    assert float(many.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("scheduler", [TrigFlowScheduler, FrameFlowScheduler])
def test_a_frame_that_is_drafted_again_is_the_same_frame(network, scheduler):
    """Also after other drafts were taken back, and as the first of a longer draft; another seed gives another frame."""
    vectors = torch.tensor([[action(1)] * 3])
    sampler = engine(network, 3, scheduler=scheduler)
    once = sampler.draft(vectors[:, :1])
    sampler.append(sampler.draft(torch.tensor([[action(2)]]))[:, :, 0], torch.tensor([action(2)]))
    sampler.draft(vectors)
    sampler.rollback(1)
    assert torch.equal(sampler.draft(vectors[:, :1]), once)
    torch.testing.assert_close(sampler.draft(vectors)[:, :, :1], once, atol=TOLERANCE, rtol=0)
    other = engine(network, 1, seed=8, scheduler=scheduler).draft(vectors[:, :1])
    assert (other - once).abs().mean() > 0.01


@pytest.mark.parametrize("fuse_write", [True, False])
@pytest.mark.parametrize("level", [0.0, 0.05, 0.3])
def test_context_is_as_noisy_as_the_network_is_told(network, level: float, fuse_write: bool):
    """A finished frame k enters as (1 - s) x + s n_k at the level s; new frames at the level of their step."""
    given: list[tuple[torch.Tensor, torch.Tensor, int, int]] = []

    def look(module, args, kwargs):
        given.append((args[0].clone(), args[1].clone(), kwargs["first_frame"], kwargs["num_written"]))

    hook = network.register_forward_pre_hook(look, with_kwargs=True)
    frames, sampler = plain(network, [0, 1, 2], context_noise=level, fuse_write=fuse_write, num_inference_steps=2)
    hook.remove()
    start = torch.randn(1, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    clip, noise = torch.cat([start, frames], dim=2), FrameNoise([7], (3, 8, 8))
    levels = [float(sampler.scheduler.noise_level(t)) for t in sampler.timesteps]
    written, new = [], []
    for hidden, told, first, count in given:
        for i in range(count):
            clean, drawn = clip[:, :, first + i], noise.context(first + i, 1)[:, :, 0]
            torch.testing.assert_close(hidden[:, :, i], (1 - level) * clean + level * drawn, atol=1e-6, rtol=0)
            assert told[0, i] == pytest.approx(level)
            written.append(first + i)
        new += told[0, count:].tolist()
    assert written == [0, 1, 2]
    assert new == pytest.approx(levels * 3)


def held_bytes(sampler: FrameSampler) -> int:
    """Memory of the cache and of the frames that a sampler keeps."""
    frames = [tensor for pair in sampler._frames.values() for tensor in pair]
    return sampler.cache.nbytes + sum(tensor.untyped_storage().nbytes() for tensor in frames)


@pytest.mark.parametrize("mode", ["rolling", "recompute"])
def test_memory_is_constant_after_the_window_is_full(network, mode: str):
    """N16: as much after 10 W frames as after W (one frame is kept beyond the window, for a rollback)."""
    sampler, sizes = engine(network, num_inference_steps=1, context_mode=mode), []
    for number in range(10 * WINDOW):
        vector = torch.tensor([action(number % 3)])
        sampler.append(sampler.draft(vector[:, None])[:, :, 0], vector)
        sizes.append(held_bytes(sampler))
    assert sizes[0] < sizes[WINDOW]
    assert set(sizes[WINDOW:]) == {sizes[WINDOW]}


def test_contexts_agree_until_the_window_is_full_and_stay_finite(network):
    """N16: rolling and recompute are equal up to frame W; both are finite after 10 W frames."""
    stream = [i % 3 for i in range(10 * WINDOW)]
    rolling, _ = plain(network, stream, num_inference_steps=2)
    recompute, _ = plain(network, stream, num_inference_steps=2, context_mode="recompute")
    none, _ = plain(network, stream[:6], num_inference_steps=2, context_mode="none")
    torch.testing.assert_close(rolling[:, :, : WINDOW - 1], recompute[:, :, : WINDOW - 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(none, recompute[:, :, :6], atol=1e-4, rtol=0)
    assert not torch.allclose(rolling[:, :, WINDOW:], recompute[:, :, WINDOW:], atol=1e-4)
    assert rolling.isfinite().all()
    assert recompute.isfinite().all()


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

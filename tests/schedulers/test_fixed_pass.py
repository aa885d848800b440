"""Passes of one shape: the same frames as with a growing cache, one graph for each kind of pass."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dit_suite.models.nfd import NFDTransformer3DModel
from dit_suite.schedulers.fixed_pass import FixedPass
from dit_suite.schedulers.frame_sampler import FrameSampler, FrameSamplerOptions
from dit_suite.schedulers.speculative import SpeculativeOptions, SpeculativeSampler
from dit_suite.schedulers.trigflow import TrigFlowScheduler

ACTIONS, WINDOW = 3, 3


def network(**changes) -> NFDTransformer3DModel:
    torch.manual_seed(0)
    model = NFDTransformer3DModel(
        3, 8, 8, 4, num_layers=2, num_attention_heads=2, attention_head_dim=16, num_actions=ACTIONS, window=WINDOW,
        **changes,
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if "modulation" in name or "proj_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def play(model: NFDTransformer3DModel, fixed: str, backend=None, length: int = 3, start: int = 2, **options):
    """Ten frames of a game whose action changes now and then; returns them and the sampler."""
    settings = FrameSamplerOptions(num_inference_steps=2, fixed_passes=fixed, **options)
    drafting = SpeculativeOptions(speculation="joint" if length > 1 else "off", draft_length=length)
    sampler = FrameSampler(model, TrigFlowScheduler(), settings, [7], drafting.num_ahead)
    if backend is not None:
        sampler.fixed = FixedPass(model, sampler.cache, backend)
    given = torch.randn(1, 3, start, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    sampler.extend(given.to(model.device), torch.zeros(1, start, ACTIONS))
    machine = SpeculativeSampler(sampler, drafting)
    stream = [0, 0, 1, 1, 1, 1, 2, 0, 0, 0]
    frames = [machine.tick(tuple(float(i == a) for i in range(ACTIONS))) for a in stream]
    return torch.stack(frames, dim=2), sampler


@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"frame_std": 0.5, "change_std": 0.2, "motion": True}])
def test_fixed_passes_give_the_frames_and_the_cache_of_a_growing_one(changes: dict, length: int, start: int):
    """Over more frames than the window and the ring have, with hits, misses and rollbacks."""
    model = network(**changes)
    expected, growing = play(model, "off", length=length, start=start)
    found, sampler = play(model, "eager", length=length, start=start)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert sampler.cache.length == growing.cache.length
    last = sampler.cache.length
    for layer in range(2):
        for one, other in zip(
            sampler.cache.read(layer, last - 2, last), growing.cache.read(layer, last - 2, last), strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_one_graph_for_each_kind_of_pass_and_none_for_a_new_frame():
    """Writing passes and the plain one are compiled once; ten frames, a ring that wraps and rollbacks add nothing."""
    model = network()
    counter = CompileCounterWithBackend("aot_eager")
    expected, _ = play(model, "eager")
    found, _ = play(model, "eager", backend=counter)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert counter.frame_count == 4  # three frames drafted while 1, 2 or 3 are written; their second step writes none
    again, _ = play(model, "eager", backend=counter)
    assert torch.equal(again, found)
    assert counter.frame_count == 4


def test_denoising_leaves_the_slots_of_the_ring_alone():
    """N4 for passes of one shape: only the scratch room behind the ring changes."""
    model = network()
    _, sampler = play(model, "eager", length=1)
    ring = sampler.cache.num_slots * sampler.cache.block_size
    before = sampler.cache.buffer.clone()
    frame = torch.randn(1, 3, 1, 8, 8)
    sampler.fixed(frame, torch.full((1, 1), 0.7), torch.zeros(1, 1, ACTIONS))
    assert torch.equal(sampler.cache.buffer[..., :ring, :], before[..., :ring, :])
    assert not torch.equal(sampler.cache.buffer, before)


def test_fixed_passes_need_a_rolling_cache():
    with pytest.raises(ValueError, match="fixed_passes need context_mode rolling"):
        FrameSamplerOptions(fixed_passes="eager", context_mode="none")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_graphs_give_the_same_frames():
    model = network().cuda()
    expected, _ = play(model, "off")
    found, sampler = play(model, "compiled")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert sampler.fixed._recorded

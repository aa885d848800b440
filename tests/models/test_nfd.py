"""NFD: causality, cached passes, initialisation, training steps."""

from pathlib import Path

import pytest
import torch

from dit_suite.models.frame_residual import velocity_from_residual, warp
from dit_suite.models.nfd import NFDTransformer3DModel

RESIDUAL = {"frame_std": 0.7, "change_std": 0.2, "motion": True}


def tiny(window: int = 4, randomise: bool = True, **changes) -> NFDTransformer3DModel:
    config = {
        "in_channels": 3,
        "sample_height": 8,
        "sample_width": 4,
        "patch_size": 2,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_actions": 3,
        "window": window,
    }
    torch.manual_seed(0)
    model = NFDTransformer3DModel(**{**config, **changes}).eval()
    for name, parameter in model.named_parameters():
        if randomise and ("modulation" in name or "proj_" in name):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def draw(frames: int = 4, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(batch, 3, frames, 8, 4, generator=generator)
    level = torch.rand(batch, frames, generator=generator)
    actions = torch.nn.functional.one_hot(torch.randint(0, 3, (batch, frames), generator=generator), 3).float()
    return sample, level, actions


@torch.no_grad()
@pytest.mark.parametrize("backend", ["index", "dense"])
def test_nothing_reaches_back_in_time(backend: str):
    """N2: frame, level or action of frame j changes no output before j, and changes the outputs from j on."""
    model, inputs = tiny(), draw()
    base = model(*inputs, backend=backend).sample
    for position in range(3):
        other = [tensor.clone() for tensor in inputs]
        if position == 0:
            other[0][:, :, 2] += 1
        elif position == 1:
            other[1][:, 2] = 1 - other[1][:, 2]
        else:
            other[2][:, 2] = other[2][:, 2].roll(1, dims=-1)
        out = model(*other, backend=backend).sample
        assert torch.equal(out[:, :, :2], base[:, :, :2])
        for frame in (2, 3):
            assert not torch.allclose(out[:, :, frame], base[:, :, frame], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, RESIDUAL])
def test_cached_passes_equal_the_masked_forward_and_only_writes_touch_the_cache(changes: dict):
    """N3, N4."""
    model, (sample, level, actions) = tiny(**changes), draw()
    expected = model(sample, level, actions).sample
    cache = model.new_cache(2)
    for frame in range(4):
        now = slice(frame, frame + 1)
        inputs = sample[:, :, now], level[:, now], actions[:, now]
        before = cache.buffer.clone()
        out = model(*inputs, first_frame=frame, kv_cache=cache).sample
        assert torch.equal(cache.buffer, before)
        torch.testing.assert_close(out[:, :, 0], expected[:, :, frame], atol=1e-4, rtol=0)
        model(*inputs, first_frame=frame, kv_cache=cache, num_written=1)
        written = cache.buffer.clone()
        cache.truncate(frame)
        model(*inputs, first_frame=frame, kv_cache=cache, num_written=1)
        assert torch.equal(cache.buffer, written)
        assert cache.length == frame + 1


@torch.no_grad()
def test_one_pass_that_writes_and_denoises_equals_two_passes():
    model, (sample, level, actions) = tiny(), draw()
    cache, other = model.new_cache(2, 2), model.new_cache(2, 2)
    fused = model(sample, level, actions, kv_cache=cache, num_written=3).sample[:, :, 3]
    model(sample[:, :, :3], level[:, :3], actions[:, :3], kv_cache=other, num_written=3)
    apart = model(sample[:, :, 3:], level[:, 3:], actions[:, 3:], first_frame=3, kv_cache=other).sample[:, :, 0]
    torch.testing.assert_close(fused, apart, atol=1e-5, rtol=0)
    torch.testing.assert_close(cache.buffer, other.buffer, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_window_bounds_what_a_frame_sees_and_positions_are_relative():
    """One layer: frame 5 with a window of 3 sees frames 3 and 4 only; with its clip shifted in time nothing changes."""
    model, (sample, level, actions) = tiny(window=3, num_layers=1), draw(6)
    base = model(sample, level, actions).sample
    torch.testing.assert_close(
        model(sample[:, :, 3:], level[:, 3:], actions[:, 3:]).sample[:, :, 2], base[:, :, 5], atol=1e-4, rtol=0
    )
    late = model(sample, level, actions, first_frame=1_000_000).sample
    torch.testing.assert_close(late, base, atol=1e-3, rtol=0)


def test_a_new_model_predicts_zero_and_learns_to_tell_actions_apart():
    """N5."""
    model, (sample, level, actions) = tiny(randomise=False), draw()
    other = actions.roll(1, dims=-1)
    assert not model(sample, level, actions).sample.any()
    assert torch.equal(model(sample, level, actions).sample, model(sample, level, other).sample)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        target = actions.mean(-1, keepdim=True)[:, None, :, None] + actions[..., 0][:, None, :, None, None]
        (model(sample, level, actions).sample - target).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(model(sample, level, actions).sample, model(sample, level, other).sample, atol=1e-4)


def test_gradient_checkpointing_and_save_load(tmp_path: Path):
    inputs, gradients = draw(), []
    for enabled in (False, True):
        model = tiny().train()
        if enabled:
            model.enable_gradient_checkpointing()
        model(*inputs).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=0)
    model.eval().save_pretrained(tmp_path)
    again = NFDTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(model(*inputs).sample, again(*inputs).sample)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, t, a: m(x[:, :1], t, a), "a frame must be"),
        (lambda m, x, t, a: m(x, t, a[:, :2]), "actions must be"),
        (lambda m, x, t, a: m(x, t, a, first_frame=2, kv_cache=m.new_cache(2)), "the cache ends before frame 0"),
        (lambda m, x, t, a: tiny(patch_size=3), "do not fit frames"),
        (lambda m, x, t, a: tiny(window=0), "at least 1"),
        (lambda m, x, t, a: tiny(frame_std=0.5), "both above 0 or neither"),
        (lambda m, x, t, a: tiny(motion=True), "motion warps the frame"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(tiny(), *draw())


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, RESIDUAL])
def test_finished_context_gives_every_frame_what_sampling_gives_it(changes: dict):
    """The pass over [finished | noisy] equals one pass per frame, each after the finished frames before it."""
    model, (sample, level, actions) = tiny(**changes), draw()
    context, held = draw()[0][:, :, :3] * 0.7, torch.tensor([[0.02, 0.07, 0.05], [0.01, 0.0, 0.1]])
    found = model(sample, level, actions, context=context, context_timestep=held).sample
    dense = model(sample, level, actions, context=context, context_timestep=held, backend="dense").sample
    torch.testing.assert_close(dense, found, atol=1e-4, rtol=0)
    for frame in range(4):
        frames = torch.cat([context[:, :, :frame], sample[:, :, frame : frame + 1]], dim=2)
        levels = torch.cat([held[:, :frame], level[:, frame : frame + 1]], dim=1)
        alone = model(frames, levels, actions[:, : frame + 1]).sample[:, :, frame]
        torch.testing.assert_close(found[:, :, frame], alone, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="4 frames of a window of 4 need 3 finished ones, got 2"):
        model(sample, level, actions, context=context[:, :, :2], context_timestep=held[:, :2])


@torch.no_grad()
def test_a_residual_of_zero_is_the_posterior_mean_and_follows_the_motion():
    """By hand for one frame: precisions of both looks and the prior add up; motion by whole pixels shifts the frame."""
    generator = torch.Generator().manual_seed(0)
    before, truth = torch.rand(2, 1, 1, 1, 3, 4, generator=generator)
    level, held = torch.tensor([[0.4]]), torch.tensor([[0.1]])
    noise = torch.randn(1, 1, 1, 3, 4, generator=generator)
    sample, residual = 0.6 * truth + 0.4 * noise, torch.full_like(noise, 0.3)
    found = velocity_from_residual(residual, sample, level, 0.9 * before, held, 0.7, 0.2)
    precision = (0.6 / 0.4) ** 2, 1 / (0.2**2 + (0.1 / 0.9) ** 2), 1 / 0.7**2
    mean = (precision[0] * sample / 0.6 + precision[1] * before) / sum(precision)
    expected = (sample - (mean + 0.3 / sum(precision) ** 0.5)) / 0.4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for extreme in (0.0, 1.0):
        edge = velocity_from_residual(residual, sample, torch.full((1, 1), extreme), before, held, 0.7, 0.2)
        assert edge.isfinite().all()
    motion = torch.zeros(1, 1, 2, 3, 4)
    motion[:, :, 1] = 1.0
    moved = warp(truth, motion)
    torch.testing.assert_close(moved[..., :-1], truth[..., 1:])
    torch.testing.assert_close(moved[..., -1], truth[..., -1])
    motion[:, :, 1], motion[:, :, 0] = 0.0, 0.5
    halfway = (truth[..., :-1, :] + truth[..., 1:, :]) / 2
    torch.testing.assert_close(warp(truth, motion)[..., :-1, :], halfway)

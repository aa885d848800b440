"""The per-frame flow objective of the teacher and the block objective of ACDiT."""

import pytest
import torch

from dit_suite.data.draws import Draws
from dit_suite.models.acdit import ACDiTTransformer3DModel
from dit_suite.training.block_diffusion import BlockDiffusion
from dit_suite.training.next_frame import NextFrameFlow
from dit_suite.training.objectives import TrainingBatch, named_tables


def batch(shape: tuple[int, ...], step: int = 0, **condition) -> TrainingBatch:
    samples = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return TrainingBatch(samples, condition, Draws(0, step, torch.arange(shape[0])))


def test_every_frame_has_its_own_level_and_the_exact_velocity_has_no_loss():
    data, seen = batch((6, 3, 4, 2, 2)), {}

    def exact(sample, timestep):
        level = timestep[:, None, :, None, None]
        seen["level"] = timestep
        return (sample - data.samples) / level

    result = NextFrameFlow().loss(exact, data)
    assert float(result.loss.max()) < 1e-6
    assert seen["level"].shape == (6, 4)
    assert len(seen["level"].unique()) == 24
    assert float(NextFrameFlow().loss(lambda s, timestep: s * 0, data).loss.min()) > 0.5


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.6, 1.2)])
def test_levels_follow_the_logit_normal_law_each_frame_for_itself(mean: float, std: float):
    """Quantiles of sigmoid(N(mean, std)); over 20,000 draws a frame their standard error is about 0.004."""
    level, is_context = NextFrameFlow(mean=mean, std=std).sample_levels(4, Draws(0, 0, torch.arange(20_000)))
    assert not is_context.any()
    shares = torch.tensor([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])
    expected = torch.sigmoid(mean + std * torch.special.ndtri(shares))
    for frame in (*level.unbind(1), level.flatten()):
        torch.testing.assert_close(frame.quantile(shares), expected, atol=0.02, rtol=0)
    assert float(level.T.corrcoef().fill_diagonal_(0).abs().max()) < 0.04


def test_context_frames_are_nearly_clean_and_do_not_count():
    data = batch((64, 1, 8, 2, 2))
    objective = NextFrameFlow(context_share=0.5, context_level=0.05)
    level, is_context = objective.sample_levels(8, data.draws)
    assert float(is_context.float().mean()) == pytest.approx(0.5, abs=0.06)
    assert float(level[is_context].max()) <= 0.1
    noisy = is_context[:, None, :, None, None]
    result = objective.loss(
        lambda s, timestep: torch.where(noisy, 1e3, (s - data.samples) / timestep[:, None, :, None, None]), data
    )
    assert float(result.loss.max()) < 1e-3


def test_clean_context_is_a_nearly_clean_copy_and_every_frame_counts():
    """An exact network has no loss; one that is off by d in the frame has loss d^2 when frames are weighed."""
    data, seen = batch((64, 1, 4, 2, 2)), {}

    def network(sample, timestep, context, context_timestep):
        seen.update(context=context, levels=context_timestep)
        return (sample - data.samples - 0.1) / timestep[:, None, :, None, None]

    result = NextFrameFlow(context="clean", context_level=0.05, weighting="frame").loss(network, data)
    torch.testing.assert_close(result.loss, torch.full((64,), 0.01), atol=1e-5, rtol=0)
    assert seen["context"].shape == (64, 1, 3, 2, 2)
    assert 0 < float(seen["levels"].min()) < 0.02
    assert 0.08 < float(seen["levels"].max()) <= 0.1
    error = seen["context"] - data.samples[:, :, :3]
    assert float(error.std()) == pytest.approx(
        0.08, abs=0.02
    )  # x0 and noise have unit size: s sqrt(2), s uniform to 0.1


def test_blocks_get_their_own_timestep_and_the_clean_half_is_the_sample():
    data, seen = batch((3, 2, 4, 4), class_labels=torch.zeros(3, dtype=torch.long)), {}

    def network(noisy, timestep, clean_hidden_states, class_labels):
        seen.update(timestep=timestep, clean=clean_hidden_states, noisy=noisy)
        return torch.zeros_like(noisy)

    objective = BlockDiffusion(patch_size=1, block_size=4)
    result = objective.loss(network, data)
    assert seen["timestep"].shape == (3, 4)
    assert len(seen["timestep"].unique()) > 6
    assert torch.equal(seen["clean"][0, 1, :, 0], data.samples[0, 0, :2, 2:].flatten())
    assert float(result.loss.mean()) == pytest.approx(1.0, abs=0.3)


def test_a_sample_error_counts_as_that_of_the_velocity():
    """v = sqrt(abar) n - sqrt(1 - abar) x0: an x0 estimate off by d has a velocity off by d / sqrt(1 - abar)."""
    data, seen = batch((64, 1, 2, 2), class_labels=torch.zeros(64, dtype=torch.long)), {}
    objective = BlockDiffusion(patch_size=1, block_size=4, prediction="sample")

    def network(noisy, timestep, clean_hidden_states, class_labels):
        seen.update(time=timestep[:, 0], noisy=noisy, clean=clean_hidden_states)
        return clean_hidden_states + 0.1

    loss = objective.loss(network, data).loss
    abar = named_tables("linear", 1000).alphas_cumprod[seen["time"]].float()
    signal, level = (t[:, None, None, None] for t in (abar.sqrt(), (1 - abar).sqrt()))
    noise = (seen["noisy"] - signal * seen["clean"]) / level
    estimate = seen["clean"] + 0.1
    wanted, got = (signal * ((seen["noisy"] - signal * x) / level) - level * x for x in (seen["clean"], estimate))
    kept = 1 - abar > 0.06
    torch.testing.assert_close(loss[kept], (wanted - got).square().mean((1, 2, 3))[kept], atol=1e-4, rtol=1e-3)
    assert float(loss.max()) <= 0.01 / 0.05 + 1e-4
    assert noise.std() == pytest.approx(1.0, abs=0.2)


def test_acdit_learns_to_continue_a_prefix():
    """A12: two classes of flat pictures; the loss falls below 60 % of its start and labels steer what is sampled."""
    torch.manual_seed(0)
    model = ACDiTTransformer3DModel(
        1, 4, 4, block_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=16, num_classes=2,
        class_dropout_prob=0.0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    objective, losses = BlockDiffusion(patch_size=1, block_size=4), []
    for step in range(80):
        labels = torch.arange(16) % 2
        samples = (labels * 2.0 - 1.0)[:, None, None, None].expand(16, 1, 4, 4).contiguous()
        data = TrainingBatch(samples, {"class_labels": labels}, Draws(0, step, torch.arange(16)))
        loss = objective.loss(lambda x, **kwargs: model(x, **kwargs, return_dict=False)[0], data).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    from dit_suite.converters.acdit import make_scheduler
    from dit_suite.pipelines.pipeline_acdit import ACDiTPipeline

    pipe = ACDiTPipeline(model.eval(), make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    prefix = torch.ones(2, 1, 1, 4, 4)
    prefix[0] = -1
    out = pipe([0, 1], 8, 1.0, prefix=prefix, num_prefix_blocks=2, output_type="latent").images
    assert float(out[0, :, :, 2:].mean()) < -0.3
    assert float(out[1, :, :, 2:].mean()) > 0.3

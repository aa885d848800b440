"""Warm starts: where nothing has to be approximated the student is the teacher, and errors are said early."""

from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from dit_suite.models.dit import DiTModel
from dit_suite.models.pt_dit import PTDiTTransformer3DModel
from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel
from dit_suite.training.warm_start import (
    LEVELS,
    fold_modulation,
    level_grid,
    mean_text,
    most_used_units,
    spread_layers,
    start_dit,
    start_pixart,
    start_pt_dit,
)
from scripts import warm_start as script

SHAPE = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16, "patch_size": 2}
CLASSES = {"num_classes": 4, "learn_sigma": False, "in_channels": 3}
ADDED = {"resolution": None, "aspect_ratio": None}


def teacher() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        **SHAPE, in_channels=3, out_channels=3, cross_attention_dim=32, caption_channels=8, interpolation_scale=1,
        attention_bias=True, use_additional_conditions=False,
    )  # fmt: skip
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 3, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator),
        "timestep": torch.tensor([130.0, 870.0]),
    }


def proxies(**changes) -> PTDiTTransformer3DModel:
    shape = SHAPE | {"in_channels": 3, "out_channels": 3, "caption_channels": 8, "time_share": 0.0} | changes
    return PTDiTTransformer3DModel(**shape).eval()


@torch.no_grad()
def test_a_pixart_of_all_layers_is_its_teacher():
    source = teacher()
    student = PixArtTransformer2DModel.from_config(source.config).eval()
    start_pixart(source, student, [0, 1])
    wanted = source(**inputs(), added_cond_kwargs=ADDED).sample
    assert torch.equal(student(**inputs(), added_cond_kwargs=ADDED).sample, wanted)
    start_pixart(source, student, [1, 1])
    assert (student(**inputs(), added_cond_kwargs=ADDED).sample - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_a_pt_dit_of_one_window_is_its_teacher():
    """Attention inside a window that covers the picture is full attention."""
    source, student = teacher(), proxies(compress_ratios=(1, 8, 8), shift_window=False)
    start_pt_dit(source, student, [0, 1], global_share=0.0)
    wanted = source(**inputs(), added_cond_kwargs=ADDED).sample
    torch.testing.assert_close(student(**inputs()).sample, wanted, atol=1e-5, rtol=1e-4)
    start_pt_dit(source, student, [1, 0], global_share=0.0)
    assert (student(**inputs()).sample - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_the_global_part_reads_from_window_means_with_the_mean_modulation():
    """With windows of one token the means are the tokens; a modulation that does not depend on time is then exact."""
    source, student = teacher(), proxies(compress_ratios=(1, 1, 1), shift_window=[False, True])
    source.adaln_single.linear.weight.zero_()
    start_pt_dit(source, student, [0, 1], global_share=1.0)
    wanted = source(**inputs(), added_cond_kwargs=ADDED).sample
    torch.testing.assert_close(student(**inputs()).sample, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("routing", ["none", "experts", "plain"])
def test_a_dit_is_its_teacher_without_text(routing):
    source = teacher()
    for block in source.transformer_blocks:
        block.attn2.to_out[0].weight.zero_()
        block.attn2.to_out[0].bias.zero_()
    student = DiTModel(**SHAPE, **CLASSES)
    if routing != "plain":
        student = SwitchDiTTransformer2DModel(**SHAPE, **CLASSES, routing=routing)
    start_dit(source, student.eval(), [0, 1], [torch.zeros(32)] * 2)
    last: list[torch.Tensor] = []
    for norm in (source.norm_out, student.final_layer.norm):
        norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    given = inputs()
    wanted = source(**given, added_cond_kwargs=ADDED).sample
    found = student(given["hidden_states"], given["timestep"], torch.tensor([1, 3])).sample
    torch.testing.assert_close(last[1], last[0], atol=1e-4, rtol=1e-4)
    # the final modulation is a fit over all timesteps
    assert (found - wanted).square().mean() < 1e-3 * wanted.square().mean()


@torch.no_grad()
def test_mean_text_is_caught_per_layer():
    source = teacher()
    for value, block in enumerate(source.transformer_blocks, 1):
        block.attn2.to_out[0].weight.zero_()
        block.attn2.to_out[0].bias.fill_(value)
    condition = {"encoder_hidden_states": torch.randn(LEVELS, 5, 8), "added_cond_kwargs": ADDED}
    found = mean_text(source, torch.zeros(LEVELS, 3, 16, 16), condition)
    assert [row.mean().item() for row in found] == [1.0, 2.0] and found[0].shape == (32,)
    assert not source.transformer_blocks[0].attn2._forward_hooks


@torch.no_grad()
def test_folding_a_modulation_into_a_linear_layer_is_exact():
    torch.manual_seed(0)
    linear, x, shift, scale = torch.nn.Linear(6, 4), torch.randn(5, 6), torch.randn(6), torch.randn(6)
    wanted = linear(x * (1 + scale) + shift)
    fold_modulation(linear, shift, scale)
    torch.testing.assert_close(linear(x), wanted, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_strongest_hidden_units_are_kept():
    feed_forward = teacher().transformer_blocks[0].ff
    feed_forward.net[2].weight[:, [3, 70, 9]] *= 100
    assert most_used_units(feed_forward, 3).tolist() == [3, 9, 70]


def test_layers_and_levels_are_spread():
    assert spread_layers(3, 8) == [0, 4, 7] and spread_layers(1, 8) == [0] and spread_layers(8, 8) == list(range(8))
    assert len(level_grid()) == LEVELS and level_grid().min() > 0 and level_grid().max() < 1000
    with pytest.raises(ValueError, match="9 layers"):
        spread_layers(9, 8)


def test_what_does_not_fit_is_refused(capsys):
    with pytest.raises(ValueError, match="the width of the network is 48, of the teacher 32"):
        start_pt_dit(teacher(), proxies(attention_head_dim=24), [0, 1])
    with pytest.raises(ValueError, match="layers must name 2 of the teacher's layers 0 to 1"):
        start_pt_dit(teacher(), proxies(), [0, 2])
    config = Path(__file__).parents[2] / "configs" / "emoji_lego_64_cpu.yaml"
    assert script.main(["--config", str(config), "--output", "unused"]) == 2
    assert "LegoTransformer2DModel can't be started" in capsys.readouterr().err

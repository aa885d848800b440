"""LEGO: golden parity, locality, canvases, stopping and skipping, the published shapes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from dit_suite.converters import ConversionError
from dit_suite.converters import lego as converter
from dit_suite.data.draws import Draws
from dit_suite.golden import lego as golden
from dit_suite.golden import read_fixture, section
from dit_suite.models.dit import DiTModel
from dit_suite.models.lego import LegoTransformer2DModel
from dit_suite.training.config import load_config
from dit_suite.training.objectives import EDM, TrainingBatch

FOLDER = Path(__file__).parents[1] / "golden"
FIXTURES = sorted(FOLDER.glob("lego_*.safetensors"))
SHAPE = {
    "sample_size": 16,
    "in_channels": 3,
    "brick_sizes": (4, 8, 16),
    "patch_sizes": (2, 4, 4),
    "brick_depths": (1, 1, 1),
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_classes": 5,
}


def tiny(awake: bool = True, **changes) -> LegoTransformer2DModel:
    torch.manual_seed(0)
    model = LegoTransformer2DModel(**(SHAPE | changes)).eval()
    if awake:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(height: int = 16, width: int = 16, batch: int = 2):
    x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))
    return x, torch.linspace(-1.0, 0.5, batch), torch.arange(batch) % 5


def count_calls(model: LegoTransformer2DModel) -> list[int]:
    calls = [0] * len(model.bricks)
    for index, brick in enumerate(model.bricks):
        brick.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    return calls


@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_golden(path):
    results = golden.check(*read_fixture(path))
    assert len(results) >= 10
    assert [r for r in results if not r.passed] == []


def test_the_golden_check_notices_swapped_coordinate_channels():
    tensors, config = read_fixture(FOLDER / "lego_pg_uncond.safetensors")
    key = "state_dict.model.model.0.x_embedder.proj.weight"
    failed = {r.name for r in golden.check(tensors | {key: tensors[key][:, [0, 1, 2, 4, 3]]}, config) if not r.passed}
    assert "denoised_stop_after_0" in failed


@torch.no_grad()
def test_stopping_early_is_a_prefix_and_later_bricks_do_not_run():
    """Fact 2."""
    model = tiny()
    bricks = model(*inputs(), output_bricks=True).bricks
    calls = count_calls(model)
    for stop in range(3):
        assert torch.equal(model(*inputs(), stop_after=stop).sample, bricks[stop])
    assert calls == [3, 2, 1]
    shorter = model(*inputs(), stop_after=1, output_bricks=True).bricks
    assert len(shorter) == 2 and torch.equal(shorter[1], bricks[1]) and calls == [4, 3, 1]
    assert (bricks[1] - bricks[2]).abs().max() > 1e-2


@torch.no_grad()
def test_skipped_bricks_pass_the_prediction_on():
    model = tiny()
    calls = count_calls(model)
    middle = model(*inputs(), active_bricks=(True, False, True)).sample
    assert calls == [1, 0, 1]
    assert (middle - model(*inputs()).sample).abs().max() > 1e-3
    last = model(*inputs(), active_bricks=(True, True, False)).sample
    assert torch.equal(last, model(*inputs(), stop_after=1).sample)
    with pytest.warns(UserWarning, match="brick 1 runs first and reads zeros"):
        headless = model(*inputs(), active_bricks=(False, True, True), output_bricks=True).bricks
    assert calls == [4, 4, 3] and len(headless) == 2
    x, t, y = inputs()
    conditioning = model.time_embed(t) + model.embed_labels(y, 2, x)
    canvas = torch.cat([torch.zeros_like(x), x, model.coordinates(16, 16).expand(2, -1, -1, -1)], dim=1)
    assert torch.equal(model.bricks[1](canvas, conditioning), headless[0])
    for wrong, message in (
        ({"active_bricks": (False, False, False)}, "at least one brick"),
        ({"active_bricks": (True,)}, "needs 3 entries, got 1"),
        ({"stop_after": 3}, "between 0 and 2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*inputs(), **wrong)


@torch.no_grad()
def test_a_change_stays_inside_the_patch_of_each_brick():
    """Fact 5."""
    model = tiny()
    x, t, y = inputs()
    touched = x.clone()
    touched[:, :, 5, 2] += 1.0
    for clean, other, size in zip(
        model(x, t, y, output_bricks=True).bricks,
        model(touched, t, y, output_bricks=True).bricks,
        (4, 8, 16),
        strict=True,
    ):
        moved = (clean - other).abs().amax((0, 1)) > 1e-7
        assert moved.nonzero().amin(0).tolist() == [5 // size * size, 2 // size * size]
        assert moved.nonzero().amax(0).tolist() == [5 // size * size + size - 1, 2 // size * size + size - 1]


@torch.no_grad()
def test_larger_canvases_are_their_blocks_with_global_coordinates():
    """Facts 7 and 8: no value crosses the largest patch, and cost grows with the area."""
    model = tiny()
    x, t, y = inputs(32, 48)
    whole = model(x, t, y).sample
    model.places = model.coordinates(32, 48)[:, 16:, 32:]
    block = model(x[:, :, 16:, 32:], t, y).sample
    model.places = model.coordinates(16, 16)
    torch.testing.assert_close(block, whole[:, :, 16:, 32:], atol=1e-5, rtol=0)

    def products(height: int, width: int) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            LegoTransformer2DModel(**SHAPE)(torch.zeros(1, 3, height, width), torch.zeros(1), torch.zeros(1).long())
        counts = counter.get_flop_counts()["Global"]
        return sum(n for op, n in counts.items() if "bmm" in str(op))

    assert products(32, 32) == 4 * products(16, 16) > 0
    assert products(16, 64) == 4 * products(16, 16)


@torch.no_grad()
def test_one_brick_of_the_whole_canvas_is_a_dit_with_coordinate_channels():
    """Fact 6, against the suite's DiT: same weights, the picture's rows of its last layer, labels as table rows."""
    model = tiny(brick_sizes=(16,), patch_sizes=(4,), brick_depths=(2,))
    shape = {"sample_size": 16, "patch_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    dit = DiTModel(**shape, in_channels=5, num_classes=5, learn_sigma=False).eval()
    brick, table = model.bricks[0], dit.label_embed.embedding_table.weight
    dit.patch_embed.load_state_dict(brick.patch_embed.state_dict())
    dit.time_embed.load_state_dict(model.time_embed.state_dict())
    dit.transformer_blocks.load_state_dict(brick.blocks.state_dict())
    dit.final_layer.adaln.load_state_dict(brick.final_layer.adaln.state_dict())
    table.copy_(torch.cat([model.label_embed.weight.T, torch.zeros(1, 16)]) + model.label_embed.bias)
    for ours, theirs in zip(dit.final_layer.linear.parameters(), brick.final_layer.linear.parameters(), strict=True):
        ours.unflatten(0, (16, 5))[:, :3] = theirs.unflatten(0, (16, 3))
    x, t, y = inputs()
    places = model.coordinates(16, 16).expand(2, -1, -1, -1)
    wanted = dit(torch.cat([x, places], dim=1), t, y).sample[:, :3]
    torch.testing.assert_close(model(x, t, y).sample, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x, t).sample, dit(torch.cat([x, places], 1), t, y * 0 + 5).sample[:, :3])


@pytest.mark.parametrize("preset", ["emoji_lego_64", "emoji_lego_64_cpu", "shapes_lego_16"])
def test_the_skippable_brick_of_a_preset_holds_three_quarters_of_the_products(preset):
    config = load_config(Path(__file__).parents[2] / "configs" / f"{preset}.yaml").model.options

    def products(**choice) -> int:
        side = config["sample_size"]
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = LegoTransformer2DModel(**config)
            model(torch.zeros(1, 3, side, side), torch.zeros(1), torch.zeros(1).long(), **choice)
        return counter.get_total_flops()

    assert products(stop_after=len(config["brick_sizes"]) - 2) <= 0.25 * products()


def test_sizes_that_do_not_fit():
    """Fact 11."""
    with pytest.raises(ValueError, match="height 24 is not a multiple of the brick size 16; multiples of 16"):
        tiny()(*inputs(24, 32))
    with pytest.raises(ValueError, match="one entry per brick, got 2, 3 and 3"):
        tiny(brick_sizes=(4, 8))
    with pytest.raises(ValueError, match="not a multiple of its token patch"):
        tiny(patch_sizes=(2, 3, 4))


@torch.no_grad()
def test_null_class():
    """Fact 10."""
    model = tiny()
    x, t, _ = inputs()
    none = model(x, t, None).sample
    assert torch.equal(model(x, t, torch.full((2,), 5)).sample, none)
    assert torch.equal(model(x, t, torch.zeros(2, 5)).sample, none)
    assert torch.equal(model(x, t, torch.eye(5)[:2]).sample, model(x, t, torch.tensor([0, 1])).sample)
    assert (model(x, t, torch.tensor([0, 1])).sample - none).abs().max() > 1e-3


@pytest.mark.parametrize("sizes,direction", [((4, 8, 16), "late"), ((16, 8, 4), "early"), ((16, 4, 16), None)])
def test_skip_direction_follows_from_the_stack(sizes, direction):
    """Fact 12."""
    assert tiny(brick_sizes=sizes, patch_sizes=(2, 2, 2)).skip_direction == direction


@torch.no_grad()
def test_fresh_bricks_predict_zero_and_the_objective_averages_them():
    """Facts 9 and 13."""
    fresh = tiny(awake=False)
    assert not any(z.any() for z in fresh(*inputs(), output_bricks=True).bricks)
    model = tiny()
    x, _, y = inputs()
    batch = TrainingBatch(x, {"class_labels": y}, Draws(0, 0, torch.arange(2)))

    def call(hidden_states, timestep, **condition):
        return model(hidden_states, timestep, output_bricks=True, return_dict=False, **condition)

    every, last = EDM(outputs="all").loss(call, batch), EDM(outputs="last").loss(call, batch)
    assert torch.equal(every.parts["output_2"], last.loss)
    torch.testing.assert_close(every.loss, torch.stack(list(every.parts.values())).mean(0))


def published_shape(arrangement: str, resolution: int, depths: Sequence[int], hidden_size: int, num_heads: int) -> dict:
    """Arguments of a published shape: "PG" (patches grow), "PR" (patches shrink) or "U" (shrink, then grow).

    Bricks cover 4, 16 and `resolution` pixels; `depths` are in the order of the bricks.
    """
    growing, token_side = [4, 16, resolution], {4: 2, 16: 8, 32: 2, 64: 2}
    bricks = {"PG": growing, "PR": growing[::-1], "U": growing[::-1] + growing[1:]}[arrangement]
    return {
        "sample_size": resolution,
        "brick_sizes": bricks,
        "patch_sizes": [token_side[size] for size in bricks],
        "brick_depths": list(depths),
        "num_attention_heads": num_heads,
        "attention_head_dim": hidden_size // num_heads,
    }


@pytest.mark.parametrize(
    "arrangement,resolution,depths,width,heads,channels,millions",
    [
        ("PG", 64, (2, 4, 6), 384, 6, 3, 34.1),
        ("PR", 64, (6, 4, 2), 384, 6, 3, 34.1),
        ("U", 32, (6, 4, 2, 4, 6), 384, 6, 3, 61.4),
        ("U", 64, (6, 4, 2, 4, 6), 384, 6, 3, 62.0),
        ("PG", 32, (4, 8, 12), 1024, 16, 4, 463.3),
        ("PR", 32, (12, 8, 4), 1024, 16, 4, 463.3),
        ("PG", 64, (6, 8, 12), 1024, 16, 3, 501.6),
        ("PR", 64, (12, 8, 6), 1024, 16, 3, 501.6),
        ("PG", 64, (6, 6, 12), 1024, 16, 3, 463.8),
        ("U", 32, (12, 8, 6, 8, 12), 1024, 16, 4, 884.3),
        ("U", 64, (12, 8, 6, 8, 12), 1024, 16, 3, 885.4),
        ("PG", 32, (4, 12, 14), 1152, 16, 4, 729.4),
        ("PR", 32, (14, 12, 4), 1152, 16, 4, 729.4),
        ("PG", 64, (4, 12, 14), 1152, 16, 3, 730.0),
        ("PR", 64, (14, 12, 4), 1152, 16, 3, 730.0),
        ("U", 32, (14, 10, 4, 10, 14), 1152, 16, 4, 1262.0),
        ("U", 64, (14, 12, 4, 12, 14), 1152, 16, 3, 1358.9),
    ],
)
def test_parameter_counts(arrangement, resolution, depths, width, heads, channels, millions):
    """Fact 14; the published counts include the fixed position tables."""
    config = published_shape(arrangement, resolution, depths, width, heads)
    with init_empty_weights(include_buffers=False):
        model = LegoTransformer2DModel(**config, in_channels=channels, num_classes=1000)
    tables = sum(brick.pos_embed.numel() for brick in model.bricks)
    assert (sum(p.numel() for p in model.parameters()) + tables) / 1e6 == pytest.approx(millions, abs=0.1)


def test_converter_is_strict(tmp_path):
    tensors, config = read_fixture(FOLDER / "lego_u.safetensors")
    weights = section(tensors, "state_dict")
    arguments = argparse.Namespace(heads=2, sample_size=16)
    save_file(weights, tmp_path / "model.safetensors")
    model = converter.convert(tmp_path / "model.safetensors", arguments)
    assert list(model.config.brick_sizes) == config["brick_resolutions"]
    bare = {key.removeprefix("model."): value for key, value in weights.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    again = converter.convert(tmp_path / "bare.safetensors", arguments).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    broken = {
        "map_augment": weights | {"model.map_augment.weight": torch.zeros(1)},
        "fc2": {key: value for key, value in weights.items() if key != "model.model.1.blocks.0.mlp.fc2.bias"},
        "sin-cos table": weights | {"model.model.0.pos_embed": weights["model.model.0.pos_embed"] + 1},
    }
    for message, content in broken.items():
        save_file(content, tmp_path / "broken.safetensors")
        with pytest.raises(ConversionError, match=message.replace("fc2", r"ff\.net\.2")):
            converter.convert(tmp_path / "broken.safetensors", arguments)


def test_save_load_checkpointing_and_gradients(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = LegoTransformer2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(*inputs()).sample, model(*inputs()).sample)
    gradients = []
    for network in (model.train(), again.train()):
        sum(z.square().mean() for z in network(*inputs(), output_bricks=True).bricks).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
        again.enable_gradient_checkpointing()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)
        assert gradient.abs().max() > 0 or name.endswith("to_k.bias"), name

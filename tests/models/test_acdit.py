"""ACDiT: golden parity, causality, cached inference, block sizes, converter, gradients."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors import safe_open

from dit_suite.converters import ConversionError
from dit_suite.converters import acdit as converter
from dit_suite.converters.acdit import build_model
from dit_suite.golden import acdit as golden
from dit_suite.golden import read_fixture, section
from dit_suite.models.acdit import ACDIT_SIZES, ACDiTTransformer3DModel
from dit_suite.models.block_causal import rope_tables

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = sorted(GOLDEN.glob("acdit_*.safetensors"))


def tiny(**changes) -> ACDiTTransformer3DModel:
    config = {
        "in_channels": 3,
        "sample_height": 4,
        "sample_width": 4,
        "block_size": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_classes": 5,
    }
    torch.manual_seed(0)
    model = ACDiTTransformer3DModel(**{**config, **changes}).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def draw(model: ACDiTTransformer3DModel, batch: int = 2, block_size: int | None = None):
    generator = torch.Generator().manual_seed(3)
    config = model.config
    shape = (batch, config.in_channels, config.num_frames, config.sample_height, config.sample_width)
    clean, noisy = (model.to_blocks(torch.randn(shape, generator=generator), block_size) for _ in range(2))
    time = torch.randint(0, 1000, clean.shape[:2], generator=generator).float()
    labels = torch.arange(batch) % config.num_classes
    return clean, noisy, time, labels


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path):
    tensors, config = read_fixture(path)
    failed = [(r.name, r.error) for r in golden.check(tensors, config) if not r.passed]
    assert not failed


def test_golden_check_notices_a_wrong_mask_and_a_wrong_weight():
    tensors, config = read_fixture(GOLDEN / "acdit_masks.safetensors")
    name = "output.train_mask_T3_B2"
    spoiled = {**tensors, name: 1 - tensors[name]}
    assert any(not r.passed for r in golden.check(spoiled, config))
    tensors, config = read_fixture(GOLDEN / "acdit_image.safetensors")
    key = "state_dict.blocks.0.attn.q_norm.weight"
    spoiled = {**tensors, key: tensors[key] * 1.01}
    assert not all(r.passed for r in golden.check(spoiled, config) if r.name == "train")


def test_converter_names_missing_and_unexpected_keys():
    tensors, config = read_fixture(GOLDEN / "acdit_image.safetensors")
    weights = section(tensors, "state_dict")
    shape = {"grid": (1, 4, 4), "patch_size": 1, "block_size": 4}
    short = {k: v for k, v in weights.items() if k != "blocks.1.mlp.fc2.bias"}
    with pytest.raises(ConversionError, match="ff.net.2.bias"):
        build_model(short, **shape)
    with pytest.raises(ConversionError, match="strange"):
        build_model({**weights, "strange": torch.zeros(1)}, **shape)
    with safe_open(GOLDEN / "acdit_image.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == config


def test_one_block_is_a_plain_dit():
    """A2: with T = 1 the clean half has no influence and the pass equals a cached pass without a cache content."""
    model = tiny(block_size=16)
    clean, noisy, time, labels = draw(model)
    alone = model(noisy, time, labels).sample
    torch.testing.assert_close(
        model(noisy, time, labels, clean, drop_last_clean=False).sample, alone, atol=1e-6, rtol=0
    )
    cached = model(noisy, time, labels, kv_cache=model.new_cache(2), block_index=0).sample
    torch.testing.assert_close(cached, alone, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2])
def test_one_block_equals_a_dense_full_attention_transformer(frames: int):
    """A2: the network written down once more, token by token over the whole sequence, with softmax in full."""
    model = tiny(block_size=16 * frames, num_frames=frames)
    for parameter in model.parameters():  # biases and norms start alike
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    _, noisy, time, labels = draw(model)
    heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
    cosine, sine = rope_tables(model.position_ids(), model.rope_dims, model.rope_bases, "axial")

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def linear(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
        return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x * cosine + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1) * sine

    angles = time * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    features = linear(torch.cat([angles.cos(), angles.sin()], dim=-1), model.time_embed.linear_1)
    features = linear(features * features.sigmoid(), model.time_embed.linear_2)
    condition = features + model.label_embed.embedding_table.weight[labels]
    condition = (condition * condition.sigmoid())[:, None]
    x = linear(noisy[:, 0], model.token_embed)
    for block in model.transformer_blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(condition, block.modulation).chunk(6, dim=-1)
        h = norm(x, block.norm1.weight) * (1 + scale1) + shift1
        q, k, v = (
            part.unflatten(2, (heads, dim)).transpose(1, 2) for part in linear(h, block.attn.to_qkv).chunk(3, -1)
        )
        q, k = turned(norm(q, block.attn.norm_q.weight)), turned(norm(k, block.attn.norm_k.weight))
        weights = (q @ k.transpose(2, 3) / dim**0.5).softmax(-1)
        assert weights.shape[-2:] == (16 * frames, 16 * frames)
        x = x + gate1 * linear((weights @ v).transpose(1, 2).flatten(2), block.attn.to_out)
        h = norm(x, block.norm2.weight) * (1 + scale2) + shift2
        h = torch.nn.functional.gelu(linear(h, block.ff.net[0].proj), approximate="tanh")
        x = x + gate2 * linear(h, block.ff.net[2])
    shift, scale = linear(condition, model.modulation_out).chunk(2, dim=-1)
    expected = linear(norm(x, model.norm_out.weight) * (1 + scale) + shift, model.proj_out)
    torch.testing.assert_close(model(noisy, time, labels).sample[:, 0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_causality():
    """A3: which outputs a clean block, a noisy block and a timestep reach."""
    model = tiny()
    clean, noisy, time, labels = draw(model)
    base = model(noisy, time, labels, clean).sample

    def changed(**inputs) -> list[bool]:
        arguments = {"hidden_states": noisy, "timestep": time, "clean_hidden_states": clean, **inputs}
        out = model(class_labels=labels, **arguments).sample
        return [not torch.allclose(out[:, i], base[:, i], atol=1e-6, rtol=0) for i in range(4)]

    other = clean.clone()
    other[:, 1] += 1
    assert changed(clean_hidden_states=other) == [False, False, True, True]
    other = noisy.clone()
    other[:, 1] += 1
    assert changed(hidden_states=other) == [False, True, False, False]
    other = time.clone()
    other[:, 2] = (other[:, 2] + 300) % 1000
    assert changed(timestep=other) == [False, False, True, False]


def test_dropping_the_last_clean_block_changes_neither_output_nor_gradients():
    """A4."""
    gradients = []
    outputs = []
    for drop in (True, False):
        model = tiny()
        clean, noisy, time, labels = draw(model)
        out = model(noisy, time, labels, clean, drop_last_clean=drop).sample
        out.square().mean().backward()
        outputs.append(out.detach())
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("block_size", "learned"), [(1, False), (4, False), (4, True), (16, True)])
def test_cached_inference_equals_the_masked_forward(block_size: int, learned: bool):
    """A5, A8: fused and later passes, with the same weights at every block size."""
    model = tiny(learned_positions=learned)
    clean, noisy, time, labels = draw(model, block_size=block_size)
    expected = model(noisy, time, labels, clean).sample
    cache = model.new_cache(2, block_size)
    for i in range(clean.shape[1]):
        step = {"kv_cache": cache, "block_index": i}
        new = clean[:, i - 1 : i] if i else None
        now = noisy[:, i : i + 1], time[:, i : i + 1], labels
        fused = model(*now, clean_hidden_states=new, **step).sample
        torch.testing.assert_close(fused[:, 0], expected[:, i], atol=1e-5, rtol=0)
        before = cache.buffer.clone()
        later = model(*now, **step).sample
        torch.testing.assert_close(later[:, 0], expected[:, i], atol=1e-5, rtol=0)
        assert torch.equal(cache.buffer, before)
        assert cache.length == i


@torch.no_grad()
def test_guidance_halves_share_one_clean_cache():
    """A6: clean keys do not depend on label or timestep, and a shared cache gives what two caches give."""
    model = tiny()
    clean, noisy, time, labels = draw(model)
    null = torch.full_like(labels, model.null_label)
    shared, doubled = model.new_cache(2), model.new_cache(4)
    both = torch.cat([labels, null])
    for i in range(4):
        new = clean[:, i - 1 : i] if i else None
        now = noisy[:, i : i + 1].repeat(2, 1, 1, 1), time[:, i : i + 1].repeat(2, 1), both
        one = model(*now, clean_hidden_states=new, kv_cache=shared, block_index=i).sample
        new = new.repeat(2, 1, 1, 1) if i else None
        two = model(*now, clean_hidden_states=new, kv_cache=doubled, block_index=i).sample
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert torch.equal(doubled.buffer[:, :, :2], doubled.buffer[:, :, 2:])
    assert shared.nbytes * 2 == doubled.nbytes


def test_several_clean_blocks_can_be_written_at_once():
    """A13: a prefix enters in one pass and leaves the cache that block-by-block writing leaves."""
    model = tiny()
    clean, noisy, time, labels = draw(model)
    step = noisy[:, 3:4], time[:, 3:4], labels
    at_once, one_by_one = model.new_cache(2), model.new_cache(2)
    with torch.no_grad():
        first = model(*step, clean_hidden_states=clean[:, :3], kv_cache=at_once, block_index=3).sample
        for i in (1, 2, 3):
            now = noisy[:, i : i + 1], time[:, i : i + 1], labels
            second = model(*now, clean_hidden_states=clean[:, i - 1 : i], kv_cache=one_by_one, block_index=i).sample
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    torch.testing.assert_close(at_once.buffer, one_by_one.buffer, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [{"block_size": 4}, {"block_size": 16}, {"num_frames": 3, "sample_width": 6, "block_size": 6, "patch_size": 2}],
    ids=["squares", "one", "clip"],
)
def test_blocks_round_trip(changes: dict):
    model = tiny(**{"rope_split": None, "attention_head_dim": 16, **changes})
    config = model.config
    shape = (2, 3, config.num_frames, config.sample_height, config.sample_width)
    latents = torch.arange(2 * 3 * config.num_frames * 4 * config.sample_width, dtype=torch.float32).reshape(shape)
    blocks = model.to_blocks(latents, 9 if changes.get("num_frames") else None)
    assert torch.equal(model.from_blocks(blocks), latents)


def test_squares_are_cut_in_raster_order():
    model = tiny(in_channels=1)
    blocks = model.to_blocks(torch.arange(16.0).reshape(1, 1, 1, 4, 4))
    assert blocks[0, :, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@torch.no_grad()
def test_learned_positions_tell_equal_tokens_apart_and_stay_where_they_are():
    """Attention averages equal values to equal outputs, whatever the rotation; learned places differ. Without layers
    every output depends on its own token and place only, so the cut into blocks must not matter."""
    labels, time = torch.zeros(1, dtype=torch.long), torch.tensor(500.0)
    for learned in (False, True):
        model = tiny(learned_positions=learned)
        flat = torch.zeros(1, 1, 16, 3)
        spread = model(flat, time, labels).sample.std(dim=2).max()
        assert (float(spread) > 1e-3) == learned
    model.transformer_blocks = torch.nn.ModuleList()
    whole, quarters = (
        model.from_blocks(
            model(torch.zeros(1, 16 // size, size, 3), time, labels, torch.zeros(1, 16 // size, size, 3)).sample
        )
        for size in (16, 4)
    )
    torch.testing.assert_close(whole, quarters, atol=1e-6, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for enabled in (False, True):
        model = tiny().train()
        if enabled:
            model.enable_gradient_checkpointing()
        clean, noisy, time, labels = draw(model)
        model(noisy, time, labels, clean).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=0)


def test_a_new_model_predicts_zero_and_leaves_label_dropout_to_the_trainer():
    model = ACDiTTransformer3DModel(3, 4, 4, block_size=4, num_layers=1, num_attention_heads=1, num_classes=3)
    clean, noisy, time, labels = draw(model)
    assert not model(noisy, time, labels, clean).sample.any()
    model = tiny(class_dropout_prob=0.9)
    evaluated = model(noisy, time, labels, clean).sample
    assert torch.equal(model.train()(noisy, time, labels, clean).sample, evaluated)
    dropped = model(noisy, time, torch.full_like(labels, model.null_label), clean).sample
    assert not torch.allclose(dropped, evaluated, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "picture", "clip"),
    [
        ("B", 130_305_028, 129_633_040),
        ("L", 457_851_908, 456_955_920),
        ("XL", 674_856_708, 673_848_720),
        ("H", 950_959_620, 949_839_632),
    ],
)
def test_named_sizes_have_the_parameters_of_the_reference(size: str, picture: int, clip: int):
    """Counted in the reference code: ImageNet latents in patches of 1, UCF-101 latents in patches of 2."""
    with init_empty_weights():
        image = ACDiTTransformer3DModel(**ACDIT_SIZES[size])
        video = ACDiTTransformer3DModel(
            num_frames=16, patch_size=2, block_size=1024, num_classes=101, **ACDIT_SIZES[size]
        )
    assert sum(parameter.numel() for parameter in image.parameters()) == picture
    assert sum(parameter.numel() for parameter in video.parameters()) == clip


def test_weights_start_as_in_the_reference():
    """Xavier-uniform layers without bias, N(0, 0.02) for labels and time, zero for modulations and the last layer."""
    torch.manual_seed(0)
    model = ACDiTTransformer3DModel(
        4, 8, 8, block_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=32, num_classes=40
    )
    blocks, seen = model.transformer_blocks, 0
    zero = {*(block.modulation for block in blocks), model.modulation_out, model.proj_out}
    small = {model.time_embed.linear_1, model.time_embed.linear_2}
    for module in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        assert module.bias is None or not module.bias.any()
        weight, seen = module.weight.detach(), seen + 1
        if module in zero:
            assert not weight.any()
        elif module in small:
            assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
            assert float(weight.abs().max()) > 0.05  # of a normal, beyond what a uniform draw of this size reaches
        else:
            bound = (6 / sum(weight.shape)) ** 0.5
            assert 0.97 * bound < float(weight.abs().max()) <= bound
            assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert seen == 1 + 2 + 2 * 5 + 2
    assert float(model.label_embed.embedding_table.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, torch.nn.RMSNorm))


def test_save_and_load(tmp_path: Path):
    model = tiny(rope_split=(1, 1))
    model.save_pretrained(tmp_path)
    again = ACDiTTransformer3DModel.from_pretrained(tmp_path)
    clean, noisy, time, labels = draw(model)
    assert torch.equal(model(noisy, time, labels, clean).sample, again(noisy, time, labels, clean).sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 5}, "do not divide"),
        ({"block_size": 2}, "squares of 2"),
        ({"num_frames": 2, "square_blocks": True}, "single frame"),
        ({"rope_style": "spiral"}, "rope_style"),
        ({"patch_size": 3}, "do not fit"),
        ({"rope_split": (1, 2, 3)}, "needs 2 numbers"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_calls_that_do_not_fit_are_refused():
    model = tiny()
    clean, noisy, time, labels = draw(model)
    with pytest.raises(ValueError, match="need clean_hidden_states"):
        model(noisy, time, labels)
    with pytest.raises(ValueError, match="0 are cached, 1 are given"):
        now = noisy[:, :1], time[:, :1], labels
        model(*now, clean_hidden_states=clean[:, :1], kv_cache=model.new_cache(2), block_index=3)
    with pytest.raises(ValueError, match="latents must be"):
        model.to_blocks(torch.zeros(1, 3, 1, 8, 8))


@pytest.mark.parametrize(
    ("name", "sizes", "flag", "refusal"),
    [
        (
            "image",
            {"image_size": 32, "block_size": 4, "ar_len": 4, "num_frames": 1, "nd_split": None},
            "16",
            "4 blocks",
        ),
        (
            "video",
            {"image_size": 16, "block_size": 8, "ar_len": 3, "num_frames": 6, "nd_split": "2_3_3"},
            "24",
            "3 blocks",
        ),
    ],
)
def test_a_released_file_converts_with_the_sizes_it_carries(
    tmp_path: Path, name: str, sizes: dict, flag: str, refusal: str
):
    tensors, _ = read_fixture(GOLDEN / f"acdit_{name}.safetensors")
    saved = argparse.Namespace(model="ACDiT-XL", patch_size=1, vae_patch_pixels=8, **sizes)
    path = tmp_path / "ACDiT-tiny.pt"
    torch.save({"model": section(tensors, "state_dict"), "args": saved}, path)
    parser = argparse.ArgumentParser()
    converter.add_arguments(parser)
    pipe = converter.convert(path, parser.parse_args([]))
    config = pipe.transformer.config
    assert config.rope_style == "reference"
    assert (config.num_frames, config.block_size) == (sizes["num_frames"], sizes["block_size"])
    assert config.rope_split == (None if name == "image" else (2, 3, 3))
    inputs = section(tensors, "input")
    given = inputs["noised_x"], inputs["t"], inputs["y"].long(), inputs["clean_x"]
    torch.testing.assert_close(
        pipe.transformer(*given).sample.flatten(1, 2), tensors["output.train"], atol=1e-4, rtol=0
    )
    with pytest.raises(ConversionError, match=f"trained with {refusal}, these sizes give 1"):
        converter.convert(path, parser.parse_args(["--block-size", flag]))
    path = tmp_path / "no-arguments.pt"  # the first file is mapped, not copied
    torch.save({"model": section(tensors, "state_dict")}, path)
    with pytest.raises(ConversionError, match="give --patch-size"):
        converter.convert(path, parser.parse_args([]))
    told = ["--patch-size", "1", "--image-size", str(sizes["image_size"]), "--block-size", str(sizes["block_size"])]
    told += ["--num-frames", str(sizes["num_frames"])] if name == "video" else []
    again = converter.convert(path, parser.parse_args(told))
    assert torch.equal(again.transformer(*given).sample, pipe.transformer(*given).sample)
    if name == "video":  # the default proportions are those of the file; others are another network
        other = converter.convert(path, parser.parse_args([*told, "--rope-split", "6_1_1"]))
        assert not torch.allclose(other.transformer(*given).sample, pipe.transformer(*given).sample, atol=1e-3)

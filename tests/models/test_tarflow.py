"""TarFlow: likelihood, invertibility, causality, class handling, golden parity, conversion, diffusers conventions."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dit_suite.converters import ConversionError
from dit_suite.converters import tarflow as converter
from dit_suite.golden import read_fixture, section
from dit_suite.golden.tarflow import check, load_model
from dit_suite.models.tarflow import TarFlowModel, dequantize

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TINY = {
    "sample_size": 6,
    "in_channels": 2,
    "patch_size": 2,
    "hidden_size": 16,
    "num_blocks": 3,
    "num_layers": 1,
    "head_dim": 8,
    "num_classes": 3,
    "noise_std": 0.1,
}


def tiny_model(seed: int = 0, spread: float = 0.3, **changes) -> TarFlowModel:
    """A small flow whose affine maps are far from the identity."""
    torch.manual_seed(seed)
    model = TarFlowModel(**{**TINY, **changes}).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=spread / 4)
        if block.class_embed is not None:
            torch.nn.init.normal_(block.class_embed, std=0.5)
    return model.requires_grad_(False)


def images(count: int, seed: int = 1, **changes) -> torch.Tensor:
    config = {**TINY, **changes}
    generator = torch.Generator().manual_seed(seed)
    side = config["sample_size"]
    return torch.randn(count, config["in_channels"], side, side, generator=generator)


@pytest.mark.parametrize("name", ["tarflow_cond", "tarflow_uncond", "tarflow_vp"])
def test_golden(name):
    results = check(*read_fixture(GOLDEN / f"{name}.safetensors"))
    assert len(results) >= 15
    failed = [(r.name, r.error) for r in results if not r.passed]
    assert not failed


def test_log_determinant_equals_autograd():
    model = tiny_model().double()
    model.to(torch.float32)
    image, labels = images(1), torch.tensor([2])

    def flat(x):
        return model(x.view_as(image), labels).latents.flatten()

    jacobian = torch.autograd.functional.jacobian(flat, image.flatten())
    dims = model.num_tokens * model.token_dim
    expected = torch.linalg.slogdet(jacobian.double()).logabsdet / dims
    result = model(image, labels)
    torch.testing.assert_close(result.logdet[0].double(), expected, atol=1e-5, rtol=0)
    assert abs(expected) > 1e-3
    torch.testing.assert_close(torch.stack(result.block_logdets).sum(0), result.logdet)


def test_reverse_by_prefix_inverts_forward():
    model, labels = tiny_model(), torch.tensor([0, 1])
    image = images(2)
    tokens = model(image, labels).latents
    for block in reversed(model.blocks):
        tokens = block.reverse_by_prefix(tokens, labels)
    torch.testing.assert_close(model.unpatchify(tokens), image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("index", [0, 1])
def test_block_is_causal_in_its_own_order(index):
    model = tiny_model()
    block, tokens = model.blocks[index], model.patchify(images(1))
    ordered = block.order(tokens)
    scale, shift = block.affine(ordered)
    changed = ordered.clone()
    changed[:, 4] += 1.0
    scale2, shift2 = block.affine(changed)
    assert torch.equal(scale[:, :5], scale2[:, :5]) and torch.equal(shift[:, :5], shift2[:, :5])
    assert (shift[:, 5:] - shift2[:, 5:]).abs().amax(dim=(0, 2)).min() > 0
    first = 0 if index == 0 else model.num_tokens - 1
    assert torch.equal(block(tokens)[0][:, first], tokens[:, first])


def test_dropped_labels_are_the_class_mean_per_row():
    model, image = tiny_model(), images(3)
    mixed = model(image, torch.tensor([1, -1, 2])).latents
    none = model(image).latents
    torch.testing.assert_close(model(image, torch.tensor([-1, -1, -1])).latents, none)
    torch.testing.assert_close(mixed[1], none[1])
    assert (mixed[0] - none[0]).abs().max() > 1e-3


def test_identity_flow_has_known_likelihood_and_denoising():
    model = tiny_model()
    for block in model.blocks:
        torch.nn.init.zeros_(block.proj_out.weight)
        torch.nn.init.zeros_(block.proj_out.bias)
    image = images(2)
    expected = (0.5 * image.square().mean((1, 2, 3)) + 0.5 * math.log(2 * math.pi) + math.log(128)) / math.log(2)
    torch.testing.assert_close(model.bits_per_dim(image), expected)
    torch.testing.assert_close(model.denoise(image, strength=0.5), image * (1 - 0.5 * 0.1**2))
    assert model.denoise(image, strength=0.0) is image


def test_denoise_is_independent_per_sample_and_leaves_no_gradients():
    model, image, labels = tiny_model(), images(4), torch.tensor([0, 1, 2, 0])
    model.requires_grad_(True)
    together = model.denoise(image, labels)
    apart = torch.cat([model.denoise(image[i : i + 1], labels[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    assert (together - image).abs().max() > 1e-4
    assert all(p.grad is None for p in model.parameters())


def test_likelihood_gradient_ascends():
    model, image = tiny_model(), images(2)
    assert (model.log_likelihood(model.denoise(image)) > model.log_likelihood(image)).all()


def test_volume_preserving_flow():
    model, image = tiny_model(volume_preserving=True, num_classes=0), images(5)
    result = model(image)
    assert torch.equal(result.logdet, torch.zeros(5))
    model.update_prior(result.latents.square().mean(0))
    expected = 0.9 + 0.1 * result.latents.square().mean(0)
    torch.testing.assert_close(model.var, expected)


def test_dequantize_bounds():
    pixels = torch.tensor([0.0, 255.0])
    torch.testing.assert_close(dequantize(pixels, torch.zeros(2)), torch.tensor([-1.0, 1 - 1 / 128]))


def test_fresh_model_is_nearly_the_identity():
    torch.manual_seed(0)
    model = TarFlowModel(**TINY)
    scale, shift = model.blocks[1].affine(model.patchify(images(2)))
    bound = TINY["hidden_size"] ** -0.5
    assert scale.abs().max() <= bound and shift.abs().max() <= bound
    assert torch.equal(scale[:, 0], torch.zeros_like(scale[:, 0]))


def test_training_lowers_the_loss_and_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = TarFlowModel(**TINY).train()
    image, labels = images(8) * 0.2, torch.tensor([0, 1, 2, -1] * 2)
    loss = model.nll_loss(image, labels)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    assert all(block.gradient_checkpointing for block in model.blocks)
    again = model.nll_loss(image, labels)
    again.backward()
    torch.testing.assert_close(loss, again)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=5e-5, rtol=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):
        optimizer.zero_grad()
        model.nll_loss(image, labels).backward()
        optimizer.step()
    assert model.nll_loss(image, labels) < loss - 0.1


def test_deep_shallow_depths():
    model = TarFlowModel(**{**TINY, "num_layers": [1, 1, 4]})
    assert [len(block.layers) for block in model.blocks] == [1, 1, 4]
    with pytest.raises(ValueError, match="2 depths for 3 blocks"):
        TarFlowModel(**{**TINY, "num_layers": [1, 4]})


def test_save_load_and_tuple_output(tmp_path):
    model = tiny_model(guess_kernel=3)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = TarFlowModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    image, labels = images(2), torch.tensor([0, -1])
    assert torch.equal(model(image, labels).latents, loaded(image, labels, return_dict=False)[0])
    half = TarFlowModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    latents = half(image.bfloat16(), labels).latents
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, model(image, labels).latents, atol=0.1, rtol=0.1)


def test_compiles_without_graph_breaks():
    model = tiny_model(num_blocks=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image, labels = images(2), torch.tensor([0, -1])
    torch.testing.assert_close(compiled(image, labels).latents, model(image, labels).latents, atol=1e-5, rtol=0)


def original_state(name: str = "tarflow_cond") -> tuple[dict[str, torch.Tensor], dict]:
    tensors, config = read_fixture(GOLDEN / f"{name}.safetensors")
    return section(tensors, "state_dict"), config


def test_converter_round_trip_is_bit_exact_and_drops_masks():
    state, config = original_state()
    masked = {**state, "blocks.0.attn_mask": torch.ones(16, 16).tril()}
    model = converter.build_model(masked, converter.from_original_config(config))
    back = converter.to_original_keys(model.state_dict())
    wanted = {key: value for key, value in state.items() if not key.endswith("attn_mask")}
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], wanted[key]) for key in wanted)
    assert model.config.sample_size == 8 and model.config.num_classes == 5 and model.config.noise_std == 0.1


def test_converter_is_strict():
    state, config = original_state()
    given = converter.from_original_config(config)
    key = "blocks.1.attn_blocks.1.mlp.main.2.bias"
    with pytest.raises(ConversionError, match="ff_out.bias"):
        converter.build_model({k: v for k, v in state.items() if k != key}, given)
    with pytest.raises(ConversionError, match="extra"):
        converter.build_model({**state, "blocks.0.extra": torch.zeros(1)}, given)
    with pytest.raises(ConversionError, match="shape"):
        converter.build_model({**state, key: torch.zeros(3)}, given)
    with pytest.raises(ConversionError, match="num_classes 5, but 7 was given"):
        converter.build_model(state, {**given, "num_classes": 7})
    with pytest.raises(ConversionError, match="not a TarFlow"):
        converter.build_model({"weight": torch.zeros(1)})
    for lost, named in (
        ("blocks.0.pos_embed", "pos_embed"),
        ("blocks.0.proj_out.weight", "proj_out.weight"),
        ("blocks.1.attn_blocks", "attn_blocks of block 1"),
    ):
        with pytest.raises(ConversionError, match=f"{named} is missing"):
            converter.build_model({k: v for k, v in state.items() if not k.startswith(lost)}, given)


def test_converter_reads_official_files_and_shards(tmp_path):
    state, config = original_state()
    official = tmp_path / "afhq_model_2_32_4_2_0.07.pth"
    torch.save(state, official)
    read, original = converter.read_source(official)
    assert original == {"noise_std": 0.07} and all(torch.equal(read[k], state[k]) for k in state)
    pipe = converter.convert(official, argparse.Namespace(head_dim=16, noise_std=None, in_channels=None))
    assert pipe.transformer.config.noise_std == 0.07 and pipe.transformer.config.head_dim == 16
    renamed = official.rename(tmp_path / "flow.pth")
    flags = argparse.Namespace(head_dim=16, noise_std=None, in_channels=None)
    with pytest.raises(ConversionError, match="flow.pth, which the score step .* --noise-std"):
        converter.convert(renamed, flags)
    flags.noise_std = 0.0
    assert converter.convert(renamed, flags).transformer.config.noise_std == 0.0
    model = load_model(*read_fixture(GOLDEN / "tarflow_cond.safetensors"))
    image = torch.zeros(1, 3, 8, 8)
    assert torch.equal(pipe.transformer(image).latents, model(image).latents)

    shards = tmp_path / "shards"
    shards.mkdir()
    keys = sorted(state)
    save_file({k: state[k] for k in keys[:9]}, shards / "a.safetensors")
    save_file({k: state[k] for k in keys[9:]}, shards / "b.safetensors")
    merged, _ = converter.read_source(shards)
    assert merged.keys() == state.keys()
    save_file({keys[0]: state[keys[0]]}, shards / "c.safetensors")
    with pytest.raises(ConversionError, match="repeats the key"):
        converter.read_source(shards)


def test_bad_configurations_are_refused():
    for changes, message in (
        ({"patch_size": 4}, "multiple of patch_size"),
        ({"head_dim": 12}, "multiple of head_dim"),
        ({"guess_kernel": 2}, "must be odd"),
    ):
        with pytest.raises(ValueError, match=message):
            TarFlowModel(**{**TINY, **changes})

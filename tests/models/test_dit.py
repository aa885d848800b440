"""DiT: the facts of its specification that the golden fixtures do not show."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_suite.converters import ConversionError
from dit_suite.converters.dit import build_model, make_scheduler, rename_from_official, to_official
from dit_suite.golden import dit as golden
from dit_suite.golden import read_fixture, section
from dit_suite.models.dit import DiTModel, dit_config
from dit_suite.models.dit_blocks import PatchEmbed, unpatchify
from dit_suite.schedulers.guidance import guide
from dit_suite.schedulers.respacing import respaced_betas, respaced_scheduler, space_timesteps
from dit_suite.training.objectives import diffusion_tables, named_tables

FIXTURE = Path(__file__).parents[1] / "golden" / "dit_forward.safetensors"
TINY = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_classes": 10,
}


@pytest.fixture(scope="module")
def fixture() -> tuple[dict, dict]:
    return read_fixture(FIXTURE)


@pytest.fixture(scope="module")
def model(fixture: tuple) -> DiTModel:
    return golden.build(*fixture)


def inputs(batch: int = 2, height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, height, width, generator=generator)
    return x, torch.tensor([17, 500, 999, 3])[:batch], torch.tensor([3, 7, 1, 0])[:batch]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("DiT-S/2", 32_865_056),
        ("DiT-S/4", 32_920_448),
        ("DiT-S/8", 33_142_016),
        ("DiT-B/2", 130_315_808),
        ("DiT-B/8", 130_869_248),
        ("DiT-L/4", 457_988_224),
        ("DiT-XL/2", 674_834_720),
        ("DiT-XL/8", 675_664_640),
    ],
)
def test_parameter_counts_of_the_published_sizes(name: str, count: int) -> None:
    with init_empty_weights():
        model = DiTModel(**dit_config(name))
    assert sum(p.numel() for p in model.parameters()) == count


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="DiT-M/2"):
        dit_config("DiT-M/2")


def test_a_fresh_network_outputs_zero_and_its_blocks_are_the_identity() -> None:
    torch.manual_seed(0)
    model = DiTModel(**TINY).eval()
    x, t, y = inputs()
    with torch.no_grad():
        assert model(x, t, y).sample.abs().max() == 0
        tokens, conditioning = torch.randn(2, 16, 16), torch.randn(2, 16)
        assert torch.equal(model.transformer_blocks[0](tokens, conditioning), tokens)
    zeros = {name for name, value in model.named_parameters() if name.endswith("weight") and not value.any()}
    blocks = {f"transformer_blocks.{i}.adaln.weight" for i in range(2)}
    assert zeros == blocks | {"final_layer.adaln.weight", "final_layer.linear.weight"}


def test_dropping_a_label_equals_the_null_class(model: DiTModel) -> None:
    x, t, y = inputs()
    with torch.no_grad():
        null = model(x, t, torch.full_like(y, model.null_class)).sample
        dropped = model(x, t, y, force_drop_ids=torch.ones_like(y)).sample
        half = model(x, t, y, force_drop_ids=torch.tensor([0, 1])).sample
        plain = model(x, t, y).sample
    assert torch.equal(null, dropped)
    assert torch.equal(half[0], plain[0]) and torch.equal(half[1], null[1])
    assert (plain - null).abs().max() > 0.01


def test_training_mode_draws_no_random_numbers(model: DiTModel) -> None:
    x, t, y = inputs()
    state = torch.get_rng_state()
    model.train()
    trained = model(x, t, y).sample
    model.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trained, model(x, t, y).sample)


def test_without_label_dropout_there_is_no_null_class() -> None:
    model = DiTModel(**TINY, class_dropout_prob=0.0)
    assert model.null_class is None
    assert model.label_embed.embedding_table.weight.shape[0] == 10


def test_tokens_are_row_major_and_unpatchify_inverts_the_patches(model: DiTModel) -> None:
    dark, bright = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    bright[..., 2:4, 6:8] = 1.0
    changed = (model.patch_embed(bright) != model.patch_embed(dark)).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 3]

    image = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = image.reshape(2, 3, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 12)
    assert torch.equal(unpatchify(patches, 2, 3, 2), image)


def test_time_features_have_the_cosine_first(model: DiTModel) -> None:
    features = golden.trace(model, inputs(1)[0].expand(2, -1, -1, -1), torch.tensor([0, 500]), torch.tensor([1, 1]))
    zero, later = features["timestep_embedding"]
    assert torch.equal(zero, torch.cat([torch.ones(128), torch.zeros(128)]))
    torch.testing.assert_close(later[0], torch.tensor(500.0).cos())
    torch.testing.assert_close(later[128], torch.tensor(500.0).sin())
    # The denominator is half, not half - 1: the slowest frequency is 10000^(-127/128).
    slowest = 500.0 * 10000.0 ** (-127 / 128)
    torch.testing.assert_close(later[255], torch.tensor(slowest).sin(), atol=1e-6, rtol=0)


def test_any_grid_is_accepted(model: DiTModel) -> None:
    x, t, y = inputs(2, 4, 12)
    with torch.no_grad():
        sample = model(x, t, y).sample
        swapped = model(x.transpose(2, 3), t, y).sample
    assert sample.shape == (2, 8, 4, 12)
    assert (sample - swapped.transpose(2, 3)).abs().max() > 0.01


def test_one_timestep_for_the_whole_batch(model: DiTModel) -> None:
    x, _, y = inputs()
    with torch.no_grad():
        one, many = model(x, torch.tensor(500), y).sample, model(x, torch.tensor([500, 500]), y).sample
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)


def test_guidance_reads_one_half_and_has_its_limits(model: DiTModel, fixture: tuple) -> None:
    given = section(fixture[0], "input")
    x, t, y = given["cfg_x"], given["cfg_t"], given["cfg_y"]
    spoiled = torch.cat([x[:2], torch.randn(2, 4, 8, 8)])
    for channels in (3, 4):
        out = golden.guided_halves(model, x, t, y, 4.0, channels)
        assert torch.equal(out, golden.guided_halves(model, spoiled, t, y, 4.0, channels))
        assert torch.equal(out[:2, :channels], out[2:, :channels])
    with torch.no_grad():
        raw = model(x, t, y).sample
    for scale, half in ((1.0, raw[:2]), (0.0, raw[2:])):
        out = golden.guided_halves(model, x, t, y, scale, 4)
        torch.testing.assert_close(out[:2, :4], half[:, :4], atol=2e-6, rtol=0)


def test_guide_leaves_the_other_channels_alone() -> None:
    uncond, cond = torch.zeros(1, 4, 1, 1), torch.arange(1.0, 5.0).reshape(1, 4, 1, 1)
    assert guide(uncond, cond, 3.0, channels=2).flatten().tolist() == [3.0, 6.0, 3.0, 4.0]
    assert guide(uncond, cond, 3.0).flatten().tolist() == [3.0, 6.0, 9.0, 12.0]


def stock_twin(fixture: tuple) -> DiTTransformer2DModel:
    """diffusers' own class with the fixture's weights."""
    tensors, config = fixture
    renamed = rename_from_official(section(tensors, "state_dict"))
    width, heads = config["hidden_size"], config["num_heads"]
    stock = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=config["num_classes"],
    ).eval()  # fmt: skip
    top = {"patch_embed.proj": "pos_embed.proj", "final_layer.adaln": "proj_out_1", "final_layer.linear": "proj_out_2"}
    state = {}
    for key, value in renamed.items():
        stem, _, leaf = key.rpartition(".")
        for i in range(2):
            prefix = f"transformer_blocks.{i}."
            if stem.startswith("time_embed."):
                name = stem.replace("time_embed", "norm1.emb.timestep_embedder")
                state[f"{prefix}{name}.{leaf}"] = value.clone()
            elif stem.startswith("label_embed."):
                state[f"{prefix}norm1.emb.class_embedder.embedding_table.{leaf}"] = value.clone()
        if stem in top:
            state[f"{top[stem]}.{leaf}"] = value
        elif stem.startswith("transformer_blocks."):
            state[key.replace(".attn.", ".attn1.").replace(".adaln.", ".norm1.linear.")] = value
    stock.load_state_dict(state)
    return stock


def test_diffusers_own_class_differs_only_by_frequency_and_eps(model: DiTModel, fixture: tuple) -> None:
    stock = stock_twin(fixture)
    x, t, y = inputs()
    with torch.no_grad():
        ours, theirs = model(x, t, y).sample, stock(x, t, y).sample
        assert (ours - theirs).abs().max() > 0.1
        for block in stock.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
        repaired = stock(x, t, y).sample
    torch.testing.assert_close(ours, repaired, atol=1e-5, rtol=0)


def test_conversion_is_a_bijection(fixture: tuple) -> None:
    official = section(fixture[0], "state_dict")
    back = to_official(build_model(official, num_heads=4))
    assert set(back) == set(official)
    for key, value in official.items():
        if key == "pos_embed":
            torch.testing.assert_close(back[key], value, atol=1e-6, rtol=0)
        else:
            assert torch.equal(back[key], value), key


def test_diffusers_weights_convert_to_the_same_network(model: DiTModel, fixture: tuple) -> None:
    stock = stock_twin(fixture)
    converted = build_model(stock.state_dict(), num_heads=4, sample_size=8)
    x, t, y = inputs()
    with torch.no_grad():
        assert torch.equal(converted(x, t, y).sample, model(x, t, y).sample)
    state = stock.state_dict()
    state["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"][0] += 1
    with pytest.raises(ConversionError, match="differs from its copy"):
        build_model(state, num_heads=4, sample_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc1.bias"), "missing: transformer_blocks.1.ff.net.0.proj.bias"),
        (lambda w: w.update({"blocks.0.attn.extra": torch.zeros(1)}), "unexpected: blocks.0.attn.extra"),
        (lambda w: w.pop("pos_embed"), "give the latent side|missing: pos_embed"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 16, 48)), "not the fixed sin-cos table"),
        (lambda w: w.pop("x_embedder.proj.weight"), "patch_embed.proj.weight"),
        (lambda w: w.update({"blocks.0.mlp.fc2.bias": torch.zeros(7)}), "shape"),
        (lambda w: w.update({"blocks.0.attn.qkv.bias": torch.zeros(100)}), "attn.qkv.bias"),
    ],
)
def test_a_wrong_checkpoint_is_refused(fixture: tuple, change, message: str) -> None:
    weights = dict(section(fixture[0], "state_dict"))
    change(weights)
    with pytest.raises(ConversionError, match=message):
        build_model(weights, num_heads=4)


def test_heads_of_an_unpublished_width_must_be_given(fixture: tuple) -> None:
    with pytest.raises(ConversionError, match="--num-heads"):
        build_model(section(fixture[0], "state_dict"))


def test_attention_is_quadratic_in_the_tokens_and_the_rest_is_linear() -> None:
    model = DiTModel(**TINY).eval()

    def flops(side: int) -> tuple[int, int]:
        math = sdpa_kernel(SDPBackend.MATH)  # its matrix products are visible to the counter
        with FlopCounterMode(display=False) as counter, torch.no_grad(), math:
            model(torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long))
        per = counter.get_flop_counts()["Global"]
        attention = sum(value for op, value in per.items() if "bmm" in str(op))
        conditioning = 2 * (256 * 16 + 16 * 16 + 2 * 16 * 96 + 16 * 32)
        return attention, sum(per.values()) - attention - conditioning

    (small_attention, small_rest), (large_attention, large_rest) = flops(8), flops(16)
    assert large_attention == 16 * small_attention > 0
    assert large_rest == 4 * small_rest > 0


def test_the_golden_check_takes_other_sizes() -> None:
    """A fixture of another depth, patch and channel count, written from a network made here, passes; a wrong weight
    in it is noticed."""
    torch.manual_seed(0)
    config = {"input_size": 16, "num_heads": 2, "class_dropout_prob": 0.0, "learn_sigma": False, "in_channels": 3}
    model = DiTModel(
        16, 4, 3, num_layers=3, num_attention_heads=2, attention_head_dim=16, mlp_ratio=2.0, num_classes=5,
        class_dropout_prob=0.0, learn_sigma=False,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([5, 800]), torch.tensor([4, 0])
    tensors = {f"state_dict.{key}": value for key, value in to_official(model).items()}
    tensors |= {"input.x": x, "input.t": t, "input.y": y}
    tensors |= {f"output.{key}": value for key, value in golden.trace(model, x, t, y).items()}
    results = golden.check(tensors, config)
    assert {"block_0", "block_1", "block_2", "sample", "c"} <= {result.name for result in results}
    assert all(result.passed for result in results)
    tensors["state_dict.blocks.2.mlp.fc2.bias"] = tensors["state_dict.blocks.2.mlp.fc2.bias"] + 1e-3
    failed = {result.name for result in golden.check(tensors, config) if not result.passed}
    assert "block_2" in failed and "block_1" not in failed


@pytest.mark.parametrize(("kind", "respacing"), [("ddpm", "7"), ("ddpm", "5,3,9"), ("ddim", "ddim7"), ("ddim", "9")])
def test_samplers_over_uneven_timesteps_equal_the_formulas(kind: str, respacing: str) -> None:
    """Counts that diffusers' own spacings do not reach, against the update written out."""
    given = {key: value.double() if value.is_floating_point() else value for key, value in section(
        read_fixture(FIXTURE.with_name("dit_diffusion.safetensors"))[0], "input").items()}  # fmt: skip
    products = named_tables("linear", 1000).alphas_cumprod
    steps = space_timesteps(1000, respacing)
    tables = diffusion_tables(respaced_betas(products, steps))
    noises = torch.randn(len(steps), *given["z"].shape, generator=torch.Generator().manual_seed(0)).double()
    case = {"name": "x", "kind": kind, "eta": 0.5}
    x, expected = given["z"], []
    for i, noise in zip(range(len(steps))[::-1], noises, strict=True):
        eps, raw = golden.toy_network(given, x, torch.full((len(x),), steps[i])).chunk(2, dim=1)
        abar = tables.alphas_cumprod[i]
        before = tables.alphas_cumprod[i - 1] if i else torch.tensor(1.0).double()
        x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
        if kind == "ddim":
            sigma = 0.5 * ((1 - before) / (1 - abar) * (1 - abar / before)).sqrt()
            x = before.sqrt() * x0 + (1 - before - sigma**2).sqrt() * eps + (i > 0) * sigma * noise
        else:
            mean = tables.posterior_x0_weight[i] * x0 + tables.posterior_xt_weight[i] * x
            share = (raw + 1) / 2
            spread = share * tables.betas[i].log() + (1 - share) * tables.posterior_log_variance[i]
            x = mean + (i > 0) * (0.5 * spread).exp() * noise
        expected.append(x)
    given = {key: value.float() if value.is_floating_point() else value for key, value in given.items()}
    scheduler = respaced_scheduler(kind, products, steps)
    samples, _ = golden.run_sampler({**given, "x.noise": noises.float()}, case, scheduler, steps[::-1])
    torch.testing.assert_close(samples.double(), torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", ["10", "25", "250", "7", "ddim10", "ddim250", "10,5,20", "1"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_respaced_betas_keep_the_products(spec: str, schedule: str) -> None:
    betas = make_scheduler("ddim", schedule, True).betas.double()
    products = torch.cumprod(1 - betas, 0)
    steps = space_timesteps(1000, spec)
    assert steps == sorted(set(steps))
    short = respaced_betas(products, steps)
    assert (short > 0).all() and (short <= 1).all()
    torch.testing.assert_close(torch.cumprod(1 - short, 0), products[steps])


def test_impossible_spacing_is_refused() -> None:
    with pytest.raises(ValueError, match="no stride"):
        space_timesteps(1000, "ddim999")
    with pytest.raises(ValueError, match="can't give 600"):
        space_timesteps(1000, "600,10")


def test_patches_are_the_strided_convolution():
    torch.manual_seed(0)
    embed = PatchEmbed(3, 8, 4)
    images = torch.randn(2, 3, 8, 12)
    conv = torch.nn.functional.conv2d(images, embed.proj.weight, embed.proj.bias, stride=4)
    assert embed.proj(images).shape == conv.shape
    torch.testing.assert_close(embed(images), conv.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)

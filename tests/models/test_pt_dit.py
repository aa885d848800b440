"""PT-DiT: golden parity, the window algebra against brute-force masks, and the facts of the paper."""

import argparse
import itertools
import math
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from dit_suite.converters import ConversionError
from dit_suite.converters import pt_dit as converter
from dit_suite.golden import pt_dit as golden
from dit_suite.golden import read_fixture, section
from dit_suite.models import pt_dit
from dit_suite.models.dit_blocks import AttentionProcessor, from_windows, sincos_2d, to_windows
from dit_suite.models.pt_dit import (
    PT_DIT_SIZES,
    PTDiTTransformer3DModel,
    attention_mac_share,
    pick_compress_ratios,
)
from dit_suite.models.pt_dit_lean import can_run_lean
from dit_suite.models.shifted_windows import Reorder, window_layout
from dit_suite.schedulers.pt_dit_flow import flow_sigmas, resolution_warp

FIXTURES = sorted((Path(__file__).parents[1] / "golden").glob("pt_dit_*.safetensors"))


def tiny(**changes) -> PTDiTTransformer3DModel:
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 2,
        "caption_channels": 8,
        "sample_size": 16,
        "compress_ratios": (1, 4, 4),
    } | changes
    return PTDiTTransformer3DModel(**config).eval()


def awake(model: PTDiTTransformer3DModel) -> PTDiTTransformer3DModel:
    """Gives every zero-initialised layer weights, so that all paths count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(batch: int = 2, size=(16, 16), frames: int | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, *size) if frames is None else (batch, 3, frames, *size)
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, 8, generator=generator),
        "timestep": torch.full((batch,), 400.0),
    }


def test_reordering_is_undone_and_has_the_gather_gradient():
    layout = window_layout((2, 4, 4), (2, 2, 2), (2, 2, 2), (1, 1, 1), torch.device("cpu"))
    tokens = torch.randn(2, 32, 3, dtype=torch.float64, requires_grad=True)
    there = Reorder.apply(tokens, layout.order, layout.inverse)
    assert torch.equal(Reorder.apply(there, layout.inverse, layout.order), tokens)
    assert not torch.equal(there, tokens)
    assert torch.autograd.gradcheck(lambda x: Reorder.apply(x, layout.order, layout.inverse).square(), tokens)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_golden(path):
    results = golden.check(*read_fixture(path))
    assert len(results) >= 10
    assert [r for r in results if not r.passed] == []


@torch.no_grad()
@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_golden_output_of_lean_blocks(path, monkeypatch):
    """The check runs blocks as written, for it hooks them and the pictures are small."""
    monkeypatch.setattr(pt_dit, "can_run_lean", lambda *_: True)
    tensors, config = read_fixture(path)
    given, model = section(tensors, "input"), golden.build(tensors, config)
    out = model(given["latent"], given["text_embeds"], given["timestep"], encoder_attention_mask=given["text_mask"])
    made = golden.as_released(out.sample, model.config.in_channels)
    torch.testing.assert_close(made, tensors["output.model"], atol=golden.FORWARD_TOLERANCE, rtol=0)


def test_the_golden_check_notices_a_changed_weight():
    tensors, config = read_fixture(FIXTURES[0])
    key = "state_dict.transformer_blocks.0.linear_1_visual.weight"
    failed = {r.name for r in golden.check(tensors | {key: tensors[key] + 0.01}, config) if not r.passed}
    assert "model" in failed and "block0_in" not in failed


@pytest.mark.parametrize("grid,window", [((1, 8, 8), (1, 2, 4)), ((4, 4, 8), (2, 2, 4)), ((3, 5, 7), (1, 1, 1))])
def test_windows_are_undone_exactly(grid, window):
    tokens = torch.arange(2.0 * grid[0] * grid[1] * grid[2] * 3).reshape(2, -1, 3)
    cut = to_windows(tokens, grid, window)
    assert torch.equal(from_windows(cut, grid, window), tokens)
    coordinates = torch.tensor(list(itertools.product(*(range(n) for n in grid)))).float()[None]
    first = to_windows(coordinates, grid, window)[0, : window[0] * window[1] * window[2]]
    assert torch.equal(first, torch.tensor(list(itertools.product(*(range(p) for p in window)))).float())


@pytest.mark.parametrize(
    "grid,window", [((1, 4, 4), (1, 2, 2)), ((1, 8, 8), (1, 4, 4)), ((4, 4, 4), (2, 2, 2)), ((8, 4, 4), (4, 2, 2))]
)
def test_window_attention_is_dense_attention_under_a_brute_force_mask(grid, window):
    """Both branches against full attention over all tokens, whose mask comes from coordinates one pair at a time."""
    block = awake(tiny()).transformer_blocks[0]
    count = grid[0] * grid[1] * grid[2]
    tokens = torch.randn(1, count, 32, generator=torch.Generator().manual_seed(2))
    places = list(itertools.product(*(range(n) for n in grid)))
    shift = tuple(p // 2 for p in window)

    def piece(place, offset):
        """Shifted window and non-wrapped region of a place of the original grid."""
        moved = [(x - s) % n for x, s, n in zip(place, offset, grid, strict=True)]
        wrapped = [x < s for x, s in zip(place, offset, strict=True)]
        return [m // p for m, p in zip(moved, window, strict=True)], wrapped

    plain = torch.tensor([[piece(a, (0, 0, 0)) == piece(b, (0, 0, 0)) for b in places] for a in places])
    cut = to_windows(tokens, grid, window).reshape(-1, window[0] * window[1] * window[2], 32)
    ours = from_windows(block.attn1(cut).reshape(1, count, 32), grid, window)
    torch.testing.assert_close(ours, block.attn1(tokens, attention_mask=plain[None, None]), atol=1e-5, rtol=0)

    shifted = torch.tensor([[piece(a, shift) == piece(b, shift) for b in places] for a in places])
    layout = window_layout(grid, window, window, shift, tokens.device)
    ours = block.attend_shifted(to_windows(tokens, grid, window), torch.zeros(1, 6, 32), layout)
    offset, scale, gate = block.proxy_scale_shift_table
    normed = block.norm_shift(tokens) * (1 + scale) + offset
    dense = block.linear_2(gate * block.attn3(normed, attention_mask=shifted[None, None]))
    torch.testing.assert_close(from_windows(ours, grid, window), dense, atol=1e-5, rtol=0)


def test_window_of_one_token_makes_proxies_the_tokens():
    model = awake(tiny())
    block = model.transformer_blocks[0]
    tokens = torch.randn(2, 16, 32)
    assert torch.equal(block.extract_proxies(tokens, (1, 1, 1), (1, 1, 1)), tokens)
    one = tokens.reshape(32, 1, 32)
    torch.testing.assert_close(block.attn1(one), block.attn1.to_out[0](block.attn1.to_v(one)), atol=1e-6, rtol=0)
    attended = tokens + block.proxy_attn1(block.norm_proxy(tokens))
    read = block.pvisual_attn2(block.norm_visual(tokens), block.norm_injected(attended))
    injected = tokens + read @ block.linear_1_visual.weight.T + block.linear_1_visual.bias
    torch.testing.assert_close(block.interact_globally(tokens, tokens), injected, atol=1e-6, rtol=0)
    alone = awake(tiny(shift_window=False)).transformer_blocks[0]
    layout = window_layout((1, 4, 4), (1, 1, 1), (1, 1, 1), (0, 0, 0), tokens.device)
    shift, scale, gate = alone.scale_shift_table[:3]
    through = alone.interact_globally(tokens, tokens)
    values = alone.attn1.to_out[0](alone.attn1.to_v(alone.norm1(through) * (1 + scale) + shift))
    made = alone.attend(tokens, torch.zeros(1, 6, 32), layout)
    torch.testing.assert_close(made, through + gate * values, atol=1e-5, rtol=0)
    assert model(**inputs(), compress_ratios=(1, 1, 1)).sample.isfinite().all()


@pytest.mark.parametrize("window", [2, 4])
def test_score_matrices_of_a_block(window):
    """Fact 8, memory: P^2 + N P + 2 N p scores a head where full attention has N^2."""
    block = awake(tiny(num_layers=1)).transformer_blocks[0]
    scores, sizes = [], {}
    for name in ("proxy_attn1", "pvisual_attn2", "attn1", "attn3"):
        attention = getattr(block, name)
        attention.to_q.register_forward_hook(lambda module, args, out: sizes.update(q=out.shape))
        attention.to_k.register_forward_hook(lambda module, args, out: sizes.update(k=out.shape))
        attention.register_forward_hook(
            lambda *_: scores.append(sizes["q"][0] * sizes["q"][1] * sizes["k"][1]) or sizes.clear()
        )
    ratios = (1, window, window)
    layout = window_layout((1, 8, 8), ratios, ratios, (0, window // 2, window // 2), torch.device("cpu"))
    block.attend(torch.randn(1, 64, 32), torch.zeros(1, 6, 32), layout)
    tokens, size = 64, window**2
    assert sum(scores) == (tokens // size) ** 2 + tokens * tokens // size + 2 * tokens * size


def test_one_window_injects_one_vector_into_every_token():
    block = awake(tiny()).transformer_blocks[0]
    tokens = torch.randn(2, 16, 32)
    proxies = block.extract_proxies(tokens, (1, 4, 4), (1, 4, 4))
    assert proxies.shape == (2, 1, 32)
    added = block.interact_globally(tokens, proxies) - tokens
    torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-6, rtol=0)
    assert (added[0, 0] - added[1, 0]).abs().max() > 1e-3


def test_a_window_over_the_whole_grid_is_full_attention():
    """Fact 3."""
    model = awake(tiny(num_layers=1, shift_window=False))
    block = model.transformer_blocks[0]
    tokens = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(4))
    layout = window_layout((1, 8, 8), (1, 8, 8), (1, 8, 8), (0, 4, 4), tokens.device)
    shift, scale, gate = block.scale_shift_table[:3]
    injected = block.interact_globally(tokens, tokens.mean(dim=1, keepdim=True))
    wanted = injected + gate * block.attn1(block.norm1(injected) * (1 + scale) + shift)
    torch.testing.assert_close(block.attend(tokens, torch.zeros(1, 6, 32), layout), wanted, atol=1e-5, rtol=0)


def test_fresh_global_and_shifted_paths_add_nothing_and_awake_ones_couple_windows():
    """Fact 6: with zero projections a change stays in its window; with weights it reaches every window."""

    def changed_windows(model):
        block = model.transformer_blocks[0]
        tokens = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
        touched = tokens.clone()
        touched[:, :16] = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(5))
        layout = window_layout((1, 8, 8), (1, 4, 4), (1, 4, 4), (0, 2, 2), tokens.device)
        shared = (torch.zeros(1, 6, 32), torch.zeros(1, 1, 32), None, layout)
        moved = (block(touched, *shared) - block(tokens, *shared)).abs().reshape(4, -1).amax(1)
        return (moved > 1e-6).tolist()

    assert changed_windows(tiny()) == [True, False, False, False]
    assert changed_windows(awake(tiny())) == [True] * 4


def test_proxy_modes():
    tokens = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))
    order = torch.cat([torch.randperm(16), 16 + torch.randperm(16)])
    for mode in ("mean", "first", "center", "random"):
        block = tiny(proxy_mode=mode).transformer_blocks[0]
        proxies = block.extract_proxies(tokens, (1, 4, 4), (1, 4, 4))
        again = block.extract_proxies(tokens[:, order], (1, 4, 4), (1, 4, 4))
        assert torch.equal(proxies, block.extract_proxies(tokens, (1, 4, 4), (1, 4, 4)))
        assert torch.allclose(proxies, again, atol=1e-6) == (mode == "mean")
        assert torch.equal(block.extract_proxies(tokens, (1, 1, 1), (1, 1, 1)), tokens)
    assert torch.equal(
        tiny(proxy_mode="center").transformer_blocks[0].extract_proxies(tokens, (1, 4, 4), (1, 4, 4))[0, 0],
        tokens[0, 10],
    )


def test_random_proxies_pick_every_position_about_equally():
    block = tiny(proxy_mode="random").transformer_blocks[0]
    fixed = block.scattered_positions(16000, 16, torch.device("cpu"))
    drawn = block.train().pick_member(torch.arange(16.0).expand(1, 16000, 16)[..., None], 0).flatten().long()
    for chosen in (fixed, drawn):
        assert (torch.bincount(chosen, minlength=16) - 1000).abs().max() < 200
    other = tiny(proxy_mode="random").transformer_blocks[1].scattered_positions(64, 16, torch.device("cpu"))
    assert not torch.equal(other, fixed[:64])


def test_random_proxies_of_evaluation_are_those_of_every_row():
    """Guidance puts the same picture into two rows, which must see the same proxies; training draws for each."""
    block = tiny(proxy_mode="random").transformer_blocks[0]
    tokens = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
    proxies = block.extract_proxies(tokens, (1, 4, 4), (1, 4, 4))
    assert torch.equal(proxies[0], proxies[1])
    assert torch.equal(proxies[:1], block.extract_proxies(tokens[:1], (1, 4, 4), (1, 4, 4)))
    drawn = torch.stack([block.train().extract_proxies(tokens, (1, 4, 4), (1, 4, 4)) for _ in range(4)])
    assert not torch.equal(drawn[:, 0], drawn[:, 1])


def test_finer_proxies_interleaved_and_contiguous():
    tokens = torch.arange(16.0).reshape(1, 16, 1)
    interleaved = tiny().transformer_blocks[0].extract_proxies(tokens, (1, 4, 4), (1, 2, 2))
    contiguous = tiny(proxy_layout="contiguous").transformer_blocks[0].extract_proxies(tokens, (1, 4, 4), (1, 2, 2))
    assert interleaved.flatten().tolist() == [5.0, 6.0, 9.0, 10.0]
    assert contiguous.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    first = tiny(proxy_mode="first").transformer_blocks[0].extract_proxies(tokens, (1, 4, 4), (1, 2, 2))
    assert first.flatten().tolist() == [0.0, 1.0, 4.0, 5.0]


@pytest.mark.parametrize(
    "tokens,window,percent", [(256, 4, 34.375), (1024, 16, 9.766), (4096, 64, 4.712), (16384, 256, 3.517)]
)
def test_attention_share_by_torchs_counter(tokens, window, percent):
    """Fact 8, counted: on the meta device attention is two batched products, linear layers are `addmm`."""
    ratio = int(window**0.5)
    with torch.device("meta"):
        block = tiny().transformer_blocks[0]
        hidden = torch.zeros(1, tokens, 32)
        windows = hidden.reshape(-1, window, 32)

        def count(call) -> int:
            with FlopCounterMode(display=False) as counter:
                call()
            table = counter.get_flop_counts()["Global"]
            return sum(n for op, n in table.items() if "bmm" in str(op))

        proxies = block.extract_proxies(hidden, (1, ratio, ratio), (1, ratio, ratio))
        ours = count(lambda: block.interact_globally(hidden, proxies)) + 2 * count(lambda: block.attn1(windows))
        full = count(lambda: block.attn1(hidden))
    assert full == 2 * 2 * tokens**2 * 32
    proxies_count = tokens // window
    assert ours == 2 * 2 * 32 * (proxies_count**2 + tokens * proxies_count + 2 * tokens * window)
    assert ours / full == pytest.approx(attention_mac_share(tokens, window), rel=1e-9)
    assert 100 * ours / full == pytest.approx(percent, abs=1e-3)


def test_mixed_timesteps_and_batch_splits_agree_with_single_runs():
    model = awake(tiny(compress_ratios=(1, 2, 2)))
    both = inputs(batch=3) | {"timestep": torch.tensor([10.0, 500.0, 990.0])}
    together = model(**both).sample
    for i in range(3):
        alone = model(**{key: value[i : i + 1] for key, value in both.items()}).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=0)
    assert (model(**both | {"timestep": torch.full((3,), 10.0)}).sample[1] - together[1]).abs().max() > 1e-2


def test_several_sizes_in_one_process_and_sizes_that_do_not_fit():
    model = awake(tiny(compress_ratios=None))
    small, wide = inputs(), inputs(size=(16, 32))
    first = model(**small).sample
    assert model(**wide).sample.shape == (2, 3, 16, 32)
    assert torch.equal(model(**small).sample, first)
    with pytest.raises(ValueError, match="width 12, which does not split into 8 windows"):
        model(**inputs(size=(16, 24)))
    with pytest.raises(ValueError, match="height 8, which is not a multiple of the window ratio 3"):
        model(**small, compress_ratios=(1, 3, 2))
    finer = tiny(proxy_compress_ratios=(1, 2, 2))
    assert finer.resolve_windows((1, 8, 8), (1, 8, 4))[1] == (1, 2, 2), "windows of a call keep the finer proxies"
    with pytest.raises(ValueError, match=r"windows of \(1, 1, 4\) tokens are not made of proxies of \(1, 2, 2\)"):
        finer(**small, compress_ratios=(1, 1, 4))
    with pytest.raises(ValueError, match="multiples of the patch size 2, got 15 x 16"):
        model(**inputs(size=(15, 16)))


def test_rows_and_columns_keep_their_places_on_a_wide_canvas():
    """The reference scrambles the positions of inputs that are not square."""
    model = tiny()
    table = model.position_table((1, 4, 6), torch.device("cpu")).reshape(4, 6, 32)
    assert not torch.equal(table[0, :, 20:], table[3, :, 20:])
    assert torch.equal(table[1, :, 8:20], table[3, :, 8:20])
    assert torch.equal(table[:, 1, 20:], table[:, 5, 20:])
    torch.testing.assert_close(table[2, 0, 20], torch.tensor(2.0).sin())


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"shift_window": [True, False]}, {"proxy_mode": "first"}])
def test_lean_blocks_are_the_blocks(changes, monkeypatch):
    """The short cuts of CPU inference against the block as written: queries projected (long text) or not, one noise
    level for the batch or one per sample, masked text."""
    model = awake(tiny(compress_ratios=None, **changes))
    calls = []
    lean = pt_dit.lean_block
    monkeypatch.setattr(pt_dit, "lean_block", lambda *given: calls.append(1) or lean(*given))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    for size, length in (((16, 32), 5), ((32, 32), 80)):
        given = inputs(size=size) | {"encoder_hidden_states": torch.randn(2, length, 8)}
        for timestep in (torch.tensor([10.0, 900.0]), torch.tensor(400.0).expand(2), torch.tensor([400.0])):
            for text_mask in (None, mask if length == 5 else torch.arange(80).expand(2, -1) < 70):
                call = given | {"timestep": timestep, "encoder_attention_mask": text_mask}
                short = model(**call).sample
                with torch.enable_grad():
                    torch.testing.assert_close(short, model(**call).sample.detach(), atol=2e-5, rtol=1e-5)
    assert len(calls) == 2 * 12


@torch.no_grad()
def test_touched_blocks_run_as_written():
    """Hooks, wrapped layers, other processors, other types: nothing is bypassed."""
    model = awake(tiny())
    tokens = torch.zeros(1, 128, 32)
    assert can_run_lean(model.transformer_blocks, tokens)
    seen = []
    handle = model.transformer_blocks[1].attn2.to_q.register_forward_hook(lambda *_: seen.append(1))
    model(**inputs(size=(16, 32)))
    handle.remove()
    assert seen == [1] and can_run_lean(model.transformer_blocks, tokens)

    class Replaced(AttentionProcessor):
        pass

    def processor(block):
        block.attn1.set_processor(Replaced())

    def wrapped(block):
        block.ff.forward = block.ff.forward

    def adapted(block):
        block.attn3.to_v = torch.nn.Sequential(block.attn3.to_v)
        block.attn3.to_v.weight = block.attn3.to_v[0].weight

    def backend(block):
        block.pvisual_attn2.set_attention_backend("native")

    for change in (processor, wrapped, adapted, backend, lambda block: block.double(), lambda block: block.compile()):
        model = awake(tiny())
        change(model.transformer_blocks[0])
        assert not can_run_lean(model.transformer_blocks, tokens)
    assert not can_run_lean([], tokens.double()) and not can_run_lean([], tokens[:, :64])
    with torch.enable_grad():
        assert not can_run_lean([], tokens)


def test_masked_text_has_no_effect_and_visible_text_has():
    model = awake(tiny())
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    base = inputs()
    out = model(**base, encoder_attention_mask=mask).sample
    changed = base["encoder_hidden_states"].clone()
    changed[:, 4] += 100
    same = model(**base | {"encoder_hidden_states": changed}, encoder_attention_mask=mask).sample
    assert torch.equal(out, same)
    changed[:, 0] += 1
    assert (
        model(**base | {"encoder_hidden_states": changed}, encoder_attention_mask=mask).sample - out
    ).abs().max() > 1e-4


def test_an_image_is_a_video_of_one_frame_and_videos_take_the_same_weights():
    model = awake(tiny(compress_ratios=None))
    image = inputs()
    video = image | {"hidden_states": image["hidden_states"][:, :, None]}
    assert torch.equal(model(**image).sample, model(**video).sample[:, :, 0])
    clip = model(**inputs(frames=4)).sample
    assert clip.shape == (2, 3, 4, 16, 16) and clip.isfinite().all()
    with pytest.raises(ValueError, match="frames 3, which is not a multiple of the window ratio 4"):
        model(**inputs(frames=3))


def test_ratio_picker():
    assert [pick_compress_ratios((1, n, n)) for n in (16, 32, 64, 128)] == [(1, r, r) for r in (2, 4, 8, 16)]
    assert pick_compress_ratios((24, 32, 64)) == (4, 4, 8)


def test_single_window_axis_can_be_left_unshifted():
    model = tiny(shift_single_window=False)
    assert model.resolve_windows((1, 4, 8), None)[2] == (0, 0, 2)
    assert tiny().resolve_windows((1, 4, 8), None)[2] == (0, 2, 2)


@pytest.mark.parametrize("size,millions", [("S", 26.9), ("B", 153.8), ("L", 637.7), ("XL", 1131.6), ("H", 1890.7)])
def test_parameter_counts(size, millions):
    with init_empty_weights():
        model = PTDiTTransformer3DModel(**PT_DIT_SIZES[size])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_timestep_warp():
    assert resolution_warp(512, 512) == 1 and resolution_warp(1024, 1024) == 2
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=flow_sigmas(2))
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 1000 * 2 / 3])
    assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_a_constant_velocity_adds_it_once(guidance):
    """Fact 15: the steps sum to one, and guidance 1 is the conditional branch."""
    tensors, config = read_fixture(next(path for path in FIXTURES if path.stem == "pt_dit_image"))
    velocities = torch.tensor([-0.2, 0.7]).reshape(2, 1, 1, 1)

    model = golden.build(tensors, config)
    model.forward = lambda latents, *given, **more: (velocities[-len(latents) :].expand_as(latents),)
    made = golden.sample(model, tensors, config["sample"] | {"cfg_scale": guidance})["sample_final"]
    wanted = tensors["input.sample_noise"] - (-0.2 + guidance * 0.9)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)


def test_converter_is_strict(tmp_path):
    tensors, config = read_fixture(FIXTURES[0])
    weights = section(tensors, "state_dict")
    save_file(weights, tmp_path / "model.safetensors")
    arguments = argparse.Namespace(heads=config["num_heads"], sample_size=config["sample_size"])
    model = converter.convert(tmp_path / "model.safetensors", arguments)
    back = model.state_dict()
    assert len(back) == len(weights) - 1
    assert all(torch.equal(back[ours], value) for ours, value in converter.convert_keys(weights).items())
    turned = back["proj_out.bias"] / weights["proj_out.bias"]
    assert turned.reshape(4, 8).tolist() == [[-1.0] * 4 + [1.0] * 4] * 4, "x0 - noise becomes noise - x0"
    for name, change in {"extra.weight": torch.zeros(1), "proj_out.bias": None}.items():
        broken = {key: value for key, value in weights.items() if key != name}
        save_file(broken if change is None else broken | {name: change}, tmp_path / "broken.safetensors")
        with pytest.raises(ConversionError, match=name):
            converter.convert(tmp_path / "broken.safetensors", arguments)


@torch.no_grad()
def test_size_conditions_of_the_1024_px_layout(tmp_path):
    """PixArt's embeddings of height, width and aspect ratio: a third of the width each, added to the time embedding,
    nothing in a fresh network; the converter finds them by their names."""
    shape = {"attention_head_dim": 24, "use_additional_conditions": True}
    added = {"resolution": torch.tensor([[512.0, 1024.0], [64.0, 64.0]]), "aspect_ratio": torch.tensor([[0.5], [1.0]])}
    given = inputs() | {"added_cond_kwargs": added}
    fresh = tiny(**shape)
    fresh.proj_out.weight.normal_()
    plain = tiny(attention_head_dim=24)
    plain.load_state_dict(fresh.state_dict(), strict=False)
    torch.testing.assert_close(fresh(**given).sample, plain(**inputs()).sample, atol=1e-5, rtol=0)

    model = awake(fresh)
    seen = []
    model.adaln_single.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    wanted_sample = model(**given).sample
    embedder = model.adaln_single.emb

    def features(values):
        angles = values[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    resolution = embedder.resolution_embedder(features(added["resolution"].flatten())).reshape(2, 32)
    sizes = torch.cat([resolution, embedder.aspect_ratio_embedder(features(added["aspect_ratio"].flatten()))], dim=1)
    wanted = embedder.timestep_embedder(features(given["timestep"])) + sizes
    torch.testing.assert_close(seen[0], wanted, atol=1e-4, rtol=1e-4)

    def renamed(tensors):
        return {key.replace("patch_embed.proj", "pos_embed.proj"): value for key, value in tensors.items()}

    names = renamed(converter.convert_keys(renamed(model.state_dict())))  # turning the sign undoes itself
    assert names["adaln_single.emb.resolution_embedder.linear_1.weight"].shape == (16, 256)
    save_file({key: value.contiguous() for key, value in names.items()}, tmp_path / "model.safetensors")
    arguments = argparse.Namespace(heads=2, sample_size=16)
    converted = converter.convert(tmp_path / "model.safetensors", arguments)
    assert converted.config.use_additional_conditions
    made = converted(**given, compress_ratios=(1, 4, 4)).sample
    torch.testing.assert_close(made, wanted_sample, atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter_and_checkpointing_changes_nothing():
    model = awake(tiny()).train()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs()).sample.square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(g.abs().max() > 0 for name, g in grads[0].items() if not name.endswith("to_k.bias"))
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], atol=5e-6, rtol=0)


def test_compiles_to_one_graph_with_gradients():
    """The window reordering has a gradient of its own; inference is compiled by the conformance suite."""
    model = awake(tiny(num_layers=1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")(**inputs()).sample
    torch.testing.assert_close(compiled, model(**inputs()).sample, atol=1e-6, rtol=0)


def test_shifted_windows_in_some_blocks_and_positions_without_time():
    model = tiny(shift_window=[False, True])
    assert [hasattr(block, "attn3") for block in model.transformer_blocks] == [False, True]
    assert model(**inputs()).sample.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="one flag per block, 2, got 3"):
        tiny(shift_window=[True] * 3)
    table = tiny(time_share=0.0).position_table((1, 4, 6), torch.device("cpu"))
    torch.testing.assert_close(table, sincos_2d(4, 6, 32))
    with pytest.raises(ValueError, match="time_share must be 0 or 0.25"):
        tiny(time_share=0.3)

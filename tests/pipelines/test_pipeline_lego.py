"""LEGO sampling: bricks that are skipped do not run, canvases, guidance, per-sample randomness, bad input."""

import inspect
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dit_suite.call_options import LegoOptions
from dit_suite.golden import lego as golden
from dit_suite.golden import read_fixture
from dit_suite.models.lego import LegoTransformer2DModel
from dit_suite.options import fields_of
from dit_suite.pipelines.pipeline_lego import (
    LegoPipeline,
    skipped_steps,
    window_offset,
    window_starts,
    window_weights,
)
from dit_suite.schedulers.edm_heun import EDMHeunScheduler
from dit_suite.schedulers.generators import sample_generators
from dit_suite.step_plan import current_step
from tests.tiny import save_lora

FOLDER = Path(__file__).parents[1] / "golden"
SIZES = {"PG": (4, 8, 16), "PR": (16, 8, 4), "U": (16, 4, 16)}


def make(stack: str = "PG", **changes) -> LegoPipeline:
    torch.manual_seed(0)
    shape = {
        "sample_size": 16,
        "brick_sizes": SIZES[stack],
        "patch_sizes": (2, 4, 4) if stack == "PG" else (4, 4, 2),
        "brick_depths": (1, 1, 1),
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_classes": 5,
    }
    model = LegoTransformer2DModel(**(shape | changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    pipe = LegoPipeline(model, EDMHeunScheduler(), id2label={"0": "cat, kitten", "1": "dog"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: LegoPipeline, labels=(1, 3), seed: int = 0, **options) -> torch.Tensor:
    given = {
        "num_inference_steps": 4,
        "output_type": "latent",
        "generator": sample_generators(seed, range(len(labels))),
    }
    return pipe(list(labels), **(given | options)).images


def count_bricks(pipe: LegoPipeline) -> list[int]:
    calls = [0] * len(pipe.transformer.bricks)
    for index, brick in enumerate(pipe.transformer.bricks):
        brick.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    return calls


@pytest.mark.parametrize("name", ["lego_pg", "lego_pr"])
def test_the_pipeline_reproduces_the_golden_samples(name):
    """Unskipped, guided, and skipped in the direction that the stack implies."""
    tensors, config = read_fixture(FOLDER / f"{name}.safetensors")
    settings = config["sampler"]
    pipe = LegoPipeline(golden.build(tensors, config), EDMHeunScheduler())
    pipe.set_progress_bar_config(disable=True)
    labels = tensors["input.class_labels"].argmax(1).tolist()
    call = {
        "num_inference_steps": settings["num_steps"],
        "latents": tensors["input.latents"],
        "output_type": "latent",
    }
    direction = "late" if name == "lego_pg" else "early"
    for expected, options in {
        "sample_full": {"guidance_scale": 1.0},
        "sample_cfg": {"guidance_scale": config["cfg_scale"]},
        f"sample_skip_last_{direction}": {"guidance_scale": 1.0, "t_break": settings["skip_t_break"]},
    }.items():
        found = pipe(labels, **call, **options).images
        torch.testing.assert_close(found, tensors[f"output.{expected}"], atol=1e-3, rtol=0)


def test_the_pipeline_runs_the_u_stack_as_the_golden_sampler_does():
    """`lego_u`: unskipped, guided, and skipped in both directions, which the caller chooses."""
    tensors, config = read_fixture(FOLDER / "lego_u.safetensors")
    settings = config["sampler"]
    pipe = LegoPipeline(golden.build(tensors, config), EDMHeunScheduler())
    pipe.set_progress_bar_config(disable=True)
    call = {
        "num_inference_steps": settings["num_steps"], "latents": tensors["input.latents"], "output_type": "latent",
    }  # fmt: skip
    skipping = {"guidance_scale": 1.0, "t_break": settings["skip_t_break"]}
    for expected, options in {
        "sample_full": {"guidance_scale": 1.0},
        "sample_cfg": {"guidance_scale": config["cfg_scale"]},
        "sample_skip_last_early": skipping | {"skip_direction": "early"},
        "sample_skip_last_late": skipping | {"skip_direction": "late"},
    }.items():
        found = pipe(tensors["input.class_labels"].argmax(1).tolist(), **call, **options).images
        torch.testing.assert_close(found, tensors[f"output.{expected}"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("stack,direction", [("PG", "late"), ("PR", "early")])
@pytest.mark.parametrize("guidance,batched", [(1.0, True), (2.0, True), (2.0, False)])
def test_skipped_bricks_do_not_run(stack, direction, guidance, batched):
    """Facts 3 and 4: the last brick loses both evaluations of every skipped step, guidance or not."""
    passes = 2 if guidance > 1 and not batched else 1
    for t_break in (0.0, 0.5, 1.0):
        pipe = make(stack)
        calls = count_bricks(pipe)
        run(pipe, t_break=t_break, guidance_scale=guidance, batched_guidance=batched)
        steps = skipped_steps(4, t_break, direction)
        saved = 2 * len(steps) - (1 if 3 in steps else 0)
        assert calls == [7 * passes, 7 * passes, (7 - saved) * passes]


def test_t_break_zero_changes_nothing_and_one_is_the_truncated_chain():
    pipe = make()
    full = run(pipe)
    assert torch.equal(run(pipe, t_break=0.0, skip_direction="early"), full)
    every = run(pipe, t_break=1.0)
    short = make(brick_sizes=(4, 8), patch_sizes=(2, 4), brick_depths=(1, 1))
    state = {k: v for k, v in pipe.transformer.state_dict().items() if not k.startswith("bricks.2")}
    short.transformer.load_state_dict(state)
    short.transformer.register_to_config(sample_size=16)
    assert torch.equal(run(short, canvas="grid"), every)
    assert (every - full).abs().max() > 1e-2
    half = run(pipe, t_break=0.5)
    assert (half - full).abs().max() > 1e-3 and (half - every).abs().max() > 1e-3


def test_steps_to_skip():
    assert list(skipped_steps(10, 0.3, "late")) == [7, 8, 9]
    assert list(skipped_steps(10, 0.3, "early")) == [0, 1, 2]
    assert list(skipped_steps(10, 0.0, "late")) == [] and len(skipped_steps(10, 1.0, "early")) == 10


def test_the_plan_tells_every_evaluation_about_its_step():
    pipe = make()
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(current_step()))
    run(pipe, t_break=0.5, guidance_scale=2.0)
    assert [(c.step_index, c.evaluation) for c in seen] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert [c.extras.get("stop_after") for c in seen] == [None] * 4 + [1] * 3
    assert {c.branch for c in seen} == {"batched"} and len({id(c.run) for c in seen}) == 1
    assert current_step() is None


def test_a_u_stack_needs_a_direction():
    pipe = make("U")
    with pytest.raises(ValueError, match=r"\[16, 4, 16\] do not say .* give skip_direction"):
        run(pipe, t_break=0.5)
    run(pipe, t_break=0.5, skip_direction="late")


def test_canvases_that_are_not_square_or_trained():
    pipe = make()
    assert run(pipe, height=16, width=40).shape == (2, 3, 16, 40)
    assert run(pipe, height=32, width=16, canvas="grid").shape == (2, 3, 32, 16)
    assert torch.equal(run(pipe, canvas="overlap"), run(pipe, canvas="grid")) or torch.allclose(
        run(pipe, canvas="overlap"), run(pipe, canvas="grid"), atol=1e-5
    )
    for bad, message in (
        ({"height": 8, "width": 16}, "height 8 does not fit the drift canvas: it takes any size from 16 up"),
        (
            {"height": 16, "width": 24, "canvas": "grid"},
            "width 24 does not fit the grid canvas: it takes multiples of 16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(pipe, **bad)


def seam_ratio(image: torch.Tensor, columns: list[int]) -> float:
    """Mean jump across the given column borders over the mean jump across all others."""
    jumps = image.diff(dim=-1).abs().mean((0, 1, 2))
    at = torch.zeros(len(jumps), dtype=torch.bool)
    at[[column - 1 for column in columns]] = True
    return float(jumps[at].mean() / jumps[~at].mean())


class SawTooth(torch.nn.Module):
    """Predicts a ramp over every 16 columns, as a network would whose windows know nothing of each other."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, hidden_states, timestep, class_labels, stop_after=None, return_dict=False):
        ramp = torch.linspace(-1, 1, 16).repeat(hidden_states.shape[-1] // 16)
        return (ramp.expand(hidden_states.shape),)


@pytest.mark.parametrize("canvas", ["overlap", "drift"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_of_any_canvas_average_to_what_they_agree_on(canvas, dtype):
    """Windows that predict their own input give back the canvas, odd sizes and bfloat16 included."""
    pipe = make()
    pipe.transformer.forward = lambda windows, *given, **more: (windows,)
    scaled = torch.randn(2, 3, 16, 25, generator=torch.Generator().manual_seed(0)).to(dtype)
    for step in range(4):
        whole = pipe.run_network(scaled, -0.5, torch.tensor([1, 3]), canvas, None, step)
        torch.testing.assert_close(whole, scaled.float(), atol=1e-5, rtol=0)


def test_sizes_that_half_windows_do_not_tile():
    pipe = make()
    for canvas in ("overlap", "drift"):
        assert run(pipe, height=17, width=25, canvas=canvas).isfinite().all()


def test_a_bfloat16_panorama_is_near_the_float32_one():
    wide = {"height": 16, "width": 25, "num_inference_steps": 3}
    exact = run(make(), **wide)
    pipe = make()
    pipe.transformer.to(torch.bfloat16)
    rounded = run(pipe, **wide)
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_overlapping_windows_leave_no_seam():
    """Where the grid jumps from one window to the next, the overlap canvas is as smooth as anywhere."""
    pipe = make()
    pipe.transformer = SawTooth(pipe.transformer.config)
    labels = torch.tensor([1, 3])
    canvas = torch.zeros(2, 3, 16, 48)
    grid = pipe.run_network(canvas, -0.5, labels, "grid", None)
    overlap = pipe.run_network(canvas, -0.5, labels, "overlap", None)
    assert seam_ratio(grid, [16, 32]) > 10
    assert seam_ratio(overlap, [8, 16, 24, 32, 40]) < 1.1


def test_drifting_windows_cover_the_canvas_with_other_borders_in_every_step():
    offsets = [window_offset(step, 64) for step in range(32)]
    assert sorted(offsets) == list(range(32)) and offsets[0] == 0
    for offset in offsets:
        starts = window_starts(160, 64, offset)
        assert starts[0] == 0 and starts[-1] == 96 and max(b - a for a, b in pairwise(starts)) <= 32
    assert window_starts(64, 64, 13) == [0]
    pipe = make()
    seen = []
    inner = pipe.transformer.forward
    pipe.transformer.forward = lambda *given, **more: seen.append(len(given[0])) or inner(*given, **more)
    drifting = run(pipe, height=16, width=40, canvas="drift")
    assert seen == [16] * 2 + [20] * 5
    assert drifting.isfinite().all() and not torch.equal(drifting, run(pipe, height=16, width=40, canvas="overlap"))
    assert torch.equal(drifting, run(pipe, height=16, width=40))
    assert torch.equal(run(pipe, canvas="drift"), run(pipe, canvas="overlap"))


def test_window_layout():
    assert window_starts(160, 64) == [0, 32, 64, 96] and window_starts(64, 64) == [0]
    weight = window_weights(8, torch.device("cpu"), torch.float64)
    assert torch.equal(weight, weight.flip(0)) and torch.equal(weight, weight.T) and weight.min() > 0
    assert weight[0, 3] < 0.3 * weight[3, 3]


def test_batch_of_samples_equals_single_samples():
    pipe = make()
    for options in ({}, {"s_churn": 2.0}, {"t_break": 0.5, "guidance_scale": 2.0}):
        both = run(pipe, labels=(1, 3), seed=5, **options)
        alone = pipe(
            [3], num_inference_steps=4, output_type="latent", generator=sample_generators(5, [1]), **options
        ).images
        torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    assert (run(pipe, s_churn=2.0) - run(pipe)).abs().max() > 1e-3


def test_names_null_class_and_unconditional_networks():
    pipe = make()
    assert pipe.get_label_ids(["Kitten", "dog", 4, None, "3"]) == [0, 1, 4, 5, 3]
    alone = make(num_classes=0)
    assert run(alone, labels=(None,)).shape == (1, 3, 16, 16)
    for labels, options, message in (
        ((9,), {}, "between 0 and 4, got 9"),
        (("bird",), {}, "no class 'bird'"),
        ((1.5,), {}, "ids or names, got 1.5"),
        ((1,), {"t_break": 1.4}, "t_break must be between 0 and 1, got 1.4"),
        ((1,), {"skip_direction": "up"}, "skip_direction must be one of"),
        ((1,), {"num_inference_steps": 0}, "at least 1, got 0"),
        ((1,), {"output_type": "jpg"}, "output_type must be one of"),
        ((1,), {"latents": torch.zeros(1, 3, 8, 8)}, "latents must have the shape"),
        ((1,), {"generator": sample_generators(0, [0, 1])}, "2 generators were given for 1 samples"),
        ((1,), {"callback_on_step_end_tensor_inputs": ["noise"]}, "callbacks can have"),
    ):
        with pytest.raises(ValueError, match=message):
            run(pipe, labels=labels, **options)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="sampled with EDMHeunScheduler, not DDIMScheduler"):
        run(pipe)
    with pytest.raises(ValueError, match="unconditional: class_labels must be None"):
        run(alone, labels=(1,))
    with pytest.raises(ValueError, match="can't be guided"):
        run(alone, labels=(None,), guidance_scale=2.0)


def test_outputs_and_round_trip(tmp_path):
    pipe = make()
    array = pipe(1, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert array.shape == (1, 16, 16, 3) and array.min() >= 0 and array.max() <= 1
    pipe.save_pretrained(tmp_path)
    again = LegoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    same = again("dog", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert np.array_equal(array, same)


def test_lora_changes_the_picture_and_comes_off(tmp_path):
    pipe = make()
    before = run(pipe)
    save_lora(make().transformer, tmp_path)
    pipe.load_lora_weights(tmp_path)
    assert (run(pipe) - before).abs().max() > 1e-2
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), before)


def test_callbacks_and_interruption():
    pipe = make()
    calls = count_bricks(pipe)

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == 2
        return {}

    run(pipe, callback_on_step_end=stop)
    assert calls == [3, 3, 3]

    def zero(pipe, index, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if index == pipe.num_timesteps - 1 else {}

    assert not run(pipe, callback_on_step_end=zero).any()


def test_option_names_are_keywords_of_the_call():
    keywords = inspect.signature(LegoPipeline.__call__).parameters
    assert {field.name for field in fields_of(LegoOptions)} <= set(keywords)
    assert LegoOptions().t_break == 0.0
    with pytest.raises(ValueError, match="t_break must be between 0 and 1"):
        LegoOptions(t_break=1.5)

"""TarFlow pipeline: same pictures for every solver, per-sample purity, callbacks, interruption, saving, messages."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading

from dit_suite import load_pipeline
from dit_suite.call_options import TarFlowOptions
from dit_suite.options import fields_of
from dit_suite.pipelines.pipeline_tarflow import TarFlowPipeline
from dit_suite.schedulers.generators import sample_generators
from dit_suite.schedulers.gs_jacobi import BlockStrategy, GSJacobiScheduler
from dit_suite.schedulers.tarflow_planner import psnr
from dit_suite.step_plan import current_step
from tests.models.test_tarflow import tiny_model


def tiny_pipe(scheduler: GSJacobiScheduler | None = None, **changes) -> TarFlowPipeline:
    model = tiny_model(**{"in_channels": 3, "spread": 0.2, **changes})
    names = {index: f"style/{name}" for index, name in enumerate(("cat", "dog", "sun")[: model.config.num_classes])}
    pipe = TarFlowPipeline(model, scheduler or GSJacobiScheduler([0, 1, 3], [1, 3, 2]), id2label=names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, labels=(0, 1, 2), seed=0, **given) -> np.ndarray:
    generators = sample_generators(seed, range(len(labels)))
    return pipe(list(labels), generator=generators, output_type="np", return_dict=False, **given)[0]


def test_solvers_agree_when_run_to_the_end():
    pipe = tiny_pipe()
    exact = run(pipe, strategy="sequential")
    assert exact.std() > 0.05
    np.testing.assert_allclose(run(pipe, strategy="jacobi", sweeps=9), exact, atol=2e-5)
    np.testing.assert_allclose(run(pipe, strategy="gauss-seidel", modules=4, sweeps=3), exact, atol=2e-5)
    planned = run(pipe)
    assert 1e-6 < np.abs(planned - exact).max() < 0.2


def test_guidance_reaches_the_solver():
    pipe = tiny_pipe()
    plain = run(pipe, strategy="sequential")
    guided = run(pipe, strategy="sequential", guidance_scale=2.0)
    assert np.abs(plain - guided).max() > 1e-3
    assert np.array_equal(plain, run(pipe, strategy="sequential", guidance_scale=1.0, annealed_guidance=False))
    np.testing.assert_allclose(run(pipe, strategy="jacobi", sweeps=9, guidance_scale=2.0), guided, atol=5e-5)


def test_guidance_without_a_class_costs_nothing():
    """ "No class" is the weaker branch itself; beside a sample with a class it is left as it is."""
    pipe, rows = tiny_pipe(), []
    plain = run(pipe, (None, None), strategy="jacobi", sweeps=2, denoise_strength=0.0)
    pipe.transformer.blocks[0].proj_in.register_forward_pre_hook(lambda m, a: rows.append(a[0].shape[0]))
    given = {"strategy": "jacobi", "sweeps": 2, "denoise_strength": 0.0, "guidance_scale": 3.0}
    assert np.array_equal(run(pipe, (None, None), **given), plain)
    assert rows == [2, 2]
    mixed = run(pipe, (None, 1), **given)
    assert rows == [2, 2, 4, 4]
    np.testing.assert_allclose(mixed[0], plain[0], atol=1e-5)


def test_first_guess_of_fixed_strategies():
    pipe, given = linear_pipe(), {"strategy": "jacobi", "denoise_strength": 0.0}
    found = {guess: run(pipe, sweeps=1, guess=guess, **given) for guess in ("latent", "zero", "linear")}
    assert np.array_equal(found["latent"], run(pipe, sweeps=1, **given))
    assert min(np.abs(found["latent"] - found[guess]).max() for guess in ("zero", "linear")) > 1e-3
    exact = run(pipe, strategy="sequential", denoise_strength=0.0)
    np.testing.assert_allclose(run(pipe, sweeps=9, guess="linear", **given), exact, atol=2e-5)


def test_the_score_step_in_parts_is_the_score_step():
    """18 rows are two parts."""
    pipe = tiny_pipe()
    sample = torch.randn(18, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(18) % 3
    found = pipe.denoise(sample, labels, 0.7)
    torch.testing.assert_close(found, pipe.transformer.denoise(sample, labels, 0.7), atol=1e-6, rtol=0)
    assert (found - sample).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_a_sample_is_a_function_of_its_generator_alone():
    pipe = tiny_pipe(GSJacobiScheduler([0, 1, 3], [1, 5, 2], tolerance=1e-2))
    together = run(pipe, (0, 1, 2, 0))
    for i, label in enumerate((0, 1, 2, 0)):
        alone = pipe([label], generator=sample_generators(0, [i]), output_type="np", return_dict=False)[0]
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


def test_denoising_is_the_last_step_and_optional():
    pipe = tiny_pipe()
    raw = pipe([1], generator=sample_generators(0, [0]), output_type="latent").images
    noisy = pipe([1], generator=sample_generators(0, [0]), output_type="pt", denoise_strength=0.0).images
    torch.testing.assert_close(noisy, raw.clamp(-1, 1) / 2 + 0.5)
    clean = pipe([1], generator=sample_generators(0, [0]), output_type="pt").images
    wanted = pipe.transformer.denoise(raw, torch.tensor([1]))
    torch.testing.assert_close(clean, wanted.clamp(-1, 1) / 2 + 0.5)
    assert (clean - noisy).abs().max() > 1e-4


def test_output_says_how_each_block_was_solved():
    output = tiny_pipe()([0], generator=torch.Generator().manual_seed(0))
    assert [trace.block for trace in output.blocks] == [2, 1, 0]
    assert [trace.calls for trace in output.blocks] == [8, 3, 6]
    assert output.blocks[1].residual_rms().shape == (3, 1)
    assert output.images[0].size == (6, 6)


def test_callback_previews_and_replacement():
    pipe, seen = tiny_pipe(), []

    def watch(p, number, block, tensors):
        seen.append((number, int(block), tensors["latents"].shape, len(p.decode(tensors["latents"], "pil"))))
        if number == p.num_timesteps - 1:
            return {"latents": torch.zeros_like(tensors["latents"])}
        return {}

    images = pipe([0, 1], output_type="latent", callback_on_step_end=watch).images
    assert images.abs().max() == 0
    assert seen == [(i, 2 - i, (2, 3, 6, 6), 2) for i in range(3)]


def test_interruption_between_blocks_and_within_a_block():
    pipe, calls = tiny_pipe(), []
    pipe.transformer.blocks[1].proj_in.register_forward_pre_hook(lambda m, a: calls.append(current_step().step_index))

    def stop(p, number, block, tensors):
        p._interrupt = True
        return {}

    pipe([0], callback_on_step_end=stop)
    assert calls == []

    def stop_inside(module, args):
        pipe._interrupt = True

    handle = pipe.transformer.blocks[1].proj_in.register_forward_pre_hook(stop_inside)
    output = pipe([0])
    handle.remove()
    assert calls == [1] and output.blocks[-1].interrupted and len(output.blocks) == 2
    pipe([0], denoise_strength=0.0)
    assert calls == [1] + [1] * 3
    pipe([0])
    assert calls[4:] == [1] * 3 + [3]


def test_progress_counts_network_calls(capsys):
    pipe = tiny_pipe()
    pipe.set_progress_bar_config(disable=False)
    pipe([0], strategy="jacobi", sweeps=20, tolerance=1e-3)
    assert "60/60" in capsys.readouterr().err


def test_network_calls_are_reported_within_blocks():
    """8 tokens, 3 sweeps, 3 modules of 2 sweeps. What early stopping saves counts as done."""
    pipe, seen, blocks = tiny_pipe(), [], []
    given = {"callback_on_network_call": lambda p, done, total: seen.append((p is pipe, done, total))}
    given["callback_on_step_end"] = lambda p, number, block, tensors: blocks.append(len(seen)) or {}
    pipe([0], denoise_strength=0.0, **given)
    assert seen == [(True, done, 17) for done in range(1, 18)] and blocks == [8, 11, 17]
    seen.clear()
    pipe([0], strategy="jacobi", sweeps=20, tolerance=1e9, **given)
    assert [done for _, done, _ in seen] == [1, 20, 21, 40, 41, 60] and seen[-1][2] == 60


def test_labels_by_name_and_unconditional_models():
    pipe = tiny_pipe()
    generators = sample_generators(4, [0])
    by_name = pipe("Style/Dog", generator=generators, output_type="np").images
    assert np.array_equal(by_name, run(pipe, (1,), seed=4))
    none = run(pipe, (None,), seed=4)
    assert np.abs(none - by_name).max() > 1e-4
    free = tiny_pipe(num_classes=0)
    assert free(num_images_per_prompt=2, output_type="np").images.shape == (2, 6, 6, 3)
    with pytest.raises(ValueError, match="unconditional: class_labels must be None"):
        free([1])


def test_given_latents():
    pipe = tiny_pipe()
    noise = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    before = noise.clone()
    images = pipe([0, 1], latents=noise, output_type="latent", strategy="sequential").images
    assert torch.equal(noise, before)
    tokens = pipe.transformer(images, torch.tensor([0, 1])).latents
    torch.testing.assert_close(pipe.transformer.unpatchify(tokens), noise, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_labels": [3]}, "between 0 and 2, got 3"),
        ({"class_labels": ["style/cta"]}, "close names: style/cat"),
        ({"class_labels": []}, "at least one class"),
        ({"class_labels": [1.5]}, "ids or names"),
        ({"strategy": "fast"}, "strategy must be one of"),
        ({"sweeps": 0}, "at least 1"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"bfloat16_sweeps": -1}, "bfloat16_sweeps must be at least 0"),
        ({"guess": "best"}, "guess must be one of latent, zero, linear"),
        ({"guess": "linear", "strategy": "jacobi"}, "guess_kernel is 0"),
        ({"generator": [torch.Generator()] * 2}, "2 generators were given for 1"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"shape \(1, 3, 6, 6\)"),
        ({"output_type": "jpg"}, "output_type"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt|at least one"),
        ({"attention_temperature": 0.0}, "temperature"),
        ({"guidance_parameters": "ac"}, "letters a and b"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "not noise"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(given, message):
    pipe = tiny_pipe()
    pipe.transformer.blocks[2].proj_in.register_forward_pre_hook(lambda m, a: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=message) as caught:
        pipe(**{"class_labels": [0], **given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (GSJacobiScheduler([1] * 3, [2] * 3, ["latent", "linear", "zero"]), "plan_tarflow"),
        (GSJacobiScheduler([1] * 4, [2] * 4), "lists 4 blocks, but the model has 3"),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused_before_any_work_and_only_if_it_is_used(scheduler, message):
    pipe = tiny_pipe(scheduler)
    wanted = run(tiny_pipe(), strategy="sequential")
    assert np.array_equal(run(pipe, strategy="sequential"), wanted)
    assert np.array_equal(run(pipe, strategy="jacobi", sweeps=2), run(tiny_pipe(), strategy="jacobi", sweeps=2))
    pipe.transformer.blocks[2].proj_in.register_forward_pre_hook(lambda m, a: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=message):
        pipe([0])


def test_options_are_arguments_of_the_call():
    import inspect

    parameters = inspect.signature(TarFlowPipeline.__call__).parameters
    for field in fields_of(TarFlowOptions):
        assert parameters[field.name].default == field.default, field.name
    assert TarFlowOptions.condition in parameters


def linear_pipe() -> TarFlowPipeline:
    """Starts its sweeps from a random linear guess."""
    strategies = ([0, 1, 3], [1, 3, 2], ["latent", "linear", "linear"])
    pipe = tiny_pipe(GSJacobiScheduler(*strategies), guess_kernel=3)
    for block in pipe.transformer.blocks:
        torch.nn.init.normal_(block.guess.weight, std=0.1)
    return pipe


def test_offloading_every_layer_changes_nothing():
    """Weights lie on the meta device except while a forward uses them: whatever no hook sees would fail."""
    pipe = linear_pipe()
    wanted, guided = run(pipe), run(pipe, guidance_scale=2.0)
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}
    np.testing.assert_allclose(run(pipe), wanted, atol=1e-6)
    np.testing.assert_allclose(run(pipe, guidance_scale=2.0), guided, atol=1e-6)
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}


def test_offloading_the_model_loads_it_before_the_first_block():
    pipe, events = linear_pipe(), []

    class Loads(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            events.append("model")
            return args, kwargs

    add_hook_to_module(pipe.transformer, Loads())
    handle = pipe.transformer.blocks[2].proj_in.register_forward_pre_hook(lambda m, a: events.append("block"))
    pipe([0], denoise_strength=0.0)
    handle.remove()
    assert events == ["model"] + ["block"] * 8


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_offloading_groups_to_the_disk_changes_nothing(tmp_path, offload_type):
    """What is offloaded is emptied, so that a network call outside of the hooks would use rubbish."""
    pipe = linear_pipe()
    pipe.transformer.requires_grad_(True)
    wanted = run(pipe)
    apply_group_offloading(
        pipe.transformer, torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )  # fmt: skip
    for block in pipe.transformer.blocks:
        block.pos_embed.data.fill_(float("nan"))
    np.testing.assert_allclose(run(pipe), wanted, atol=1e-6)


def test_default_call_in_inference_mode():
    pipe = linear_pipe()
    pipe.transformer.requires_grad_(True)
    wanted = run(pipe)
    with torch.inference_mode():
        np.testing.assert_allclose(run(pipe), wanted, atol=1e-6)


def test_layerwise_casting_keeps_the_linear_guess():
    """The first guess is cheap and read outside of a layer's forward: it stays in float32."""
    pipe = linear_pipe()
    wanted = run(pipe, denoise_strength=0.0)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.transformer.blocks[0].layers[0].to_qkv.weight.dtype == torch.float8_e4m3fn
    found = run(pipe, denoise_strength=0.0)
    assert 1e-5 < np.abs(found - wanted).max() < 0.1


@pytest.fixture(scope="module")
def bundle():
    pipe = load_pipeline("emoji-tarflow-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("index", "tolerance"), [(5, 5e-3), (4, 1e-4)])
def test_bundle_gauss_seidel_run_to_the_end_equals_sequential(bundle, index, tolerance):
    """256 tokens in 16 modules of 16: 16 sweeps each are exact but for rounding.

    Block 5 amplifies float32 rounding along the sequence (measured 7.5e-4), the others don't.
    """
    block, scheduler, labels = bundle.transformer.blocks[index], GSJacobiScheduler(), torch.tensor([30])
    noise = torch.randn(1, 256, 48, generator=torch.Generator().manual_seed(0))
    exact = scheduler.step(block, index, noise, labels).tokens
    found = scheduler.step(block, index, noise, labels, strategy=BlockStrategy(16, 16)).tokens
    torch.testing.assert_close(found, exact, atol=tolerance, rtol=0)
    with torch.no_grad():
        for solution in (found, exact):
            torch.testing.assert_close(block(solution, labels)[0], noise, atol=1e-3, rtol=0)


def test_bundle_jacobi_until_it_comes_to_rest_equals_sequential(bundle):
    """255 sweeps at most, which would take 17 s; an easy block comes to rest long before."""
    block, labels = bundle.transformer.blocks[2], torch.tensor([30])
    noise = torch.randn(1, 256, 48, generator=torch.Generator().manual_seed(0))
    exact = GSJacobiScheduler().step(block, 2, noise, labels).tokens
    trace = GSJacobiScheduler().step(block, 2, noise, labels, strategy=BlockStrategy(1, 255, tolerance=1e-6))
    torch.testing.assert_close(trace.tokens, exact, atol=1e-4, rtol=0)
    assert trace.calls < 60


def test_bundle_plan_keeps_the_picture_and_saves_most_calls(bundle):
    labels, generators = [3, 47], lambda: sample_generators(40, range(2))
    exact = bundle(labels, strategy="sequential", generator=generators(), output_type="latent")
    planned = bundle(labels, generator=generators(), output_type="latent")
    assert float(psnr(planned.images, exact.images).min()) > 35
    calls = [trace.calls for trace in planned.blocks]
    assert calls[0] == 255 and max(calls[1:]) <= 16
    assert sum(trace.calls for trace in exact.blocks) == 6 * 255

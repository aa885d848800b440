"""TextToImagePipeline: what the denoising loop computes, what it refuses, and which schedulers it runs."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dit_suite.models.pt_dit import PTDiTTransformer3DModel
from dit_suite.schedulers.diffusers_schedulers import build_scheduler
from dit_suite.schedulers.generators import sample_generators
from dit_suite.step_plan import current_step
from tests.tiny import save_lora, tiny_pixart, tiny_text_to_image

PROMPT = "red apple , flat style"


@pytest.fixture(scope="module")
def pipe():
    return tiny_text_to_image()


def sample(pipe, **kwargs):
    kwargs = {"prompt": PROMPT, "num_inference_steps": 3, "output_type": "latent", **kwargs}
    if "generator" not in kwargs and "latents" not in kwargs:
        kwargs["generator"] = torch.Generator().manual_seed(0)
    return pipe(**kwargs).images


def count_calls(pipe, monkeypatch):
    """Batch sizes and step contexts of every network evaluation."""
    calls = []
    original = pipe.transformer.forward

    def forward(hidden_states, *args, **kwargs):
        calls.append((len(hidden_states), current_step()))
        return original(hidden_states, *args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    return calls


def test_equals_a_loop_written_out(pipe):
    """Euler steps of the guided velocity, by hand."""
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    result = sample(pipe, latents=latents, guidance_scale=3.0)

    states, mask = pipe.encode_prompt([PROMPT], torch.device("cpu"))
    null_states, null_mask = pipe.encode_prompt([""], torch.device("cpu"))
    sigmas = torch.tensor(FlowMatchEulerDiscreteScheduler().sigmas.numpy())
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    sigmas, x = scheduler.sigmas, latents
    with torch.no_grad():
        for i in range(3):
            added = {"resolution": None, "aspect_ratio": None}
            t = (1000 * sigmas[i]).expand(1)
            cond, null = (
                pipe.transformer(x, encoder_hidden_states=s, timestep=t, added_cond_kwargs=added,
                                 encoder_attention_mask=m).sample
                for s, m in ((states, mask), (null_states, null_mask))
            )  # fmt: skip
            x = x + (sigmas[i + 1] - sigmas[i]) * (null + 3.0 * (cond - null))
    torch.testing.assert_close(result, x, atol=1e-5, rtol=1e-5)


def test_guidance_off_is_one_evaluation_a_step(pipe, monkeypatch):
    calls = count_calls(pipe, monkeypatch)
    sample(pipe, guidance_scale=1.0)
    assert [(batch, c.branch) for batch, c in calls] == [(1, "none")] * 3


def test_guidance_in_one_batch_equals_two_passes(pipe, monkeypatch):
    calls = count_calls(pipe, monkeypatch)
    batched = sample(pipe)
    two_pass = sample(pipe, batched_guidance=False)
    torch.testing.assert_close(batched, two_pass, atol=1e-5, rtol=1e-5)
    assert [(batch, c.branch, c.step_index) for batch, c in calls] == [
        *[(2, "batched", i) for i in range(3)],
        *[(1, branch, i) for i in range(3) for branch in ("uncond", "cond")],
    ]
    assert len({c.run for _, c in calls}) == 2 and current_step() is None


def test_text_and_negative_text_matter(pipe):
    base = sample(pipe)
    assert not torch.allclose(base, sample(pipe, prompt="green cat"))
    assert not torch.allclose(base, sample(pipe, negative_prompt="blue sun"))
    assert torch.equal(base, sample(pipe, negative_prompt=""))


def test_list_of_generators_makes_rows_independent_of_the_batch(pipe):
    prompts = ["red apple", "green cat", "blue sun", "red cat"]
    together = sample(pipe, prompt=prompts, generator=sample_generators(5, range(4)))
    for i, prompt in enumerate(prompts):
        alone = sample(pipe, prompt=prompt, generator=sample_generators(5, [i]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_images_per_prompt_are_neighbours(pipe):
    pair = sample(
        pipe, prompt=["red apple", "green cat"], num_images_per_prompt=2, generator=sample_generators(0, range(4))
    )
    single = sample(pipe, prompt="green cat", generator=sample_generators(2, [0]))
    torch.testing.assert_close(pair[2:3], single, atol=1e-5, rtol=1e-5)


def test_prompt_embeds_equal_the_prompt(pipe):
    states, mask = pipe.encode_prompt([PROMPT], torch.device("cpu"))
    given = sample(pipe, prompt=None, prompt_embeds=states, prompt_attention_mask=mask)
    assert torch.equal(given, sample(pipe))


def test_callback_replaces_latents_and_interrupts(pipe, monkeypatch):
    def zero_at_the_end(pipe, index, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if index == pipe.num_timesteps - 1 else {}

    assert sample(pipe, callback_on_step_end=zero_at_the_end).abs().max() == 0

    calls = count_calls(pipe, monkeypatch)

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == 1
        return {}

    sample(pipe, num_inference_steps=6, callback_on_step_end=stop)
    assert len(calls) == 2


def test_output_types_agree(pipe):
    latents = sample(pipe)
    array = sample(pipe, output_type="np")
    tensor = sample(pipe, output_type="pt")
    image = sample(pipe, output_type="pil")[0]
    torch.testing.assert_close(tensor, (latents / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(image), (array[0] * 255).round().astype(np.uint8))


def test_latent_space_goes_through_the_vae():
    pipe = tiny_text_to_image(vae=True)
    latents = sample(pipe)
    assert latents.shape == (1, 4, 8, 8)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(sample(pipe, output_type="pt"), (decoded / 2 + 0.5).clamp(0, 1))


def test_learned_variance_channels_are_dropped():
    pipe = tiny_text_to_image(transformer=tiny_pixart(channels=3, out_channels=6))
    before, rows = sample(pipe), pipe.transformer.proj_out.weight.detach().unflatten(0, (-1, 6))
    assert before.shape == (1, 3, 8, 8)
    rows[:, 3:] += 1.0
    assert torch.equal(sample(pipe), before)
    rows[:, :3] += 1.0
    assert not torch.equal(sample(pipe), before)


FLOW = (
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchHeunDiscreteScheduler(),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0),
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0),
)
DIFFUSION = (DDIMScheduler(), DDPMScheduler(), DPMSolverMultistepScheduler(), UniPCMultistepScheduler())


@pytest.mark.parametrize("scheduler", FLOW, ids=lambda s: type(s).__name__)
def test_flow_schedulers_end_at_the_same_picture(pipe, scheduler):
    """All integrate one ODE: with many steps they meet where Euler with very many steps ends."""
    reference = sample(pipe, num_inference_steps=200, guidance_scale=1.0)
    other = tiny_text_to_image(scheduler=type(scheduler).from_config(scheduler.config))
    result = sample(other, num_inference_steps=50, guidance_scale=1.0)
    assert (result - reference).abs().max() < 0.05 * reference.abs().max()


@pytest.mark.parametrize("scheduler", DIFFUSION, ids=lambda s: type(s).__name__)
def test_diffusion_schedulers_run_a_noise_predictor(scheduler):
    pipe = tiny_text_to_image(scheduler=scheduler, prediction_type="epsilon")
    first = sample(pipe, generator=sample_generators(3, [0]))
    assert torch.isfinite(first).all()
    again = sample(pipe, generator=sample_generators(3, [0]))
    assert torch.equal(first, again)


def test_second_order_steps_are_told_apart(monkeypatch):
    pipe = tiny_text_to_image(scheduler=FlowMatchHeunDiscreteScheduler())
    calls = count_calls(pipe, monkeypatch)
    sample(pipe, guidance_scale=1.0)
    assert [(c.step_index, c.evaluation) for _, c in calls] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert {c.num_steps for _, c in calls} == {3}


def test_levels_are_refused_by_solvers_with_a_schedule_of_their_own():
    with pytest.raises(ValueError, match="with FlowMatchEuler only, not with FlowMatchHeun"):
        sample(tiny_text_to_image(scheduler=FlowMatchHeunDiscreteScheduler()), levels="resolution")


def test_build_scheduler_keeps_the_flow(pipe):
    scheduler = build_scheduler("dpm-solver", pipe.scheduler, "flow_prediction")
    assert scheduler.config.use_flow_sigmas and scheduler.config.prediction_type == "flow_prediction"
    with pytest.raises(ValueError, match="DDIMScheduler can't integrate"):
        build_scheduler("ddim", pipe.scheduler, "flow_prediction")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler is not supported"),
        (DDIMScheduler(), "can't integrate"),
        (DPMSolverMultistepScheduler(), "use_flow_sigmas=True"),
    ],
)
def test_wrong_scheduler_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_text_to_image(scheduler=scheduler))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": []}, "non-empty list"),
        ({"prompt": 3}, "must be a string"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"height": 9}, "height must be a positive multiple of 2, got 9"),
        ({"output_type": "jpeg"}, "output_type must be one of"),
        ({"negative_prompt": ["a", "b"]}, "2 entries for 1 prompts"),
        ({"generator": sample_generators(0, range(3))}, "3 generators were given for 1 samples"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, "latents must have the shape"),
        ({"callback_on_step_end_tensor_inputs": ["mask"]}, "not mask"),
        ({"levels": "warped"}, "levels must be one of scheduler, resolution"),
        ({"sigmas": [0.5, 1.0]}, "sigmas must fall from at most 1"),
        ({"sigmas": [1.0, 0.5], "levels": "resolution"}, "not both"),
        ({"shift": 0.0}, "shift must be above 0"),
    ],
)
def test_bad_input_gets_one_sentence(pipe, arguments, message, monkeypatch):
    calls = count_calls(pipe, monkeypatch)
    with pytest.raises(ValueError, match=message) as error:
        sample(pipe, **arguments)
    assert "\n" not in str(error.value) and not calls


def flow_levels(pipe) -> list[float]:
    return [level for level in pipe.scheduler.sigmas.tolist() if level]


def test_noise_levels_of_a_call(pipe):
    """The released PT-DiT schedule: 1 - i/N, shifted by sqrt(pixels) / 512, and both parts on their own."""

    def warped(shift, levels):
        return pytest.approx([shift * u / (1 + (shift - 1) * u) for u in levels])

    own = sample(pipe)
    own_levels = flow_levels(pipe)
    released = sample(pipe, num_inference_steps=4, levels="resolution")
    assert flow_levels(pipe) == warped(8 / 512, [1.0, 0.75, 0.5, 0.25])
    by_hand = sample(pipe, sigmas=[1.0, 0.75, 0.5, 0.25], shift=8 / 512)
    assert torch.equal(released, by_hand) and not torch.allclose(released, own)
    sample(pipe, num_inference_steps=2, levels="resolution", shift=3.0)
    assert flow_levels(pipe) == warped(3.0, [1.0, 0.5])
    assert torch.equal(sample(pipe), own) and flow_levels(pipe) == own_levels, "the scheduler is as it was"
    latent = tiny_text_to_image(vae=True)
    sample(latent, num_inference_steps=2, levels="resolution")
    assert flow_levels(latent) == warped(16 / 512, [1.0, 0.5]), "sizes are pixels, not latents"


def tiny_pt_dit(**changes) -> PTDiTTransformer3DModel:
    torch.manual_seed(6)
    model = PTDiTTransformer3DModel(
        2, 8, 3, 3, 2, caption_channels=16, sample_size=16, **{"compress_ratios": (1, 2, 2)} | changes
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def test_windows_of_a_call_reach_pt_dit(pipe, monkeypatch):
    ours = tiny_text_to_image(transformer=tiny_pt_dit())
    with_call, configured = sample(ours, compress_ratios=[1, 4, 4]), tiny_pt_dit(compress_ratios=(1, 4, 4))
    assert torch.equal(with_call, sample(tiny_text_to_image(transformer=configured)))
    assert not torch.allclose(with_call, sample(ours))
    monkeypatch.setattr(ours, "encode_prompt", lambda *_: pytest.fail("the sizes were not looked at first"))
    with pytest.raises(ValueError, match="height 8, which is not a multiple of the window ratio 3"):
        sample(ours, compress_ratios=(1, 3, 2))
    with pytest.raises(ValueError, match="height 9, which is not a multiple of the window ratio 2"):
        sample(ours, height=18)
    with pytest.raises(ValueError, match="compress_ratios belong to PT-DiT"):
        sample(pipe, compress_ratios=(1, 2, 2))


def test_diffusers_block_cache_keeps_the_guidance_branches_apart():
    pipe = tiny_text_to_image(transformer=tiny_pt_dit())
    plain = sample(pipe, num_inference_steps=4, batched_guidance=False)
    evaluated = []
    pipe.transformer.transformer_blocks[1].attn1.register_forward_hook(lambda *_: evaluated.append(1))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    first, second = (sample(pipe, num_inference_steps=4, batched_guidance=False) for _ in range(2))
    assert torch.equal(first, second) and (first - plain).abs().max() > 1e-3
    assert len(evaluated) == 2 * 2, "each branch runs in full at its first step of each call, and never again"
    pipe.transformer.disable_cache()
    again = sample(pipe, num_inference_steps=4, batched_guidance=False)
    torch.testing.assert_close(again, plain, atol=1e-4, rtol=0)


def test_other_sizes(pipe):
    assert sample(pipe, height=12, width=6).shape == (1, 3, 12, 6)


def test_lora_changes_the_picture_and_comes_off(tmp_path):
    pipe = tiny_text_to_image()
    before = sample(pipe)
    save_lora(tiny_pixart(), tmp_path)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        assert not torch.allclose(sample(pipe), before)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), before)

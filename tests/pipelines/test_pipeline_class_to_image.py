"""ClassToImagePipeline: labels, guidance, samplers against a hand-written loop, foreign DiT folders, latent space."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

import dit_suite
from dit_suite.call_options import ClassToImageOptions
from dit_suite.converters.dit import make_scheduler
from dit_suite.models.dit import DiTModel
from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel
from dit_suite.pipelines.pipeline_class_to_image import ClassToImagePipeline, read_labels
from dit_suite.step_plan import current_step
from tests.tiny import save_lora

LABELS = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "crane", "3": "crane, machine"}


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Replaces every parameter, so that no branch is a zero of the initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def tiny_model(in_channels: int = 3, **changes) -> DiTModel:
    shape = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 4, "sample_size": 8}
    return randomised(DiTModel(in_channels=in_channels, **{**shape, **changes}))


def tiny_switch() -> SwitchDiTTransformer2DModel:
    return randomised(SwitchDiTTransformer2DModel(8, 2, 3, 2, 2, 8, num_classes=4))


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.18215,
    ).eval()


def pipeline(model: torch.nn.Module | None = None, sampler: str = "ddim", **parts) -> ClassToImagePipeline:
    model = model or tiny_model()
    pipe = ClassToImagePipeline(model, make_scheduler(sampler, "linear", True), id2label=LABELS, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def evaluations(pipe: ClassToImagePipeline) -> list:
    """Fills with (batch size, labels, step context) at every network evaluation."""
    seen: list = []

    def record(module, args, kwargs):
        seen.append((len(args[0]), kwargs["class_labels"].tolist(), current_step()))

    pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    return seen


def test_labels_by_id_and_by_name() -> None:
    pipe = pipeline()
    assert pipe.get_label_ids(["Tinca TINCA", 3, "1", "goldfish", "machine"]) == [0, 3, 1, 1, 3]
    assert pipe.get_label_ids("tench") == [0]
    assert pipe.get_label_ids(4) == [4]
    by_name = pipe("goldfish", 2, generator=seeds(0), output_type="pt").images
    assert torch.equal(by_name, pipe([1], 2, generator=seeds(0), output_type="pt").images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("crane", "classes 2, 3: give the id"),
        ("goldfisch", "close names: goldfish"),
        ("zzz", "there is no class 'zzz'; the names begin with "),
        ([5], "between 0 and 3, got 5"),
        ([-1], "between 0 and 3, got -1"),
        ([True], "ids or names"),
        ([1.5], "ids or names"),
        ([], "at least one"),
    ],
)
def test_bad_labels(labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline()(labels)


def test_null_class_comes_from_the_config() -> None:
    pipe = pipeline(tiny_model(num_classes=7))
    seen = evaluations(pipe)
    pipe([5, 6], 1, generator=seeds(0, 1), output_type="pt")
    assert [(batch, labels) for batch, labels, _ in seen] == [(4, [7, 7, 5, 6])]

    bare = pipeline(tiny_model(class_dropout_prob=0.0))
    assert bare.null_class is None
    with pytest.raises(ValueError, match="no null class"):
        bare([1])
    with pytest.raises(ValueError, match="between 0 and 3"):
        bare([4], guidance_scale=1.0)
    bare([3], 1, guidance_scale=1.0, output_type="pt")


def test_guidance_off_is_one_evaluation_and_the_context_is_published() -> None:
    pipe = pipeline()
    seen = evaluations(pipe)
    pipe([1], 3, guidance_scale=1.0, generator=seeds(0), output_type="pt")
    assert [(batch, ctx.branch, ctx.step_index, ctx.num_steps) for batch, _, ctx in seen] == [
        (1, "none", i, 3) for i in range(3)
    ]
    assert len({id(ctx.run) for _, _, ctx in seen}) == 1
    seen.clear()
    pipe([1], 2, guidance_scale=2.0, batched_guidance=False, generator=seeds(0), output_type="pt")
    assert [(labels, ctx.branch) for _, labels, ctx in seen] == [([4], "uncond"), ([1], "cond")] * 2
    assert current_step() is None


def test_two_pass_guidance_equals_batched() -> None:
    pipe = pipeline()
    results = [pipe([1], 3, generator=seeds(0), output_type="latent", batched_guidance=b).images for b in (True, False)]
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("channels", [None, 2])
def test_ddim_equals_a_hand_written_loop(channels: int | None) -> None:
    pipe = pipeline()
    result = pipe(
        [1], 5, guidance_scale=3.0, guidance_channels=channels, generator=seeds(3), output_type="latent"
    ).images
    abar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0).float()
    x = torch.randn(3, 8, 8, generator=seeds(3)[0])[None]
    with torch.no_grad():
        for t in (800, 600, 400, 200, 0):
            level = torch.tensor([t])
            cond = pipe.transformer(x, level, torch.tensor([1])).sample[:, :3]
            eps = cond + 2.0 * (cond - pipe.transformer(x, level, torch.tensor([4])).sample[:, :3])
            if channels:
                eps[:, channels:] = cond[:, channels:]
            x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
            before = abar[t - 200] if t else torch.tensor(1.0)
            x = before.sqrt() * x0 + (1 - before).sqrt() * eps
    torch.testing.assert_close(result, x, atol=1e-4 * float(x.abs().max()), rtol=0)


def test_ddpm_uses_the_learned_variance_of_the_conditional_half() -> None:
    pipe = pipeline(sampler="ddpm")
    outputs, steps = [], []
    pipe.transformer.register_forward_hook(lambda m, a, output: outputs.append(output[0]))
    original = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: (steps.append(output), original(output, *args, **kwargs))[1]
    pipe.scheduler.step.__signature__ = inspect.signature(original)
    learned = pipe([1], 4, guidance_scale=3.0, generator=seeds(0), output_type="latent").images
    for output, given in zip(outputs, steps, strict=True):
        uncond, cond = output.chunk(2)
        assert torch.equal(given[:, 3:], cond[:, 3:])
        torch.testing.assert_close(given[:, :3], uncond[:, :3] + 3.0 * (cond[:, :3] - uncond[:, :3]))
    fixed = pipeline()
    fixed.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_small")
    assert not torch.allclose(learned, fixed([1], 4, 3.0, generator=seeds(0), output_type="latent").images, atol=1e-2)


def test_a_learned_variance_scheduler_needs_a_network_that_predicts_it() -> None:
    with pytest.raises(ValueError, match="does not predict"):
        pipeline(tiny_model(learn_sigma=False), sampler="ddpm")([1])


def test_eta_adds_noise_to_ddim_only() -> None:
    pipe = pipeline()
    plain = pipe([1], 3, generator=seeds(0), output_type="latent").images
    noisy = pipe([1], 3, eta=1.0, generator=seeds(0), output_type="latent").images
    assert (plain - noisy).abs().max() > 0.1
    assert torch.equal(noisy, pipe([1], 3, eta=1.0, generator=seeds(0), output_type="latent").images)
    with pytest.raises(ValueError, match="eta belongs to DDIM"):
        pipeline(sampler="ddpm")([1], eta=0.5)


def test_samples_do_not_depend_on_their_batch() -> None:
    pipe = pipeline(sampler="ddpm")
    batch = pipe([0, 1, 2], 4, generator=seeds(5, 6, 7), output_type="latent").images
    for i in range(3):
        alone = pipe([i], 4, generator=seeds(5 + i), output_type="latent").images
        torch.testing.assert_close(batch[i : i + 1], alone, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_flow_matching(scheduler: type) -> None:
    model = tiny_model(learn_sigma=False)
    pipe = ClassToImagePipeline(model, scheduler(shift=1.0))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.prediction_type == "flow_prediction"
    seen = evaluations(pipe)
    result = pipe([1], 3, guidance_scale=1.0, generator=seeds(0), output_type="latent").images
    recorded = list(seen)
    pipe.scheduler.set_timesteps(3)
    assert [ctx.timestep for _, _, ctx in recorded] == [float(t) for t in pipe.scheduler.timesteps]
    if scheduler is FlowMatchEulerDiscreteScheduler:
        x = torch.randn(3, 8, 8, generator=seeds(0)[0])[None]
        sigmas = pipe.scheduler.sigmas
        with torch.no_grad():
            for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
                x = (
                    x
                    + (following - sigma) * model(x, timestep=1000 * sigma[None], class_labels=torch.tensor([1])).sample
                )
        torch.testing.assert_close(result, x, atol=1e-4, rtol=1e-5)
    else:
        assert [ctx.evaluation for _, _, ctx in recorded] == [0, 1, 0, 1, 0]


def test_scheduler_and_prediction_must_agree() -> None:
    pipe = pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="flow velocity"):
        pipe([1])
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(make_scheduler("ddim", "linear", True).config)
    assert pipe([1], 3, output_type="latent").images.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"height": 7}, "height must be a positive multiple of 2"),
        ({"width": -2}, "width must be a positive multiple of 2"),
        ({"guidance_channels": 4}, "between 1 and 3"),
        ({"generator": seeds(0, 1)}, "2 generators were given for 1"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"shape \(1, 3, 8, 8\)"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "latents, class_labels, not noise"),
    ],
)
def test_bad_input_is_refused_before_any_evaluation(arguments: dict, message: str) -> None:
    pipe = pipeline()
    seen = evaluations(pipe)
    with pytest.raises(ValueError, match=message):
        pipe([1], **arguments)
    assert seen == []


def test_latents_without_a_vae_are_not_pictures() -> None:
    pipe = pipeline(tiny_model(in_channels=4))
    with pytest.raises(ValueError, match="no vae"):
        pipe([1])
    assert pipe([1], 1, output_type="latent").images.shape == (1, 4, 8, 8)


def test_latent_space_decodes_with_the_scaling_factor() -> None:
    vae = tiny_vae()
    pipe = pipeline(tiny_model(in_channels=4), vae=vae)
    latent = pipe([1], 2, generator=seeds(0), output_type="latent").images
    picture = pipe([1], 2, generator=seeds(0), output_type="pt").images
    with torch.no_grad():
        expected = (vae.decode(latent / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(picture, expected, atol=1e-6, rtol=0)
    assert pipe([1], 1).images[0].size == (16, 16)
    assert pipe([1], 1, height=24, width=8).images[0].size == (8, 24)


def test_a_folder_of_diffusers_own_pipeline_opens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False)
    theirs = DiTPipeline(randomised(stock), tiny_vae(), scheduler)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "dit")
    # The public folders name the class that diffusers has since renamed, and carry class names.
    index = json.loads((tmp_path / "dit" / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    index["id2label"] = {"1": "goldfish, Carassius auratus"}
    (tmp_path / "dit" / "model_index.json").write_text(json.dumps(index))

    ours = dit_suite.load_pipeline(tmp_path / "dit")
    ours.set_progress_bar_config(disable=True)
    assert isinstance(ours, ClassToImagePipeline)
    assert ours.get_label_ids("carassius auratus") == [1]
    expected = theirs([1, 7], 3.0, torch.Generator().manual_seed(0), 4, output_type="np").images
    result = ours([1, 7], 4, 3.0, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert abs(result - expected).max() < 1e-4
    with pytest.raises(ValueError, match="square"):
        ours([1], height=16, width=32)


def test_diffusers_block_cache_keeps_the_guidance_branches_apart() -> None:
    pipe = pipeline()
    arguments = {"class_labels": [1], "num_inference_steps": 4, "batched_guidance": False, "output_type": "latent"}
    plain = pipe(**arguments, generator=seeds(0)).images
    evaluated = []
    pipe.transformer.transformer_blocks[1].attn.register_forward_hook(lambda *_: evaluated.append(1))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    first, second = (pipe(**arguments, generator=seeds(0)).images for _ in range(2))
    assert torch.equal(first, second)
    assert len(evaluated) == 2 * 2, "each branch runs in full at its first step of each call, and never again"
    assert (first - plain).abs().max() > 1e-3
    pipe.transformer.disable_cache()
    assert torch.equal(pipe(**arguments, generator=seeds(0)).images, plain)


def test_options_are_the_keywords_of_the_call() -> None:
    pipe = pipeline()
    options = ClassToImageOptions(num_inference_steps=2, guidance_channels=2, eta=0.5)
    given = {ClassToImageOptions.condition: [1]}
    result = pipe(**given, **options.to_kwargs(), generator=seeds(0), output_type="latent").images
    expected = pipe([1], 2, 4.0, 2, 0.5, generator=seeds(0), output_type="latent").images
    assert torch.equal(result, expected)


@pytest.mark.parametrize("network", [tiny_model, tiny_switch], ids=["dit", "switch-dit"])
def test_lora_changes_the_picture_and_comes_off(network, tmp_path: Path) -> None:
    pipe = pipeline(network())
    arguments = {"class_labels": [1], "num_inference_steps": 2, "output_type": "latent"}
    before = pipe(**arguments, generator=seeds(0)).images
    save_lora(network(), tmp_path)
    pipe.load_lora_weights(tmp_path)
    assert (pipe(**arguments, generator=seeds(0)).images - before).abs().max() > 1e-2
    pipe.unload_lora_weights()
    assert torch.equal(pipe(**arguments, generator=seeds(0)).images, before)


def test_label_files(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(LABELS))
    assert read_labels(tmp_path / "good.json") == LABELS
    for name, text in (("list", "[1]"), ("key", '{"a": "b"}'), ("broken", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            read_labels(tmp_path / name)

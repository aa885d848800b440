"""The step context: isolation between calls, plans, and the hook that fills it for diffusers' own pipelines."""

import threading
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PixArtSigmaPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from dit_suite.schedulers.generators import randn_per_sample, sample_generators
from dit_suite.schedulers.root_hook import attach_root_hook
from dit_suite.step_plan import StepContext, current_step, plan_steps, publish_step
from tests.tiny import tiny_pixart, tiny_text_encoder, tiny_text_to_image, tiny_tokenizer, tiny_vae


def test_context_is_restored_after_an_exception():
    context = StepContext(0, 1, 999.0)
    with pytest.raises(RuntimeError), publish_step(context):
        assert current_step() is context
        raise RuntimeError("mid-run")
    assert current_step() is None


def test_unknown_branch_is_refused():
    with pytest.raises(ValueError, match="branch must be one of"):
        StepContext(0, 1, 0.0, branch="both")


def test_plan_counts_evaluations():
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    plan = plan_steps(scheduler.timesteps, order=2, guidance=True, batched=False)
    assert (plan.num_steps, plan.num_evaluations) == (4, 14)
    marked = plan.with_extras({2: {"skip": True}})
    assert [bool(s.extras.get("skip")) for s in marked.steps] == [False] * 4 + [True] * 2 + [False]
    assert marked.run is plan.run


def test_two_pipelines_on_threads_see_their_own_steps():
    barrier = threading.Barrier(2, timeout=60)
    seen = {}

    def run(name, steps):
        pipe = tiny_text_to_image()
        original = pipe.transformer.forward

        def forward(*args, **kwargs):
            before = current_step()
            if before.step_index < 2:
                barrier.wait()
            seen.setdefault(name, []).append((before.step_index, before.num_steps, before.run))
            assert current_step() is before
            return original(*args, **kwargs)

        pipe.transformer.forward = forward
        pipe("red apple", num_inference_steps=steps, generator=torch.Generator().manual_seed(0))

    threads = [threading.Thread(target=run, args=args) for args in (("a", 2), ("b", 5))]
    [t.start() for t in threads]
    [t.join(120) for t in threads]
    assert [s[:2] for s in seen["a"]] == [(0, 2), (1, 2)]
    assert [s[:2] for s in seen["b"]] == [(i, 5) for i in range(5)]
    assert {s[2] for s in seen["a"]}.isdisjoint({s[2] for s in seen["b"]})


def record(module, calls):
    """Notes the context that the first block sees."""
    block = next(m for name, m in module.named_modules() if name.endswith("blocks.0"))
    return block.register_forward_pre_hook(lambda *_: calls.append(current_step()))


def stock_pixart():
    pipe = PixArtSigmaPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(),
        transformer=tiny_pixart(channels=4, out_channels=8),
        scheduler=DDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_stock(pipe, steps):
    return pipe(
        "red apple", num_inference_steps=steps, height=16, width=16, use_resolution_binning=False, clean_caption=False,
        max_sequence_length=8, output_type="latent", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


def test_hook_counts_the_steps_of_a_stock_pipeline_and_comes_off():
    pipe, calls = stock_pixart(), []
    before = run_stock(pipe, 3)
    attributes = set(vars(pipe.transformer))
    handle = attach_root_hook(pipe.transformer, pipe)
    watcher = record(pipe.transformer, calls)
    run_stock(pipe, 3)
    run_stock(pipe, 2)
    assert [c.step_index for c in calls] == [0, 1, 2, 0, 1]
    assert {c.branch for c in calls} == {"batched"}
    assert len({c.run for c in calls}) == 2
    assert calls[0].timestep > calls[1].timestep
    watcher.remove()
    handle.remove()
    handle.remove()
    assert set(vars(pipe.transformer)) == attributes
    assert torch.equal(run_stock(pipe, 3), before) and current_step() is None


def tiny_wan():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip


def test_hook_reads_branches_from_cache_context():
    """The denoising loop of a video pipeline: two named passes a step."""
    model, calls = tiny_wan(), []
    handle = attach_root_hook(model)
    record(model, calls)
    x, text = torch.zeros(1, 4, 1, 4, 4), torch.zeros(1, 3, 16)
    with torch.no_grad():
        for t in (900.0, 500.0, 100.0, 900.0):
            for name in ("cond", "uncond"):
                with model.cache_context(name):
                    model(x, torch.tensor([t]), text)
    assert [(c.step_index, c.branch) for c in calls] == [(i, b) for i in (0, 1, 2, 0) for b in ("cond", "uncond")]
    assert calls[0].run is calls[5].run and calls[6].run is not calls[0].run
    handle.remove()


def test_hook_believes_an_announced_step():
    model, calls = tiny_wan(), []
    attach_root_hook(model)
    record(model, calls)
    x, text = torch.zeros(1, 4, 1, 4, 4), torch.zeros(1, 3, 16)
    with torch.no_grad():
        for index, t in enumerate((900.0, 900.0, 800.0)):
            with model.cache_context("cond", step_index=index, num_inference_steps=3):
                model(x, torch.tensor([t]), text)
    assert [(c.step_index, c.num_steps, c.evaluation) for c in calls] == [(0, 3, 0), (1, 3, 0), (2, 3, 0)]


def test_hook_reads_the_step_from_tokens_of_their_own_timesteps():
    """Image to video: the first frame is clean, so the first tokens' timestep is 0 throughout."""
    model, calls = tiny_wan(), []
    attach_root_hook(model)
    record(model, calls)
    x, text = torch.zeros(2, 4, 2, 4, 4), torch.zeros(2, 3, 16)
    own = torch.tensor([0.0] * 4 + [1.0] * 4).expand(2, 8)
    with torch.no_grad():
        for t in (900.0, 500.0, 100.0):
            model(x, own * t, text)
    assert [(c.step_index, c.timestep) for c in calls] == [(0, 900.0), (1, 500.0), (2, 100.0)]


def test_hook_counts_steps_of_frames_that_are_denoised_one_after_the_other():
    """Diffusion forcing: the last frame waits at its first timestep, the first one at its last."""
    model, calls = tiny_wan(), []
    attach_root_hook(model)
    record(model, calls)
    x, text = torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 3, 16)
    with torch.no_grad():
        for first, second in ((900.0, 900.0), (500.0, 900.0), (0.0, 900.0), (0.0, 500.0)):
            for _ in range(2):
                model(x, torch.tensor([first] * 4 + [second] * 4)[None], text)
    assert [(c.step_index, c.branch) for c in calls] == [(i, b) for i in range(4) for b in ("batched", "uncond")]


def test_networks_of_one_pipeline_are_counted_together():
    first, second, calls = tiny_wan(), tiny_wan(), []
    pipe = SimpleNamespace(transformer=first, transformer_2=second, scheduler=DDIMScheduler())
    pipe.scheduler.set_timesteps(4)
    handles = [attach_root_hook(model, pipe) for model in (first, second)]
    for model in (first, second):
        record(model, calls)
    x, text = torch.zeros(1, 4, 1, 4, 4), torch.zeros(1, 3, 16)
    with torch.no_grad():
        for i, t in enumerate(pipe.scheduler.timesteps):
            (first if i < 2 else second)(x, t[None], text)
    assert [(c.step_index, c.num_steps) for c in calls] == [(i, 4) for i in range(4)]
    assert len({c.run for c in calls}) == 1
    handles[1].reset()
    with torch.no_grad():
        first(x, pipe.scheduler.timesteps[:1], text)
    assert calls[-1].step_index == 0 and calls[-1].run is not calls[0].run


def test_our_pipelines_context_wins_over_the_hook():
    pipe, calls = tiny_text_to_image(), []
    attach_root_hook(pipe.transformer, pipe)
    record(pipe.transformer, calls)
    pipe("red apple", num_inference_steps=2, batched_guidance=False, generator=torch.Generator().manual_seed(0))
    assert [(c.step_index, c.branch) for c in calls] == [(0, "uncond"), (0, "cond"), (1, "uncond"), (1, "cond")]


def test_hook_needs_a_timestep():
    with pytest.raises(ValueError, match="takes no timestep"):
        attach_root_hook(tiny_vae())


def test_two_users_of_one_hook():
    model = tiny_pixart()
    first, second = attach_root_hook(model), attach_root_hook(model)
    first.remove()
    assert hasattr(model, "_diffusers_hook")
    second.remove()
    assert not hasattr(model, "_diffusers_hook") and "forward" not in vars(model)


def test_generators_belong_to_the_sample():
    rows = randn_per_sample((2, 3), sample_generators(10, range(4)))
    assert torch.equal(rows[2], torch.randn(2, 3, generator=torch.Generator().manual_seed(12)))
    with pytest.raises(ValueError, match="seed must be between"):
        sample_generators(-1, [0])


def test_wan_pipeline_is_still_what_the_hook_expects():
    """diffusers' pipelines still announce their passes through `cache_context`."""
    import inspect

    assert "cache_context" in inspect.getsource(WanPipeline.__call__)
    assert FlowMatchEulerDiscreteScheduler.order == 1

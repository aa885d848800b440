"""Sparse attention on video pipelines of diffusers itself, which publish no step context of ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch

from dit_suite.attention import AdaSpaConfig, VMoBAConfig, apply_adaspa, apply_vmoba
from tests.attention.tiny_models import build

STEPS = 5
ADASPA = {"block_size": 16, "search_steps": (1, 3), "min_tokens": 0}
VMOBA = {"min_tokens": 0, "block_1d": 1.0, "block_2d": (2, 2), "block_3d": (2, 2, 2)}


def _rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _prompts(width: int, masks: bool = False) -> dict[str, Any]:
    given: dict[str, Any] = {"prompt_embeds": _rand(1, 6, width, seed=1), "guidance_scale": 4.0}
    given["negative_prompt_embeds"] = _rand(1, 6, width, seed=2)
    if masks:
        given["prompt_attention_mask"] = given["negative_prompt_attention_mask"] = torch.ones(1, 6, dtype=torch.bool)
    return given


def _without_text(pipeline: type, transformer: str, scheduler: Any, **parts: Any) -> Any:
    defaults = {"tokenizer": None, "text_encoder": None, "vae": None}
    return pipeline(transformer=build(transformer), scheduler=scheduler, **{**defaults, **parts})


def _wan() -> tuple[Any, dict[str, Any]]:
    pipe = _without_text(diffusers.WanPipeline, "wan", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    return pipe, {"height": 64, "width": 64, "num_frames": 13, **_prompts(8)}


def _wan_image() -> tuple[Any, dict[str, Any]]:
    """Wan 2.2 with a clean first frame (a timestep per token) and a second network for the low noise."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).eval()
    pipe = _without_text(
        diffusers.WanImageToVideoPipeline, "wan", diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae,
        transformer_2=build("wan"), boundary_ratio=0.5, expand_timesteps=True,
    )  # fmt: skip
    return pipe, {
        "image": _rand(1, 3, 64, 64, seed=3).tanh(),
        "height": 64,
        "width": 64,
        "num_frames": 13,
        **_prompts(8),
    }


def _ltx() -> tuple[Any, dict[str, Any]]:
    pipe = _without_text(diffusers.LTXPipeline, "ltx", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    return pipe, {"height": 128, "width": 128, "num_frames": 25, **_prompts(16, masks=True)}


def _ltx_image() -> tuple[Any, dict[str, Any]]:
    pipe = _without_text(diffusers.LTXImageToVideoPipeline, "ltx", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    sizes = {"height": 128, "width": 128, "num_frames": 25}
    return pipe, {"latents": _rand(1, 64, 8, seed=3), **sizes, **_prompts(16, masks=True)}


def _cogvideox() -> tuple[Any, dict[str, Any]]:
    pipe = _without_text(diffusers.CogVideoXPipeline, "cogvideox", diffusers.CogVideoXDDIMScheduler())
    return pipe, {"height": 64, "width": 64, "num_frames": 13, **_prompts(8)}


def _mochi() -> tuple[Any, dict[str, Any]]:
    pipe = _without_text(
        diffusers.MochiPipeline, "mochi", diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    )
    return pipe, {"height": 64, "width": 64, "num_frames": 19, **_prompts(16, masks=True)}


@dataclass(frozen=True)
class Stock:
    """One of diffusers' pipelines; `calls` is the attention calls of a step, `networks` the steps of each network."""

    build: Callable[[], tuple[Any, dict[str, Any]]]
    calls: int
    networks: tuple[int, ...] = (STEPS,)


CASES = {
    "wan": Stock(_wan, 3 * 2),
    "wan_image": Stock(_wan_image, 3 * 2, (3, 2)),
    "ltx": Stock(_ltx, 2),
    "ltx_image": Stock(_ltx_image, 2),
    "cogvideox": Stock(_cogvideox, 2),
    "mochi": Stock(_mochi, 3 * 2),
}


def _sampler(case: Stock) -> tuple[Any, Callable[..., torch.Tensor]]:
    pipe, given = case.build()
    pipe.set_progress_bar_config(disable=True)

    def sample(seed: int = 0, on_step: Callable[[int], None] | None = None) -> torch.Tensor:
        callback = None if on_step is None else lambda _pipe, index, *_: on_step(index) or {}
        return pipe(
            num_inference_steps=STEPS, output_type="latent", return_dict=False, callback_on_step_end=callback,
            generator=torch.Generator().manual_seed(seed), **given,
        )[0]  # fmt: skip

    return pipe, sample


def _expected(networks: tuple[int, ...]) -> dict[str, int]:
    """AdaSpa's steps of each kind with searches at steps 1 and 3; a network's first search is a fused one."""
    facts = {"dense_calls": 0, "fused_searches": 0, "cached_searches": 0, "sparse_calls": 0}
    first = 0
    for count in networks:
        searched = False
        for step in range(first, first + count):
            if step == 0:
                facts["dense_calls"] += 1
            elif not searched:
                facts["fused_searches"] += 1
                searched = True
            else:
                facts["sparse_calls"] += 1
                facts["cached_searches"] += step == 3
        first += count
    return facts


@pytest.mark.parametrize("name", list(CASES))
def test_a_run_of_a_stock_pipeline(name):
    """Full budget is dense, every call is accounted for, a run is repeatable, removal is bitwise."""
    case = CASES[name]
    pipe, sample = _sampler(case)
    dense = sample()
    expected = {key: steps * case.calls for key, steps in _expected(case.networks).items()}
    with apply_adaspa(pipe, AdaSpaConfig(sparsity=0.0, **ADASPA)) as handle:
        full, stats = sample(), handle.stats()
    assert (full - dense).abs().max() < 1e-3 * dense.abs().max()
    assert {key: stats[key] for key in expected} == expected and stats["fallbacks"] == {}
    with apply_adaspa(pipe, AdaSpaConfig(sparsity=0.75, **ADASPA)) as handle:
        first, second = sample(), sample()
        assert handle.stats()["sparse_calls"] == 2 * expected["sparse_calls"]
    assert torch.equal(first, second) and (first - dense).abs().max() > 1e-3
    with apply_vmoba(pipe, VMoBAConfig(topk_ratio=1.0, **VMOBA)) as handle:
        full, stats = sample(), handle.stats()
    assert (full - dense).abs().max() < 1e-3 * dense.abs().max()
    assert (stats["dense_calls"], stats["sparse_calls"]) == (2 * case.calls, 3 * case.calls)
    assert stats["fallbacks"] == {}
    assert torch.equal(sample(), dense)
    assert not any("forward" in vars(m) for m in pipe.transformer.modules())


@pytest.mark.parametrize("abort_after", [1, 3])
@pytest.mark.parametrize("name", ["wan", "wan_image", "ltx_image", "mochi"])
def test_an_aborted_run_leaves_nothing(name, abort_after):
    """The next run starts at the timestep of the aborted one and must search anew."""
    pipe, sample = _sampler(CASES[name])

    def fail(index):
        if index == abort_after:
            raise RuntimeError("stop")

    with apply_adaspa(pipe, AdaSpaConfig(sparsity=0.75, **ADASPA)):
        fresh = sample()
        with pytest.raises(RuntimeError, match="stop"):
            sample(seed=7, on_step=fail)
        assert torch.equal(sample(), fresh)


def test_two_pipelines_with_handles_in_one_process():
    """Interleaved step by step, each gives what it gives alone."""
    (wan, sample_wan), (ltx, sample_ltx) = (_sampler(CASES[name]) for name in ("wan", "ltx_image"))
    with (
        apply_adaspa(wan, AdaSpaConfig(sparsity=0.75, **ADASPA)) as first,
        apply_vmoba(ltx, VMoBAConfig(topk=(1, 1, 1), **VMOBA)) as second,
    ):
        alone = sample_wan(), sample_ltx()
        first.reset(), second.reset()
        inner = []
        outer = sample_wan(on_step=lambda index: inner.append(sample_ltx()) if index == 2 else None)
        assert torch.equal(outer, alone[0]) and torch.equal(inner[0], alone[1])
        assert first.stats()["sparse_calls"] == 3 * 6 and second.stats()["sparse_calls"] == 3 * 2
        second.remove()
        assert torch.equal(sample_wan(), alone[0])

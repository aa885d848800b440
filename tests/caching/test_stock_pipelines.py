"""BAC on pipelines of diffusers itself, which publish no step context of ours."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from dit_suite import BACConfig, ProfileRecorder, SimilarityProfile, apply_bac
from dit_suite.caching.plan import build_schedule
from tests.caching.conftest import Case
from tests.tiny import tiny_vae

STEPS = 5


def _rows(count: int, width: int, seed: int, pooled: bool = False) -> torch.Tensor:
    shape = (count, width) if pooled else (count, 5, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _pixart() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=tiny_vae(), transformer=Case("pixart").model,
        scheduler=diffusers.DDIMScheduler(),
    )  # fmt: skip
    mask = torch.ones(1, 5)
    return pipe, {
        "negative_prompt": None, "prompt_embeds": _rows(1, 12, 1), "negative_prompt_embeds": _rows(1, 12, 2),
        "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "use_resolution_binning": False,
    }  # fmt: skip


def _sd3() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=Case("sd3").model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    return pipe, {
        "prompt_embeds": _rows(1, 16, 1), "negative_prompt_embeds": _rows(1, 16, 2),
        "pooled_prompt_embeds": _rows(1, 16, 3, True), "negative_pooled_prompt_embeds": _rows(1, 16, 4, True),
    }  # fmt: skip


def _flux() -> tuple[Any, dict[str, Any]]:
    """With real guidance: two named passes a step."""
    case = Case("flux")
    model = diffusers.FluxTransformer2DModel(**{**case.model.config, "in_channels": 16})
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    pipe = diffusers.FluxPipeline(
        transformer=model.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    return pipe, {
        "prompt_embeds": _rows(1, 16, 1), "negative_prompt_embeds": _rows(1, 16, 2), "true_cfg_scale": 2.0,
        "pooled_prompt_embeds": _rows(1, 16, 3, True), "negative_pooled_prompt_embeds": _rows(1, 16, 4, True),
    }  # fmt: skip


BUILDERS: dict[str, Callable] = {"pixart": _pixart, "sd3": _sd3, "flux": _flux}


class Stock:
    """One of diffusers' pipelines around a tiny transformer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipe, self.given = BUILDERS[name]()
        self.pipe.set_progress_bar_config(disable=True)

    def sample(self, steps: int = STEPS, seed: int = 0, on_step: Callable[[], None] | None = None) -> torch.Tensor:
        """The final latents; `on_step` is called after every step."""
        callback: dict[str, Any] = {}
        if on_step is not None and self.name == "pixart":
            callback = {"callback": lambda *_: on_step()}
        elif on_step is not None:
            callback = {"callback_on_step_end": lambda *_: on_step() or {}}
        return self.pipe(
            num_inference_steps=steps, height=16, width=16, output_type="latent", return_dict=False,
            generator=torch.Generator().manual_seed(seed), **self.given, **callback,
        )[0]  # fmt: skip

    def profile(self) -> SimilarityProfile:
        with ProfileRecorder(self.pipe) as recorder:
            self.sample(seed=5)
        return recorder.profile()


@pytest.fixture(params=list(BUILDERS))
def stock(request: pytest.FixtureRequest) -> Stock:
    return Stock(request.param)


def test_profile_apply_remove(stock, tmp_path) -> None:
    plain = stock.sample()
    path = stock.profile().save(tmp_path / "profile.safetensors")
    profile = SimilarityProfile.load(path)
    named = stock.name == "flux"
    assert profile.branches == (("cond", "uncond") if named else ("batched",))
    assert profile.num_inference_steps == profile.num_evaluations == STEPS and profile.num_runs == 1
    for granularity in ("subblock", "block"):
        with apply_bac(stock.pipe, BACConfig(budget=STEPS, granularity=granularity), profile=profile):
            assert torch.equal(stock.sample(), plain)
    config = BACConfig(budget=2, granularity="block")
    with apply_bac(stock.pipe, config, profile=profile) as handle:
        first, second = stock.sample(), stock.sample()
        facts = handle.stats()
        assert facts["computed"]["block"] * 3 == facts["reused"]["block"] * 2 > 0 and facts["runs"] == 2
        assert torch.equal(first, second) and not torch.equal(first, plain)
        with pytest.raises(ValueError, match="made for 5 steps and this run has 4"):
            stock.sample(steps=4)
        assert torch.equal(stock.sample(), first)
    assert torch.equal(stock.sample(), plain)
    model = stock.pipe.transformer
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("abort_after", [0, 2])
def test_an_aborted_run_leaves_nothing(stock, abort_after: int) -> None:
    """The next run starts at the timestep of the aborted one and must not take its tensors."""
    schedule = build_schedule(stock.profile(), BACConfig(budget=2, granularity="block"))
    steps: list[int] = []

    def fail() -> None:
        steps.append(1)
        if len(steps) == abort_after + 1:
            raise RuntimeError("stop")

    with apply_bac(stock.pipe, schedule) as handle:
        fresh = stock.sample()
        with pytest.raises(RuntimeError, match="stop"):
            stock.sample(seed=7, on_step=fail)
        assert handle.stats()["cached_bytes"] > 0
        assert torch.equal(stock.sample(), fresh)
        assert handle.stats()["runs"] == 3 and handle.stats()["cached_bytes"] == 0


def test_two_step_counts_side_by_side() -> None:
    """A stock pipeline does not always tell its number of steps; its scheduler's timesteps do."""
    stock = Stock("pixart")
    profiles = []
    for steps in (4, 5):
        with ProfileRecorder(stock.pipe) as recorder:
            stock.sample(steps=steps)
        profiles.append(recorder.profile())
    with apply_bac(stock.pipe, BACConfig(budget=2, granularity="block"), profile=profiles) as handle:
        stock.sample(steps=5)
        stock.sample(steps=4)
        assert handle.stats()["computed"]["block"] == 2 * 2 * 2 and handle.stats()["reused"]["block"] == 2 * (3 + 2)

"""Caching: BAC beside fewer steps and the caches of diffusers and cache-dit, on one trained text-to-image model.

Every method makes the same pictures (same prompts, same noise) in turn, prompt by prompt, so that a busy machine slows
all of them alike; the first prompt warms up, counts FLOPs and tunes thresholds and is not timed. PSNR and SSIM are to
the un-cached pictures; `speedup` is the median over prompts of the ratio of wall times, `cpu_speedup` of CPU times.
"""

import argparse
import contextlib
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

NAME = "caching"

PROMPTS = (
    "fire engine, twemoji style", "snowman, 3d style", "guitar, blob style", "pizza, gradient style", "crescent moon",
    "soccer ball, flat style", "penguin, noto style", "key, 3d style", "tulip, gradient style", "ghost, blob style",
    "bicycle, flat style", "frog, twemoji style",
)  # fmt: skip

Scope = Callable[[], AbstractContextManager[Any]]


@dataclass
class Method:
    """One row: how to switch the method on, and what it was seen to do."""

    name: str
    setting: str
    scope: Scope
    steps: int
    share: float = 1.0
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--model", default="emoji-pixart-64", help="a text-to-image checkpoint with BAC profiles")
    parser.add_argument("--num-inference-steps", type=int, default=40)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--num-prompts", type=int, default=5, help="timed prompts (one more warms up)")
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("--flop-fractions", type=float, nargs="+", default=[0.25, 0.35, 0.5])
    parser.add_argument("--rivals", choices=("all", "none"), default="all")
    parser.add_argument("--tuning-runs", type=int, default=3, help="runs spent on each rival's threshold")


@dataclass
class Bench:
    """The pipeline and how one picture is made with it."""

    model: str
    pipe: Any
    guidance_scale: float
    seed: int

    def sample(self, prompt_index: int, steps: int, scope: Any = None) -> tuple[torch.Tensor, float, float]:
        """One uint8 picture (1, 3, H, W), seconds of wall time and of CPU time."""
        pipe = scope if hasattr(scope, "transformer") else self.pipe
        generator = [torch.Generator().manual_seed(self.seed + prompt_index)]
        wall, cpu = time.perf_counter(), time.process_time()
        output = pipe(
            PROMPTS[prompt_index % len(PROMPTS)], num_inference_steps=steps, guidance_scale=self.guidance_scale,
            generator=generator, output_type="pt", return_dict=False,
        )  # fmt: skip
        if self.pipe.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - wall, time.process_time() - cpu)
        return (output[0].float().cpu() * 255).round().to(torch.uint8), *seconds

    def flops(self, scope: Scope, steps: int) -> tuple[float, torch.Tensor]:
        """FLOPs of the network for one picture under a method, and the picture."""
        from dit_suite.caching.recorder import FlopMeter

        meter = FlopMeter()
        with scope() as inside, meter:
            picture = self.sample(0, steps, inside)[0]
        return float(meter.total), picture


@contextlib.contextmanager
def _diffusers_cache(model: Any, attach: Callable[[Any], None], hooks: tuple[str, ...]) -> Iterator[None]:
    """A cache of diffusers on a model whose class lacks CacheMixin: attached by hand, with a context and a reset."""
    from diffusers import CacheMixin
    from diffusers.hooks import HookRegistry

    attach(model)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.invalidate_child_registries_cache()
    try:
        with CacheMixin.cache_context(model, "cond_uncond"):
            yield
    finally:
        registry.reset_stateful_hooks(recurse=True)
        for hook in hooks:
            registry.remove_hook(hook, recurse=True)
        registry.invalidate_child_registries_cache()


def _first_block_cache(model: Any, threshold: float) -> AbstractContextManager[None]:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    config = FirstBlockCacheConfig(threshold=threshold)
    hooks = ("fbc_leader_block_hook", "fbc_block_hook")
    return _diffusers_cache(model, lambda m: apply_first_block_cache(m, config), hooks)


def _mag_cache(model: Any, threshold: float, steps: int, ratios: list[float]) -> AbstractContextManager[None]:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    config = MagCacheConfig(threshold=threshold, max_skip_steps=4, num_inference_steps=steps, mag_ratios=ratios)
    hooks = ("mag_cache_leader_block_hook", "mag_cache_block_hook")
    return _diffusers_cache(model, lambda m: apply_mag_cache(m, config), hooks)


def _taylorseer(model: Any, interval: int, order: int, lite: bool) -> AbstractContextManager[None]:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    modules = None if lite else [r"transformer_blocks\.\d+\.(attn1|attn2|ff)"]
    config = TaylorSeerCacheConfig(
        cache_interval=interval, max_order=order, disable_cache_before_step=2, cache_identifiers=modules,
        taylor_factors_dtype=torch.float32, use_lite_mode=lite,
    )  # fmt: skip
    return _diffusers_cache(model, lambda m: apply_taylorseer_cache(m, config), ("taylorseer_cache",))


@contextlib.contextmanager
def _dbcache(model: str, threshold: float, steps: int) -> Iterator[Any]:
    """cache-dit's DBCache (F1B0, two warm-up steps), where that package is installed, on a pipeline of its own.

    Disabling it leaves the transformer with other parameter names, so the shared pipeline is kept out of it.
    """
    from dit_suite.checkpoints import load_pipeline

    cache_dit = importlib.import_module("cache_dit")
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    adapter = cache_dit.BlockAdapter(
        pipe=pipe, transformer=pipe.transformer, blocks=pipe.transformer.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3, has_separate_cfg=False,
    )  # fmt: skip
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=2,
        num_inference_steps=steps,
    )  # fmt: skip
    cache_dit.enable_cache(adapter, cache_config=config)
    try:
        yield pipe
    finally:
        cache_dit.disable_cache(adapter)


def _tuned(bench: Bench, steps: int, full: float, target: float, runs: int, scope: Callable[[float], Scope]) -> float:
    """The threshold whose executed share of the FLOPs on the first prompt comes closest to `target` (bisection)."""
    low, high = 0.0, 1.0
    best = (float("inf"), high)
    for run in range(runs + 3):
        middle = (low + high) / 2 if run else 0.25
        share = bench.flops(scope(middle), steps)[0] / full
        best = min(best, (abs(share - target), middle))
        low, high = (middle, high) if share > target else (low, middle)
        if run >= runs - 1 and best[0] < 0.04:
            break
    return best[1]


def _bac_methods(bench: Bench, steps: int, fractions: list[float]) -> list[Method]:
    from dit_suite.caching.bac import apply_bac, bundled_profiles
    from dit_suite.caching.plan import BACConfig, build_schedule

    profile = next((p for p in bundled_profiles(bench.pipe) if p.num_inference_steps == steps), None)
    if profile is None:
        raise ValueError(f"the checkpoint has no BAC profile for {steps} steps; run scripts/calibrate_bac.py")
    reuse = {"granularity": "subblock", "predictor": "reuse", "order": 1}
    target = fractions[len(fractions) // 2]
    configs = [("BAC", BACConfig(flop_fraction=f)) for f in fractions]
    configs += [
        ("BAC, plain reuse, shared l2", BACConfig(flop_fraction=target, **reuse)),
        ("BAC as published", BACConfig.reference(flop_fraction=target)),
        ("uniform reuse", BACConfig(flop_fraction=target, schedule="uniform", **reuse)),
    ]
    found = []
    for name, config in configs:
        schedule = build_schedule(profile, config)
        setting = f"budget {schedule.config['budget']}"
        found.append(Method(name, setting, lambda s=schedule: apply_bac(bench.pipe, s), steps))
    return found


def _rival_methods(bench: Bench, steps: int, full: float, target: float, runs: int) -> tuple[list[Method], list[str]]:
    """diffusers' and cache-dit's caches at about the same FLOPs, and the reasons of those that do not apply."""
    from dit_suite.caching.bac import bundled_profiles

    model = bench.pipe.transformer
    profile = next(p for p in bundled_profiles(bench.pipe) if p.num_inference_steps == steps)
    stack = profile.select("stack")[0]
    norms = np.sqrt(np.diag(profile.inner_products(stack, profile.branches)))
    ratios = [1.0, *(float(b / a) for a, b in zip(norms, norms[1:], strict=False))]
    tunable: dict[str, Callable[[float], Scope]] = {
        "FirstBlockCache (diffusers)": lambda t: lambda: _first_block_cache(model, t),
        "MagCache (diffusers)": lambda t: lambda: _mag_cache(model, t, steps, ratios),
        "DBCache F1B0 (cache-dit)": lambda t: lambda: _dbcache(bench.model, t, steps),
    }
    found, left_out = [], []
    for name, scope in tunable.items():
        try:
            threshold = _tuned(bench, steps, full, target, runs, scope)
        except ModuleNotFoundError:
            left_out.append(f"{name}: the package is not installed")
            continue
        found.append(Method(name, f"threshold {threshold:.3f}", scope(threshold), steps))
    interval = max(2, round(1 / target))
    for kind, order in (("attention + FFN", 1), ("attention + FFN", 2), ("lite", 1)):
        scope = functools.partial(_taylorseer, model, interval, order, kind == "lite")
        found.append(Method("TaylorSeer (diffusers)", f"{kind}, interval {interval}, order {order}", scope, steps))
    return found, left_out


def _measure(bench: Bench, methods: list[Method], num_prompts: int, full: float) -> None:
    from dit_suite.evaluation.pairs import psnr, ssim

    for method in methods[1:]:
        method.share = bench.flops(method.scope, method.steps)[0] / full
        print(f"{method.name}, {method.setting}: {method.share:.3f} of the FLOPs", flush=True)
    for prompt in range(1, num_prompts + 1):
        reference = None
        for method in methods:
            with method.scope() as inside:
                picture, wall, cpu = bench.sample(prompt, method.steps, inside)
            method.wall.append(wall)
            method.cpu.append(cpu)
            if reference is None:
                reference = picture
                continue
            method.psnr.append(float(psnr(picture, reference)[0]))
            method.ssim.append(float(ssim(picture, reference)[0]))
            print(
                f"prompt {prompt}, {method.name}, {method.setting}: {method.psnr[-1]:.2f} dB, {wall:.1f} s", flush=True
            )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures every method and returns the rows."""
    from dit_suite.checkpoints import load_pipeline

    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    bench, steps = Bench(args.model, pipe, args.guidance_scale, args.seed), args.num_inference_steps
    full, _ = bench.flops(contextlib.nullcontext, steps)
    target = args.flop_fractions[len(args.flop_fractions) // 2]
    methods = [Method("no cache", "", contextlib.nullcontext, steps)]
    methods += _bac_methods(bench, steps, args.flop_fractions)
    fewer = max(1, int(target * steps))
    methods.append(Method("fewer steps", f"{fewer} steps", contextlib.nullcontext, fewer))
    left_out: list[str] = []
    if args.rivals == "all":
        rivals, left_out = _rival_methods(bench, steps, full, target, args.tuning_runs)
        methods += rivals
    _measure(bench, methods, args.num_prompts, full)
    baseline = methods[0]
    rows = []
    for method in methods:
        ratio = [a / b for a, b in zip(baseline.wall, method.wall, strict=True)]
        cpu_ratio = [a / b for a, b in zip(baseline.cpu, method.cpu, strict=True)]
        rows.append(
            {
                "method": method.name,
                "setting": method.setting,
                "flops": method.share,
                "psnr_mean": statistics.mean(method.psnr) if method.psnr else None,
                "psnr_min": min(method.psnr, default=None),
                "ssim_mean": statistics.mean(method.ssim) if method.ssim else None,
                "seconds": statistics.median(method.wall),
                "speedup": statistics.median(ratio),
                "cpu_speedup": statistics.median(cpu_ratio),
            }
        )
    facts = {"model": args.model, "steps": steps, "guidance_scale": args.guidance_scale, "prompts": args.num_prompts}
    return {"settings": facts, "not_measured": left_out, "rows": rows}

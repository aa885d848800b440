"""Caching: BAC beside fewer steps and the caches of diffusers and cache-dit, on one trained text-to-image model.

Every method makes the same pictures (same prompts, same noise) in turn, prompt by prompt, so that a busy machine slows
all of them alike; the first prompt warms up, counts FLOPs and tunes thresholds and is not timed. PSNR and SSIM are to
the un-cached pictures; `speedup` is the median over prompts of the ratio of wall times, `cpu_speedup` of CPU times.

`--fd-samples N` instead makes N pictures for held-out captions without a cache and with every method that
`--fd-methods` names, and gives their FD and KID to the held-out pictures, with paired verdicts; it goes on where it was
stopped. FLOPs and the thresholds of the other caches come from one further prompt there too.
"""

import argparse
import contextlib
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_suite.files import write_json

NAME = "caching"

PROMPTS = (
    "fire engine, twemoji style", "snowman, 3d style", "guitar, blob style", "pizza, gradient style", "crescent moon",
    "soccer ball, flat style", "penguin, noto style", "key, 3d style", "tulip, gradient style", "ghost, blob style",
    "bicycle, flat style", "frog, twemoji style",
)  # fmt: skip

FD_METHODS = ("bac", "bac-sum", "fewer", "firstblock", "magcache", "dbcache", "taylorseer")

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
    pictures: list[torch.Tensor] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--model", default="emoji-pixart-64", help="a text-to-image checkpoint with BAC profiles")
    parser.add_argument("--num-inference-steps", type=int, default=40)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--num-prompts", type=int, default=5, help="timed prompts (one more warms up)")
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("--flop-fractions", type=float, nargs="+", default=[0.25, 0.35, 0.5])
    parser.add_argument("--rivals", choices=("all", "none"), default="all", help="other caches (not --fd-samples)")
    parser.add_argument("--tuning-runs", type=int, default=3, help="runs spent on each rival's threshold")
    parser.add_argument("--picture", type=Path, help="also write pictures, times and differences of some methods")
    parser.add_argument("--fd-samples", type=int, default=0, help="compare distances over this many captions instead")
    parser.add_argument(
        "--fd-methods", nargs="+", choices=FD_METHODS, default=["bac", "bac-sum", "fewer", "magcache"],
        help="what to compare with no cache; bac: at every budget, the others: at the middle one (--fd-samples)",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, default=Path("data/emoji64"), help="held-out captions (--fd-samples)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at a time (--fd-samples)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network")
    parser.add_argument("--features", default="enet-lite0", help="feature network, as in evaluate.py (--fd-samples)")


@dataclass
class Bench:
    """The pipeline and how one picture is made with it."""

    model: str
    pipe: Any
    guidance_scale: float
    seed: int

    def sample(self, prompt_index: int, steps: int, scope: Any = None) -> tuple[torch.Tensor, float, float]:
        """One uint8 picture (1, 3, H, W), seconds of wall time and of CPU time."""
        from dit_suite.benchmarks.held_out import pipeline_inside

        pipe = pipeline_inside(scope, self.pipe)
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
def _dbcache(bench: Bench, threshold: float, steps: int) -> Iterator[Any]:
    """cache-dit's DBCache (F1B0, two warm-up steps), where that package is installed, on a pipeline of its own.

    Disabling it leaves the transformer with other parameter names, so the shared pipeline is kept out of it.
    """
    from dit_suite.checkpoints import load_pipeline

    cache_dit = importlib.import_module("cache_dit")
    pipe = load_pipeline(bench.model, dtype=bench.pipe.transformer.dtype)
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


def _profile(bench: Bench, steps: int) -> Any:
    """The bundled BAC profile for a step count."""
    from dit_suite.caching.bac import bundled_profiles

    profile = next((p for p in bundled_profiles(bench.pipe) if p.num_inference_steps == steps), None)
    if profile is None:
        raise ValueError(f"the checkpoint has no BAC profile for {steps} steps; run scripts/calibrate_bac.py")
    return profile


def _bac_methods(bench: Bench, steps: int, configs: list[tuple[str, dict[str, Any]]]) -> list[Method]:
    """BAC under every (name, options of `BACConfig`)."""
    from dit_suite.caching.bac import apply_bac
    from dit_suite.caching.plan import BACConfig, build_schedule

    profile, found = _profile(bench, steps), []
    for name, options in configs:
        schedule = build_schedule(profile, BACConfig(**options))
        setting = f"budget {schedule.config['budget']}"
        found.append(Method(name, setting, lambda s=schedule: apply_bac(bench.pipe, s), steps))
    return found


def _bac_variants(fractions: list[float], target: float) -> list[tuple[str, dict[str, Any]]]:
    """Our default and the plain sum at every budget; plain reuse, the published method and uniform at `target`."""
    from dit_suite.caching.plan import BACConfig

    reuse = {"flop_fraction": target, "granularity": "subblock", "predictor": "reuse", "order": 1}
    return [
        *[("BAC", {"flop_fraction": f}) for f in fractions],
        *[("BAC, plain sum of errors", {"flop_fraction": f, "objective": "sum"}) for f in fractions],
        ("BAC, plain reuse, shared l2", reuse),
        ("BAC as published", BACConfig.reference(flop_fraction=target).to_dict()),
        ("uniform reuse", {**reuse, "schedule": "uniform"}),
    ]


def _fewer_steps(steps: int, target: float) -> Method:
    """No cache and as many steps as `target` of the FLOPs pays for."""
    fewer = max(1, int(target * steps))
    return Method("fewer steps", f"{fewer} steps", contextlib.nullcontext, fewer)


def _mag_ratios(bench: Bench, steps: int) -> list[float]:
    """MagCache's ratios, from the output norms that the profile holds."""
    profile = _profile(bench, steps)
    stack = profile.select("stack")[0]
    norms = np.sqrt(np.diag(profile.inner_products(stack, profile.branches)))
    return [1.0, *(float(b / a) for a, b in zip(norms, norms[1:], strict=False))]


def _tunable_rivals(bench: Bench, steps: int) -> dict[str, tuple[str, Callable[[float], Scope]]]:
    """The other caches whose FLOPs a threshold sets: their name, and the scope at a threshold."""
    model = bench.pipe.transformer
    return {
        "firstblock": ("FirstBlockCache (diffusers)", lambda t: lambda: _first_block_cache(model, t)),
        "magcache": ("MagCache (diffusers)", lambda t: lambda: _mag_cache(model, t, steps, _mag_ratios(bench, steps))),
        "dbcache": ("DBCache F1B0 (cache-dit)", lambda t: lambda: _dbcache(bench, t, steps)),
    }


def _taylorseer_methods(bench: Bench, steps: int, target: float) -> list[Method]:
    """TaylorSeer at the interval nearest to `target`, the kind with the highest PSNR at 40 steps first."""
    interval, found = max(2, round(1 / target)), []
    for kind, order in (("attention + FFN", 1), ("attention + FFN", 2), ("lite", 1)):
        scope = functools.partial(_taylorseer, bench.pipe.transformer, interval, order, kind == "lite")
        found.append(Method("TaylorSeer (diffusers)", f"{kind}, interval {interval}, order {order}", scope, steps))
    return found


def _rival_methods(bench: Bench, steps: int, full: float, target: float, runs: int) -> tuple[list[Method], list[str]]:
    """diffusers' and cache-dit's caches at about the same FLOPs, and the reasons of those that do not apply."""
    found, left_out = [], []
    for name, scope in _tunable_rivals(bench, steps).values():
        try:
            threshold = _tuned(bench, steps, full, target, runs, scope)
        except ModuleNotFoundError:
            left_out.append(f"{name}: the package is not installed")
            continue
        found.append(Method(name, f"threshold {threshold:.3f}", scope(threshold), steps))
    return found + _taylorseer_methods(bench, steps, target), left_out


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
            method.pictures.append(picture[0].permute(1, 2, 0))
            if reference is None:
                reference = picture
                continue
            method.psnr.append(float(psnr(picture, reference)[0]))
            method.ssim.append(float(ssim(picture, reference)[0]))
            print(
                f"prompt {prompt}, {method.name}, {method.setting}: {method.psnr[-1]:.2f} dB, {wall:.1f} s", flush=True
            )


def _draw(methods: list[Method], path: Path, fraction: float, rows: int = 4) -> None:
    """The first pictures of the un-cached run, of BAC at `fraction`, of fewer steps and of MagCache."""
    from dit_suite.benchmarks.strips import GAIN, comparison_picture

    bac = min((m for m in methods if m.name == "BAC"), key=lambda m: abs(m.share - fraction))
    chosen = [methods[0], bac, *(m for m in methods if m.name.startswith(("fewer steps", "MagCache")))]
    titles = [[f"no cache, {methods[0].steps} steps", f"{statistics.median(methods[0].wall):.2f} s a picture"]]
    for method in chosen[1:]:
        speedup = statistics.median(a / b for a, b in zip(methods[0].wall, method.wall, strict=True))
        steps = "" if method.steps == methods[0].steps else f", {method.setting}"
        titles.append(
            [
                f"{method.name}{steps}",
                f"{statistics.median(method.wall):.2f} s, {speedup:.2f}x",
                f"PSNR {statistics.mean(method.psnr):.1f} dB; difference times {GAIN}",
            ]
        )
    comparison_picture(titles, [[p.numpy() for p in m.pictures[:rows]] for m in chosen], path)


def _kept_threshold(path: Path, target: float, tune: Callable[[], float]) -> float:
    """A threshold for `target` of the FLOPs, tuned once and kept with the pictures."""
    kept = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if kept.get("target") != target:
        kept = {"threshold": tune(), "target": target}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, path)
    return float(kept["threshold"])


def _distance_methods(
    args: argparse.Namespace, bench: Bench, full: float, folder: Path
) -> tuple[dict[str, Method], list[str]]:
    """What `--fd-methods` names beside no cache, by folder of its pictures, and the reasons of what can't run."""
    steps, fractions = args.num_inference_steps, args.flop_fractions
    target = fractions[len(fractions) // 2]
    methods, left_out = {"none": Method("no cache", "", contextlib.nullcontext, steps)}, []
    for kind in args.fd_methods:
        if kind == "bac":
            found = _bac_methods(bench, steps, [("BAC", {"flop_fraction": f}) for f in fractions])
            methods |= {f"bac-{method.setting.split()[-1]}": method for method in found}
        elif kind == "bac-sum":
            options = {"flop_fraction": target, "objective": "sum"}
            (method,) = _bac_methods(bench, steps, [("BAC, plain sum of errors", options)])
            methods[f"bac-sum-{method.setting.split()[-1]}"] = method
        elif kind == "fewer":
            methods[kind] = _fewer_steps(steps, target)
        elif kind == "taylorseer":
            methods[kind] = _taylorseer_methods(bench, steps, target)[0]
        else:
            name, scope = _tunable_rivals(bench, steps)[kind]
            tune = functools.partial(_tuned, bench, steps, full, target, args.tuning_runs, scope)
            try:
                threshold = _kept_threshold(folder / f"{kind}-threshold.json", target, tune)
            except ModuleNotFoundError:
                left_out.append(f"{name}: the package is not installed")
                continue
            methods[kind] = Method(name, f"threshold {threshold:.3f}", scope(threshold), steps)
    return methods, left_out


def _distances(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """FD and KID of every method over the same held-out captions and seeds."""
    from dit_suite.benchmarks.held_out import HeldOut, distance_cells, save_sheet
    from dit_suite.checkpoints import find_checkpoint
    from dit_suite.sampling import SamplingJob

    if getattr(args, "output", None) is None:
        raise ValueError("--fd-samples writes pictures: give --output FOLDER")
    checkpoint, steps = find_checkpoint(args.model), args.num_inference_steps
    held_out = HeldOut(args.data, args.output / f"fd-{steps}", args.fd_samples, features=args.features)
    captions = held_out.captions()
    full, _ = bench.flops(contextlib.nullcontext, steps)
    methods, left_out = _distance_methods(args, bench, full, held_out.output)
    rows = []
    for name, method in methods.items():
        options = checkpoint.technique.options_class()(
            num_inference_steps=method.steps, guidance_scale=args.guidance_scale
        )
        job = SamplingJob(
            technique=checkpoint.technique.name, model=args.model, weights_sha256=checkpoint.weights_sha256,
            conditions=captions, options=options, seed=args.seed, batch_size=args.batch_size, dtype=args.dtype,
        )  # fmt: skip
        folder = held_out.output / name
        held_out.make(folder, job, bench.pipe, method.scope, note=f"{method.name}, {method.setting}")
        save_sheet(folder, held_out.output / f"{name}.png")
        score = held_out.score(folder, held_out.output / "none" if name != "none" else None)
        write_json(score, held_out.output / f"{name}.json")
        share = 1.0 if name == "none" else bench.flops(method.scope, method.steps)[0] / full
        row = {"method": method.name, "setting": method.setting, "flops": share, **distance_cells(score)}
        for verdict in score.get("comparison", ()):
            kind, difference = verdict["metric"].partition("_")[0], verdict["difference"]
            row[f"{kind}_difference"] = (
                f"{difference['value']:+.4g} [{difference['low']:+.4g}, {difference['high']:+.4g}]"
            )
            row[f"{kind}_verdict"] = verdict["verdict"]
        rows.append(row)
        print(f"{method.name}: {row['fd']}, {row['kid']}", flush=True)
    facts = {"model": args.model, "steps": steps, "guidance_scale": args.guidance_scale, "samples": args.fd_samples}
    return {"settings": facts, "not_measured": left_out, "rows": rows}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures every method and returns the rows."""
    from dit_suite.checkpoints import load_pipeline

    pipe = load_pipeline(args.model, dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    bench, steps = Bench(args.model, pipe, args.guidance_scale, args.seed), args.num_inference_steps
    if args.fd_samples:
        return _distances(args, bench)
    full, _ = bench.flops(contextlib.nullcontext, steps)
    target = args.flop_fractions[len(args.flop_fractions) // 2]
    methods = [Method("no cache", "", contextlib.nullcontext, steps)]
    methods += _bac_methods(bench, steps, _bac_variants(args.flop_fractions, target))
    methods.append(_fewer_steps(steps, target))
    left_out: list[str] = []
    if args.rivals == "all":
        rivals, left_out = _rival_methods(bench, steps, full, target, args.tuning_runs)
        methods += rivals
    _measure(bench, methods, args.num_prompts, full)
    if args.picture is not None:
        _draw(methods, args.picture, target)
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

"""AdaSpa, VMoBA and rivals on a trained video model: clips compared pair by pair, single steps timed in turn."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_suite.attention.adaspa import AdaSpaConfig, LayerState, recall
from dit_suite.attention.block_mass import block_mass
from dit_suite.attention.calls import AttentionCall
from dit_suite.attention.mask_rules import RuleMethod
from dit_suite.attention.merge import attention_with_lse
from dit_suite.attention.methods import AdaSpaMethod, VMoBAMethod
from dit_suite.attention.plugin import SparseAttentionHandle
from dit_suite.attention.vmoba import VMoBAConfig
from dit_suite.benchmarks.sparse_kernels import interleaved, median_ratio
from dit_suite.schedulers.step_plan import Run, StepContext, current_step, publish_step

_PROBES = (0.3, 0.6, 0.9)
STATIC_RIVALS = {"radial": "native", "sliding-tile": "tile"}
SCORED_RIVALS = {"antidiagonal": "tile", "oracle": "tile"}


class _Probe:
    """Measures the exact recall of the tables in use at a few steps of a run. Kept out of timed runs."""

    def __init__(self, method: AdaSpaMethod, steps: set[int]) -> None:
        self._steps = steps
        self._plain = method._sparse
        self._method = method
        self.recalls: list[float] = []
        method._sparse = self

    def __call__(self, call: AttentionCall, state: LayerState, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = self._plain(call, state, *args, **kwargs)
        step = current_step()
        if step.step_index in self._steps and step.branch != "uncond":
            (query, key, value), _ = self._method._video_in_order(call)
            lse = attention_with_lse(query, key, value, call.scale)[1]
            mass = block_mass(query, key, lse, self._method._block_size(call), scale=call.scale)
            self.recalls.append(float(recall(mass, state.result.table, state.result.counts).mean()))
        return out


@dataclass
class Contender:
    """One row: how to build the method, and what was measured."""

    name: str
    setting: str
    build: Callable[[], Any]
    clips: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """Mean of a number over the clips that have it."""
        values = [clip[name] for clip in self.clips if clip[name] is not None]
        return statistics.mean(values) if values else None


def _adaspa(**changes: Any) -> Callable[[], AdaSpaMethod]:
    return lambda: AdaSpaMethod(AdaSpaConfig(**changes))


def _rival(name: str, order: str, sparsity: float, every_step: bool, tile: tuple[int, ...] | None) -> Callable:
    def build() -> RuleMethod:
        config = AdaSpaConfig(sparsity=sparsity, token_order=order, tile=tile, head_adaptive=False)
        return RuleMethod(name, config, every_step=every_step)

    return build


def contenders(args: argparse.Namespace) -> list[Contender]:
    """The rows of the table, filtered by `--methods`."""
    rows = [
        Contender(f"adaspa-{order}", f"sparsity {s:g}", _adaspa(sparsity=s, token_order=order))
        for s in args.sparsities
        for order in ("tile", "native")
    ]
    rows.append(Contender("vmoba", "training-free", lambda: VMoBAMethod(VMoBAConfig.training_free())))
    if args.rival_sparsity >= 0:
        s = args.rival_sparsity
        rows += [
            Contender("adaspa-one-tier", f"sparsity {s:g}", _adaspa(sparsity=s, head_adaptive=False)),
            Contender("radial", f"sparsity {s:g}", _rival("radial", "native", s, False, None)),
            Contender("sliding-tile", f"sparsity {s:g}", _rival("sliding-tile", "tile", s, False, (4, 4, 4))),
            Contender("antidiagonal", f"sparsity {s:g}", _rival("antidiagonal", "tile", s, True, None)),
            Contender("oracle", f"sparsity {s:g}", _rival("oracle", "tile", s, True, None)),
        ]
    if "all" in args.methods:
        return rows
    unknown = set(args.methods) - {label for row in rows for label in _labels(row)}
    if unknown:
        known = ", ".join(dict.fromkeys(row.name for row in rows))
        raise ValueError(f"there is no method {sorted(unknown)[0]!r}; the methods are {known}")
    return [row for row in rows if _labels(row) & set(args.methods)]


def _labels(row: Contender) -> set[str]:
    """What `--methods` may call a row: its name, or name:sparsity."""
    return {row.name, f"{row.name}:{row.setting.removeprefix('sparsity ')}"}


def _clip(pipe: Any, prompt: str, args: argparse.Namespace) -> tuple[torch.Tensor, float]:
    """uint8 frames `(T, 3, H, W)` and seconds."""
    start = time.perf_counter()
    clip = pipe(
        prompt,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=[torch.Generator().manual_seed(args.seed)],
        output_type="pt",
        return_dict=False,
    )[0][0]
    return (clip.float().cpu() * 255).round().to(torch.uint8), time.perf_counter() - start


def _clip_key(args: argparse.Namespace, prompt: str, name: str, setting: str) -> dict[str, Any]:
    facts = {"model": args.model, "prompt": prompt, "seed": args.seed, "steps": args.num_inference_steps}
    return facts | {"guidance_scale": args.guidance_scale, "method": name, "setting": setting}


def _known_clips(path: Path | None) -> list[dict[str, Any]]:
    """Rows that an earlier run wrote; a last line that was cut off is left out."""
    if path is None or not path.is_file():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _measure_clip(pipe: Any, prompt: str, row: Contender, dense: torch.Tensor, args: argparse.Namespace) -> dict:
    from dit_suite.evaluation.pairs import psnr, ssim

    method = row.build()
    probes = {round(share * args.num_inference_steps) for share in _PROBES}
    probe = _Probe(method, probes) if isinstance(method, AdaSpaMethod) else None
    with SparseAttentionHandle(pipe, method) as handle:
        clip, seconds = _clip(pipe, prompt, args)
        density = handle.stats()["density"]
    return {
        "psnr": float(psnr(clip, dense).mean()),
        "ssim": float(ssim(clip, dense).mean()),
        "recall": statistics.mean(probe.recalls) if probe is not None and probe.recalls else None,
        "density": density,
        "seconds": seconds,
    }


def _make_clips(pipe: Any, rows: list[Contender], args: argparse.Namespace) -> None:
    """Every method's clip of every prompt beside the dense one; with `--clips-file` a stopped run goes on."""
    known = _known_clips(args.clips_file)
    for prompt in args.prompts:
        dense = None
        for row in rows:
            key = _clip_key(args, prompt, row.name, row.setting)
            measured = next((k for k in known if key.items() <= k.items()), None)
            if measured is None:
                dense = _clip(pipe, prompt, args)[0] if dense is None else dense
                measured = _measure_clip(pipe, prompt, row, dense, args)
                if args.clips_file is not None:
                    with args.clips_file.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(key | measured) + "\n")
            row.clips.append(measured)
            print(f"{prompt}, {row.name}, {row.setting}: {measured['psnr']:.2f} dB", flush=True)


@torch.no_grad()
def _time_steps(pipe: Any, rows: list[Contender], args: argparse.Namespace) -> None:
    """Times one network pass at the middle of a run, dense and with each method, in turn.

    The input is half-way noise; every method searches (or builds its table) on that same input first.
    """
    device, network = pipe.device, pipe.transformer
    generator = torch.Generator().manual_seed(args.seed)
    frames, height, width = pipe.config.sample_size
    shape = pipe._latent_shape(1, frames, height, width)
    given = {
        "hidden_states": torch.randn(shape, generator=generator).to(device, network.dtype),
        "encoder_hidden_states": pipe.encode_prompt([args.prompts[0]], device),
        "timestep": torch.full((1,), 600.0, device=device),
    }
    middle = args.num_inference_steps // 2
    first = AdaSpaConfig().searches(args.num_inference_steps)[0]
    run = Run()

    def forward(index: int, key: Run) -> None:
        with publish_step(StepContext(index, args.num_inference_steps, 600.0, "cond", run=key)):
            network(**given, return_dict=False)

    for row in rows:
        method = row.build()
        key = Run()

        def sparse(method: Any = method, key: Run = key) -> None:
            with SparseAttentionHandle(pipe, method, keep_state=True):
                forward(middle, key)

        with SparseAttentionHandle(pipe, method, keep_state=True) as handle:
            forward(first, key)
            stats = handle.stats()
        if stats.get("fused_searches"):
            row.facts["search_s_per_layer"] = stats["search_seconds"] / stats["fused_searches"]
        times = interleaved({"dense": lambda: forward(middle, run), "sparse": sparse}, args.repeats)
        row.facts["dense_step_s"] = statistics.median(t[0] for t in times["dense"])
        row.facts["step_speedup"] = median_ratio(times["dense"], times["sparse"], 0)
        row.facts["step_cpu_speedup"] = median_ratio(times["dense"], times["sparse"], 1)
        print(f"step, {row.name}, {row.setting}: {row.facts['step_cpu_speedup']:.2f}x of CPU time", flush=True)


def bundle_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per method and setting."""
    from dit_suite.checkpoints import load_pipeline

    rows = contenders(args)
    pipe = load_pipeline(args.model, device="cuda" if torch.cuda.is_available() else None)
    pipe.set_progress_bar_config(disable=True)
    if not args.skip_timing:
        _time_steps(pipe, rows, args)
    if not args.skip_clips:
        _make_clips(pipe, rows, args)
    return [
        {
            "part": "bundle",
            "method": row.name,
            "setting": row.setting,
            "density": row.mean("density"),
            "step_speedup": row.facts.get("step_speedup"),
            "step_cpu_speedup": row.facts.get("step_cpu_speedup"),
            "dense_step_s": row.facts.get("dense_step_s"),
            "search_s_per_layer": row.facts.get("search_s_per_layer"),
            "recall": row.mean("recall"),
            "psnr_mean": row.mean("psnr"),
            "ssim_mean": row.mean("ssim"),
            "clip_s": row.mean("seconds"),
            "clips": len(row.clips),
        }
        for row in rows
    ]

"""Clips made with sparse attention beside the dense clip of the same prompt and noise."""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dit_suite.attention.adaspa import LayerState, recall
from dit_suite.attention.block_mass import block_mass
from dit_suite.attention.calls import AttentionCall
from dit_suite.attention.merge import attention_with_lse
from dit_suite.attention.methods import AdaSpaMethod, VMoBAMethod
from dit_suite.attention.plugin import SparseAttentionHandle
from dit_suite.benchmarks.sparse_contenders import Contender
from dit_suite.files import write_text
from dit_suite.step_plan import current_step

_PROBES = (0.3, 0.6, 0.9)


class Probe:
    """Measures the exact recall of what a method attends to, at a few steps of a run. Kept out of timed runs."""

    def __init__(self, method: AdaSpaMethod | VMoBAMethod, steps: set[int]) -> None:
        self._steps = steps
        self._plain = method._sparse
        self._method = method
        self.recalls: list[float] = []
        method._sparse = self

    def __call__(self, call: AttentionCall, state: Any, *args: Any, **kwargs: Any) -> Any:
        out = self._plain(call, state, *args, **kwargs)
        step = current_step()
        if step.step_index in self._steps and step.branch != "uncond":
            by_table = isinstance(state, LayerState)
            self.recalls.append(self._block_recall(call, state) if by_table else weight_kept(call, out[1]))
        return out

    def _block_recall(self, call: AttentionCall, state: LayerState) -> float:
        order = self._method._order(call)
        query, key, value = (t if order is None else order.permute(t, 2) for t in call.video())
        lse = attention_with_lse(query, key, value, call.scale)[1]
        mass = block_mass(query, key, lse, self._method._block_size(call), scale=call.scale)
        return float(recall(mass, state.result.table, state.result.counts).mean())


def weight_kept(call: AttentionCall, lse: torch.Tensor) -> float:
    """Mean share of the dense softmax weight that a selection kept, from the selection's log-sum-exp."""
    return float(torch.exp(lse - attention_with_lse(*call.video(), call.scale)[1]).mean())


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
    facts = {
        "model": args.model,
        "dtype": args.dtype,
        "prompt": prompt,
        "seed": args.seed,
        "steps": args.num_inference_steps,
    }
    return facts | {"guidance_scale": args.guidance_scale, "method": name, "setting": setting}


def _known_clips(path: Path | None) -> list[dict[str, Any]]:
    """Rows that an earlier run wrote; a last line that was cut off is taken out of the file."""
    if path is None or not path.is_file():
        return []
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return [json.loads(line) for line in whole.splitlines()]


def _measure_clip(pipe: Any, prompt: str, row: Contender, dense: torch.Tensor, args: argparse.Namespace) -> dict:
    from dit_suite.evaluation.pairs import psnr, ssim

    method = row.build()
    probes = {round(share * args.num_inference_steps) for share in _PROBES}
    probe = Probe(method, probes)
    with SparseAttentionHandle(pipe, method) as handle:
        clip, seconds = _clip(pipe, prompt, args)
        density = handle.stats()["density"]
    return {
        "psnr": float(psnr(clip, dense).mean()),
        "ssim": float(ssim(clip, dense).mean()),
        "recall": statistics.mean(probe.recalls) if probe.recalls else None,
        "density": density,
        "seconds": seconds,
    }


def make_clips(pipe: Any, rows: list[Contender], args: argparse.Namespace) -> None:
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

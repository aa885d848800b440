"""ACDiT fixtures: masks, the masked forward, cached inference with its cache, guided sampling, reference positions."""

import math
import re
from typing import Any

import torch

from dit_suite.converters.acdit import build_model, make_scheduler
from dit_suite.golden import Result, Tensors, compare, section
from dit_suite.models.acdit import ACDiTTransformer3DModel
from dit_suite.models.block_causal import fused_pattern, rope_tables, rotate, skip_causal_pattern

FAMILY = "acdit"
PREFIXES = ("acdit_",)
TOLERANCE = 1e-4
SAMPLE_TOLERANCE = 1e-3


def build(tensors: Tensors, config: dict[str, Any]) -> ACDiTTransformer3DModel:
    """The network of a fixture, loaded strictly through the converter's key table."""
    grid = tuple(config["max_lens"])
    divisor = math.gcd(*config["rope_split_dims"])
    return build_model(
        section(tensors, "state_dict"),
        grid=(1, *grid) if len(grid) == 2 else grid,
        patch_size=1,
        block_size=config["block_size"],
        rope_split=tuple(dim // divisor for dim in config["rope_split_dims"]),
        class_dropout_prob=config["class_dropout_prob"],
    )


def check_masks(tensors: Tensors) -> list[Result]:
    """Training and inference masks; their sizes are in the tensors' names."""
    results = []
    for name, expected in section(tensors, "output").items():
        kind, number, size = re.fullmatch(r"(train_mask_T|infer_mask_block)(\d+)_B(\d+)", name).groups()
        if kind == "train_mask_T":
            pattern = skip_causal_pattern(int(number), int(size))
        else:
            pattern = fused_pattern(int(number) - 1, 1, int(size))
        results.append(compare(name, pattern.dense().float(), expected.float(), 0.0))
    return results


def run_cached(model: ACDiTTransformer3DModel, inputs: Tensors) -> dict[str, torch.Tensor]:
    """Teacher-forced inference: block i by the fused pass, then one cache-only pass; returns also the final cache."""
    clean, labels = inputs["clean_x"], inputs["y"].long()
    num_blocks, block_size = clean.shape[1:3]
    cache = model.new_cache(clean.shape[0], block_size)
    first, later = [], []
    for i in range(num_blocks):
        now = slice(i, i + 1)
        new = clean[:, i - 1 : i] if i else None
        passes = ((first, "noised_x", "t", new), (later, "noised_x2", "t2", None))
        for outputs, sample, time, written in passes:
            step = {"kv_cache": cache, "block_index": i, "clean_hidden_states": written}
            outputs.append(model(inputs[sample][:, now], inputs[time][:, now], labels, **step).sample)
    values = {"infer_first": torch.cat(first, dim=1), "infer_later": torch.cat(later, dim=1)}
    for name, layer in (("layer0", 0), ("last", cache.num_layers - 1)):
        kept = cache.buffer[layer, :, :, :, : cache.length * block_size]
        values[f"cache_k_{name}"], values[f"cache_v_{name}"] = kept[0], kept[1]
    return values


def sample(model: ACDiTTransformer3DModel, inputs: Tensors, steps: int, guidance_scale: float) -> torch.Tensor:
    """The whole sampling loop from given starting noise `(batch, T, B, channels)`."""
    noise, labels = inputs["sample_noise"], inputs["y"].long()
    if guidance_scale > 1:
        labels = torch.cat([labels, torch.full_like(labels, model.null_label)])
    repeats = labels.shape[0] // noise.shape[0]
    cache, blocks = model.new_cache(noise.shape[0], noise.shape[2]), []
    for i in range(noise.shape[1]):
        scheduler = make_scheduler()
        scheduler.set_timesteps(steps)
        block, new = noise[:, i : i + 1], blocks[-1] if i else None
        for timestep in scheduler.timesteps:
            step = {"kv_cache": cache, "block_index": i, "clean_hidden_states": new}
            out = model(block.repeat(repeats, 1, 1, 1), timestep, labels, **step).sample
            if guidance_scale > 1:
                cond, null = out.chunk(2)
                out = null + guidance_scale * (cond - null)
            block, new = scheduler.step(out, timestep, block).prev_sample, None
        blocks.append(block)
    return torch.cat(blocks, dim=1)


def compute(model: ACDiTTransformer3DModel, tensors: Tensors, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every recorded output by its name."""
    inputs = section(tensors, "input")
    labels, clean, noisy = inputs["y"].long(), inputs["clean_x"], inputs["noised_x"]
    null = torch.full_like(labels, model.null_label)

    def train(time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return model(noisy, time, label, clean).sample.flatten(1, 2)

    scheduler = make_scheduler()
    scheduler.set_timesteps(config["sample_steps"])
    positions = model.position_ids()
    tables = rope_tables(positions, model.rope_dims, model.rope_bases, "reference")
    return {
        "train": train(inputs["t"], labels),
        "train_null_label": train(inputs["t"], null),
        "train_scalar_t": train(inputs["t"][:, 0], labels),
        **run_cached(model, inputs),
        "sample_timesteps": scheduler.timesteps,
        "sample_cfg": sample(model, inputs, config["sample_steps"], config["cfg_scale"]),
        "sample_nocfg": sample(model, inputs, config["sample_steps"], 1.0),
        "rope_q": rotate(inputs["rope_q"], tables),
        "rope_k": rotate(inputs["rope_k"], tables),
        "position_ids": positions,
    }


@torch.no_grad()
def check(tensors: Tensors, config: dict[str, Any]) -> list[Result]:
    """Compares every output tensor of a fixture.

    Samples are compared relative to their largest value: an untrained network starts at a signal-to-noise ratio near
    zero and its samples grow to several hundred.
    """
    if not section(tensors, "state_dict"):
        return check_masks(tensors)
    values = compute(build(tensors, config), tensors, config)
    results = []
    for name, expected in section(tensors, "output").items():
        relative = name in ("sample_cfg", "sample_nocfg")
        tolerance = SAMPLE_TOLERANCE if relative else TOLERANCE
        actual = values[name].reshape(expected.shape) if values[name].numel() == expected.numel() else values[name]
        results.append(compare(name, actual, expected, tolerance, relative=relative))
    return results

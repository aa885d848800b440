"""Fixtures `bac_*`: similarities, adaptive schedules, bubbling masks and the cached forward of a small decoder."""

from typing import Any

import numpy as np
import torch
from torch import nn

from dit_suite.caching.bac import BACHandle
from dit_suite.caching.plan import EVERY_BRANCH, BACConfig, BACSchedule, BranchPlan
from dit_suite.caching.profile import block_error, similarity_matrix
from dit_suite.caching.schedule import (
    MAXIMISED,
    adaptive_schedule,
    adjacent_schedule,
    bubbling_union,
    mask_of,
    rank_blocks,
)
from dit_suite.golden import Result, compare, section
from dit_suite.step_plan import Run, StepContext, publish_step

FAMILY = "bac"
PREFIXES = ("bac_",)

_KINDS = {"sa": "sa", "mha": "ca", "ff": "ffn"}


class _Attention(nn.Module):
    """Multi-head attention over `memory`, or over the hidden states themselves."""

    def __init__(self, size: int, heads: int, is_cross_attention: bool) -> None:
        super().__init__()
        self.is_cross_attention = is_cross_attention
        self.mix = nn.MultiheadAttention(size, heads, batch_first=True)

    def forward(self, hidden_states: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        source = hidden_states if memory is None else memory
        return self.mix(hidden_states, source, source, need_weights=False)[0]


class _Block(nn.Module):
    """A pre-norm decoder layer whose three branches are modules."""

    def __init__(self, size: int, heads: int, inner: int, activation: str) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(size), nn.LayerNorm(size), nn.LayerNorm(size)
        self.attn1 = _Attention(size, heads, False)
        self.attn2 = _Attention(size, heads, True)
        act = {"gelu": nn.GELU(), "relu": nn.ReLU()}[activation]
        self.ff = nn.Sequential(nn.Linear(size, inner), act, nn.Linear(inner, size))

    def forward(self, hidden_states: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states))
        hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), memory)
        return hidden_states + self.ff(self.norm3(hidden_states))


class FixtureDecoder(nn.Module):
    """`decoder(sample + timestep, cond)`, the denoiser of the fixtures, with their decoder's weights."""

    def __init__(self, config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        if not config["norm_first"]:
            raise ValueError("BAC fixtures need a pre-norm decoder")
        size = (config["d_model"], config["nhead"], config["dim_feedforward"], config["activation"])
        self.layers = nn.ModuleList(_Block(*size) for _ in range(len(config["blocks"]) // 3))
        names = {"self_attn": "attn1.mix", "multihead_attn": "attn2.mix", "linear1": "ff.0", "linear2": "ff.2"}
        renamed = {}
        for key, value in state.items():
            prefix, layer, part, rest = key.removeprefix("decoder.").split(".", 3)
            renamed[f"{prefix}.{layer}.{names.get(part, part)}.{rest}"] = value
        self.load_state_dict(renamed)
        self.eval()

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + timestep
        for layer in self.layers:
            hidden_states = layer(hidden_states, cond)
        return hidden_states


def _units(config: dict[str, Any]) -> tuple[list[str], list[str], list[int]]:
    """Our names, kinds and layers of the fixture's sub-blocks."""
    ours = {"sa": "attn1", "mha": "attn2", "ff": "ff"}
    names, kinds, layers = [], [], []
    for block in config["blocks"]:
        layer, kind = block.split(".")[-1].split("_")[:2]
        names.append(f"layers.{layer}.{ours[kind]}")
        kinds.append(_KINDS[kind])
        layers.append(int(layer))
    return names, kinds, layers


@torch.no_grad()
def run_decoder(
    model: FixtureDecoder, tensors: dict[str, torch.Tensor], steps: list[list[int]] | None, names: list[str]
) -> torch.Tensor:
    """The outputs of all K evaluations, without a cache (`steps` None) or with one."""
    samples, times, cond = tensors["sample"], tensors["timestep"], tensors["cond"]
    run, count = Run(), len(times)
    handle = None
    if steps is not None:
        weights = tuple({k: (1.0,) for k in range(count) if k not in chosen} for chosen in steps)
        schedule = BACSchedule(
            model=type(model).__name__,
            fingerprint="",
            scheduler={},
            num_inference_steps=count,
            timesteps=tuple(float(t) for t in times),
            positions=tuple((k, 0) for k in range(count)),
            config=BACConfig.reference(len(steps[0])).to_dict(),
            blocks=tuple(names),
            types=("sa",) * len(names),
            layers=(0,) * len(names),
            branches={EVERY_BRANCH: BranchPlan(tuple(tuple(s) for s in steps), weights)},
            selected=(),
            compute_fraction=1.0,
        )
        handle = BACHandle(model, None, {count: schedule})
    outputs = []
    for k in range(count):
        with publish_step(StepContext(k, count, float(times[k]), "none", 0, run)):
            outputs.append(model(samples[k], times[k], cond))
    if handle is not None:
        handle.remove()
    return torch.stack(outputs)


def check(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> list[Result]:
    """Compares everything a `bac_*` fixture holds with what this project computes."""
    given, wanted = section(tensors, "input"), section(tensors, "output")
    features, count = given["features"], config["K"]
    results = []
    similarities: dict[str, np.ndarray] = {}
    for metric in ("cosine", "l1", "mse"):
        if f"similarity_{metric}" not in given:
            continue
        found = np.stack([similarity_matrix(unit, metric) for unit in features])
        similarities[metric] = given[f"similarity_{metric}"].double().numpy()
        expected = given[f"similarity_{metric}"]
        results.append(compare(f"similarity_{metric}", torch.from_numpy(found), expected, 1e-5, relative=True))
        for budget in config["budgets"]:
            results += _check_schedules(similarities[metric], metric, budget, wanted)
    cosine = similarities["cosine"]
    for name in wanted:
        if name.startswith("steps_adjacent_cosine_M"):
            steps = [adjacent_schedule(unit, int(name.rpartition("M")[2]), True) for unit in cosine]
            results.append(compare(name, torch.tensor(steps), wanted[name], 0))
    errors = [block_error(unit) for unit in features]
    results.append(compare("block_error", torch.tensor(errors), wanted["block_error"], 1e-5, relative=True))
    selected = rank_blocks(errors, config["num_bu_blocks"])
    results.append(compare("bu_selected", torch.tensor(selected), wanted["bu_selected"], 0))
    names, kinds, layers = _units(config)
    maximise = config["metric"] in MAXIMISED
    before = [adaptive_schedule(unit, config["bu_budget"], maximise)[0] for unit in similarities[config["metric"]]]
    after = bubbling_union(before, kinds, layers, selected)
    results.append(compare("mask_acs", torch.tensor(mask_of(before, count).astype(int)), wanted["mask_acs"], 0))
    results.append(compare("mask_bac", torch.tensor(mask_of(after, count).astype(int)), wanted["mask_bac"], 0))
    model = FixtureDecoder(config, section(tensors, "state_dict"))
    results.append(compare("full", run_decoder(model, given, None, names), wanted["full"], 1e-5))
    results.append(compare("cached", run_decoder(model, given, after, names), wanted["cached"], 1e-5))
    return results


def _check_schedules(matrices: np.ndarray, metric: str, budget: int, wanted: dict[str, torch.Tensor]) -> list[Result]:
    if f"steps_{metric}_M{budget}" not in wanted:
        return []
    solved = [adaptive_schedule(unit, budget, metric in MAXIMISED) for unit in matrices]
    steps = torch.tensor([steps for steps, _ in solved])
    scores = torch.tensor([score for _, score in solved])
    return [
        compare(f"steps_{metric}_M{budget}", steps, wanted[f"steps_{metric}_M{budget}"], 0),
        compare(f"score_{metric}_M{budget}", scores, wanted[f"score_{metric}_M{budget}"], 1e-5, relative=True),
    ]

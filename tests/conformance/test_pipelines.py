"""diffusers' standards for pipelines, and the house's own, for every row of `cases.PIPELINES`."""

import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModelMixin

from dit_suite.registry import TECHNIQUES, resolve
from dit_suite.step_plan import current_step
from tests.conformance.cases import BATCH, PIPELINES, PipelineCase

ROOT = Path(__file__).parents[2]
every_pipeline = pytest.mark.parametrize("case", PIPELINES, ids=lambda case: case.name)
guided_pipelines = pytest.mark.parametrize("case", [c for c in PIPELINES if c.guided], ids=lambda case: case.name)
latent_pipelines = pytest.mark.parametrize("case", [c for c in PIPELINES if c.latent], ids=lambda case: case.name)


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """One pipeline per case; checks that change it build their own."""
    return {case.name: case.build() for case in PIPELINES}


@pytest.fixture
def pipe(case: PipelineCase, built: dict[str, Any]) -> Any:
    return built[case.name]


def sample(pipe: Any, case: PipelineCase, rows: tuple[int, ...] = tuple(range(BATCH)), **changes: Any) -> Any:
    """The pictures or frames of a call."""
    return pipe(**case.arguments(rows, **changes), return_dict=False)[0]


@pytest.fixture(scope="module")
def saved(built: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case's pipeline, saved."""
    folder = tmp_path_factory.mktemp("saved")
    for name, pipe in built.items():
        pipe.save_pretrained(folder / name)
    return folder


@every_pipeline
def test_save_and_load_are_exact(case: PipelineCase, pipe: Any, saved: Path) -> None:
    cls = resolve(case.pipeline)
    loaded = cls.from_pretrained(saved / case.name, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(loaded, case), sample(pipe, case))
    assert set(loaded.components) == set(case.parts())
    index = json.loads((saved / case.name / "model_index.json").read_text())
    assert index["_class_name"] == cls.__name__
    for name in pipe.components:
        library = index[name][0]
        assert library is None or "." in library or library in ("diffusers", "transformers"), (name, library)
    for part in loaded.components.values():
        if isinstance(part, torch.nn.Module):
            assert not any(p.is_meta for p in part.parameters()) and not part.training


_FRESH = """
import sys, numpy as np, torch, dit_suite
from tests.conformance.cases import PIPELINES
folder = sys.argv[1]
for case in PIPELINES:
    pipe = dit_suite.load_pipeline(f"{folder}/{case.name}")
    pipe.set_progress_bar_config(disable=True)
    np.save(f"{folder}/{case.name}.npy", pipe(**case.arguments(), return_dict=False)[0])
"""


def test_fresh_process_makes_the_same_samples(built: dict[str, Any], saved: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", _FRESH, str(saved)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for case in PIPELINES:
        assert np.array_equal(np.load(saved / f"{case.name}.npy"), sample(built[case.name], case)), case.name


@every_pipeline
def test_signature(case: PipelineCase, pipe: Any) -> None:
    parameters = inspect.signature(pipe.__call__).parameters
    wanted = {case.condition, "generator", "output_type", "return_dict", "callback_on_step_end"}
    wanted |= {"callback_on_step_end_tensor_inputs", *case.call}
    wanted |= {"guidance_scale"} if case.guided else set()
    assert wanted <= set(parameters)
    assert parameters["return_dict"].default is True
    for name in ("num_timesteps", "interrupt"):
        assert isinstance(inspect.getattr_static(type(pipe), name), property), name
    assert set(pipe.components) == set(case.parts())
    assert type(pipe).model_cpu_offload_seq
    for row in TECHNIQUES:
        if row.pipeline == case.pipeline:
            options = row.options_class()
            assert options.condition == case.condition
            assert set(options().to_kwargs()) <= set(parameters), "an option is not a keyword of the call"


@every_pipeline
def test_a_batch_equals_its_samples_alone(case: PipelineCase, pipe: Any) -> None:
    batch = sample(pipe, case)
    assert len(batch) == BATCH and np.isfinite(batch).all()
    assert np.abs(batch[0] - batch[1]).max() > 1e-3
    for row in range(BATCH):
        assert np.abs(sample(pipe, case, (row,))[0] - batch[row]).max() <= case.batch_tolerance
    assert np.abs(sample(pipe, case, (1, 0))[::-1] - batch).max() <= case.batch_tolerance


@every_pipeline
def test_repeatable_and_free_of_side_effects(case: PipelineCase, pipe: Any) -> None:
    before = {name: getattr(part, "config", None) for name, part in pipe.components.items()}
    weights = [p.detach().clone() for p in getattr(pipe, case.network).parameters()]
    state = torch.get_rng_state()
    first = sample(pipe, case)
    assert np.array_equal(sample(pipe, case), first)
    assert torch.equal(torch.get_rng_state(), state), "a draw came from the global generator"
    assert current_step() is None
    assert {name: getattr(part, "config", None) for name, part in pipe.components.items()} == before
    assert all(torch.equal(p, w) for p, w in zip(getattr(pipe, case.network).parameters(), weights, strict=True))


@every_pipeline
def test_output_forms(case: PipelineCase, pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    array = sample(pipe, case)
    assert array.min() >= 0 and array.max() <= 1
    output = pipe(**case.arguments())
    assert np.array_equal(next(iter(output.values())), array)
    tensor = sample(pipe, case, output_type="pt")
    axes = [*range(array.ndim - 3), array.ndim - 1, array.ndim - 3, array.ndim - 2]
    assert np.array_equal(tensor.numpy(), array.transpose(axes)) and not tensor.requires_grad
    pictures = sample(pipe, case, output_type="pil")
    first = pictures[0] if array.ndim == 4 else pictures[0][0]
    expected = (array[0] if array.ndim == 4 else array[0][0]) * 255
    assert np.abs(np.asarray(first.convert("RGB")) - expected.round()).max() <= 0
    assert capsys.readouterr() == ("", ""), "something was printed"


@every_pipeline
def test_bad_calls_are_refused_before_any_evaluation(case: PipelineCase) -> None:
    pipe = case.build()
    seen = case.evaluations(pipe)
    changes = [
        {"generator": [torch.Generator()] * (BATCH + 1)},
        {"output_type": "jpeg"},
        {"callback_on_step_end_tensor_inputs": ["no_such_tensor"], "callback_on_step_end": lambda *_: {}},
    ]
    if "num_inference_steps" in case.call:
        changes.append({"num_inference_steps": 0})
    for change in changes:
        with pytest.raises(ValueError):
            sample(pipe, case, **change)
    assert seen == []


@every_pipeline
def test_every_evaluation_runs_under_its_step(case: PipelineCase) -> None:
    pipe = case.build()
    seen = case.evaluations(pipe)
    sample(pipe, case)
    assert seen and all(context is not None for context in seen)
    runs = [list(group) for _, group in itertools.groupby(seen, key=lambda context: id(context.run))]
    assert len(runs) == len({id(context.run) for context in seen}) == case.trajectories
    for contexts in runs:
        indices = [context.step_index for context in contexts]
        assert indices == sorted(indices) and indices[0] == 0
        assert {context.num_steps for context in contexts} == {indices[-1] + 1}
    sample(pipe, case)
    assert len({id(context.run) for context in seen}) == 2 * case.trajectories


@guided_pipelines
def test_guidance(case: PipelineCase) -> None:
    pipe = case.build()
    seen = case.evaluations(pipe)
    off, on = (sample(pipe, case, guidance_scale=scale) for scale in (1.0, 7.5))
    assert off.shape == on.shape and np.abs(off - on).max() > 1e-3
    branches = {context.branch for context in seen if context.run is seen[0].run}
    assert branches == {"none"}, "guidance that is off must not evaluate the unconditional branch"


@every_pipeline
def test_callbacks(case: PipelineCase, pipe: Any) -> None:
    calls = []

    def record(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append((index, sorted(tensors)))
        assert pipeline is pipe
        return tensors

    plain = sample(pipe, case)
    names = list(type(pipe)._callback_tensor_inputs)
    for subset in (names[:1], names):
        calls.clear()
        result = sample(pipe, case, callback_on_step_end=record, callback_on_step_end_tensor_inputs=subset)
        assert np.array_equal(result, plain), "a callback that changes nothing changed the samples"
        assert [index for index, _ in calls] == list(range(pipe.num_timesteps))
        assert {tuple(given) for _, given in calls} == {tuple(sorted(subset))}


@latent_pipelines
def test_a_callback_can_replace_the_latents(case: PipelineCase, pipe: Any) -> None:
    def clear_last(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == pipeline.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    result = sample(pipe, case, callback_on_step_end=clear_last, output_type="latent")
    assert torch.is_tensor(result) and result.abs().sum() == 0


@guided_pipelines
def test_a_callback_can_change_the_guidance(case: PipelineCase, pipe: Any) -> None:
    def raise_scale(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._guidance_scale += 1.0
        return tensors

    plain = sample(pipe, case, guidance_scale=2.0)
    assert pipe.guidance_scale == 2.0
    changed = sample(pipe, case, guidance_scale=2.0, callback_on_step_end=raise_scale)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    assert pipe.num_timesteps > 1 and not np.array_equal(plain, changed)


@every_pipeline
def test_interruption_stops_the_network(case: PipelineCase) -> None:
    pipe = case.build()
    seen = case.evaluations(pipe)

    def stop(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = True
        stopped_at.append(len(seen))
        return tensors

    stopped_at: list[int] = []
    sample(pipe, case)
    whole = len(seen)
    seen.clear()
    sample(pipe, case, callback_on_step_end=stop)
    assert pipe.interrupt and pipe.num_timesteps > 1
    assert stopped_at == [len(seen)] and len(seen) < whole, "the network ran, or a callback came, after the stop"
    seen.clear()
    sample(pipe, case)
    assert len(seen) == whole, "an interrupted pipeline must run again"


@every_pipeline
def test_dtype_and_device(case: PipelineCase, saved: Path) -> None:
    pipe = case.build().to(torch.bfloat16)
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {part.dtype for part in networks} == {torch.bfloat16}
    assert np.isfinite(sample(pipe, case)).all()
    assert {part.device.type for part in pipe.to("cpu").components.values() if isinstance(part, ModelMixin)} == {"cpu"}
    mixed = resolve(case.pipeline).from_pretrained(
        saved / case.name, dtype={case.network: torch.bfloat16, "default": torch.float16}, local_files_only=True
    )
    for name, part in mixed.components.items():
        if isinstance(part, ModelMixin):
            assert part.dtype == (torch.bfloat16 if name == case.network else torch.float16)


@every_pipeline
def test_optional_components(case: PipelineCase, tmp_path: Path) -> None:
    cls = resolve(case.pipeline)
    assert set(case.optional) <= set(cls._optional_components)
    for name, needs in case.optional.items():
        bare = case.build(**{name: None})
        before = sample(bare, case, **needs)
        bare.save_pretrained(tmp_path / name)
        loaded = cls.from_pretrained(tmp_path / name, local_files_only=True)
        loaded.set_progress_bar_config(disable=True)
        assert getattr(loaded, name) is None
        assert np.array_equal(np.asarray(sample(loaded, case, **needs)), np.asarray(before))


@every_pipeline
def test_variants(case: PipelineCase, pipe: Any, tmp_path: Path) -> None:
    cls = resolve(case.pipeline)
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="1KB")
    loaded = cls.from_pretrained(tmp_path, variant="fp16", local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(loaded, case), sample(pipe, case))
    with pytest.raises((ValueError, OSError)):
        cls.from_pretrained(tmp_path, variant="other", local_files_only=True)


@every_pipeline
def test_sharing_components(case: PipelineCase, pipe: Any) -> None:
    cls = type(pipe)
    twin = cls(**pipe.components, **case.settings)
    other = cls.from_pipe(pipe)
    for again in (twin, other):
        again.set_progress_bar_config(disable=True)
        assert getattr(again, case.network) is getattr(pipe, case.network)
        assert np.array_equal(sample(again, case), sample(pipe, case))


@every_pipeline
def test_group_offload(case: PipelineCase, pipe: Any) -> None:
    offloaded = case.build()
    for part in offloaded.components.values():
        if isinstance(part, ModelMixin):
            part.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    for _ in range(2):
        assert np.abs(sample(offloaded, case) - sample(pipe, case)).max() <= 1e-4


@every_pipeline
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading whole components needs an accelerator")
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_component_offload(case: PipelineCase, pipe: Any, how: str) -> None:
    offloaded = case.build()
    getattr(offloaded, how)()
    for _ in range(2):
        assert np.abs(sample(offloaded, case) - sample(pipe, case)).max() <= 1e-3


def test_every_registered_technique_has_a_case() -> None:
    covered = {case.pipeline for case in PIPELINES}
    assert {row.pipeline for row in TECHNIQUES} <= covered, "add a PipelineCase to tests/conformance/cases.py"

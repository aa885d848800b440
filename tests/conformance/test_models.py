"""diffusers' standards for networks, for every row of `cases.MODELS`."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import diffusers.models.modeling_utils as loading
import pytest
import torch
from diffusers import CacheMixin, FirstBlockCacheConfig
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.training_utils import EMAModel
from torch._inductor import config as inductor

from dit_suite.registry import TECHNIQUES, resolve
from tests.conformance.cases import MODELS, ModelCase, moved

Module = torch.nn.Module
every_model = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def built() -> dict[str, Module]:
    """One network per case; checks that change it take a copy."""
    return {case.name: case.build() for case in MODELS}


@pytest.fixture
def model(case: ModelCase, built: dict[str, Module]) -> Module:
    return built[case.name]


def run(model: Module, case: ModelCase, dtype: torch.dtype | None = None, **changes: Any) -> torch.Tensor:
    """The first output for the case's inputs, floats cast to `dtype`."""
    inputs = {**case.inputs(), **changes}
    if dtype is not None:
        inputs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def arguments(model: Module) -> dict[str, Any]:
    """The constructor arguments as JSON keeps them."""
    return json.loads(json.dumps({k: v for k, v in model.config.items() if not k.startswith("_")}))


def load(case: ModelCase, folder: Path, **how: Any) -> Module:
    """Loads and checks that every tensor was in the file."""
    loaded, info = resolve(case.model).from_pretrained(folder, output_loading_info=True, local_files_only=True, **how)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert not loaded.training
    return loaded


@every_model
def test_output_depends_on_every_input(case: ModelCase, model: Module) -> None:
    reference = run(model, case)
    assert reference.isfinite().all() and reference.std() > 1e-3
    for name, value in case.inputs().items():
        if torch.is_tensor(value) and "mask" not in name:
            other = value.flip(0) if value.ndim == 1 else value + 0.5
            assert not torch.allclose(run(model, case, **{name: other}), reference, atol=1e-5), name


@every_model
def test_save_and_load_are_exact(case: ModelCase, model: Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    for how in ({}, {"low_cpu_mem_usage": False}):
        loaded = load(case, tmp_path, **how)
        assert arguments(loaded) == arguments(model)
        assert torch.equal(run(loaded, case), run(model, case))
        buffers = dict(model.named_buffers())
        assert all(torch.equal(value, buffers[name]) for name, value in loaded.named_buffers())


@every_model
def test_variant_and_shards(case: ModelCase, model: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = max(p.numel() * p.element_size() for p in model.parameters()) // 1024 + 2
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=f"{size}KB")
    shards = list(tmp_path.glob("diffusion_pytorch_model.fp16-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    reference = run(model, case)
    assert torch.equal(run(load(case, tmp_path, variant="fp16"), case), reference)
    monkeypatch.setattr(loading, "HF_ENABLE_PARALLEL_LOADING", True)
    assert torch.equal(run(load(case, tmp_path, variant="fp16"), case), reference)
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        resolve(case.model).from_pretrained(tmp_path, local_files_only=True)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtype(case: ModelCase, model: Module, dtype: torch.dtype, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    for how in ({}, {"low_cpu_mem_usage": False}):
        loaded = load(case, tmp_path, dtype=dtype, **how)
        assert loaded.dtype == dtype
        for name, parameter in loaded.named_parameters():
            island = dtype != torch.float32 and any(part in name.split(".") for part in kept)
            assert parameter.dtype == (torch.float32 if island else dtype), name
    output = run(loaded, case, dtype)
    assert output.dtype == (torch.float32 if case.float32_output else dtype)
    reference = run(model, case)
    scale = float(reference.abs().max())
    bound = {torch.float32: 1e-6, torch.float16: 0.03, torch.bfloat16: 0.2}[dtype]
    assert (output.float() - reference).abs().max() <= bound * scale


@every_model
def test_forward_is_a_function_of_its_inputs(case: ModelCase, model: Module) -> None:
    state = torch.get_rng_state()
    reference = run(model, case)
    assert torch.equal(run(model, case), reference)
    first = model(**case.inputs())
    torch.testing.assert_close(first[0], reference, atol=1e-5, rtol=1e-5)
    assert torch.equal(copy.deepcopy(model).train()(**case.inputs())[0], first[0])
    assert torch.equal(torch.get_rng_state(), state), "forward draws random numbers"
    as_tuple = model(**case.inputs(), return_dict=False)
    assert isinstance(as_tuple, tuple) and not isinstance(first, tuple)
    for one, other in zip(first.to_tuple(), as_tuple, strict=True):
        assert type(one) is type(other)
        assert not torch.is_tensor(one) or torch.equal(one, other)


@every_model
def test_samples_of_a_batch_are_independent(case: ModelCase, model: Module) -> None:
    batch = run(model, case)
    for row in range(len(batch)):
        alone = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in case.inputs().items()}
        torch.testing.assert_close(run(model, case, **alone), batch[row : row + 1], atol=1e-5, rtol=1e-4)


@every_model
def test_attributes(case: ModelCase, model: Module, built: dict[str, Module]) -> None:
    key = next(name for name in case.config if not hasattr(type(model), name) and name not in vars(model))
    with pytest.warns(FutureWarning):
        assert getattr(model, key) == model.config[key]
    with pytest.raises(AttributeError, match=f"'{type(model).__name__}' object has no attribute 'no_such_thing'"):
        _ = model.no_such_thing
    assert type(model).__module__ == case.model.partition(":")[0]
    assert hasattr(__import__(type(model).__module__, fromlist=["x"]), "ModelMixin"), "diffusers can't load this module"
    parts = {
        type(module).__name__ for each in MODELS if each.model == case.model for module in built[each.name].modules()
    }
    assert set(type(model)._no_split_modules) <= parts
    assert set(type(model)._repeated_blocks) <= parts


@every_model
def test_training_reaches_every_parameter(case: ModelCase, model: Module) -> None:
    model = copy.deepcopy(model).train()
    ema = EMAModel(model.parameters(), decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    model(**case.inputs())[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        left_out = any(part in name for part in case.no_gradient)
        reached = parameter.grad is not None and parameter.grad.abs().max() > 0
        assert reached != left_out, name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    ema.step(model.parameters())
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    averaged = [not torch.equal(p, old) for p, old in zip(ema.shadow_params, before, strict=True)]
    assert sum(changed) > 0 and sum(averaged) > 0


@every_model
def test_gradient_checkpointing_changes_nothing(case: ModelCase, model: Module) -> None:
    plain, checkpointed = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    assert type(model)._supports_gradient_checkpointing
    assert not plain.is_gradient_checkpointing
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    used = []
    inner = checkpointed._gradient_checkpointing_func
    for module in checkpointed.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda *a, **k: (used.append(1), inner(*a, **k))[1]
    losses = []
    for each in (plain, checkpointed):
        loss = each(**case.inputs())[0].square().mean()
        loss.backward()
        losses.append(loss.detach())
    assert used, "the flag is set and nothing is checkpointed"
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=5e-5, rtol=1e-4, msg=name)
    checkpointed.disable_gradient_checkpointing()
    assert not checkpointed.is_gradient_checkpointing


@every_model
def test_compiles_without_a_graph_break(case: ModelCase, model: Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=case.fullgraph, backend="eager")
    torch.testing.assert_close(run(compiled, case), run(model, case), atol=1e-5, rtol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(compiled, case)


@every_model
def test_repeated_blocks_compile_once(case: ModelCase, model: Module) -> None:
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(run(compiled, case), run(model, case), atol=1e-5, rtol=1e-4)
    kinds = len(set(type(model)._repeated_blocks))
    assert 1 <= len(graphs) <= 2 * kinds, "one graph per kind of block and at most one more"


def test_inductor_compiles_a_whole_network() -> None:
    torch._dynamo.reset()
    case = MODELS[0]
    model = moved(resolve(case.model)(**{**case.config, "num_layers": 1}))
    with inductor.patch(compile_threads=1):
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
        torch.testing.assert_close(run(compiled, case), run(model, case), atol=1e-4, rtol=1e-4)


@every_model
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(case: ModelCase, model: Module, kind: str) -> None:
    offloaded = copy.deepcopy(model)
    extra = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    offloaded.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **extra)
    torch.testing.assert_close(run(offloaded, case), run(model, case), atol=1e-5, rtol=1e-5)


@every_model
def test_layerwise_casting(case: ModelCase, model: Module) -> None:
    cast = copy.deepcopy(model)
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(p.dtype == torch.float8_e4m3fn for p in cast.parameters())
    output = run(cast, case)
    reference = run(model, case)
    assert output.isfinite().all()
    assert (output - reference).abs().mean() < 0.5 * reference.abs().mean()


@every_model
def test_attention_processors(case: ModelCase, model: Module) -> None:
    if not isinstance(model, AttentionMixin):
        pytest.skip("the class offers no processors")
    model = copy.deepcopy(model)
    processors = model.attn_processors
    assert processors
    reference = run(model, case)
    model.set_attn_processor(dict(processors))
    assert torch.equal(run(model, case), reference)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor(dict(list(processors.items())[1:]))
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, case), reference, atol=1e-4, rtol=1e-3)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, case), reference)


@every_model
def test_adapters(case: ModelCase, model: Module, tmp_path: Path) -> None:
    if not isinstance(model, PeftAdapterMixin):
        pytest.skip("the class takes no adapters")
    from peft import LoraConfig

    reference = run(model, case)
    model = copy.deepcopy(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    target = next(name for name in linear if re.search(r"to_q|qkv|attn", name))
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=[target], init_lora_weights=True))
    assert torch.equal(run(model, case), reference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 1.0
    adapted = run(model, case)
    assert not torch.allclose(adapted, reference, atol=1e-6)
    model.disable_adapters()
    assert torch.equal(run(model, case), reference)
    model.enable_adapters()
    weights = {"weight_name": "pytorch_lora_weights.safetensors"}
    model.save_lora_adapter(tmp_path, adapter_name="default", **weights)
    fresh = case.build()
    fresh.load_lora_adapter(tmp_path, prefix=None, **weights)
    torch.testing.assert_close(run(fresh, case), adapted, atol=1e-6, rtol=1e-6)


@every_model
def test_a_class_with_cache_support_runs_diffusers_block_cache(case: ModelCase, model: Module) -> None:
    if not isinstance(model, CacheMixin):
        pytest.skip("the class announces no cache")
    reference = run(model, case)
    model = copy.deepcopy(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with model.cache_context("cond"):
        assert torch.equal(run(model, case), reference)
        torch.testing.assert_close(run(model, case), reference, atol=1e-4, rtol=1e-4)
    model._reset_stateful_cache()
    with model.cache_context("cond"):
        assert torch.equal(run(model, case), reference)
    model.disable_cache()
    assert not model.is_cache_enabled and torch.equal(run(model, case), reference)


def test_every_registered_network_has_a_case() -> None:
    covered = {case.model for case in MODELS}
    own = {row.model for row in TECHNIQUES if row.model.startswith("dit_suite.")}
    assert own <= covered, "add a ModelCase to tests/conformance/cases.py"

"""How the plug-in reaches a kernel: under torch.compile, with processors of all sorts, and never silently dense."""

import types
import warnings
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch._dynamo.utils import counters

from dit_suite.attention import AdaSpaConfig, VMoBAConfig, apply_adaspa, apply_vmoba, supported
from dit_suite.attention.layouts import TokenLayout
from dit_suite.attention.plugin import _Scope, self_attention_layers
from dit_suite.attention.selection import block_gate
from tests.attention import tiny_models
from tests.attention.test_plugin import SEARCH_AT_0, VMOBA, _run_steps
from tests.attention.tiny_models import build, forward

SPARSE = AdaSpaConfig(sparsity=0.75, **SEARCH_AT_0)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_blocks_of_a_deep_network_compile_once(fresh_dynamo):
    """Torch makes at most 8 variants of a function and then runs it eagerly: layers must not differ to it."""
    model, given = tiny_models.wan(num_layers=4).eval(), tiny_models.wan_inputs()
    with apply_adaspa(model, SPARSE) as handle:
        expected = _run_steps(model, given, range(2))[1]
        handle.reset()
        model.compile_repeated_blocks(backend="eager")
        actual = _run_steps(model, given, range(2))[1]
        assert handle.stats()["sparse_calls"] == 4
    assert (actual - expected).abs().max() < 1e-5
    assert counters["stats"]["unique_graphs"] == 4


def test_a_compiled_network_runs_sparse(fresh_dynamo):
    """torch.compile breaks the graph at an attention (here one that calls torch's own); the result is the eager one."""
    model, given = tiny_models.cogvideox(num_layers=1).eval(), tiny_models.cogvideox_inputs()
    with apply_vmoba(model, VMoBAConfig(topk=(2, 2, 2), **VMOBA)) as handle:
        expected = _run_steps(model, given, range(2))[1]
        actual = _run_steps(torch.compile(model, backend="eager"), given, range(2))[1]
        assert handle.stats()["sparse_calls"] == 4 and handle.fallbacks == {}
    assert (actual - expected).abs().max() < 1e-5
    assert counters["stats"]["unique_graphs"] > 1 and counters["stats"]["calls_captured"] > 50


def test_a_network_compiled_beforehand(fresh_dynamo):
    model, given = tiny_models.dit(num_layers=1).eval(), tiny_models.picture_inputs()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    pipe = types.SimpleNamespace(transformer=torch.compile(model, backend="eager"))
    dense = forward(pipe.transformer, given)
    assert supported(pipe) == supported(model) and any(row.supported for row in supported(pipe))
    with apply_adaspa(pipe, SPARSE) as handle:
        sparse = _run_steps(pipe.transformer, given, range(2))[1]
        assert handle.stats()["sparse_calls"] == 1
        assert torch.equal(sparse, _run_steps(model, given, range(2))[1])
    assert not torch.equal(sparse, dense)
    assert torch.equal(forward(pipe.transformer, given), dense)


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_one_processor_for_all_layers(name):
    """Layers are told apart by their modules, and the processor is given back as it was."""
    model, given = build(name), tiny_models.CASES[name].inputs(1)
    with apply_adaspa(model, SPARSE):
        expected = _run_steps(model, given, range(2))[1]
    layers = [module for _, module in self_attention_layers(model)]
    for module in layers:
        module.processor = layers[0].processor
    with apply_adaspa(model, SPARSE) as handle:
        assert torch.equal(_run_steps(model, given, range(2))[1], expected)
        assert [row["sparse_calls"] for row in handle.stats()["layers"]] == [1] * len(layers)
    assert "_attention_backend" not in vars(layers[0].processor)


class _OwnKernel:
    """A processor that computes its attention without torch's function."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return attn.to_out[0](torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


def test_layers_that_go_another_way_are_noted():
    model, given = build("wan"), tiny_models.wan_inputs()
    model.blocks[1].attn1.processor = _OwnKernel()
    with apply_adaspa(model, SPARSE) as handle, pytest.warns(RuntimeWarning, match="does not call torch's attention"):
        _run_steps(model, given, range(2))
        assert handle.fallbacks == {"an attention processor does not call torch's attention": 2}
        assert [row["layer"] for row in handle.stats()["layers"]] == [0, 2]


def test_a_backend_chosen_after_applying_is_noted_and_kept():
    model, given = build("wan"), tiny_models.wan_inputs()
    with apply_adaspa(model, SPARSE) as handle:
        _run_steps(model, given, range(2))
        model.blocks[0].attn1.set_attention_backend("_native_math")
        with pytest.warns(RuntimeWarning, match="backend was chosen after"):
            _run_steps(model, given, range(1))
        model.blocks[2].attn1.processor = WanAttnProcessor()
        with pytest.warns(RuntimeWarning, match="processor was replaced after"):
            _run_steps(model, given, range(1))
        assert list(handle.fallbacks.values()) == [2, 1]
    processors = [block.attn1.processor for block in model.blocks]
    assert processors[0]._attention_backend == "_native_math"
    assert not any("_attention_backend" in vars(p) for p in processors[1:])
    assert torch.isfinite(forward(model, given)).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_causal": True}, "an attention call is causal"),
        ({"dropout_p": 0.5}, "an attention call has dropout"),
        ({"key": torch.ones(1, 2, 5, 8)}, r"keys of \(1, 2, 5, 8\) are not shaped like queries"),
    ],
)
@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_calls_that_are_not_plain_are_counted(name, change, reason):
    """A processor's call as torch sees it (module route) and as diffusers' dispatcher sees it."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    model = build(name)
    query = torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    given = {"query": query, "key": change.get("key", query), "value": change.get("key", query)}
    options = {key: value for key, value in change.items() if key != "key"}

    class Calls:
        _attention_backend = None
        _parallel_config = None

        def __call__(self, attn, *args, **kwargs):
            torch.manual_seed(0)
            if name == "cogvideox":
                return F.scaled_dot_product_attention(**given, **options)
            tensors = {key: tensor.transpose(1, 2) for key, tensor in given.items()}
            out = dispatch_attention_fn(**tensors, **options, backend=self._attention_backend)
            return out.transpose(1, 2)

    layer = self_attention_layers(model)[0][1]
    if name == "cogvideox":
        del Calls._attention_backend  # so that it does not look like one that dispatches
    layer.processor = Calls()
    hidden = torch.zeros(1, 64, 4)
    expected = layer(hidden)
    handle = apply_vmoba(model, VMoBAConfig(topk=(1, 1, 1), **VMOBA))
    handle._attachments[0].local.scope = _Scope(TokenLayout((4, 4, 4)))
    with pytest.warns(RuntimeWarning, match=reason), torch.no_grad():
        assert torch.equal(layer(hidden), expected)
    assert sum(handle.fallbacks.values()) == 1
    handle.remove()


def test_nothing_is_noted_where_a_cache_skips_layers():
    from diffusers import FirstBlockCacheConfig

    model, given = build("wan"), tiny_models.wan_inputs()
    model.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    with apply_adaspa(model, SPARSE) as handle, model.cache_context("cond"), warnings.catch_warnings():
        warnings.simplefilter("error")
        _run_steps(model, given, range(3))
        assert [row["sparse_calls"] for row in handle.stats()["layers"]] == [2, 0, 0]
        assert handle.fallbacks == {}


def test_autocast_leaves_selection_in_float32():
    """Autocast casts query, key and value, as it does for torch's attention, and not the method's own arithmetic."""
    model, given = build("wan"), tiny_models.wan_inputs()
    gates = []

    def gate(query, means):
        gates.append((query, means, block_gate(query, means)))
        return gates[-1][2]

    with torch.autocast("cpu", torch.bfloat16):
        dense = forward(model, given)
        with patch("dit_suite.attention.selection.block_gate", gate):
            with apply_vmoba(model, VMoBAConfig.trained(**(VMOBA | {"dense_first_steps": 0.0}))):
                sparse = forward(model, given)
        with apply_vmoba(model, VMoBAConfig(topk_ratio=1.0, **VMOBA)):
            full = forward(model, given)
        with apply_adaspa(model, AdaSpaConfig(block_size=16, search_steps=(3,), min_tokens=0)):
            assert torch.equal(_run_steps(model, given, [0])[0], dense)
    assert (full - dense).abs().max() < 0.05 * dense.abs().max() and not torch.equal(sparse, dense)
    for query, means, scores in gates:
        assert query.dtype == torch.bfloat16 and scores.dtype == torch.float32
        exact = means.double() @ query.double().transpose(-1, -2)
        assert (scores - exact).abs().max() < 1e-5 * exact.abs().max()

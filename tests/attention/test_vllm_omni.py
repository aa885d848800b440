"""The vLLM-Omni adapter against the contract as its documentation states it."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from dit_suite.attention import AdaSpaConfig, VMoBAConfig, vmoba_attention
from dit_suite.attention.methods import AdaSpaMethod, VMoBAMethod
from dit_suite.attention.vllm_omni import VllmOmniAttention, adaspa, token_grid, vmoba

GRID = (4, 4, 4)
LAYERS = 3


def _plugin(kind="adaspa"):
    if kind == "adaspa":
        return VllmOmniAttention("AdaSpa", AdaSpaConfig, AdaSpaMethod)
    return VllmOmniAttention("VMoBA", VMoBAConfig, VMoBAMethod)


def _params(step, total=10, samples=1, **static):
    """Static settings, then what the framework adds per forward pass, as per-sample tensors."""
    per_forward = {
        "denoise_step_idx": torch.full((samples,), step),
        "total_denoise_steps": torch.full((samples,), total),
        "latent_shape": torch.tensor([[4, 8, 8]] * samples),
        "patch_size": torch.tensor([[1, 2, 2]] * samples),
        "total_latent_frames": 4,
        "patches_per_frame": 16,
    }
    return {"min_tokens": 0, **static, **per_forward}


def _qkv(layer, samples=1, tokens=64, heads=2):
    generator = torch.Generator().manual_seed(layer)
    return [torch.randn(samples, tokens, heads, 8, generator=generator) * 2 for _ in range(3)]


def _dense(query, key, value):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)


def _run(plugin, steps, total=10, **static):
    """A denoising loop: two guidance branches of three layers per step."""
    return [
        [
            plugin(*_qkv(call), _params(step, total, **static), is_causal=False, softmax_scale=8**-0.5)
            for call in range(6)
        ]
        for step in steps
    ]


def test_the_entry_points_have_the_documented_signature():
    for plugin in (adaspa, vmoba):
        names = list(inspect.signature(plugin.__call__).parameters)
        assert names == ["query", "key", "value", "params", "is_causal", "softmax_scale"]
        assert plugin.capabilities["supports_attention_mask"] is False


def test_layout_is_batch_sequence_heads_dim_and_full_budget_is_dense():
    plugin = _plugin()
    for step in range(3):
        query, key, value = _qkv(0, samples=2)
        out = plugin(
            query, key, value, _params(step, samples=2, sparsity=0.0, block_size=16, search_steps=(0.0,)), False
        )
        assert out.shape == query.shape
        assert (out - _dense(query, key, value)).abs().max() < 1e-5
    assert plugin.stats()["methods"][0]["sparse_calls"] == 2


def test_calls_are_told_apart_by_their_place_in_the_step():
    plugin = _plugin()
    settings = {"sparsity": 0.75, "block_size": 16, "search_steps": (2, 5), "num_layers": LAYERS}
    outs = _run(plugin, range(8), **settings)
    dense = [_dense(*_qkv(call)) for call in range(6)]
    for step in range(3):
        assert all((o - d).abs().max() < 1e-5 for o, d in zip(outs[step], dense, strict=True))
    assert all((o - d).abs().max() > 1e-3 for o, d in zip(outs[3], dense, strict=True))
    stats = plugin.stats()["methods"][0]
    assert (stats["dense_calls"], stats["fused_searches"], stats["cached_searches"]) == (12, 6, 6)
    assert len(stats["layers"]) == LAYERS
    again = _run(plugin, range(8), **settings)
    assert plugin.stats()["methods"][0]["fused_searches"] == 12  # a step that goes back is a new run
    assert all(torch.equal(a, b) for x, y in zip(outs, again, strict=True) for a, b in zip(x, y, strict=True))


def test_vmoba_equals_the_function():
    settings = {"block_1d": 1.0, "block_2d": (2, 2), "block_3d": (2, 2, 2), "dense_first_steps": 0.0, "topk": (2, 2, 2)}
    plugin = _plugin("vmoba")
    outs = _run(plugin, [0], num_layers=LAYERS, **settings)[0]
    for call, out in enumerate(outs):
        q, k, v = (t.transpose(1, 2) for t in _qkv(call))
        expected = vmoba_attention(q, k, v, GRID, VMoBAConfig(**settings), call % LAYERS)
        assert (out.transpose(1, 2) - expected).abs().max() < 1e-6


def test_text_beside_the_video():
    for text in ("first", "last"):
        plugin = _plugin()
        for step in range(2):
            query, key, value = _qkv(0, tokens=70)
            out = plugin(query, key, value, _params(step, sparsity=0.0, block_size=16, search_steps=(0.0,), text=text))
            assert (out - _dense(query, key, value)).abs().max() < 1e-5
        assert plugin.stats()["methods"][0]["sparse_calls"] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"denoise_step_idx": None}, "no denoise_step_idx"),
        ({"latent_shape": None}, "no latent_shape"),
        ({"denoise_step_idx": torch.tensor([1, 2])}, "different denoise_step_idx"),
        ({"latent_shape": torch.tensor([[4, 8, 16]])}, "does not fit the grid"),
        ({"min_tokens": 100}, "fewer than 100"),
        ({"total_denoise_steps": None}, "number of steps is unknown"),
    ],
)
def test_what_cannot_be_placed_runs_dense_and_says_so_once(changes, reason):
    plugin = _plugin()
    query, key, value = _qkv(0)
    params = {key: v for key, v in (_params(1) | changes).items() if v is not None}
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        for _ in range(2):
            assert torch.equal(plugin(query, key, value, params), _dense(query, key, value))
    assert len(caught) == 1
    assert sum(plugin.stats()["fallbacks"].values()) == 2


def test_causal_calls_stay_causal():
    plugin = _plugin()
    q, k, v = _qkv(0)
    with pytest.warns(RuntimeWarning, match="causal"):
        out = plugin(q, k, v, _params(0), True)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    assert (out - expected.transpose(1, 2)).abs().max() < 1e-6


def test_a_bad_setting_is_refused():
    with pytest.raises(ValueError, match="sparsity must be between 0 and 1"):
        _plugin()(*_qkv(0), _params(0, sparsity=3.0))
    assert token_grid(_params(0)) == GRID

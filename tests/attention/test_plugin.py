"""The plug-in on tiny diffusers models: full budget equals dense, removal is bitwise, nothing fails silently."""

import gc
import threading
import warnings
from unittest.mock import patch

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from dit_suite.attention import AdaSpaConfig, VMoBAConfig, apply_adaspa, apply_vmoba, supported
from dit_suite.attention.methods import AdaSpaMethod, VMoBAMethod, smallest_useful
from dit_suite.attention.plugin import self_attention_layers
from dit_suite.pipelines.pipeline_text_to_video import TextToVideoPipeline
from dit_suite.schedulers.generators import sample_generators
from dit_suite.step_plan import Run, StepContext, current_step, publish_step
from tests.attention import tiny_models
from tests.attention.tiny_models import CASES, build, forward

NAMES = list(CASES)
SEARCH_AT_0 = {"block_size": 16, "search_steps": (0.0,), "min_tokens": 0}
VMOBA = {"dense_first_steps": 0.0, "min_tokens": 0, "block_1d": 1.0, "block_2d": (2, 2), "block_3d": (2, 2, 2)}


def _step(index, run, branch="cond", count=10):
    return publish_step(StepContext(index, count, 1000.0 - index, branch, run=run))


def _run_steps(model, given, steps, branch="cond", run=None):
    run = run or Run()
    outs = []
    for index in steps:
        with _step(index, run, branch):
            outs.append(forward(model, given))
    return outs


def _snapshot(model):
    return {
        "backends": set(_AttentionBackendRegistry._backends),
        "names": list(AttentionBackendName),
        "active": _AttentionBackendRegistry._active_backend,
        "function": F.scaled_dot_product_attention,
        "hooked": [n for n, m in model.named_modules() if "_diffusers_hook" in m.__dict__],
        "forwards": [n for n, m in model.named_modules() if "forward" in m.__dict__],
        "processors": [dict(m.processor.__dict__) for m in model.modules() if hasattr(m, "processor")],
        "torch_hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["tile", "native"])
def test_adaspa_with_a_full_budget_equals_dense(name, order):
    model, case = build(name), CASES[name]
    given = case.inputs(2)
    dense = forward(model, given)
    with apply_adaspa(model, AdaSpaConfig(sparsity=0.0, token_order=order, **SEARCH_AT_0)) as handle:
        outs = _run_steps(model, given, range(3))
        stats = handle.stats()
    calls = case.layers * (2 if name == "mochi" else 1)  # Mochi attends sample by sample
    assert (stats["fused_searches"], stats["sparse_calls"]) == (calls, 2 * calls)
    assert stats["fallbacks"] == {}
    assert stats["density"] == pytest.approx(1.0)
    for out in outs:
        assert (out - dense).abs().max() <= 1e-4 * max(1.0, dense.abs().max())


@pytest.mark.parametrize(
    ("name", "changes", "layers"),
    [
        ("SkyReelsV2Transformer3DModel", {}, 3),
        ("WanVACETransformer3DModel", {"vace_layers": [0, 2], "vace_in_channels": 8}, 5),
    ],
)
def test_relatives_of_wan(name, changes, layers):
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**dict(tiny_models.wan().config), **changes).eval()
    given = tiny_models.wan_inputs(2)
    if "vace_layers" in changes:
        given["control_hidden_states"] = torch.randn(2, 8, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    dense = forward(model, given)
    with apply_adaspa(model, AdaSpaConfig(sparsity=0.0, **SEARCH_AT_0)) as handle:
        out = _run_steps(model, given, range(2))[1]
        assert handle.stats()["sparse_calls"] == layers
    assert (out - dense).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_vmoba_with_every_block_selected_equals_dense(name):
    model, case = build(name), CASES[name]
    given = case.inputs(2)
    dense = forward(model, given)
    with apply_vmoba(model, VMoBAConfig(topk_ratio=1.0, **VMOBA)) as handle:
        out = _run_steps(model, given, [0])[0]
        stats = handle.stats()
    assert (out - dense).abs().max() <= 1e-4 * max(1.0, dense.abs().max())
    assert stats["sparse_calls"] == case.layers * (2 if name == "mochi" else 1)
    assert stats["density"] == pytest.approx(1.0)
    assert stats["fallbacks"] == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["adaspa", "vmoba"])
def test_sparse_differs_and_removal_is_bitwise(name, method):
    model, case = build(name), CASES[name]
    given = case.inputs(1)
    before, dense = _snapshot(model), forward(model, given)
    if method == "adaspa":
        handle = apply_adaspa(model, AdaSpaConfig(sparsity=0.75, **SEARCH_AT_0))
    else:
        handle = apply_vmoba(model, VMoBAConfig(topk=(1, 1, 1), **VMOBA))
    sparse = _run_steps(model, given, range(2))[1]
    density = handle.stats()["density"]
    handle.remove()
    handle.remove()
    assert (sparse - dense).abs().max() > 1e-5
    assert 0.05 < density < 0.75
    assert torch.equal(forward(model, given), dense)
    assert _snapshot(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_only_self_attention_of_the_video_is_touched(name):
    model, case = build(name), CASES[name]
    rows = supported(model)
    assert sum(row.supported for row in rows) == case.layers == len(self_attention_layers(model))
    assert {row.route for row in rows if row.supported} == {case.route}
    assert all(row.reason for row in rows)
    refused = [row.name for row in rows if not row.supported]
    assert all("attn2" in name or "refiner" in name for name in refused)
    assert bool(refused) == (name in ("wan", "hunyuan", "ltx"))


def test_steps_before_the_search_are_bitwise_dense_and_calls_are_counted():
    model, given = build("wan"), tiny_models.wan_inputs()
    dense = forward(model, given)
    config = AdaSpaConfig(sparsity=0.75, block_size=16, search_steps=(2, 5), min_tokens=0)
    with apply_adaspa(model, config) as handle:
        run = Run()
        for branch in ("uncond", "cond"):
            outs = _run_steps(model, given, range(8), branch, run)
            assert all(torch.equal(out, dense) for out in outs[:3])
            assert not torch.equal(outs[3], dense)
        stats = handle.stats()
    branches, layers = 2, 3
    assert stats["dense_calls"] == 2 * layers * branches
    assert stats["fused_searches"] == layers * branches
    assert stats["cached_searches"] == layers * branches
    assert stats["sparse_calls"] == 5 * layers * branches
    assert len(stats["layers"]) == layers
    assert stats["layers"][0]["recall"] <= 1.0
    assert stats["backend"] == stats["layers"][0]["backend"] == "grouped"
    assert stats["search_seconds"] > 0


def test_without_the_lse_cache_later_searches_are_dense_again():
    model, given = build("wan"), tiny_models.wan_inputs()
    dense = forward(model, given)
    config = AdaSpaConfig(sparsity=0.75, block_size=16, search_steps=(0, 2), min_tokens=0, lse_cache=False)
    with apply_adaspa(model, config) as handle:
        outs = _run_steps(model, given, range(4))
        assert handle.stats()["fused_searches"] == 6
    assert torch.equal(outs[2], dense)
    assert not torch.equal(outs[3], dense)


def test_branches_and_runs_never_share_masks():
    model = build("wan")
    first, second = tiny_models.wan_inputs(seed=0), tiny_models.wan_inputs(seed=9)
    config = AdaSpaConfig(sparsity=0.75, **SEARCH_AT_0)
    with apply_adaspa(model, config):
        alone = [_run_steps(model, given, range(3)) for given in (first, second)]
        mixed = {"a": [], "b": []}
        run = Run()
        for index in range(3):
            mixed["a"] += _run_steps(model, first, [index], "cond", run)
            mixed["b"] += _run_steps(model, second, [index], "uncond", run)
    for apart, together in zip(alone, mixed.values(), strict=True):
        for x, y in zip(apart, together, strict=True):
            assert torch.equal(x, y)


def test_a_sample_is_sparse_by_itself():
    model = build("wan")
    with apply_adaspa(model, AdaSpaConfig(sparsity=0.75, **SEARCH_AT_0)):
        given = tiny_models.wan_inputs(3)
        together = _run_steps(model, given, range(2))[1]
        for i in range(3):
            alone = _run_steps(model, {k: v[i : i + 1] for k, v in given.items()}, range(2))[1]
            assert (together[i : i + 1] - alone).abs().max() < 1e-5


def test_states_die_with_their_run():
    model = build("wan")
    with apply_adaspa(model, AdaSpaConfig(**SEARCH_AT_0)) as handle:
        run = Run()
        _run_steps(model, tiny_models.wan_inputs(), [0], run=run)
        assert len(handle.method._runs) == 1
        del run
        gc.collect()
        assert len(handle.method._runs) == 0


def test_threads_do_not_share_state():
    model = build("wan")
    inputs = [tiny_models.wan_inputs(seed=s) for s in range(3)]
    with apply_adaspa(model, AdaSpaConfig(sparsity=0.75, **SEARCH_AT_0)):
        expected = [_run_steps(model, given, range(4))[-1] for given in inputs]
        results = [None] * 3

        def work(i):
            results[i] = _run_steps(model, inputs[i], range(4))[-1]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


def test_text_is_always_attended():
    """With one video block per row, changing the value of one text token still moves every video token."""
    model = build("hunyuan")
    given = tiny_models.hunyuan_inputs()
    other = dict(given)
    other["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
    other["encoder_hidden_states"][:, 0] += 3.0
    with apply_adaspa(model, AdaSpaConfig(sparsity=0.95, **SEARCH_AT_0)):
        out = _run_steps(model, given, range(2))[1]
        moved = _run_steps(model, other, range(2))[1]
    assert ((out - moved).abs().amax(1) > 0).all()


def test_padded_text_does_not_matter():
    for name in ("hunyuan", "mochi"):
        model, given = build(name), CASES[name].inputs(1)
        other = dict(given)
        other["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
        other["encoder_hidden_states"][:, 5] += 3.0
        if name == "mochi":  # its time embedding pools the text, with the mask
            assert (forward(model, given) - forward(model, other)).abs().max() < 1e-5
        with apply_adaspa(model, AdaSpaConfig(sparsity=0.75, **SEARCH_AT_0)):
            out, moved = (_run_steps(model, g, range(2))[1] for g in (given, other))
        assert (out - moved).abs().max() < 1e-5


def test_applying_twice_is_an_error_and_the_first_stays():
    model, given = build("wan"), tiny_models.wan_inputs()
    with apply_adaspa(model, AdaSpaConfig(sparsity=0.75, **SEARCH_AT_0)):
        expected = _run_steps(model, given, range(2))[1]
        for apply in (apply_adaspa, apply_vmoba):
            with pytest.raises(ValueError, match="already applied"):
                apply(model)
        assert torch.equal(_run_steps(model, given, range(2))[1], expected)


def test_reasons_to_stay_dense_are_counted_and_warned_once():
    model, given = build("wan"), tiny_models.wan_inputs()
    dense = forward(model, given)
    for config, reason in (
        (AdaSpaConfig(), "64 video tokens are fewer than 2048"),
        (AdaSpaConfig(min_tokens=0), "the number of steps is unknown"),
    ):
        with apply_adaspa(model, config) as handle, pytest.warns(RuntimeWarning, match=reason) as caught:
            for _ in range(2):
                assert torch.equal(forward(model, given), dense)
            assert len([w for w in caught if "AdaSpa" in str(w.message)]) == 1
            assert sum(handle.stats()["fallbacks"].values()) == 6


def test_a_density_that_saves_nothing_on_a_cpu_is_said_once():
    model, given = build("wan"), tiny_models.wan_inputs()
    for sparsity, times in ((0.4, 1), (0.75, 0)):
        config = AdaSpaConfig(sparsity=sparsity, **SEARCH_AT_0)
        with apply_adaspa(model, config), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                _run_steps(model, given, range(2))
        said = [str(w.message) for w in caught if "saves no time" in str(w.message)]
        expected = "AdaSpa keeps 60% of the blocks: on a CPU that saves no time (it does below half of them)"
        assert said == [expected] * times


def test_vmoba_pays_later_than_adaspa_on_a_cpu():
    cpu = torch.device("cpu")
    assert smallest_useful(AdaSpaMethod(AdaSpaConfig()), cpu) == 2048
    assert smallest_useful(VMoBAMethod(VMoBAConfig()), cpu) == 4096
    assert smallest_useful(VMoBAMethod(VMoBAConfig(min_tokens=7)), cpu) == 7


def test_a_mask_that_is_not_text_padding_stays_dense():
    model, given = build("hunyuan"), tiny_models.hunyuan_inputs()
    handle = apply_adaspa(model, AdaSpaConfig(**SEARCH_AT_0))
    layer = self_attention_layers(model)[0][1]
    hidden, text = torch.randn(1, 64, 20), torch.randn(1, 6, 20)
    causal = torch.ones(70, 70, dtype=torch.bool).tril()
    from dit_suite.attention.layouts import TokenLayout
    from dit_suite.attention.plugin import _Scope

    handle._attachments[0].local.scope = _Scope(TokenLayout((4, 4, 4), "last"))
    with pytest.warns(RuntimeWarning, match="more than text padding"), torch.no_grad():
        masked = layer(hidden, encoder_hidden_states=text, attention_mask=causal)
    assert list(handle.fallbacks) == ["an attention mask of torch.bool (70, 70) is more than text padding"]
    handle.remove()
    with torch.no_grad():
        assert torch.equal(masked[0], layer(hidden, encoder_hidden_states=text, attention_mask=causal)[0])
    assert forward(model, given).isfinite().all()


def test_a_grid_that_does_not_fit_stays_dense():
    model, given = build("ltx"), tiny_models.ltx_inputs()
    coords = torch.zeros(1, 3, 64)
    wrong = given | {"height": 8, "video_coords": coords}
    dense = forward(model, wrong)
    with apply_adaspa(model, AdaSpaConfig(**SEARCH_AT_0)), pytest.warns(RuntimeWarning, match="does not fit the grid"):
        assert torch.equal(_run_steps(model, wrong, range(2))[1], dense)


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="token layout of Linear is not known"):
        apply_adaspa(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has none"):
        apply_adaspa(object())
    assert supported(torch.nn.Linear(2, 2)) == []


def test_adaspa_refuses_gradients_and_vmoba_trains():
    model, given = build("wan"), tiny_models.wan_inputs()
    with apply_adaspa(model, AdaSpaConfig(**SEARCH_AT_0)), pytest.raises(ValueError, match="inference only"):
        model(**given)
    model.train()
    reference = model(**given).sample.pow(2).mean()
    expected = torch.autograd.grad(reference, model.blocks[0].attn1.to_q.weight)[0]
    with apply_vmoba(model, VMoBAConfig.trained(tau=1.0, min_tokens=0)):
        loss = model(**given).sample.pow(2).mean()
        actual = torch.autograd.grad(loss, model.blocks[0].attn1.to_q.weight)[0]
    assert (actual - expected).abs().max() < 1e-5
    with apply_vmoba(model, VMoBAConfig.trained(min_tokens=0, block_3d=(2, 2, 2), block_2d=(2, 2))):
        model.enable_gradient_checkpointing()
        loss = model(**given).sample.pow(2).mean()
        sparse = torch.autograd.grad(loss, model.blocks[0].attn1.to_q.weight)[0]
    assert sparse.abs().max() > 0
    assert (sparse - expected).abs().max() > 1e-6


def test_chosen_layers_only():
    model, given = build("wan"), tiny_models.wan_inputs()
    with apply_adaspa(model, AdaSpaConfig(sparsity=0.75, **SEARCH_AT_0), layers=(1,)) as handle:
        _run_steps(model, given, range(2))
        assert [row["layer"] for row in handle.stats()["layers"]] == [1]


def test_vmoba_dense_first_steps_are_bitwise():
    model, given = build("wan"), tiny_models.wan_inputs()
    dense = forward(model, given)
    with apply_vmoba(model, VMoBAConfig(topk=(1, 1, 1), **(VMOBA | {"dense_first_steps": 0.25}))):
        outs = _run_steps(model, given, range(5))
    assert [torch.equal(out, dense) for out in outs] == [True, True, True, False, False]


def test_a_foreign_pipeline_run_is_followed_by_the_root_hook():
    """No step context is published here: the root hook counts timesteps, as in diffusers' own pipelines."""
    model, given = build("wan"), tiny_models.wan_inputs()
    dense = forward(model, given)
    config = AdaSpaConfig(sparsity=0.75, block_size=16, search_steps=(1,), min_tokens=0)
    with apply_adaspa(model, config) as handle:
        for _ in range(2):
            for timestep in (900.0, 700.0, 400.0):
                for _branch in ("uncond", "cond"):
                    forward(model, given | {"timestep": torch.tensor([timestep])})
        stats = handle.stats()
    assert (stats["dense_calls"], stats["fused_searches"], stats["sparse_calls"]) == (12, 12, 12)
    assert torch.equal(forward(model, given), dense)


def test_reset_ends_a_run_that_was_left():
    model, given = build("wan"), tiny_models.wan_inputs()
    contexts = []
    with apply_adaspa(model, AdaSpaConfig(search_steps=(1,), block_size=16, min_tokens=0)) as handle:
        watch = model.blocks[0].register_forward_pre_hook(lambda *_: contexts.append(current_step()))
        for _ in range(2):
            forward(model, given | {"timestep": torch.tensor([900.0])})
            handle.reset()
        watch.remove()
    assert [(c.step_index, c.branch) for c in contexts] == [(0, "batched")] * 2
    assert contexts[0].run is not contexts[1].run


def test_other_attention_backends_stay_what_they_were():
    model, given = build("wan"), tiny_models.wan_inputs()
    model.blocks[0].attn1.set_attention_backend("_native_math")
    dense = forward(model, given)
    with apply_adaspa(model, AdaSpaConfig(search_steps=(5,), block_size=16, min_tokens=0)):
        assert torch.equal(_run_steps(model, given, [0])[0], dense)
    assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
    assert torch.equal(forward(model, given), dense)


def test_a_failed_application_leaves_nothing_behind():
    model = build("wan")
    before = _snapshot(model)
    with (
        patch("dit_suite.attention.plugin.route_for", side_effect=RuntimeError("no route")),
        pytest.raises(RuntimeError, match="no route"),
    ):
        apply_adaspa(model)
    assert _snapshot(model) == before


def _apply_full(method, model):
    """AdaSpa or VMoBA with every block kept."""
    if method == "adaspa":
        return apply_adaspa(model, AdaSpaConfig(sparsity=0.0, **SEARCH_AT_0))
    return apply_vmoba(model, VMoBAConfig(topk_ratio=1.0, **VMOBA))


both_methods = pytest.mark.parametrize("method", ["adaspa", "vmoba"])


@both_methods
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name, method):
    model = build(name).to(torch.bfloat16)
    given = {
        k: v.to(torch.bfloat16) if torch.is_tensor(v) and v.is_floating_point() and not k.endswith("mask") else v
        for k, v in CASES[name].inputs(1).items()
    }
    dense = forward(model, given)
    with _apply_full(method, model) as handle:
        out = _run_steps(model, given, range(2))[1]
        assert handle.stats()["sparse_calls"] > 0 and handle.stats()["fallbacks"] == {}
    assert out.dtype == torch.bfloat16
    assert (out - dense).abs().max() < 0.05 * dense.abs().max()


@both_methods
def test_lora_adapters_keep_working(method):
    pytest.importorskip("peft")
    from peft import LoraConfig

    model, given = build("wan"), tiny_models.wan_inputs()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    dense = forward(model, given)
    with _apply_full(method, model):
        assert (_run_steps(model, given, range(2))[1] - dense).abs().max() < 1e-4
    assert torch.equal(forward(model, given), dense)


@both_methods
def test_first_block_cache_composes(method):
    model, given = build("wan"), tiny_models.wan_inputs()
    dense = forward(model, given)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with _apply_full(method, model) as handle, model.cache_context("cond"):
        outs = _run_steps(model, given, range(3))
        assert handle.stats()["sparse_calls"] > 0
    model.disable_cache()
    assert all((out - dense).abs().max() < 1e-4 for out in outs)
    assert torch.equal(forward(model, given), dense)


def test_a_pipeline_run_counts_its_calls():
    pipe = TextToVideoPipeline(
        tiny_models.wan(in_channels=4).eval(), FlowMatchEulerDiscreteScheduler(shift=3.0), sample_size=(4, 8, 8)
    )
    pipe.set_progress_bar_config(disable=True)
    states = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))

    def run():
        return pipe(
            prompt_embeds=states,
            negative_prompt_embeds=torch.zeros_like(states),
            num_inference_steps=10,
            generator=sample_generators(0, [0]),
            output_type="latent",
        ).frames

    dense = run()
    with apply_adaspa(pipe, AdaSpaConfig(sparsity=0.5, block_size=16, min_tokens=0)) as handle:
        first, second = run(), run()
        stats = handle.stats()
    per_run = 3 * 2  # layers times guidance branches
    assert stats["dense_calls"] == 2 * per_run
    assert stats["fused_searches"] == stats["cached_searches"] == 2 * per_run
    assert stats["sparse_calls"] == 2 * 8 * per_run
    assert torch.equal(first, second)
    assert torch.equal(run(), dense)


def test_ltx_has_the_arguments_the_layout_reads():
    import inspect

    assert {"num_frames", "height", "width"} <= set(inspect.signature(LTXVideoTransformer3DModel.forward).parameters)

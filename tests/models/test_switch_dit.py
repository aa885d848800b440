"""Switch-DiT: golden parity, routing facts, equality of the expert paths, limits that are a plain DiT."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from dit_suite.converters import ConversionError
from dit_suite.converters import switch_dit as converter
from dit_suite.golden import read_fixture, section
from dit_suite.golden import switch_dit as golden
from dit_suite.models import switch_dit
from dit_suite.models.dit import DiTModel, dit_config
from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel, sliding_window
from dit_suite.step_plan import StepContext, publish_step
from dit_suite.training import auxiliary
from dit_suite.training.auxiliary import (
    DiffusionPriorLoss,
    diffusion_prior,
    match_units,
    prior_loss,
    uniform_gate_divergence,
)
from dit_suite.training.objectives import ObjectiveResult

FOLDER = Path(__file__).parents[1] / "golden"
FIXTURES = sorted(FOLDER.glob("switch_dit_*.safetensors"))
SHAPE = {
    "sample_size": 8,
    "in_channels": 3,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 5,
}


def tiny(awake: bool = True, **changes) -> SwitchDiTTransformer2DModel:
    torch.manual_seed(0)
    model = SwitchDiTTransformer2DModel(**(SHAPE | changes)).eval()
    if awake:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(timesteps=(10, 300, 999)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = len(timesteps)
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return x, torch.tensor(timesteps), torch.arange(batch) % 5


@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_golden(path):
    results = golden.check(*read_fixture(path))
    assert len(results) >= 20
    assert [r for r in results if not r.passed] == []


def test_the_golden_check_notices_swapped_expert_axes():
    tensors, config = read_fixture(FOLDER / "switch_dit_forward.safetensors")
    key = "state_dict.routers.0.experts.w"
    failed = {r.name for r in golden.check(tensors | {key: tensors[key].mT.contiguous()}, config) if not r.passed}
    assert "router_0.mask" in failed and "router_0.probs" not in failed


def test_the_golden_check_names_outputs_that_it_does_not_compare():
    tensors, config = read_fixture(FOLDER / "switch_dit_dtr.safetensors")
    with pytest.raises(ValueError, match="nothing is compared with block_9"):
        golden.check(tensors | {"output.block_9": torch.zeros(1)}, config)


def test_zero_experts_and_full_channels_are_the_plain_dit():
    """Fact 2, and the plain twin is the suite's DiT with the same weights."""
    plain = tiny(routing="none")
    switch = tiny(awake=False)
    switch.load_state_dict(plain.state_dict() | switch.routers.state_dict(prefix="routers."))
    everything = tiny(routing="channels", channel_share=1.0)
    everything.load_state_dict(plain.state_dict())
    dit = DiTModel(**SHAPE).eval()
    dit.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = dit(*inputs()).sample
        assert torch.equal(plain(*inputs()).sample, expected)
        assert torch.equal(switch(*inputs()).sample, expected)
        assert torch.equal(everything(*inputs()).sample, expected)
        assert (tiny()(*inputs()).sample - expected).abs().max() > 1e-2


def test_one_expert_has_gate_one():
    model = tiny(num_experts=1, experts_per_timestep=1)
    router = model.routers[0]
    x = torch.randn(2, 4, 32)
    gates = router.gates(model.time_embed(torch.tensor([5, 900])))
    assert torch.equal(gates, torch.ones(2, 1))
    expected = x @ router.expert_weight[0] + router.expert_bias[0]
    torch.testing.assert_close(router.mix_grouped(x, gates), expected, atol=1e-6, rtol=0)


def test_grouped_merged_and_common_timestep_paths_agree():
    """Fact 5; the sampling path merges once for the whole batch and keeps it for the next pass of the step."""
    model = tiny()
    with torch.no_grad():
        for timesteps in ((10, 300, 999), (300, 300, 300)):
            x, t, y = inputs(timesteps)
            fast = model(x, t, y).sample
            with torch.enable_grad():
                torch.testing.assert_close(model(x, t, y).sample.detach(), fast, atol=1e-5, rtol=0)
            rows = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]).sample for i in range(3)])
            torch.testing.assert_close(rows, fast, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(x, torch.tensor(300), y).sample, fast, atol=5e-6, rtol=0)


@pytest.mark.parametrize("experts,active", [(1, 1), (3, 1), (3, 2), (5, 3)])
@torch.no_grad()
def test_merging_the_chosen_experts_is_merging_all_by_their_gates(experts, active):
    router = tiny(num_experts=experts, experts_per_timestep=active).routers[0]
    embedding = 5 * torch.randn(6, 32, generator=torch.Generator().manual_seed(4))
    weights, biases = router(embedding, output="merged")
    assert (router.gates(embedding) > 0).sum(1).tolist() == [active] * 6
    for row in range(6):
        weight, bias = router(embedding[row : row + 1], output="merged")
        assert weight.shape == (1, 32, 32) and bias.shape == (1, 32)
        torch.testing.assert_close(weight[0], weights[row], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(bias[0], biases[row], atol=1e-6, rtol=1e-6)
    equal = router.merge_chosen([1 / experts] * experts)[0][0]
    torch.testing.assert_close(equal, router.expert_weight[:active].sum(0) / experts)


def test_training_under_autocast():
    """The presets train in bfloat16: experts, gates and the residual stream meet in different types."""
    model = tiny().train()
    exact = model(*inputs()).sample
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs()).sample
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    out.float().square().mean().backward()
    assert all(router.expert_weight.grad.abs().max() > 0 for router in model.routers)


def test_merged_experts_are_reused_per_timestep_and_renewed_with_the_weights(monkeypatch):
    model = tiny()
    calls = []
    merge = switch_dit.TimestepRouter.merge_chosen
    monkeypatch.setattr(
        switch_dit.TimestepRouter, "merge_chosen", lambda self, row: calls.append(1) or merge(self, row)
    )
    x, t, y = inputs((300, 300, 300))
    with torch.no_grad():
        first = model(x, t, y).sample
        assert len(calls) == 2
        assert torch.equal(model(x, t, y).sample, first) and len(calls) == 2
        model(x, t + 1, y)
        model(x, t, y)
        assert len(calls) == 6
        model.set_expert_cache(2)
        for step in (0, 1, 0, 1):
            model(x, t + step, y)
        assert len(calls) == 10
        model.routers[0].expert_weight.mul_(2.0)
        changed = model(x, t, y).sample
        assert len(calls) == 12 and (changed - first).abs().max() > 1e-4
        model.set_expert_cache(0)
        model(x, t, y)
        model(x, t, y)
        assert len(calls) == 16


@torch.no_grad()
def test_an_expanded_timestep_is_one_where_values_stay_on_a_device(monkeypatch):
    """What a GPU runs: values are not looked at, the published step names the timestep, and the two passes of guidance
    share their experts."""
    model = tiny()
    x, t, y = inputs((300, 300, 300))
    plain = model(x, t, y).sample
    monkeypatch.setattr(switch_dit, "can_read", lambda timestep: False)
    model.set_expert_cache(1)
    merged = []
    merge = switch_dit.TimestepRouter.merge
    monkeypatch.setattr(
        switch_dit.TimestepRouter, "merge", lambda self, gates: merged.append(len(gates)) or merge(self, gates)
    )
    expanded = torch.tensor(300).expand(3)
    torch.testing.assert_close(model(x, expanded, y).sample, plain, atol=1e-5, rtol=0)
    assert merged == [1, 1], "merged once for the batch; without a published step nothing is kept"
    merged.clear()
    for timestep in (300.0, 300.0, 700.0):
        value = torch.tensor(timestep).expand(3)
        with publish_step(StepContext(0, 2, timestep)):
            out = model(x, value, y).sample
        with torch.enable_grad():
            torch.testing.assert_close(model(x, value, y).sample.detach(), out, atol=1e-5, rtol=0)
    assert merged == [1] * 4, "the second pass at 300 takes what the first has merged"
    merged.clear()
    torch.testing.assert_close(model(x, t, y).sample, plain, atol=1e-5, rtol=0)
    assert merged == [3, 3], "values that are not known to be equal have a matrix each, block by block"


@torch.no_grad()
def test_kept_experts_know_autocast_and_adapters():
    model = tiny()
    x, t, y = inputs((300, 300, 300))
    exact = model(x, t, y).sample
    with torch.autocast("cpu", torch.bfloat16):
        first = model(x, t, y).sample
        fresh = tiny()(x, t, y).sample
    assert torch.equal(first, fresh), "nothing of the float32 pass is used"
    assert torch.equal(model(x, t, y).sample, exact)

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear_1", "gate"], init_lora_weights=False), model)
    strong = model(x, t, y).sample
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(3.0)
    scaled = model(x, t, y).sample
    model.set_expert_cache(0)
    assert torch.equal(scaled, model(x, t, y).sample) and (scaled - strong).abs().max() > 1e-4


def test_hooks_of_offloading_see_every_use_of_the_weights():
    """accelerate's sequential offload leaves weights on the meta device outside a module's own `forward`."""
    model, offloaded = tiny(), tiny()
    x, t, y = inputs()
    with torch.no_grad():
        wanted = [model(x, steps, y).sample for steps in (t, torch.tensor(300).expand(3))]
        table = model.routing_table()
        cpu_offload(offloaded, torch.device("cpu"))
        assert offloaded.routers[0].expert_weight.is_meta
        for steps, sample in zip((t, torch.tensor(300).expand(3)), wanted, strict=True):
            torch.testing.assert_close(offloaded(x, steps, y).sample, sample, atol=1e-6, rtol=0)
        assert torch.equal(offloaded.routing_table(), table) and not offloaded._merged
    called = []
    for router in model.routers:
        router.register_forward_pre_hook(lambda *_: called.append(1))
    model.train()(x, t, y)
    model.routing_probabilities(t)
    assert len(called) == 4


def test_no_pass_over_all_timesteps_in_inference():
    model = tiny()
    seen = []
    model.time_embed.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        model(*inputs())
    assert seen == [3]


def test_routing_depends_on_the_timestep_only():
    """Facts 4 and 8."""
    model = tiny()
    table = model.routing_table()
    assert table.shape == (1000, 2, 3)
    assert (table.sum(-1) == 2).all()
    shared = (table[:, None] & table[None]).sum(-1)
    assert shared.min() >= 1
    x, _, y = inputs((300, 300, 700))
    t = torch.tensor([300, 300, 700])
    embedding = model.time_embed(t)
    gates = model.routers[0].gates(embedding)
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])
    with torch.no_grad():
        plain = model.mixture(0, torch.ones(3, 4, 32), embedding, model.expert_plan(t, embedding))
        assert torch.equal(plain[0], plain[1])


def test_ties_go_to_the_lower_expert():
    router = tiny().routers[0]
    equal = torch.full((2, 3), 1 / 3)
    assert router.selected(equal).tolist() == [[True, True, False]] * 2


def test_the_mask_reaches_the_branches_and_not_the_residual():
    """Fact 3: with closed adaLN gates a block is the identity whatever the mask."""
    model = tiny()
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.adaln.weight.zero_()
            block.adaln.bias.zero_()
        x = torch.randn(3, 16, 32)
        _, t, _ = inputs()
        embedding = model.time_embed(t)
        out = model.run_block(0, x, embedding, embedding, t, model.expert_plan(t, embedding))
        torch.testing.assert_close(out, x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("depth,experts,active", [(12, 3, 2), (24, 3, 2), (12, 3, 1), (12, 4, 2), (12, 6, 3)])
def test_prior_windows(depth, experts, active):
    """Fact 6."""
    prior = diffusion_prior(1000, depth, experts, active)
    units, width = depth * experts, depth * active
    assert (prior.sum(1) == width).all()
    start = prior.argmax(1)
    assert start[0] == 0 and start[-1] == units - width and (start.diff() >= 0).all()
    assert all(prior[t, s : s + width].all() for t, s in enumerate(start.tolist()))
    assert int(prior.all(0).sum()) == max(0, 2 * width - units)


def test_prior_loss_of_uniform_and_of_perfect_gates():
    """Fact 7, and the matching finds a permutation of the units."""
    prior = diffusion_prior(1000, 4, 3, 2)
    t = torch.tensor([0, 500, 999])
    uniform = prior_loss(torch.full((3, 4, 3), 1 / 3), prior[t])
    assert uniform.tolist() == pytest.approx([0.1323] * 3, abs=1e-4)
    assert uniform_gate_divergence(3, 2) == pytest.approx(0.1323, abs=1e-4)
    assert uniform_gate_divergence(4, 2) == pytest.approx(0.2158, abs=1e-4)
    assert uniform_gate_divergence(3, 1) == pytest.approx(0.3182, abs=1e-4)
    one_of_three = diffusion_prior(1000, 4, 3, 1)[t]
    assert prior_loss(torch.full((3, 4, 3), 1 / 3), one_of_three).tolist() == pytest.approx([0.3182] * 3, abs=1e-4)
    shuffle = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assignment, cost = match_units(prior[:, shuffle].bool(), prior)
    assert cost == 0
    gates = (prior[t][:, shuffle] / 2).reshape(3, 4, 3)
    assert prior_loss(gates, prior[t][:, assignment]).abs().max() < 1e-5
    opposite = prior_loss((1 - prior[t]).reshape(3, 4, 3), prior[t])
    assert opposite.max() <= math.log(2) + 1e-4


def test_prior_loss_for_the_trainer_teaches_the_gates():
    model = tiny().train()
    with pytest.raises(ValueError, match="routing='experts'"):
        DiffusionPriorLoss().attach(tiny(routing="none"))
    term = DiffusionPriorLoss()
    term.attach(model)
    result = ObjectiveResult(torch.zeros(3), torch.tensor([0, 500, 999]))
    optimizer = torch.optim.Adam([*model.routers.parameters(), *model.time_embed.parameters()], lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = term.loss(None, result).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_prior_loss_ignores_autocast_and_matches_once_per_step(monkeypatch):
    model = tiny().train()
    term = DiffusionPriorLoss()
    term.attach(model)
    result = ObjectiveResult(torch.zeros(3), torch.tensor([0, 500, 999]))
    matched = []
    match = auxiliary.match_units
    monkeypatch.setattr(auxiliary, "match_units", lambda *given: matched.append(1) or match(*given))
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = term.loss(None, result).mean()
        loss.backward()
        gradients.append([router.gate.weight.grad.clone() for router in model.routers])
    assert len(matched) == 1, "micro-batches of one step share the matching"
    for exact, cast in zip(*gradients, strict=True):
        assert exact.abs().max() > 1e-4 and torch.equal(exact, cast)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    term.loss(None, result)
    assert len(matched) == 2


@pytest.mark.parametrize("experts", [3, 6])
def test_active_experts_decide_the_cost(experts):
    """Fact 9: k T D^2 products per sample whatever E is; parameters grow with E."""
    router = tiny(num_experts=experts).routers[0]
    hidden, embedding = torch.zeros(2, 16, 32), torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    gates = router.gates(embedding)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        router.mix_grouped(hidden, gates)
    assert counter.get_total_flops() == 2 * 2 * (2 * 16 * 32**2)
    assert sum(p.numel() for p in router.parameters()) == experts * (32**2 + 32 + 32 + 1)


@torch.no_grad()
def test_guidance_halves_share_their_experts():
    """Fact 4: the class and the picture do not reach the gate."""
    model = tiny()
    seen = []
    mixture = model.mixture
    model.mixture = lambda layer, hidden, embedding, merged: (
        seen.append(merged) or mixture(layer, hidden, embedding, merged)
    )
    x, _, y = inputs()
    for pictures, labels in ((x, y), (x.flip(0), y), (x, torch.full_like(y, 5))):
        model(pictures, torch.tensor([300, 300, 300]), labels)
    first = seen[0]
    assert len(first[0][0]) == 1 and all(other is first for other in seen)


def test_channel_masks():
    """Fact 10."""
    model, plain = tiny(routing="channels"), tiny(routing="none")
    assert set(model.state_dict()) == set(plain.state_dict())
    assert (model.channel_table.sum(1) == 25).all()
    start = sliding_window(1000, 384, 307).argmax(1)
    assert start[-1] == 77 and start[0] == 0
    differing = sliding_window(1000, 384, 307).diff(dim=0).abs().sum(1)
    assert torch.equal(differing, 2.0 * start.diff())
    with torch.no_grad():
        x, t, y = inputs()
        rows = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]).sample for i in range(3)])
        torch.testing.assert_close(rows, model(x, t, y).sample, atol=1e-5, rtol=0)


def test_fresh_model_outputs_zero_and_unconditional_table_has_one_row():
    assert not tiny(awake=False)(*inputs()).sample.any()
    alone = tiny(num_classes=1)
    assert alone.label_embed.embedding_table.weight.shape[0] == 1 and alone.config.class_dropout_prob == 0


@pytest.mark.parametrize(
    "size,dit,total",
    [
        ("S", 32_865_056, 38_201_156),
        ("B", 130_315_808, 151_604_804),
        ("L", 457_840_672, 533_485_672),
        ("XL", 674_834_720, 786_505_076),
    ],
)
def test_parameter_counts(size, dit, total):
    with init_empty_weights():
        model = SwitchDiTTransformer2DModel(**dit_config(f"DiT-{size}/2"))
    ours = sum(p.numel() for p in model.parameters())
    routers = sum(p.numel() for p in model.routers.parameters())
    assert ours - routers == dit and routers == total - dit


def test_converter_is_strict_and_a_dit_file_warm_starts(tmp_path):
    for name in ("switch_dit_forward", "switch_dit_dtr"):
        tensors, config = read_fixture(FOLDER / f"{name}.safetensors")
        weights = section(tensors, "state_dict")
        save_file(weights, tmp_path / "model.safetensors")
        arguments = argparse.Namespace(
            heads=config["num_heads"], sample_size=8, experts_per_timestep=2, warm_start=False
        )
        model = converter.convert(tmp_path / "model.safetensors", arguments)
        assert model.config.routing == ("experts" if "forward" in name else "channels")
        for broken in (
            weights | {"routers.0.extra": torch.zeros(1)},
            {k: v for k, v in weights.items() if "fc1.b" not in k},
        ):
            save_file(broken, tmp_path / "broken.safetensors")
            with pytest.raises(ConversionError, match=r"extra|ff\.net\.0"):
                converter.convert(tmp_path / "broken.safetensors", arguments)
    tensors, config = read_fixture(FOLDER / "switch_dit_forward.safetensors")
    weights = section(tensors, "state_dict")
    moved = weights | {"prior._unit_mapping": weights["prior._unit_mapping"].roll(1, 1)}
    save_file(moved, tmp_path / "broken.safetensors")
    arguments.heads = config["num_heads"]
    with pytest.raises(ConversionError, match="not the sliding window"):
        converter.convert(tmp_path / "broken.safetensors", arguments)
    plain = {k: v for k, v in weights.items() if not k.startswith(("routers", "prior", "full_time"))}
    save_file(plain, tmp_path / "dit.safetensors")
    arguments.warm_start = True
    warm = converter.convert(tmp_path / "dit.safetensors", arguments)
    arguments.warm_start = False
    twin = converter.convert(tmp_path / "dit.safetensors", arguments)
    assert warm.config.routing == "experts" and twin.config.routing == "none"
    given = section(tensors, "input")
    with torch.no_grad():
        assert torch.equal(
            warm(given["x"], given["t"], given["y"]).sample, twin(given["x"], given["t"], given["y"]).sample
        )


def test_save_and_load_keeps_outputs(tmp_path):
    for routing in ("experts", "channels"):
        model = tiny(routing=routing)
        model.save_pretrained(tmp_path / routing)
        again = SwitchDiTTransformer2DModel.from_pretrained(tmp_path / routing)
        with torch.no_grad():
            assert torch.equal(again(*inputs()).sample, model(*inputs()).sample)


def test_gradient_checkpointing_changes_nothing():
    model = tiny().train()
    model(*inputs()).sample.square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(plain[f"routers.{i}.gate.weight"].abs().max() > 0 for i in range(2))
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(*inputs()).sample.square().mean().backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-6, rtol=1e-5)

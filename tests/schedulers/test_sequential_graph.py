"""Forward substitution as a CUDA graph: the held system is independent of the batch it was made from."""

import pytest
import torch

from dit_suite.models.tarflow import TarFlowModel
from dit_suite.schedulers.flow_system import FlowSystem
from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler, _substitute
from dit_suite.schedulers.sequential_graph import held_copy, kind_of, load
from dit_suite.schedulers.tarflow_strategy import FlowGuidance

GUIDANCE = FlowGuidance(2.0, annealed=True)


def network(seed: int = 0) -> TarFlowModel:
    torch.manual_seed(seed)
    model = TarFlowModel(
        sample_size=8, patch_size=2, hidden_size=32, num_blocks=2, num_layers=2, head_dim=16, num_classes=3
    )
    for block in model.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.05)
    return model.eval()


def batch(seed: int, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 16, 12, generator=generator), torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize("guidance", [FlowGuidance(), GUIDANCE])
@torch.no_grad()
def test_held_system_takes_other_numbers(guidance):
    block = network().blocks[1]
    first, second = (FlowSystem(block, *batch(seed), guidance) for seed in (1, 2))
    held = held_copy(first)
    assert torch.equal(_substitute(held), _substitute(first))
    expected = _substitute(second)
    load(held, second)
    assert torch.equal(_substitute(held), expected)
    assert not torch.equal(_substitute(first), expected)  # the batch it was made from is untouched


@torch.no_grad()
def test_kind_tells_batches_guidance_and_weights_apart():
    block = network().blocks[1]
    plain = FlowSystem(block, *batch(1), FlowGuidance())
    assert kind_of(plain) == kind_of(FlowSystem(block, *batch(2), FlowGuidance()))
    assert kind_of(plain) != kind_of(FlowSystem(block, *batch(1), GUIDANCE))
    assert kind_of(plain) != kind_of(FlowSystem(block, *batch(1, count=2), FlowGuidance()))
    assert kind_of(plain) != kind_of(FlowSystem(network().blocks[1], *batch(1), FlowGuidance()))


def test_on_a_cpu_nothing_changes():
    model, (noise, labels) = network(), batch(1)
    scheduler = GSJacobiScheduler()
    expected = scheduler.step(model.blocks[1], 1, noise, labels).tokens
    scheduler.set_cuda_graphs(True)
    assert torch.equal(scheduler.step(model.blocks[1], 1, noise, labels).tokens, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("guidance", [FlowGuidance(), GUIDANCE])
def test_graph_is_the_loop(guidance):
    model = network().cuda()
    plain, graphed = GSJacobiScheduler(), GSJacobiScheduler()
    graphed.set_cuda_graphs(True)
    for seed, count in ((1, 3), (2, 3), (3, 2)):
        noise, labels = (part.cuda() for part in batch(seed, count))
        for block in (1, 0):
            expected = plain.step(model.blocks[block], block, noise, labels, guidance)
            found = graphed.step(model.blocks[block], block, noise, labels, guidance)
            torch.testing.assert_close(found.tokens, expected.tokens, atol=1e-5, rtol=0)
            assert found.calls == expected.calls

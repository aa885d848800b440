"""CUDA graphs of a TarFlow: on a CPU all but the recording, which a second run of the same function stands in for."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch.utils._python_dispatch import TorchDispatchMode

from dit_suite.models.tarflow import TarFlowModel
from dit_suite.schedulers.flow_graphs import FlowGraphs, HeldBlock, kind_of
from dit_suite.schedulers.flow_system import BlockTrace, FlowSystem, Watch
from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler, _substitute, solve, solve_sequential
from dit_suite.schedulers.tarflow_strategy import BlockStrategy, FlowGuidance
from tests.models.test_tarflow import tiny_model
from tests.pipelines.test_pipeline_tarflow import run, tiny_pipe
from tests.schedulers.test_bfloat16_sweeps import units
from tests.schedulers.test_gs_jacobi import GUIDED, LABELS, noise

GUIDANCE = FlowGuidance(2.0, annealed=True)
BOTH = pytest.mark.parametrize("guidance", [FlowGuidance(), GUIDED], ids=["plain", "guided"])


class NoWaits(TorchDispatchMode):
    """A graph can't hold what brings a number to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


class Rerun:
    """Stands in for the recording: runs a function once, as its warm-up, and again for every replay."""

    def __init__(self) -> None:
        self.recorded, self.replays = 0, 0

    def __call__(self, function, pool):
        self.recorded += 1
        with NoWaits():
            function()

        def replay() -> None:
            self.replays += 1
            function()

        return replay


def graphed(rerun: Rerun, **config) -> GSJacobiScheduler:
    """A scheduler that believes it has recorded graphs."""
    scheduler = GSJacobiScheduler(**config)
    scheduler._graphs = FlowGraphs(rerun, "cpu")
    return scheduler


def uneven() -> torch.Tensor:
    """Noise of four samples that need different numbers of sweeps."""
    z = noise(4)
    z[1] *= 0.01
    return z


def agree(found: BlockTrace, wanted: BlockTrace, atol: float = 2e-6) -> None:
    torch.testing.assert_close(found.tokens, wanted.tokens, atol=atol, rtol=1e-6)
    for name in ("modules", "covered", "calls", "bfloat16_calls", "note", "fallbacks", "interrupted"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert torch.equal(found.sweeps, wanted.sweeps)
    if wanted.residuals:
        residuals = (torch.stack(trace.residuals) for trace in (found, wanted))
        torch.testing.assert_close(*residuals, atol=1e-5, rtol=1e-4)


@BOTH
@pytest.mark.parametrize("bfloat16", [0, 2])
def test_recorded_sweeps_are_the_shrinking_ones(monkeypatch, guidance, bfloat16):
    """Finished samples stay as they are, though they are computed along, until fewer than half go on."""
    units(monkeypatch, True)
    model, z, rerun, sizes = tiny_model(spread=0.3), uneven(), Rerun(), []
    config = {"modules": [1] * 3, "sweeps": [12] * 3, "tolerance": 1e-3, "bfloat16_sweeps": [bfloat16] * 3}
    wanted = solve(model, z, LABELS, GSJacobiScheduler(**config), guidance)
    assert len({int(count) for trace in wanted.blocks for count in trace.sweeps}) > 1
    scheduler = graphed(rerun, **config)
    solve(model, z.flip(0), LABELS, scheduler, guidance)
    recorded, replays = rerun.recorded, rerun.replays
    assert recorded == 3 * (1 + (bfloat16 > 0))
    for block in model.blocks:
        block.proj_in.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    found = solve(model, z, LABELS, scheduler, guidance)
    for one, other in zip(found.blocks, wanted.blocks, strict=True):
        agree(one, other, atol=5e-6 if guidance.active else 2e-6)
    rows = 8 if guidance.active else 4
    assert rerun.recorded == recorded and rerun.replays - replays == sizes.count(rows)
    assert len(sizes) == sum(trace.calls for trace in wanted.blocks)
    assert all(size == rows or 2 * size < rows for size in sizes) and sizes.count(rows) > 3


def test_half_of_the_batch_goes_on_in_graphs_and_less_shrinks():
    """Quiet samples need three sweeps here, the others five."""
    block, sizes, strategy = tiny_model(spread=0.1).blocks[1], [], BlockStrategy(1, 12, tolerance=1e-4)
    block.proj_in.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    for quiet, left in ((1, 3), (2, 2), (3, 1)):
        z = 3 * noise(4)
        z[:quiet] *= 0.003
        wanted = GSJacobiScheduler().step(block, 1, z, LABELS, strategy=strategy)
        assert wanted.sweeps.tolist() == [3] * quiet + [5] * left and sizes == [4, 4, 4, left, left]
        sizes.clear()
        agree(graphed(Rerun()).step(block, 1, z, LABELS, strategy=strategy), wanted)
        kept = 4 if left >= 2 else 1
        assert sizes == [4] + [4, 4, 4, kept, kept], "the first one is the warm-up"
        sizes.clear()


@pytest.mark.parametrize("tolerance", [-1.0, 1e-3])
@pytest.mark.parametrize("stopping", ["sample", "batch"])
def test_divergence_clamp_and_fixed_sweeps(stopping, tolerance):
    """A sample that diverged goes on though it no longer changes."""
    model = tiny_model(volume_preserving=True)
    z, huge = 3 * uneven(), uneven()
    huge[2, 4, 0] = 5e6
    for start, clamp, fallbacks in ((huge, None, (2,)), (z, 0.5, ()), (z, None, ())):
        given = {"clamp": clamp, "stopping": stopping}
        strategy = BlockStrategy(1, 12, tolerance=tolerance)
        wanted = GSJacobiScheduler(**given).step(model.blocks[0], 0, start, LABELS, GUIDED, strategy)
        rerun = Rerun()
        found = graphed(rerun, **given).step(model.blocks[0], 0, start, LABELS, GUIDED, strategy)
        agree(found, wanted)
        assert found.fallbacks == fallbacks and rerun.recorded == 1
        if fallbacks:
            assert found.residuals[10][2] == 0 and found.sweeps[2] == 12
        if clamp:
            assert not torch.equal(found.tokens[:, 0], start[:, 0])


@pytest.mark.parametrize("stopping", ["sample", "batch"])
def test_nobody_stops_before_a_float32_sweep(monkeypatch, stopping):
    units(monkeypatch, True)
    block, strategy = tiny_model().blocks[0], BlockStrategy(1, 6, tolerance=1e9, bfloat16_sweeps=2)
    wanted, found = (
        scheduler.step(block, 0, noise(2), strategy=strategy)
        for scheduler in (GSJacobiScheduler(stopping=stopping), graphed(Rerun(), stopping=stopping))
    )
    agree(found, wanted)
    assert found.sweeps.tolist() == [3, 3]


def test_progress_and_interruption_go_by_sweeps():
    block, z, strategy = tiny_model(spread=0.3).blocks[1], uneven(), BlockStrategy(1, 9, tolerance=1e-3)
    for most in (0, 2, 99):
        seen = []
        for scheduler in (GSJacobiScheduler(), graphed(Rerun())):
            told = []
            watch = {"progress": told.append, "should_stop": lambda told=told, most=most: len(told) == most}
            seen.append((scheduler.step(block, 1, z, LABELS, strategy=strategy, **watch), told))
        agree(seen[1][0], seen[0][0])
        assert seen[0][1] == seen[1][1] and seen[0][0].interrupted == (most < 99)


@BOTH
def test_recorded_loop_is_the_loop(guidance):
    """Also for the next batch of a kind, after another kind, and after sweeps on the same memory."""
    model, rerun = tiny_model(), Rerun()
    plain, recorded = GSJacobiScheduler(), graphed(rerun)
    for seed, count, made in ((1, 4, 1), (2, 4, 1), (3, 2, 2), (1, 4, 3)):
        z, labels = noise(count, seed), LABELS[:count]
        wanted = plain.step(model.blocks[1], 1, z, labels, guidance)
        agree(recorded.step(model.blocks[1], 1, z, labels, guidance), wanted)
        assert rerun.recorded == made
    strategy = BlockStrategy(1, 8)
    agree(
        recorded.step(model.blocks[1], 1, z, labels, guidance, strategy),
        plain.step(model.blocks[1], 1, z, labels, guidance, strategy),
    )
    agree(recorded.step(model.blocks[1], 1, z, labels, guidance), wanted)
    assert rerun.recorded == 4


def test_other_kinds_drop_what_was_recorded():
    model, graphs = tiny_model(), FlowGraphs(Rerun(), "cpu")
    systems = [FlowSystem(block, noise(2), LABELS[:2], FlowGuidance()) for block in model.blocks]
    first = [graphs.block(system) for system in systems]
    assert [graphs.block(system) for system in systems] == first and len(set(map(id, first))) == 3
    other = FlowSystem(model.blocks[0], noise(3), LABELS[:3], FlowGuidance())
    assert graphs.block(other) is not first[0] and list(graphs._held) == [id(model.blocks[0])]


@torch.no_grad()
def test_kind_tells_batches_guidance_and_weights_apart():
    block = tiny_model().blocks[1]
    plain = FlowSystem(block, noise(3), LABELS[:3], FlowGuidance())
    assert kind_of(plain) == kind_of(FlowSystem(block, noise(3, 9), LABELS[1:], FlowGuidance()))
    assert kind_of(plain) != kind_of(FlowSystem(block, noise(3), LABELS[:3], GUIDANCE))
    assert kind_of(plain) != kind_of(FlowSystem(block, noise(2), LABELS[:2], FlowGuidance()))
    assert kind_of(plain) != kind_of(FlowSystem(tiny_model().blocks[1], noise(3), LABELS[:3], FlowGuidance()))


@torch.no_grad()
def test_a_held_block_has_its_own_memory_and_recording_changes_nothing_in_it():
    block = tiny_model().blocks[1]
    system = FlowSystem(block, noise(2), LABELS[:2], FlowGuidance())
    expected = solve_sequential(system, BlockTrace(system.latents), Watch())
    with torch.inference_mode():
        held = HeldBlock(system, lambda function: function() or (lambda: None))
    system.latents.zero_()
    held.state.begin(torch.ones_like(expected), 0.5)
    held.run(("sequential",), _substitute)
    assert torch.equal(held.state.found, torch.ones_like(expected)) and float(held.state.tolerance) == 0.5
    _substitute(held.system, held.state)
    assert torch.equal(held.state.found, expected)


def test_on_a_cpu_nothing_changes():
    model = tiny_model()
    scheduler = GSJacobiScheduler([0, 1, 2], [1, 3, 3], tolerance=1e-3)
    expected = solve(model, noise(3), LABELS[:3], scheduler).tokens
    scheduler.set_cuda_graphs(True)
    assert torch.equal(solve(model, noise(3), LABELS[:3], scheduler).tokens, expected)
    assert not scheduler._graphs._held


def test_option_of_the_pipeline():
    """Recordings outlive a call, and go with a call without them."""
    pipe = tiny_pipe()
    wanted = run(pipe)
    assert np.array_equal(run(pipe, cuda_graphs=True), wanted) and pipe.scheduler._graphs.device_type == "cuda"
    rerun = Rerun()
    pipe.scheduler._graphs = FlowGraphs(rerun, "cpu")
    for _ in range(2):
        np.testing.assert_allclose(run(pipe, cuda_graphs=True), wanted, atol=1e-5)
    assert rerun.recorded == 2 and rerun.replays == 2 * (1 + 3)  # three modules in the last block: not recorded
    with torch.inference_mode():
        np.testing.assert_allclose(run(pipe, cuda_graphs=True), wanted, atol=1e-5)
    run(pipe)
    assert pipe.scheduler._graphs is None


@pytest.mark.parametrize("hook", ["accelerate", "groups", "casting"])
def test_a_flow_with_hooks_is_refused(hook):
    pipe = tiny_pipe()
    if hook == "accelerate":
        cpu_offload(pipe.transformer, torch.device("cpu"))
    elif hook == "groups":
        apply_group_offloading(pipe.transformer, torch.device("cpu"), offload_type="leaf_level")
    else:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pipe.transformer.blocks[2].proj_in.register_forward_pre_hook(lambda m, a: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match="without its hooks: not with offloading") as caught:
        pipe([0], cuda_graphs=True)
    assert "\n" not in str(caught.value)


def network() -> TarFlowModel:
    """Wide enough for a GPU's attention kernels."""
    return tiny_model(spread=0.1, sample_size=8, in_channels=3, hidden_size=32, num_layers=2, head_dim=16)


def batch(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 16, 12, generator=generator)
    tokens[0] *= 0.01
    return tokens.cuda(), torch.randint(3, (count,), generator=generator).cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("guidance", [FlowGuidance(), GUIDANCE])
def test_graph_is_the_loop(guidance):
    """Passed on an H200 when the loop had a recorder of its own; never run with the present one."""
    model = network().cuda()
    plain, recorded = GSJacobiScheduler(), GSJacobiScheduler()
    recorded.set_cuda_graphs(True)
    for seed, count in ((1, 3), (2, 3), (3, 2)):
        noise, labels = batch(seed, count)
        for block in (1, 0):
            expected = plain.step(model.blocks[block], block, noise, labels, guidance)
            found = recorded.step(model.blocks[block], block, noise, labels, guidance)
            torch.testing.assert_close(found.tokens, expected.tokens, atol=1e-5, rtol=0)
            assert found.calls == expected.calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("guidance", [FlowGuidance(), GUIDANCE])
@pytest.mark.parametrize("bfloat16", [0, 1])
@pytest.mark.parametrize("clamp", [None, 2.0])
def test_graphs_are_the_sweeps(guidance, bfloat16, clamp):
    """Never run so far. Loops and sweeps of all blocks in turn, so that all graphs use the shared memory."""
    model = network().cuda()
    lists = {"modules": [0, 1, 1], "sweeps": [1, 12, 12], "bfloat16_sweeps": [0, bfloat16, bfloat16]}
    schedulers = [GSJacobiScheduler(**lists, tolerance=1e-3, clamp=clamp) for _ in range(2)]
    schedulers[1].set_cuda_graphs(True)
    for seed, count in ((1, 4), (2, 4), (3, 2), (4, 4)):
        expected, found = (solve(model, *batch(seed, count), scheduler, guidance) for scheduler in schedulers)
        for one, other in zip(found.blocks, expected.blocks, strict=True):
            agree(one, other, atol=1e-4)

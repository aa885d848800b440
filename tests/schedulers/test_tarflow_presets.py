"""Published strategies: the work that their lists imply, how they run, lookup."""

import pytest
import torch

from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler, solve
from dit_suite.schedulers.tarflow_presets import PUBLISHED, published
from tests.models.test_tarflow import tiny_model


@pytest.mark.parametrize(
    ("name", "tokens", "calls", "work"),
    [
        ("imagenet128-cond", 1024, 326, 102),
        ("afhq256-cond", 1024, 326, 102),
        ("imagenet64-uncond", 1024, 632, 184),
        ("imagenet64-cond", 256, 395, 50),
    ],
)
def test_network_calls_and_token_work(name, tokens, calls, work):
    """Most serial network calls, and tokens in units of one full pass, worked out by hand from the lists."""
    scheduler = published(name).scheduler()
    spans = [span for block in range(8) for span in scheduler.strategy_of(block, 8).calls(tokens)]
    assert len(spans) == calls
    assert sum(end - start for start, end, _ in spans) / tokens == pytest.approx(work, abs=1)


def test_lists_name_the_blocks_of_their_notation():
    """Lists run from block 7 down to block 0; the notation counts blocks forwards."""
    for row in PUBLISHED.values():
        named = {int(block) for block in row.notation.split("-")[0].split("/")}
        modules = row.scheduler().config.modules
        assert {block for block in range(8) if modules[7 - block] != 1} == named
        assert len(row.guesses) == len(row.sweeps) == 8
    assert published("imagenet64-uncond").guesses[::-1][:2] == ("zero", "zero")


def test_a_published_strategy_solves_a_small_flow_of_eight_blocks():
    """Nine tokens: every list has more sweeps than a module has tokens, so the result is exact where no clamp binds."""
    model = tiny_model(num_blocks=8, spread=0.05)
    noise = 0.3 * torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2])
    exact = solve(model, noise, labels, GSJacobiScheduler()).tokens
    found = solve(model, noise, labels, published("imagenet128-cond").scheduler()).tokens
    assert exact.abs().max() < 3
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)
    wild = solve(model, 20 * noise, labels, published("imagenet128-cond").scheduler()).tokens
    assert wild[:, 1:-1].abs().max() <= 3


def test_lookup():
    assert published("afhq256-cond").arguments() == {
        "guidance_scale": 4.4,
        "denoise_strength": 1.4,
        "attention_temperature": 1.0,
    }
    with pytest.raises(ValueError, match="there is no published strategy 'afhq'; there are"):
        published("afhq")

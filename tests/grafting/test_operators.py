"""The operators: published sizes, reach, limits, and the scan against its recurrence."""

from pathlib import Path

import pytest
import torch

from dit_suite.caching.recorder import FlopMeter
from dit_suite.golden import read_fixture
from dit_suite.golden.grafting import check
from dit_suite.grafting.operators import MlpHyenaX, MultiHeadAttention, SlidingWindowAttention, decayed_scan
from dit_suite.grafting.plan import ATTENTION_KINDS, MLP_KINDS, OperatorSpec, build_operator, count_parameters

FIXTURES = sorted((Path(__file__).resolve().parent.parent / "golden").glob("grafting_*.safetensors"))
TOKENS, DIM, HEADS = 16, 16, 2


def small(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_operator(OperatorSpec(kind=kind, d_state=8, head_dim=8), DIM, TOKENS, HEADS)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_fixture(path: Path) -> None:
    assert [result for result in check(*read_fixture(path)) if not result.passed] == []


@pytest.mark.parametrize("kind", [*ATTENTION_KINDS, *MLP_KINDS])
def test_every_operator(kind: str) -> None:
    operator, x = small(kind), torch.randn(3, TOKENS, DIM)
    y = operator(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    torch.testing.assert_close(operator(x[1:2]), y[1:2], atol=1e-5, rtol=1e-4)
    y.square().sum().backward()
    idle = [name for name, p in operator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == ([] if kind != "mha" else idle) and not [name for name in idle if "bias" not in name]
    with pytest.raises(ValueError, match="takes no attention mask"):
        operator(x, attention_mask=torch.ones(3, TOKENS))


SIZES = {"mha": 5313024, "swa": 5313024, "hyena_se": 5336064, "hyena_x": 5330304, "hyena_y": 5318784, "mamba2": 8290864}


@pytest.mark.parametrize("kind", SIZES)
def test_published_parameter_counts(kind: str) -> None:
    with torch.device("meta"):
        assert count_parameters(build_operator(OperatorSpec(kind=kind), 1152, 256, 16)) == SIZES[kind]


@pytest.mark.parametrize(("ratio", "count"), [(3.0, 7967232), (4.0, 10622592), (6.0, 15933312)])
def test_published_mlp_sizes(ratio: float, count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(build_operator(OperatorSpec(kind="mlp", ratio=ratio), 1152, 256, 16)) == count
        hyena = build_operator(OperatorSpec(kind="mlp_hyena_x"), 1152, 256, 16)
    assert count_parameters(hyena) == 10626176


@pytest.mark.parametrize(
    ("kind", "reach"),
    [("hyena_x", range(4)), ("hyena_y", range(4)), ("hyena_se", range(7)), ("mlp_hyena_x", range(1)), ("mlp", range(1)),
     ("swa", range(-4, 5)), ("mamba2", range(9)), ("gla", range(9))],
)  # fmt: skip
def test_reach(kind: str, reach: range) -> None:
    operator, x = small(kind), torch.randn(1, TOKENS, DIM)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        moved = x.clone()
        moved[:, 7] += 1.0
        changed = (operator(moved) - operator(x)).abs().amax((0, 2)) > 1e-7
    assert changed.nonzero().flatten().tolist() == [7 + d for d in reach if 7 + d < TOKENS]


@pytest.mark.parametrize("kind", ["hyena_x_2d", "swa_2d"])
def test_two_dimensional_reach(kind: str) -> None:
    operator = build_operator(OperatorSpec(kind=kind, window=1), DIM, 25, HEADS)
    x = torch.randn(1, 25, DIM)
    moved = x.clone()
    moved[:, 12] += 1.0
    changed = (operator(moved) - operator(x)).abs().amax((0, 2)) > 1e-7
    assert changed.nonzero().flatten().tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    with pytest.raises(ValueError, match="square grid"):
        operator(x[:, :20])


def test_window_limits() -> None:
    torch.manual_seed(1)
    window, full = SlidingWindowAttention(DIM, HEADS, 0), MultiHeadAttention(DIM, HEADS)
    full.qkv.load_state_dict(window.Wqkv.state_dict())
    full.proj.load_state_dict(window.out_proj.state_dict())
    x = torch.randn(2, TOKENS, DIM)
    values = window.Wqkv(x)[..., 2 * DIM :]
    torch.testing.assert_close(window(x), window.out_proj(values), atol=1e-6, rtol=1e-5)
    for size in (TOKENS - 2, TOKENS - 1, TOKENS + 3):
        window.window = size
        close = torch.allclose(window(x), full(x), atol=1e-5)
        assert close == (size >= TOKENS - 1)


def test_fresh_hyenas() -> None:
    se, x_kind, y_kind = small("hyena_se"), small("hyena_x"), small("hyena_y")
    x_kind.load_state_dict({k: v for k, v in se.state_dict().items() if "inner" not in k})
    x = torch.randn(2, TOKENS, DIM)
    torch.testing.assert_close(se(x), x_kind(x))
    q, k, v = y_kind.in_proj(x).chunk(3, dim=-1)
    torch.testing.assert_close(y_kind(x), y_kind.out_proj(q * k * v), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        for name, parameter in se.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        torch.testing.assert_close(se(2 * x), 8 * se(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("width", [1, 5])
def test_scan_equals_the_recurrence(width: int) -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(2, 3, 11, 5), torch.randn(2, 3, 11, 5), torch.randn(2, 3, 11, 4)
    decay = -torch.rand(2, 3, 11, width) * 3
    state, rows = torch.zeros(2, 3, 5, 4), []
    for t in range(11):
        state = decay[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append((q[:, :, t, None] @ state)[:, :, 0])
    for chunk in (1, 4, 16):
        torch.testing.assert_close(decayed_scan(q, k, v, decay, chunk), torch.stack(rows, 2), atol=1e-5, rtol=1e-4)


def test_mlp_hyena_refuses_other_lengths() -> None:
    with pytest.raises(ValueError, match="made for 9 tokens and got 8"):
        MlpHyenaX(8, 9)(torch.zeros(1, 8, 8))


@pytest.mark.parametrize(
    ("kind", "growth"),
    [("hyena_se", 4), ("hyena_x", 4), ("hyena_y", 4), ("hyena_x_2d", 4), ("gla", 4), ("mamba2", 4), ("mlp", 4),
     ("mha", 16), ("pool_2d", 16)],
)  # fmt: skip
def test_cost_by_the_number_of_tokens(kind: str, growth: int) -> None:
    """Counted operations from 256 to 1,024 tokens: 4 times as many, or 16 where all tokens meet (to 25 %)."""
    counts = []
    for tokens in (256, 1024):
        operator = build_operator(OperatorSpec(kind=kind), 16, tokens, 2)
        with torch.no_grad(), FlopMeter() as meter:
            operator(torch.randn(1, tokens, 16))
        counts.append(meter.total)
    assert counts[1] / counts[0] == pytest.approx(growth, rel=0.25)

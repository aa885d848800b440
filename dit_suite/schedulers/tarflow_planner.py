"""Chooses how each block of a TarFlow is solved, by measurement on the flow's own samples.

Steps: solve a calibration batch sequentially; fit the linear first guesses by ridge regression on one part of it; on
the other part measure, for every block and candidate, the error against the exact block output and the time; measure
how much an error of each block grows on its way to the picture; take the fastest combination whose predicted error in
the worst picture is within the target, and check it end to end. A block whose sweeps lose stays sequential.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from dit_suite.models.tarflow import TarFlowBlock, TarFlowModel
from dit_suite.schedulers.gs_jacobi import (
    BlockStrategy,
    FlowGuidance,
    FlowSystem,
    GSJacobiScheduler,
    first_iterate,
    solve,
)
from dit_suite.schedulers.tarflow_metrics import flow_metrics

MAX_SWEEPS = 8
STAGGERED = ((8, 2), (8, 3))
TOLERANCES = (0.12, 0.08, 0.05, 0.03, 0.02, 0.01)
HOPELESS = 0.1
GAIN_ROWS = 4
GAIN_SWEEPS = 4
TIGHTEN = 0.85


@dataclass(frozen=True)
class Calibration:
    """Exact states of a batch: `states[0]` is the noise, `states[k]` the tokens after the k-th sampled block."""

    states: tuple[torch.Tensor, ...]
    class_labels: torch.Tensor | None

    def rows(self, rows: slice) -> "Calibration":
        labels = None if self.class_labels is None else self.class_labels[rows]
        return Calibration(tuple(state[rows] for state in self.states), labels)


@dataclass(frozen=True)
class Candidate:
    """One way to solve one block: `errors` is the rms error of every held-out sample, `seconds` the time of a batch."""

    strategy: BlockStrategy
    errors: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The chosen strategy of every block in sampling order and what was measured.

    Attributes:
        strategies: one per block, the last block first.
        seconds: predicted time of a batch; `sequential_seconds` is the baseline's.
        psnr: `(samples,)` dB against the sequential pictures, end to end, on samples that fitted nothing.
        fixed: rows "the same sweeps for every block", measured the same way.
    """

    strategies: tuple[BlockStrategy, ...]
    seconds: float
    sequential_seconds: float
    psnr: torch.Tensor
    igm: list[list[float]]
    crm_share: list[float]
    gains: list[float]
    fixed: list[dict]

    def scheduler(self, record: dict) -> GSJacobiScheduler:
        """The strategy file: lists in sampling order, and the measurements under `planned`."""
        rows = [asdict(strategy) for strategy in self.strategies]
        measured = {
            "seconds": round(self.seconds, 4),
            "sequential_seconds": round(self.sequential_seconds, 4),
            "psnr_min": round(float(self.psnr.min()), 2),
            "psnr_mean": round(float(self.psnr.mean()), 2),
            "igm": self.igm,
            "crm_share": self.crm_share,
            "gains": self.gains,
            "fixed": self.fixed,
        }
        return GSJacobiScheduler(
            modules=[row["modules"] for row in rows],
            sweeps=[row["sweeps"] for row in rows],
            guesses=[row["guess"] for row in rows],
            staggered=[row["staggered"] for row in rows],
            tolerances=[row["tolerance"] for row in rows],
            planned={**record, **measured},
        )


def psnr(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of every picture in dB; `(batch, ...)` in [-1, 1], compared after clipping."""
    error = (found.clamp(-1, 1) - exact.clamp(-1, 1)).flatten(1).square().mean(dim=1) / 4.0
    return -10.0 * torch.log10(error.clamp(min=1e-12))


def calibrate(
    model: TarFlowModel, noise: torch.Tensor, class_labels: torch.Tensor | None, guidance: FlowGuidance
) -> Calibration:
    """Solves `noise` (batch, tokens, token_dim) sequentially and keeps every state."""
    solution = solve(model, noise, class_labels, GSJacobiScheduler(), guidance)
    first = noise.float() * model.var.float().sqrt()
    return Calibration((first, *(trace.tokens for trace in solution.blocks)), class_labels)


def fit_guesses(model: TarFlowModel, calibration: Calibration, kernel: int = 3, ridge: float = 10.0) -> TarFlowModel:
    """The same flow with a linear first guess per block: ridge regression of x on the `kernel` x `kernel` tokens of z.

    Args:
        kernel: odd side of the neighbourhood in tokens.
        ridge: weight of the squared coefficients (the data have unit scale).

    Returns:
        A new model in eval mode; the flow's weights are shared.
    """
    side = math.isqrt(model.num_tokens)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    fitted = TarFlowModel(**{**config, "guess_kernel": kernel}).to(model.device)
    missing, unexpected = fitted.load_state_dict(model.state_dict(), strict=False, assign=True)
    if unexpected or any(".guess." not in name for name in missing):
        raise ValueError("the model was already planned with another guess_kernel")
    for index, block in enumerate(reversed(fitted.blocks)):
        latents, data = calibration.states[index], calibration.states[index + 1]
        grid = latents.transpose(1, 2).unflatten(2, (side, side))
        near = F.unfold(grid, kernel, padding=kernel // 2).transpose(1, 2).flatten(0, 1).double()
        near = F.pad(near, (0, 1), value=1.0)
        penalty = ridge * torch.eye(near.shape[1], dtype=near.dtype, device=near.device)
        weights = torch.linalg.solve(near.T @ near + penalty, near.T @ data.flatten(0, 1).double()).float()
        block.guess.weight.data = weights[:-1].T.reshape(block.guess.weight.shape).contiguous()
        block.guess.bias.data = weights[-1].contiguous()
    return fitted.eval()


def _rms(error: torch.Tensor) -> torch.Tensor:
    return error.square().mean(dim=(1, 2)).sqrt()


def _best_time(call: Callable[[], object], repeats: int) -> float:
    """Smallest of `repeats` timings, in seconds: the least disturbed by other work on the machine."""
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class Planner:
    """Measures candidates on one calibration.

    Args:
        model: with fitted guesses.
        held_out: samples that fitted nothing.
        guidance: that of the calibration.
        batch_size: batch for which times are measured.
        repeats: timings per candidate; the smallest counts.
        say: receives one line per finding.
    """

    model: TarFlowModel
    held_out: Calibration
    guidance: FlowGuidance
    batch_size: int = 8
    repeats: int = 2
    say: Callable[[str], None] = lambda line: None

    def _block(self, index: int) -> TarFlowBlock:
        return self.model.blocks[len(self.model.blocks) - 1 - index]

    def _solve(self, index: int, data: Calibration, strategy: BlockStrategy) -> torch.Tensor:
        """The tokens after sampling block `index` from its exact input."""
        scheduler = GSJacobiScheduler()
        block, state = self._block(index), data.states[index]
        return scheduler.step(block, 0, state, data.class_labels, self.guidance, strategy).tokens

    def _seconds(self, index: int, strategy: BlockStrategy) -> float:
        timed = self.held_out.rows(slice(0, self.batch_size))
        return _best_time(lambda: self._solve(index, timed, strategy), self.repeats)

    def _candidate(self, index: int, strategy: BlockStrategy) -> Candidate:
        error = _rms(self._solve(index, self.held_out, strategy) - self.held_out.states[index + 1])
        return Candidate(strategy, error, self._seconds(index, strategy))

    def _jacobi(self, index: int, guess: str, limit: float, worse_than: float) -> list[Candidate]:
        """Jacobi with 1, 2, ... sweeps, and with a tolerance per sample, as far as they are faster than `limit`.

        One run serves them all. It ends after the first sweep if that one leaves a mean error above `worse_than`.
        """
        block, data = self._block(index), self.held_out
        system = FlowSystem(block, data.states[index], data.class_labels, self.guidance)
        exact = block.order(data.states[index + 1])
        tokens, errors, changes, found = first_iterate(system, guess), [], [], []
        one = self._seconds(index, BlockStrategy(1, 1, guess))
        for sweeps in range(1, MAX_SWEEPS + 1):
            before, tokens = tokens, torch.cat([tokens[:, :1], system.update(tokens[:, :-1], 0, None)], dim=1)
            errors.append(_rms(tokens - exact))
            changes.append(_rms(tokens[:, 1:] - before[:, 1:]))
            if float(errors[0].mean()) > worse_than:
                return []
            if sweeps * one < limit:
                found.append(Candidate(BlockStrategy(1, sweeps, guess), errors[-1], sweeps * one))
        for tolerance in TOLERANCES:
            going = (torch.stack(changes[:-1]) > tolerance).int().cumprod(dim=0).sum(dim=0)
            error = torch.stack(errors).gather(0, going[None]).squeeze(0)
            seconds = one * float((going + 1.0).mean())
            strategy = BlockStrategy(1, MAX_SWEEPS, guess, tolerance=tolerance)
            found.append(Candidate(strategy, error, seconds))
        return found

    def candidates(self, index: int, guess: str) -> list[Candidate]:
        """Measured ways to solve sampling block `index` that beat the sequential loop, which comes first.

        Args:
            guess: the better of the paper's guesses (by IGM), tried beside the linear one.
        """
        baseline = self._candidate(index, BlockStrategy())
        guesses = ["linear", guess] if self.model.config.guess_kernel else [guess]
        found = [baseline]
        for name in guesses:
            first = [float(c.errors.mean()) for c in found if c.strategy.sweeps == 1 and c is not baseline]
            found += self._jacobi(index, name, baseline.seconds, worse_than=min(first, default=math.inf))
        two = [c for c in found if c.strategy.sweeps == 2 and c.strategy.guess == guesses[0]]
        if two and float(two[0].errors.mean()) < HOPELESS:
            staggered = [BlockStrategy(modules, sweeps, guesses[0], True) for modules, sweeps in STAGGERED]
            found += [self._candidate(index, strategy) for strategy in staggered]
        return [baseline, *(each for each in found[1:] if each.seconds < baseline.seconds)]

    def gains(self) -> list[float]:
        """How much an error of each sampled block grows until the picture (ratio of rms errors).

        The error is what two sweeps leave, not noise: it has the structure of the errors that matter. For a block that
        sweeps can't solve, a small random error stands in.
        """
        data, count = self.held_out.rows(slice(0, GAIN_ROWS)), len(self.model.blocks)
        exact, result = data.states[-1], []
        guess = "linear" if self.model.config.guess_kernel else "latent"
        for index in range(count):
            state, wanted = self._solve(index, data, BlockStrategy(1, 2, guess)), data.states[index + 1]
            if not float(_rms(state - wanted).mean()) < HOPELESS:
                noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(index))
                state = wanted + 0.01 * noise.to(state.device)
            start = _rms(state - wanted)
            for later in range(index + 1, count):
                moved = Calibration((*data.states[:later], state, *data.states[later + 1 :]), data.class_labels)
                state = self._solve(later, moved, BlockStrategy(1, GAIN_SWEEPS, guess))
            result.append(float((_rms(state - exact) / start.clamp(min=1e-12)).mean()))
        return result

    def check(self, strategies: tuple[BlockStrategy, ...]) -> torch.Tensor:
        """PSNR of every held-out picture against the sequential one, all blocks solved by `strategies`."""
        data = self.held_out
        known = 1 if strategies[0].modules == 0 else 0
        tokens = data.states[known]
        for index, strategy in enumerate(strategies[known:], known):
            state = Calibration((tokens,) * len(data.states), data.class_labels)
            tokens = self._solve(index, state, strategy)
        return psnr(self.model.unpatchify(tokens), self.model.unpatchify(data.states[-1]))

    def fixed_strategies(self, table: list[list[Candidate]], target_psnr: float) -> list[dict]:
        """The one-size-fits-all settings: the first sampled block sequential, the others M sweeps from z."""
        one = [self._seconds(index, BlockStrategy(1, 1)) for index in range(1, len(table))]
        rows = []
        for sweeps in range(1, MAX_SWEEPS + 1):
            values = self.check((BlockStrategy(), *[BlockStrategy(1, sweeps)] * (len(table) - 1)))
            seconds = table[0][0].seconds + sweeps * sum(one)
            row = {"sweeps": sweeps, "seconds": round(seconds, 4), "psnr_min": round(float(values.min()), 2)}
            self.say(f"fixed: {row}")
            rows.append(row)
            if row["psnr_min"] >= target_psnr:
                break
        return rows

    def plan(self, target_psnr: float = 38.0, max_seconds: float | None = None) -> Plan:
        """The fastest combination within the target, or the most exact one within `max_seconds` per batch.

        Raises:
            ValueError: nothing is fast enough for `max_seconds`.
        """
        count = len(self.model.blocks)
        metrics = flow_metrics(self.model, self.model.unpatchify(self.held_out.states[-1]))
        guesses = metrics.guesses()
        gains = self.gains()
        table = []
        for index in range(count):
            table.append(self.candidates(index, guesses[index]))
            for each in table[-1]:
                self.say(
                    f"block {count - 1 - index} gain {gains[index]:.2f} {each.strategy} rms mean "
                    f"{float(each.errors.mean()):.4f} max {float(each.errors.max()):.4f} {1000 * each.seconds:.0f} ms"
                )
        tolerance = 2.0 * 10.0 ** (-target_psnr / 20.0)
        for _ in range(8):
            chosen = choose(table, gains, tolerance, max_seconds)
            values = self.check(tuple(each.strategy for each in chosen))
            self.say(f"tolerance {tolerance:.4f}: worst {float(values.min()):.2f} dB")
            if max_seconds is not None or float(values.min()) >= target_psnr:
                break
            missing = target_psnr - float(values.min())
            tolerance *= min(TIGHTEN, 10.0 ** (-missing / 20.0))
        return Plan(
            strategies=tuple(each.strategy for each in chosen),
            seconds=sum(each.seconds for each in chosen),
            sequential_seconds=sum(row[0].seconds for row in table),
            psnr=values,
            igm=[[round(v, 4) for v in row] for row in metrics.igm.tolist()],
            crm_share=[round(v, 2) for v in metrics.crm_share.tolist()],
            gains=[round(v, 3) for v in gains],
            fixed=self.fixed_strategies(table, target_psnr),
        )


def _pareto(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates that no other one beats in both time and worst error."""
    kept: list[Candidate] = []
    for each in sorted(candidates, key=lambda c: (c.seconds, float(c.errors.max()))):
        if not kept or float(each.errors.max()) < float(kept[-1].errors.max()):
            kept.append(each)
    return kept


def choose(
    table: list[list[Candidate]], gains: list[float], tolerance: float, max_seconds: float | None = None
) -> list[Candidate]:
    """One candidate per block: the fastest whose worst picture is predicted within `tolerance` (rms in [-1, 1]).

    The errors of the blocks are taken as independent: the picture's squared error is the sum of (gain * error)^2. With
    `max_seconds` the smallest predicted error within that time is taken instead.
    """
    rows = [_pareto(row) for row in table]
    fastest = [min(each.seconds for each in row) for row in rows]
    best: list[Candidate] | None = None
    best_key = (math.inf, math.inf)

    def descend(chosen: list[Candidate], squares: torch.Tensor, seconds: float) -> None:
        """Depth first over the blocks; a branch ends when it can't fit or can't win."""
        nonlocal best, best_key
        error = float(squares.sum(dim=0).max().sqrt()) if len(chosen) else 0.0
        least = seconds + sum(fastest[len(chosen) :])
        if max_seconds is None:
            key, fits = (least, error), error <= tolerance
        else:
            key, fits = (error, least), least <= max_seconds
        if not fits or key >= best_key:
            return
        if len(chosen) == len(rows):
            best, best_key = list(chosen), key
            return
        gain = gains[len(chosen)]
        for each in rows[len(chosen)]:
            grown = torch.cat([squares, (gain * each.errors)[None] ** 2])
            descend([*chosen, each], grown, seconds + each.seconds)

    descend([], table[0][0].errors.new_zeros(0, len(table[0][0].errors)), 0.0)
    if best is None:
        if max_seconds is not None:
            raise ValueError(f"no combination takes at most {max_seconds} s for a batch")
        return [row[0] for row in table]
    return best

"""Chooses how each block of a TarFlow is solved, by measurement on the flow's own samples.

Steps: solve calibration samples sequentially; fit the linear first guesses by ridge regression on one part of them; on
a second part measure, for every block and candidate, the error against the exact block output and the time, and how
much an error of each block grows on its way to the picture; take the fastest combination whose predicted error in the
worst picture is within the target, check it end to end, and tighten or loosen until it is the fastest that holds.
"Holds" is judged by `floor`, which leaves room for pictures that are worse than any seen. A block whose sweeps lose
stays sequential. The third part, unseen so far, tells what the plan is worth: it, the sequential sampler and the best
fixed strategies are timed on it in turn, and the plan is taken only if it is the fastest of them.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from dit_suite.models.tarflow import TarFlowBlock, TarFlowModel
from dit_suite.schedulers.flow_system import FlowSystem, estimated_error, first_iterate, why_not_bfloat16
from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler, solve
from dit_suite.schedulers.tarflow_metrics import FlowMetrics, flow_metrics
from dit_suite.schedulers.tarflow_strategy import BlockStrategy, FlowGuidance

MAX_SWEEPS = 8
TOLERANCES = (0.05, 0.03, 0.02, 0.014, 0.01, 0.007, 0.005, 0.0035, 0.0025)
MODULES = (4, 8, 16)
BFLOAT16_SWEEPS = (1, 2, 3)
TOUGH = 2.0
HOPELESS = 0.1
GAIN_ROWS = 8
GAIN_SWEEPS = 4
ROUNDS = 8
TIGHTEN = 0.85
LOOSEN = 1.25
DEVIATIONS = 2.5
TIMED_BATCHES = 4
FEW = 16


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
    """One way to solve one block: `errors` is the rms error of every sample, `seconds` the time of a batch.

    With bfloat16 sweeps the errors are the larger ones of this run and of the same strategy all in float32.
    """

    strategy: BlockStrategy
    errors: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The chosen strategy of every block in sampling order and what was measured.

    Attributes:
        strategies: one per block, the last block first.
        seconds, sequential_seconds: median time of a batch.
        psnr: `(samples,)` dB against the sequential pictures, end to end, on samples that chose nothing.
        chosen_by: worst PSNR, and `floor`, on the samples that it was chosen by.
        metrics: IGM, CRM share and error gain per block.
        fixed: rows "the same sweeps for every block"; the last one is the fastest of those that were timed like the
            plan (one per kind of guess, and one whose sweeps but the last are in bfloat16 where that is faster).
    """

    strategies: tuple[BlockStrategy, ...]
    seconds: float
    sequential_seconds: float
    psnr: torch.Tensor
    chosen_by: dict
    metrics: dict
    fixed: list[dict]

    def scheduler(self, record: dict) -> GSJacobiScheduler:
        """The strategy file: lists in sampling order, and the measurements under `planned`."""
        rows = [asdict(strategy) for strategy in self.strategies]
        reduced = [row["bfloat16_sweeps"] for row in rows]
        measured = {
            "seconds": round(self.seconds, 4),
            "sequential_seconds": round(self.sequential_seconds, 4),
            "unseen": {"samples": len(self.psnr), **_worst(self.psnr)},
            "chosen_by": self.chosen_by,
            "fixed": self.fixed,
            **self.metrics,
        }
        return GSJacobiScheduler(
            modules=[row["modules"] for row in rows],
            sweeps=[row["sweeps"] for row in rows],
            guesses=[row["guess"] for row in rows],
            tolerances=[row["tolerance"] for row in rows],
            bfloat16_sweeps=reduced if any(reduced) else None,
            planned={**record, **measured},
        )


def floor(values: torch.Tensor) -> float:
    """What to expect of the worst of many pictures: the worst PSNR seen, or 2.5 deviations below the mean if lower.

    If the values in dB were normal, one picture in 160 would be worse than the latter.
    """
    spread = float(values.std()) if len(values) > 1 else 0.0
    return min(float(values.min()), float(values.mean()) - DEVIATIONS * spread)


def _worst(values: torch.Tensor) -> dict[str, float]:
    return {"psnr_min": round(float(values.min()), 2), "psnr_mean": round(float(values.mean()), 2)}


def psnr(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of every picture in dB; `(batch, ...)` in [-1, 1], compared after clipping."""
    error = (found.clamp(-1, 1) - exact.clamp(-1, 1)).flatten(1).square().mean(dim=1) / 4.0
    return -10.0 * torch.log10(error.clamp(min=1e-12))


def calibrate(
    model: TarFlowModel, noise: torch.Tensor, class_labels: torch.Tensor | None, guidance: FlowGuidance
) -> Calibration:
    """Solves `noise` (batch, tokens, token_dim) sequentially and keeps every state."""
    solution = solve(model, noise, class_labels, GSJacobiScheduler(), guidance)
    first = model.scale_noise(noise)
    return Calibration((first, *(trace.tokens for trace in solution.blocks)), class_labels)


def _with_kernel(model: TarFlowModel, kernel: int) -> TarFlowModel:
    """A new model of the same options but `guess_kernel`, on the same device, with weights of its own."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return TarFlowModel(**{**config, "guess_kernel": kernel}).to(model.device)


def without_guesses(model: TarFlowModel) -> TarFlowModel:
    """The same flow without linear first guesses; a new model in eval mode that shares the weights."""
    bare = _with_kernel(model, 0)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if ".guess." not in k}, assign=True)
    return bare.eval()


def fit_guesses(model: TarFlowModel, calibration: Calibration, kernel: int = 3, ridge: float = 10.0) -> TarFlowModel:
    """The same flow with a linear first guess per block: ridge regression of x on the `kernel` x `kernel` tokens of z.

    Args:
        kernel: odd side of the neighbourhood in tokens.
        ridge: weight of the squared coefficients (the data have unit scale).

    Returns:
        A new model in eval mode; the flow's weights are shared.
    """
    side = math.isqrt(model.num_tokens)
    fitted = _with_kernel(model, kernel)
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


def tough_blocks(metrics: FlowMetrics) -> set[int]:
    """Sampling indices of the blocks for which modules may pay: twice the mean share of the summed CRM, or the most."""
    share = metrics.crm_share.flip(0)
    return {int(share.argmax()), *(share > TOUGH * 100.0 / len(share)).nonzero().flatten().tolist()}


def _rms(error: torch.Tensor) -> torch.Tensor:
    return error.square().mean(dim=(1, 2)).sqrt()


def _timed(call: Callable[[], object]) -> float:
    """Seconds of one call: CPU time on one thread, which other work hardly disturbs; otherwise wall time."""
    if not torch.cuda.is_available() and torch.get_num_threads() == 1:
        start = time.process_time()
        call()
        return time.process_time() - start
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Planner:
    """Measures candidates on one calibration.

    Args:
        model: with fitted guesses.
        held_out: samples that fitted nothing; the strategies are chosen by them.
        unseen: samples for the final check and the timing.
        guidance: that of the calibration.
        batch_size: batch for which times are measured.
        repeats: timings per candidate; the smallest counts.
        say: receives one line per finding.
    """

    model: TarFlowModel
    held_out: Calibration
    unseen: Calibration
    guidance: FlowGuidance
    batch_size: int = 8
    repeats: int = 3
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
        return min(_timed(partial(self._solve, index, timed, strategy)) for _ in range(self.repeats))

    def _candidate(self, index: int, strategy: BlockStrategy) -> Candidate:
        error = _rms(self._solve(index, self.held_out, strategy) - self.held_out.states[index + 1])
        return Candidate(strategy, error, self._seconds(index, strategy))

    @property
    def _reduces(self) -> bool:
        """Whether bfloat16 sweeps are worth a try on this device."""
        return not why_not_bfloat16(self.held_out.states[0].device, self._block(0).proj_in.weight.dtype)

    def _jacobi(
        self, index: int, guess: str, limit: float, worse_than: float = math.inf, bfloat16: int = 0
    ) -> list[Candidate]:
        """Jacobi with 1, 2, ... sweeps, and with a tolerance per sample, as far as they are faster than `limit`.

        One run serves them all. It ends after the first sweep if that one leaves a mean error above `worse_than`. With
        its first `bfloat16` sweeps in bfloat16 it is for tolerances only: elsewhere a fixed number would be too many.
        """
        block, data = self._block(index), self.held_out
        system = FlowSystem(block, data.states[index], data.class_labels, self.guidance)
        exact = block.order(data.states[index + 1])
        tokens, errors, estimates, found, change = first_iterate(system, guess), [], [], [], None
        one, saved = self._seconds(index, BlockStrategy(1, 1, guess)), 0.0
        if bfloat16:
            saved = bfloat16 * (2 * one - self._seconds(index, BlockStrategy(1, 2, guess, bfloat16_sweeps=1)))
        for sweeps in range(1, MAX_SWEEPS + 1):
            new = system.update(tokens[:, :-1], 0, None, bfloat16=sweeps <= bfloat16)
            before, tokens = tokens, torch.cat([tokens[:, :1], new], dim=1)
            errors.append(_rms(tokens - exact))
            last, change = change, _rms(tokens[:, 1:] - before[:, 1:])
            estimates.append(estimated_error(change, last))
            if float(errors[0].mean()) > worse_than:
                return []
            if not bfloat16 and sweeps * one < limit:
                found.append(Candidate(BlockStrategy(1, sweeps, guess), errors[-1], sweeps * one))
            if sweeps > bfloat16 > 0 and float(estimates[-1].max()) <= TOLERANCES[-1]:
                break
        for tolerance in TOLERANCES:
            unfinished = torch.stack(estimates[:-1]) > tolerance
            unfinished[:bfloat16] = True
            going = unfinished.int().cumprod(dim=0).sum(dim=0)
            error = torch.stack(errors).gather(0, going[None]).squeeze(0)
            seconds = one * float((going + 1.0).mean()) - saved
            strategy = BlockStrategy(1, MAX_SWEEPS, guess, tolerance, bfloat16)
            found.append(Candidate(strategy, error, seconds))
        return found

    def _gauss_seidel(self, index: int, guess: str, modules: int, limit: float) -> list[Candidate]:
        """That many modules with tolerances from the loosest on, as long as they are faster than `limit`."""
        length, found = -(-self.model.num_tokens // modules), []
        for tolerance in TOLERANCES:
            strategy = BlockStrategy(modules, length, guess, tolerance)
            if self._seconds(index, strategy) >= limit:
                break
            found.append(self._candidate(index, strategy))
        return found

    def candidates(self, index: int, guess: str, modules: tuple[int, ...] = ()) -> list[Candidate]:
        """Measured ways to solve sampling block `index` that beat the sequential loop, which comes first.

        Args:
            guess: the better of the paper's guesses (by IGM), tried beside the linear one.
            modules: numbers of modules to try with Gauss-Seidel, from the first of these guesses, all in float32; not
                where one sweep over the whole sequence gets within the loosest tolerance.
        """
        baseline = self._candidate(index, BlockStrategy())
        guesses = ["linear", guess] if self.model.config.guess_kernel else [guess]
        found, once = [baseline], math.inf
        for name in guesses:
            plain = self._jacobi(index, name, baseline.seconds, worse_than=once)
            found += plain
            once = min([once, *(float(each.errors.mean()) for each in plain if each.strategy.sweeps == 1)])
            for sweeps in BFLOAT16_SWEEPS if plain and self._reduces else ():
                reduced = self._jacobi(index, name, baseline.seconds, bfloat16=sweeps)
                for each, same in zip(reduced, plain[-len(reduced) :], strict=True):
                    found.append(replace(each, errors=torch.maximum(each.errors, same.errors)))
        for count in modules:
            if count < self.model.num_tokens and once > TOLERANCES[0]:
                found += self._gauss_seidel(index, guesses[0], count, baseline.seconds)
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

    def _invert(self, strategies: tuple[BlockStrategy, ...], data: Calibration, first: int = 0) -> torch.Tensor:
        """The tokens of the pictures: sampling blocks `first` .. solved one after the other."""
        tokens = data.states[first]
        for index, strategy in enumerate(strategies[first:], first):
            tokens = self._solve(index, Calibration((tokens,) * len(data.states), data.class_labels), strategy)
        return tokens

    def check(self, strategies: tuple[BlockStrategy, ...], data: Calibration | None = None) -> torch.Tensor:
        """PSNR of every picture against the sequential one, end to end; of the held-out ones without `data`.

        With bfloat16 sweeps the worse of two: where the device makes nothing of them, samples may stop earlier.
        """
        data = data or self.held_out
        values, plain = self._psnr(strategies, data), tuple(each.in_float32() for each in strategies)
        return values if plain == strategies else torch.minimum(values, self._psnr(plain, data))

    def _psnr(self, strategies: tuple[BlockStrategy, ...], data: Calibration) -> torch.Tensor:
        tokens = self._invert(strategies, data, 1 if strategies[0] == BlockStrategy() else 0)
        return psnr(self.model.unpatchify(tokens), self.model.unpatchify(data.states[-1]))

    def fixed_strategies(
        self, name: str, guesses: list[str], target_psnr: float, bfloat16: bool = False, sequential_first: bool = True
    ) -> list[tuple[tuple[BlockStrategy, ...], dict]]:
        """M sweeps for every block from its guess, for M = 1, 2, ..., or for all but the first sampled one.

        The last row is the first that reaches the target. Those that miss it on a few pictures are measured on these.
        With `bfloat16` all sweeps but a block's last one run in bfloat16.
        """
        rows = []
        for sweeps in range(1, MAX_SWEEPS + 1):
            reduced = sweeps - 1 if bfloat16 else 0
            strategies = tuple(BlockStrategy(1, sweeps, guess, bfloat16_sweeps=reduced) for guess in guesses)
            if sequential_first:
                strategies = (BlockStrategy(), *strategies[1:])
            values = self.check(strategies, self.held_out.rows(slice(0, FEW)))
            if float(values.min()) >= target_psnr:
                values = self.check(strategies)
            rows.append((strategies, {"guess": name, "sweeps": sweeps, "samples": len(values), **_worst(values)}))
            self.say(f"fixed: {rows[-1][1]}")
            if floor(values) >= target_psnr:
                break
        return rows

    def rivals(
        self, guesses: list[str], target_psnr: float, sequential_first: bool
    ) -> list[list[tuple[tuple[BlockStrategy, ...], dict]]]:
        """`fixed_strategies` from the paper's guesses and from the linear one, and with bfloat16 where that pays.

        Without `sequential_first` also those that sweep the first sampled block too.
        """
        kinds = {"paper": guesses}
        if self.model.config.guess_kernel:
            kinds["linear"] = ["linear"] * len(guesses)
        best, rows = list(kinds)[-1], [self.fixed_strategies(*kind, target_psnr) for kind in kinds.items()]
        for first in (True,) if sequential_first else (True, False):
            name = best if first else f"{best}, every block"
            if not first:
                rows.append(self.fixed_strategies(name, kinds[best], target_psnr, sequential_first=False))
            if self._reduces:
                rows.append(self.fixed_strategies(f"{name}, bfloat16", kinds[best], target_psnr, True, first))
        return rows

    def race(self, rivals: list[tuple[BlockStrategy, ...]]) -> list[float]:
        """Median seconds per batch of every rival, end to end, in turn on the same batches of the unseen samples."""
        times: list[list[float]] = [[] for _ in rivals]
        starts = range(0, len(self.unseen.states[0]) - self.batch_size + 1, self.batch_size)
        for start in list(starts)[:TIMED_BATCHES]:
            data = self.unseen.rows(slice(start, start + self.batch_size))
            for spent, strategies in zip(times, rivals, strict=True):
                spent.append(_timed(partial(self._invert, strategies, data)))
        return [statistics.median(values) for values in times]

    def measure(self, guesses: list[str], gains: list[float], tough: set[int]) -> list[list[Candidate]]:
        """The candidates of every block; `tough` are the sampling indices for which modules are tried."""
        table = []
        for index, gain in enumerate(gains):
            table.append(self.candidates(index, guesses[index], modules=MODULES if index in tough else ()))
            for each in table[-1]:
                self.say(
                    f"block {len(gains) - 1 - index} gain {gain:.2f} {each.strategy} rms mean "
                    f"{float(each.errors.mean()):.4f} max {float(each.errors.max()):.4f} {1000 * each.seconds:.0f} ms"
                )
        return table

    def search(
        self, table: list[list[Candidate]], gains: list[float], target_psnr: float, max_seconds: float | None
    ) -> tuple[tuple[BlockStrategy, ...], torch.Tensor]:
        """The fastest combination whose `floor` reaches the target, and its PSNRs; sequential if none does.

        With `max_seconds` the combination with the smallest predicted error within that time.
        """
        best = tuple(row[0].strategy for row in table)
        values, best_seconds, seen = self.check(best), math.inf, set()
        tolerance = 2.0 * 10.0 ** (-target_psnr / 20.0)
        for _ in range(1 if max_seconds is not None else ROUNDS):
            chosen = choose(table, gains, tolerance, max_seconds)
            strategies, seconds = tuple(each.strategy for each in chosen), sum(each.seconds for each in chosen)
            if strategies in seen:
                break
            seen.add(strategies)
            found = self.check(strategies)
            self.say(f"tolerance {tolerance:.4f}: worst {float(found.min()):.2f} dB, floor {floor(found):.2f} dB")
            holds = floor(found) >= target_psnr
            if (holds and seconds < best_seconds) or max_seconds is not None:
                best, values, best_seconds = strategies, found, seconds
            room = 10.0 ** ((floor(found) - target_psnr) / 20.0)
            tolerance *= min(room, LOOSEN) if holds else min(room, TIGHTEN)
        return best, values

    @torch.no_grad()
    def plan(self, target_psnr: float = 36.0, max_seconds: float | None = None) -> Plan:
        """The fastest combination within the target, or the most exact one within `max_seconds` per batch.

        Raises:
            ValueError: nothing is fast enough for `max_seconds`.
        """
        metrics = flow_metrics(self.model, self.model.unpatchify(self.held_out.states[-1]))
        guesses, gains = metrics.guesses(), self.gains()
        table = self.measure(guesses, gains, tough_blocks(metrics))
        strategies, values = self.search(table, gains, target_psnr, max_seconds)
        fixed = self.rivals(guesses, target_psnr, sequential_first=strategies[0].modules == 0)
        plain = (BlockStrategy(),) * len(gains)
        sequential, seconds, *others = self.race([plain, strategies, *(rows[-1][0] for rows in fixed)])
        for spent, rows in zip(others, fixed, strict=True):
            rows[-1][1]["seconds"] = round(spent, 4)
        fixed.sort(key=lambda rows: -rows[-1][1]["seconds"])
        rows = [row for kind in fixed for _, row in kind]
        self.say(f"seconds: sequential {sequential:.3f}, planned {seconds:.3f}, best fixed {min(others):.3f}")
        rivals = [(sequential, plain)]
        if max_seconds is None:
            rivals += [(kind[-1][1]["seconds"], kind[-1][0]) for kind in fixed]
        for spent, rival in sorted(rivals, key=lambda each: each[0]):
            if spent >= seconds:
                break
            found = self.check(rival)
            if rival == plain or floor(found) >= target_psnr:
                strategies, seconds, values = rival, spent, found
                break
        return Plan(
            strategies=strategies,
            seconds=seconds,
            sequential_seconds=sequential,
            psnr=self.check(strategies, self.unseen),
            chosen_by={"samples": len(values), **_worst(values), "floor": round(floor(values), 2)},
            metrics={
                "igm": [[round(v, 4) for v in row] for row in metrics.igm.tolist()],
                "crm_share": [round(v, 2) for v in metrics.crm_share.tolist()],
                "gains": [round(v, 3) for v in gains],
            },
            fixed=rows,
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

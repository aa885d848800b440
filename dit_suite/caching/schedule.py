"""When to recompute: BAC's Adaptive Caching Scheduler, its bubbling union, and a forecast-aware variant of ours.

Source: "Block-wise Adaptive Caching for Accelerating Diffusion Policy" (arXiv 2506.13456). A schedule of one unit (a
sub-block, a block or the whole stack) is a sorted list of steps, step 0 first, at which the unit is computed; at every
other step its output comes from the cache. Everything here is a pure function of calibration matrices.
"""

from collections.abc import Callable, Sequence

import numpy as np

MAXIMISED = ("cosine",)


def _check_budget(budget: int, num_steps: int) -> None:
    if not 1 <= budget <= num_steps:
        raise ValueError(f"the budget must be between 1 and {num_steps} computed steps, got {budget}")


def adaptive_schedule(matrix: np.ndarray, budget: int, maximise: bool) -> tuple[list[int], float]:
    """The best `budget` update steps of one unit by exact dynamic programming (section "Adaptive Caching Scheduler").

    Every step t is scored by `matrix[c, t]`, c being the update step whose output it uses; the score of a schedule is
    the sum over all steps, self terms included.

    Args:
        matrix: (K, K) similarities (`maximise`) or distances between the outputs of step row and step column.
        budget: number M of computed steps, step 0 included.

    Returns:
        The update steps in ascending order and the score. Ties fall to the earlier boundary.

    Raises:
        ValueError: the budget is not between 1 and K.
    """
    num_steps = len(matrix)
    _check_budget(budget, num_steps)
    value = np.asarray(matrix, dtype=np.float64) * (1.0 if maximise else -1.0)
    prefix = np.concatenate([np.zeros((num_steps, 1)), np.cumsum(value, axis=1)], axis=1)
    # gain[a, i]: the segment that starts with an update at a and ends at step i
    gain = prefix[:, 1:] - np.take_along_axis(prefix, np.arange(num_steps)[:, None], axis=1)
    best = gain[0].copy()
    previous = np.zeros((budget, num_steps), dtype=np.int64)
    for segment in range(1, budget):
        following = np.full(num_steps, -np.inf)
        for end in range(segment, num_steps):
            totals = best[segment - 1 : end] + gain[segment : end + 1, end]
            choice = int(np.argmax(totals))
            following[end] = totals[choice]
            previous[segment, end] = segment - 1 + choice
        best = following
    steps, end = [], num_steps - 1
    for segment in range(budget - 1, 0, -1):
        end = int(previous[segment, end])
        steps.append(end + 1)
    return [0, *reversed(steps)], float(best[-1]) * (1.0 if maximise else -1.0)


def adjacent_schedule(matrix: np.ndarray, budget: int, maximise: bool) -> list[int]:
    """The optimum of the paper's prose form, which scores a step by its likeness to the step before it.

    That sum telescopes: it is best to update at step 0 and at the `budget - 1` steps least like their predecessor.
    """
    num_steps = len(matrix)
    _check_budget(budget, num_steps)
    likeness = np.array([matrix[k - 1, k] for k in range(1, num_steps)]) * (1.0 if maximise else -1.0)
    chosen = np.argsort(likeness, kind="stable")[: budget - 1] + 1
    return [0, *sorted(int(k) for k in chosen)]


def spread_schedule(num_steps: int, budget: int) -> list[int]:
    """`budget` steps spread evenly; the fixed interval wherever `budget` divides `num_steps`."""
    _check_budget(budget, num_steps)
    return [i * num_steps // budget for i in range(budget)]


def rank_blocks(errors: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` units with the largest drift, in descending order (stable)."""
    order = np.argsort(-np.asarray(errors, dtype=np.float64), kind="stable")
    return [int(i) for i in order[:count]]


def bubbling_union(
    steps: Sequence[Sequence[int]], kinds: Sequence[str], layers: Sequence[int], selected: Sequence[int]
) -> list[list[int]]:
    """The Bubbling Union Algorithm: units in `selected` are also refreshed whenever a downstream feed-forward is.

    Args:
        steps: update steps per unit.
        kinds: "sa", "ca", "ffn" or "block" per unit. Whole blocks contain a feed-forward and count as one.
        layers: depth of the block each unit belongs to. Every feed-forward of an attention's own block counts as
            downstream of it, in a depth-to-width pair the one beside it too.
        selected: indices of the units that grow; the result does not depend on their order.
    """
    grown = [list(s) for s in steps]
    for u in selected:
        union = set(steps[u])
        for v, kind in enumerate(kinds):
            if v == u or kind not in ("ffn", "block"):
                continue
            if layers[v] > layers[u] or (layers[v] == layers[u] and kinds[u] in ("sa", "ca")):
                union |= set(steps[v])
        grown[u] = sorted(union)
    return grown


def smallest_budget(quality: Callable[[int], float], most: int, target: float) -> int:
    """The smallest budget in 1..`most` whose `quality` reaches `target`, by bisection.

    Quality is taken to rise with the budget. Whatever it does, the returned budget reaches the target and the one below
    it, if any, was tried and does not.

    Raises:
        ValueError: even `most` does not reach the target.
    """
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if quality(middle) >= target:
            high = middle
        else:
            low = middle + 1
    if low == most and (best := quality(most)) < target:
        raise ValueError(f"no budget up to {most} computed steps reaches {target:g} (the largest gives {best:.2f})")
    return low


def mask_of(steps: Sequence[Sequence[int]], num_steps: int) -> np.ndarray:
    """(units, K) boolean mask, True where a unit is computed."""
    mask = np.zeros((len(steps), num_steps), dtype=bool)
    for row, chosen in zip(mask, steps, strict=True):
        row[list(chosen)] = True
    return mask


def forecast_weights(
    gram: np.ndarray, anchors: Sequence[int], step: int, predictor: str, positions: Sequence[float] | None = None
) -> list[float]:
    """Weights of the cached outputs of `anchors` (newest first) that stand in for the output of `step`.

    Args:
        gram: (K, K) inner products of the unit's outputs over the calibration run.
        predictor: "reuse" takes the newest output; "linear" extends the line through the two newest over `positions`
            (the step number where that is None); "fitted", an addition of this project, takes the least-squares
            weights, which the inner products determine.
    """
    if predictor == "reuse" or (predictor == "linear" and len(anchors) == 1):
        return [1.0] + [0.0] * (len(anchors) - 1)
    if predictor == "linear":
        at = np.arange(len(gram)) if positions is None else np.asarray(positions)
        ratio = float((at[step] - at[anchors[0]]) / (at[anchors[0]] - at[anchors[1]]))
        return [1.0 + ratio, -ratio] + [0.0] * (len(anchors) - 2)
    rows = list(anchors)
    system = np.asarray(gram, dtype=np.float64)[np.ix_(rows, rows)]
    ridge = 1e-9 * np.trace(system) + 1e-30
    return [float(w) for w in np.linalg.solve(system + ridge * np.eye(len(rows)), gram[rows, step])]


def forecast_error(gram: np.ndarray, anchors: Sequence[int], step: int, weights: Sequence[float]) -> float:
    """Squared distance between the output of `step` and the weighted cached outputs, from inner products alone."""
    rows, a = list(anchors), np.asarray(weights)
    return max(float(gram[step, step] - 2 * a @ gram[rows, step] + a @ gram[np.ix_(rows, rows)] @ a), 0.0)


def forecast_costs(gram: np.ndarray, predictor: str, positions: Sequence[float] | None = None) -> np.ndarray:
    """`cost[p, c, t]`: distance at step t when the two newest computed steps are c and, before it, p (p = K: none).

    `forecast_weights` and `forecast_error` for every p < c < t at once; entries with t <= c are zero.
    """
    num_steps = len(gram)
    gram = np.asarray(gram, dtype=np.float64)
    power = np.diag(gram)
    pp, cc, tt = power[:, None, None], power[None, :, None], power[None, None, :]
    pc, pt, ct = gram[:, :, None], gram[:, None, :], gram[None, :, :]
    if predictor == "fitted":
        ridge = 1e-9 * (pp + cc) + 1e-30
        scale = (cc + ridge) * (pp + ridge) - pc * pc
        scale = np.where(scale > 0, scale, np.inf)
        newest, before = ((pp + ridge) * ct - pc * pt) / scale, ((cc + ridge) * pt - pc * ct) / scale
        ridge = 1e-9 * cc[0] + 1e-30
        alone = ct[0] / (cc[0] + ridge)
    else:
        at = np.arange(num_steps) if positions is None else np.asarray(positions, dtype=np.float64)
        span = at[None, :, None] - at[:, None, None]
        ratio = (at[None, None, :] - at[None, :, None]) / np.where(span == 0, np.inf, span)
        ratio = ratio * (predictor == "linear")
        newest, before = 1.0 + ratio, -ratio
        alone = np.ones((num_steps, num_steps))
    pair = tt - 2 * (newest * ct + before * pt) + newest**2 * cc + 2 * newest * before * pc + before**2 * pp
    single = tt[0] - 2 * alone * ct[0] + alone**2 * cc[0]
    squared = np.maximum(np.concatenate([pair, single[None]]), 0.0)
    return np.sqrt(squared) * (np.arange(num_steps)[None, None, :] > np.arange(num_steps)[None, :, None])


def step_lengths(timesteps: Sequence[float]) -> np.ndarray:
    """How far a sampler goes with each evaluation, as a share of the longest way: the distance to the next timestep.

    Evaluations at the same timestep (second-order samplers) share the way to the next other one; the last goes to 0.
    """
    ways, following, end = [], 0.0, 0.0
    for here in reversed(timesteps):
        if ways and here != following:
            end = following
        ways.append(abs(here - end))
        following = here
    longest = max(ways)
    return np.array(ways[::-1]) / longest if longest > 0 else np.ones(len(ways))


def forecast_schedule(cost: np.ndarray, budget: int) -> tuple[list[int], float]:
    """The best update steps when skipped steps are forecast from the two newest computed ones (our extension).

    The dynamic programme of `adaptive_schedule` with pairs of update steps as its state: O(M K^3).

    Args:
        cost: (K + 1, K, K) as made by `forecast_costs`.
        budget: number of computed steps, step 0 included.

    Returns:
        The update steps in ascending order and the summed cost.
    """
    num_steps = cost.shape[1]
    _check_budget(budget, num_steps)
    prefix = np.concatenate([np.zeros((num_steps + 1, num_steps, 1)), np.cumsum(cost, axis=2)], axis=2)
    best = np.full((num_steps + 1, num_steps), np.inf)
    best[num_steps, 0] = 0.0
    choices = []
    for _ in range(budget - 1):
        following = np.full_like(best, np.inf)
        choice = np.full(best.shape, num_steps, dtype=np.int64)
        for newest in range(num_steps - 1):
            totals = best[:, newest, None] + prefix[:, newest, newest + 1 : num_steps]
            before = np.argmin(totals, axis=0)
            choice[newest, newest + 1 :] = before
            following[newest, newest + 1 :] = totals[before, np.arange(totals.shape[1])]
        best = following
        choices.append(choice)
    totals = best + prefix[:, :, num_steps]
    before, newest = (int(i) for i in np.unravel_index(np.argmin(totals), totals.shape))
    score = float(totals[before, newest])
    steps = [newest]
    for choice in reversed(choices):
        steps.append(before)
        before, newest = int(choice[before, newest]), before
    return list(reversed(steps)), score

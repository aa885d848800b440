"""The learning rate as a function of the step."""

import math

from dit_suite.training.config import OptimizerSection


def learning_rate(section: OptimizerSection, step: int, total: int) -> float:
    """Rate of step `step` (from 0) of `total`: linear warm-up, constant, decay over the last `decay_share`.

    With f the share of the decay that is done: linear is 1 - (1 - final) f, cosine is
    final + (1 - final) (1 + cos pi f) / 2.
    """
    warm = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    decaying = section.decay_share * total
    if section.decay == "none" or decaying <= 0:
        return section.lr * warm
    done = min(1.0, max(0.0, (step - (total - decaying)) / decaying))
    if section.decay == "linear":
        factor = 1.0 - (1.0 - section.final_lr) * done
    else:
        factor = section.final_lr + (1.0 - section.final_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
    return section.lr * warm * factor

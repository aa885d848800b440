"""The strategies that the GS-Jacobi authors publish for their checkpoints (arXiv 2505.12849, README of their code).

For the flows of the TarFlow paper: eight blocks, every list in sampling order. They were tuned by hand; a plan measured
with `scripts/plan_tarflow.py` on the machine at hand replaces them.
"""

import difflib
from dataclasses import dataclass
from types import MappingProxyType

from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler

REFERENCE_CLAMP = 3.0
REFERENCE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class PublishedStrategy:
    """One row of the table.

    Attributes:
        notation: the authors' [blocks in modules - modules - sweeps - sweeps of the others].
        modules, sweeps, guesses: see `GSJacobiScheduler`.
        weight: guidance weight w; the pipeline's `guidance_scale` is 1 + w (annealed, both parameters).
        denoise_strength, attention_temperature: arguments of the pipeline.
    """

    notation: str
    modules: tuple[int, ...]
    sweeps: tuple[int, ...]
    guesses: tuple[str, ...]
    weight: float
    denoise_strength: float
    attention_temperature: float = 1.0

    def scheduler(self) -> GSJacobiScheduler:
        """The strategy with the reference's clamp at 3 and its stopping rule, which pools the batch."""
        return GSJacobiScheduler(
            modules=list(self.modules),
            sweeps=list(self.sweeps),
            guesses=list(self.guesses),
            tolerance=REFERENCE_TOLERANCE,
            stopping="batch",
            clamp=REFERENCE_CLAMP,
        )

    def arguments(self) -> dict[str, float]:
        """The pipeline's arguments that go with it."""
        return {
            "guidance_scale": 1.0 + self.weight,
            "denoise_strength": self.denoise_strength,
            "attention_temperature": self.attention_temperature,
        }


def _guesses(flags: str) -> tuple[str, ...]:
    """The authors' 0 and 1, one per block."""
    return tuple("zero" if flag == "1" else "latent" for flag in flags)


PUBLISHED = MappingProxyType(
    {
        "imagenet128-cond": PublishedStrategy(
            notation="6-8-32-10",
            modules=(1, 8, 1, 1, 1, 1, 1, 1),
            sweeps=(10, 32, 10, 10, 10, 10, 10, 10),
            guesses=_guesses("01000010"),
            weight=1.5,
            denoise_strength=0.97,
        ),
        "afhq256-cond": PublishedStrategy(
            notation="7-8-32-10",
            modules=(8, 1, 1, 1, 1, 1, 1, 1),
            sweeps=(32, 10, 10, 10, 10, 10, 10, 10),
            guesses=_guesses("00000110"),
            weight=3.4,
            denoise_strength=1.4,
        ),
        "imagenet64-uncond": PublishedStrategy(
            notation="0/6-8-32-20",
            modules=(1, 8, 1, 1, 1, 1, 1, 8),
            sweeps=(20, 32, 20, 20, 20, 20, 20, 32),
            guesses=_guesses("01001011"),
            weight=0.2,
            denoise_strength=0.9,
            attention_temperature=0.3,
        ),
        "imagenet64-cond": PublishedStrategy(
            notation="0/7-256/8-1/13-6",
            modules=(8, 1, 1, 1, 1, 1, 1, 0),
            sweeps=(13, 6, 6, 6, 6, 6, 6, 1),
            guesses=_guesses("10000111"),
            weight=2.0,
            denoise_strength=1.0,
        ),
    }
)


def published(name: str) -> PublishedStrategy:
    """The published strategy called `name`.

    Raises:
        ValueError: there is none; the message lists close names, or all.
    """
    if name not in PUBLISHED:
        close = difflib.get_close_matches(name, PUBLISHED, n=2) or list(PUBLISHED)
        raise ValueError(f"there is no published strategy {name!r}; there are {', '.join(close)}")
    return PUBLISHED[name]

"""How a TarFlow block is solved and how a flow is guided: plain data for scheduler, planner and pipeline."""

import math
from dataclasses import dataclass, replace

GUESSES = ("latent", "zero", "linear")


@dataclass(frozen=True)
class FlowGuidance:
    """Guidance of a flow: extrapolates the raw log-scale and shift away from a weaker branch (TarFlow, section 3.4).

    Attributes:
        scale: weight w; 0 or less turns guidance off.
        parameters: "ab" both, "a" the log-scale only, "b" the shift only, "" none.
        temperature: attention temperature of the weaker branch (the class-free one).
        annealed: the weight grows linearly over the tokens of a block, from w / (T - 1) to w.
    """

    scale: float = 0.0
    parameters: str = "ab"
    temperature: float = 1.0
    annealed: bool = False

    def __post_init__(self) -> None:
        if not set(self.parameters) <= set("ab"):
            raise ValueError(f"guidance parameters must be made of the letters a and b, got {self.parameters!r}")
        if not self.temperature > 0:
            raise ValueError(f"the attention temperature must be above 0, got {self.temperature}")

    @property
    def active(self) -> bool:
        return self.scale > 0 and self.parameters != ""


@dataclass(frozen=True)
class BlockStrategy:
    """How one block is solved.

    Attributes:
        modules: 0 (or T) for the sequential loop, 1 for Jacobi on the whole sequence, G for G modules.
        sweeps: updates per module at most.
        guess: first iterate: "latent" (x = z), "zero" (x = z_0, 0, 0, ...), or "linear" (the block's fitted
            prediction of x from z, see `TarFlowBlock.initial_guess`).
        tolerance: estimated root mean square error at which a sample leaves a module; negative for a fixed number of
            sweeps.
        bfloat16_sweeps: the first sweeps of every module that run the network in bfloat16 where the device has units
            for it (an addition of ours to the paper). Fewer than `sweeps`: the last sweep is in float32.
    """

    modules: int = 0
    sweeps: int = 1
    guess: str = "latent"
    tolerance: float = -1.0
    bfloat16_sweeps: int = 0

    def __post_init__(self) -> None:
        if self.modules < 0 or self.sweeps < 1:
            raise ValueError(f"modules must be 0 or more and sweeps 1 or more, got {self.modules} and {self.sweeps}")
        if self.guess not in GUESSES:
            raise ValueError(f"guess must be one of {', '.join(GUESSES)}, got {self.guess!r}")
        if math.isnan(self.tolerance):
            raise ValueError("a block's tolerance must be a number, got nan")
        most = self.sweeps - 1 if self.modules else 0
        if not 0 <= self.bfloat16_sweeps <= most:
            raise ValueError(
                f"bfloat16_sweeps must be between 0 and {most} (none if sequential, and never the last sweep), "
                f"got {self.bfloat16_sweeps}"
            )

    def in_float32(self) -> "BlockStrategy":
        """How it runs on a device that gains nothing by bfloat16: samples may stop after a first sweep there."""
        return replace(self, bfloat16_sweeps=0)

    def is_sequential(self, tokens: int) -> bool:
        return self.modules == 0 or self.modules >= tokens

    def calls(self, tokens: int) -> list[tuple[int, int, int]]:
        """The network calls of a block without early stopping: (first input, end of inputs, module).

        Inputs `start .. end - 1` update the tokens `start + 1 .. end`. Modules cover every token; their lengths differ
        by at most one where `modules` does not divide the number of tokens.
        """
        last = tokens - 1
        if self.is_sequential(tokens):
            return [(position, position + 1, 0) for position in range(last)]
        edges = [module * tokens // self.modules for module in range(self.modules)] + [last]
        spans = [(edges[m], edges[m + 1], m) for m in range(self.modules) if edges[m] < edges[m + 1]]
        return [span for span in spans for _ in range(self.sweeps)]

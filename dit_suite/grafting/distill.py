"""Stage 1: every new operator learns, by itself, to give what the exchanged one gave for the same input.

The teacher runs as it does in use (a pipeline that samples, or a trainer's forward passes); inputs and outputs of the
exchanged modules are caught on the way and each operator takes one optimiser step per catch, so that nothing is stored.
A pair of blocks (depth to width) learns as a whole, to give what the two give one after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_suite.caching.block_probe import find_blocks
from dit_suite.files import write_atomically
from dit_suite.grafting.plan import GraftPlan
from dit_suite.grafting.surgery import branch_gate, operator_name, operator_places, pair_places
from dit_suite.options import Options, option


@dataclass(frozen=True)
class DistillConfig(Options):
    """Stage 1 of grafting (learning rates and losses of the paper)."""

    attention_loss: str = option("l1", "loss of attention operators", choices=("l1", "l2", "huber"))
    mlp_loss: str = option("l2", "loss of MLP operators", choices=("l1", "l2", "huber"))
    delta: float = option(0.1, "where the Huber loss turns linear", minimum=1e-6)
    attention_lr: float = option(5e-4, "learning rate of attention operators", minimum=0.0)
    mlp_lr: float = option(1e-3, "learning rate of MLP operators", minimum=0.0)
    mlp_weight_decay: float = option(1e-5, "weight decay of MLP operators", minimum=0.0)
    pair_loss: str = option("l2", "loss of pairs of blocks", choices=("l1", "l2", "huber"))
    pair_lr: float = option(1e-4, "learning rate of pairs of blocks (their weights are trained ones)", minimum=0.0)
    scaled_pred: bool = option(False, "weigh an operator's errors by the gate behind it", advanced=True)
    decay_share: float = option(0.4, "share of stage 1 in which the learning rate falls to 0", minimum=0.0, maximum=1.0)
    clip: float = option(10.0, "largest gradient norm of one operator; 0 turns clipping off", minimum=0.0)
    seed: int = option(0, "fresh operators of layer l start from seed + l", minimum=0)


def distillation_loss(prediction: torch.Tensor, target: torch.Tensor, kind: str, delta: float = 0.1) -> torch.Tensor:
    """Mean "l1", "l2" or "huber" loss; huber is half the square for errors below `delta`."""
    if kind == "l1":
        return nn.functional.l1_loss(prediction, target)
    if kind == "l2":
        return nn.functional.mse_loss(prediction, target)
    if kind == "huber":
        return nn.functional.huber_loss(prediction, target, delta=delta)
    raise ValueError(f"loss must be l1, l2 or huber, got {kind!r}")


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


@dataclass
class Student:
    """One operator (or pair of blocks) in training, with its optimiser and the running measure of its error."""

    name: str
    operator: nn.Module
    optimizer: torch.optim.Optimizer
    loss: str
    delta: float = 0.1
    clip: float = 10.0
    steps: int = 0
    error: float = 0.0
    power: float = 0.0
    last_loss: float = float("nan")
    residual: bool = False

    def step(
        self,
        x: torch.Tensor,
        target: torch.Tensor,
        *args: Any,
        gate: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[float, float]:
        """One optimiser step on (batch, tokens, width) inputs and targets.

        Args:
            x: what the exchanged module was given.
            target: what it returned.
            args, kwargs: the other arguments of its call (pairs of blocks).
            gate: (batch, 1, width) factor of prediction and target in the loss.

        Returns:
            Loss and gradient norm before the step.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        with torch.enable_grad():
            prediction = self.operator(x, *args, **kwargs)
            scale = 1.0 if gate is None else gate
            loss = distillation_loss(prediction * scale, target * scale, self.loss, self.delta)
            self.optimizer.zero_grad()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, self.clip or float("inf"))
        self.optimizer.step()
        squared = float((prediction.detach() - target).square().mean())
        keep = 0.98 if self.steps else 0.0
        self.error = keep * self.error + (1 - keep) * squared
        power = (target - x if self.residual else target).square().mean()
        self.power = keep * self.power + (1 - keep) * float(power)
        self.steps += 1
        self.last_loss = float(loss.detach())
        return self.last_loss, float(norm)

    @property
    def relative_error(self) -> float:
        """Running ||g - f|| / ||f||; for a pair of blocks f is what they add to the residual stream."""
        return (self.error / max(self.power, 1e-30)) ** 0.5


class Distiller:
    """Trains the operators of a grafted model on a teacher that is running.

    with Distiller(pipe.transformer, grafted, plan, DistillConfig()) as distiller:
        pipe(prompts, ...)
    print(distiller.report())

    Args:
        teacher: the original model; it is not changed and gets no gradient.
        grafted: what `graft` made of it; its exchanged operators are trained in place.
        plan: the plan it was made with.
    """

    def __init__(self, teacher: nn.Module, grafted: nn.Module, plan: GraftPlan, config: DistillConfig) -> None:
        self.config = config
        self._plan = plan.to_dict()
        blocks = [block.module for block in find_blocks(teacher)]
        self.students: dict[tuple[str, int], Student] = {}
        self._sources: dict[tuple[str, int], tuple[nn.Module, nn.Module]] = {}
        taken: set[nn.Parameter] = set()
        for key, place in operator_places(grafted, plan, len(blocks)).items():
            target, layer = key
            operator = grafted.get_submodule(place)
            mlp = target == "mlp"
            optimizer = torch.optim.AdamW(
                operator.parameters(),
                lr=config.mlp_lr if mlp else config.attention_lr,
                weight_decay=config.mlp_weight_decay if mlp else 0.0,
            )
            taken |= set(operator.parameters())
            loss = config.mlp_loss if mlp else config.attention_loss
            self.students[key] = Student(place, operator, optimizer, loss, config.delta, config.clip)
            self._sources[key] = (blocks[layer], getattr(blocks[layer], operator_name(blocks[layer], target)))
        for first, place in pair_places(grafted, plan, len(blocks)).items():
            pair, key = grafted.get_submodule(place), ("pair", first)
            own = [p for p in pair.parameters() if p not in taken]
            optimizer = torch.optim.AdamW(own, lr=config.pair_lr, weight_decay=0.0)
            self.students[key] = Student(
                place, pair, optimizer, config.pair_loss, config.delta, config.clip, residual=True
            )
            self._sources[key] = (blocks[first], blocks[first + 1])
        self._rates = {key: student.optimizer.param_groups[0]["lr"] for key, student in self.students.items()}
        self._calls: dict[tuple[str, int], tuple[tuple, dict[str, Any]]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "Distiller":
        for key, (block, source) in self._sources.items():
            if key[0] == "pair" or self.config.scaled_pred:
                self._handles.append(block.register_forward_pre_hook(self._note_call(key), with_kwargs=True))
            watch = self._watch_pair if key[0] == "pair" else self._watch_operator
            self._handles.append(source.register_forward_hook(watch(key), with_kwargs=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    def anneal(self, done: float) -> None:
        """Sets the learning rates for a share `done` of stage 1: constant, then falling linearly over `decay_share`."""
        share = self.config.decay_share
        factor = 1.0 if share == 0 else min(1.0, (1.0 - done) / share)
        for key, student in self.students.items():
            for group in student.optimizer.param_groups:
                group["lr"] = self._rates[key] * factor

    def _note_call(self, key: tuple[str, int]) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
            self._calls[key] = (
                tuple(_detached(value) for value in args),
                {name: _detached(value) for name, value in kwargs.items()},
            )

        return note

    def _watch_operator(self, key: tuple[str, int]) -> Any:
        student, block = self.students[key], self._sources[key][0]

        def learn(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: torch.Tensor) -> None:
            gate = None
            if self.config.scaled_pred:
                with torch.no_grad():
                    gate = branch_gate(block, key[0], *self._calls.pop(key))
            student.step((args[0] if args else kwargs["hidden_states"]).detach(), output.detach(), gate=gate)

        return learn

    def _watch_pair(self, key: tuple[str, int]) -> Any:
        def learn(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: torch.Tensor) -> None:
            positional, named = self._calls.pop(key)
            x = positional[0] if positional else named.pop("hidden_states")
            self.students[key].step(x, output.detach(), *positional[1:], **named)

        return learn

    def report(self) -> list[dict[str, Any]]:
        """Per operator or pair: name, steps taken, last loss, relative error ||g - f|| / ||f|| (running mean)."""
        return [
            {"operator": s.name, "steps": s.steps, "loss": s.last_loss, "relative_error": s.relative_error}
            for s in self.students.values()
        ]

    def _identity(self, about: Mapping[str, Any]) -> dict[str, Any]:
        return {"plan": self._plan, "settings": self.config.to_dict(), **about}

    def save(self, path: str | Path, progress: int, about: Mapping[str, Any] | None = None) -> None:
        """Writes everything that going on needs.

        Args:
            path: the file.
            progress: the caller's own count (batches done).
            about: what else must be the same for going on, by name (JSON-able values).
        """
        path = Path(path)
        state = {
            f"{target}.{layer}": {
                "operator": s.operator.state_dict(),
                "optimizer": s.optimizer.state_dict(),
                "numbers": [s.steps, s.error, s.power, s.last_loss],
            }
            for (target, layer), s in self.students.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        everything = {"progress": progress, "identity": self._identity(about or {}), "students": state}
        write_atomically(path, lambda part: torch.save(everything, part))

    def load(self, path: str | Path, about: Mapping[str, Any] | None = None) -> int:
        """Takes up a saved state and returns its `progress`.

        Raises:
            ValueError: it belongs to another plan, other settings, or something else in `about` differs.
        """
        saved = torch.load(path, map_location="cpu", weights_only=True)
        identity = saved.get("identity", {})
        for name, value in self._identity(about or {}).items():
            if identity.get(name) != value:
                raise ValueError(
                    f"{path} belongs to a distillation that differs in its {name}; delete it or choose another folder"
                )
        for (target, layer), student in self.students.items():
            entry = saved["students"][f"{target}.{layer}"]
            student.operator.load_state_dict(entry["operator"])
            student.optimizer.load_state_dict(entry["optimizer"])
            student.steps, student.error, student.power, student.last_loss = entry["numbers"]
        return int(saved["progress"])

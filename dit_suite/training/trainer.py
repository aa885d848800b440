"""The training loop: one for every network, objective and number of processes."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel

from dit_suite.data.draws import Draws, shuffled_indices
from dit_suite.data.readers import open_source
from dit_suite.files import write_text
from dit_suite.training.build import (
    attach_attention,
    build_network,
    make_accelerator,
    make_optimizer,
    make_pipeline,
    make_weighting,
    spread,
    unwrap,
)
from dit_suite.training.conditioning import make_conditioner
from dit_suite.training.config import TrainConfig, config_text
from dit_suite.training.export import export, preview, save_picture
from dit_suite.training.monitor import Monitor, flops_per_sample, peak_tflops
from dit_suite.training.objectives import ObjectiveResult, TrainingBatch, objective_class
from dit_suite.training.schedule import learning_rate
from dit_suite.training.state import Progress, load_state, network_tensors, save_state

_WARM_STEPS, _TIMED_STEPS = 5, 20


class Network:
    """Calls the (wrapped) network the way objectives expect: `network(samples, **arguments)` -> output.

    A tuple of one tensor is unpacked; longer tuples and lists are passed on.
    """

    def __init__(self, module: torch.nn.Module, constant: dict[str, Any]) -> None:
        self.module, self.constant = module, constant

    def __call__(self, samples: torch.Tensor, **arguments: Any) -> Any:
        output = self.module(samples, **arguments, **self.constant, return_dict=False)
        return output[0] if isinstance(output, tuple) and len(output) == 1 else output


class Trainer:
    """Trains what a config describes.

    Args:
        config: the run.
        report: called with one line of text now and then.

    Raises:
        FileNotFoundError, ValueError: the data set, a class or an option does not fit; raised before the first step.
    """

    def __init__(self, config: TrainConfig, report: Callable[[str], None] = lambda line: None) -> None:
        run = config.run
        self.objective = objective_class(config.objective.name).from_dict(dict(config.objective.options))
        self.accelerator = make_accelerator(run)
        self.report = report if self.accelerator.is_main_process else lambda line: None
        self.source = open_source(config.data)
        self.config = config = config.with_classes(self.source.num_classes)
        bare = build_network(config)
        if hasattr(self.objective, "check_network"):
            self.objective.check_network(bare)
        self.auxiliary = None
        if config.auxiliary is not None:
            self.auxiliary = objective_class(config.auxiliary.name).from_dict(dict(config.auxiliary.options))
            self.auxiliary.attach(bare)
        self.attention = attach_attention(config, bare)
        self.weighting = make_weighting(self.objective, config.run, self.accelerator)
        self.conditioner = make_conditioner(config, self.source, bare)
        make_pipeline(config, bare)
        device = self.accelerator.device
        self.source.to(device)
        self.conditioner.to(device)
        # a network that is to be sharded may be too large to be counted whole on one device
        self.flops = self._count_flops(bare.to(device)) if run.parallel == "ddp" else 0.0
        self.module = spread(bare, run, self.accelerator)
        self.network = Network(self.module, dict(config.model.call))
        self.bare = unwrap(self.module)
        self.optimizer = make_optimizer(self.bare, config.optimizer, device, self.weighting)
        self.ema = None
        if config.ema.decay > 0:
            self.ema = EMAModel(
                self.bare.parameters(), decay=config.ema.decay, use_ema_warmup=config.ema.warmup, foreach=True
            )
        self.progress = Progress(identity=config.identity())
        self.stop_requested = False

    def request_stop(self) -> None:
        """Asks the loop to save its state and return after this step (with several processes: after the next log)."""
        self.stop_requested = True

    def positions(self, micro: int) -> torch.Tensor:
        """Global sample positions of this process in micro-batch `micro`; int64."""
        share = self.config.run.batch_size // self.config.run.accumulation
        own = share // self.accelerator.num_processes
        first = micro * share + self.accelerator.process_index * own
        return torch.arange(first, first + own)

    def batch(self, step: int, positions: torch.Tensor) -> TrainingBatch:
        """The samples and conditions of some positions of the global batch of `step`."""
        seed, size = self.config.run.seed, self.config.run.batch_size
        rows = shuffled_indices(seed, step * size, size, len(self.source))[positions]
        draws = Draws(seed, step, positions.to(self.accelerator.device))
        fetched = self.source.fetch(rows, draws)
        return TrainingBatch(fetched["samples"], self.conditioner.arguments(fetched, draws), draws)

    def loss(self, network: Network, batch: TrainingBatch) -> tuple[torch.Tensor, ObjectiveResult, dict[str, Any]]:
        """Scalar loss, the objective's result and what to log."""
        with self.accelerator.autocast():
            result = self.objective.loss(network, batch)
            total = result.loss.mean() if self.weighting is None else self.weighting(result.loss, result.timestep)
            parts = {name: value.detach().mean() for name, value in result.parts.items()}
            if self.weighting is not None:
                parts["unweighted"] = result.loss.detach().mean()
                parts |= {f"weight_{index}": weight for index, weight in enumerate(self.weighting.weights())}
            if self.auxiliary is not None:
                extra = self.auxiliary.loss(batch, result).mean()
                parts["auxiliary"] = extra.detach()
                parts["objective"] = total.detach()
                total = total + self.config.auxiliary.weight * extra
        return total, result, parts

    def _count_flops(self, bare: torch.nn.Module) -> float:
        """Operations per sample of a forward and backward pass, as torch's counter sees them."""
        count = min(2, self.config.run.batch_size) if self.weighting is None else self.weighting.clusters
        batch = self.batch(0, torch.arange(count))
        network = Network(bare, dict(self.config.model.call))
        try:
            return flops_per_sample(lambda: self.loss(network, batch)[0], count)
        finally:
            bare.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def _without_sync(self, last: bool) -> Iterator[None]:
        """Gradients of all but the last micro-batch stay on their process."""
        if last or self.accelerator.num_processes == 1:
            yield
        elif hasattr(self.module, "set_requires_gradient_sync"):
            self.module.set_requires_gradient_sync(False)
            yield
            self.module.set_requires_gradient_sync(True)
        else:
            with self.module.no_sync():
                yield

    def _observed(self, result: ObjectiveResult) -> list[torch.Tensor]:
        """What the objective wants to know of a micro-batch, in a list; empty if it is nothing."""
        if not hasattr(self.objective, "observe"):
            return []
        value = self.objective.observe(self.bare, result)
        return [] if value is None else [value]

    def step(self, step: int, total: int) -> dict[str, torch.Tensor]:
        """One optimizer step; returns scalars of this process."""
        run = self.config.run
        rate = learning_rate(self.config.optimizer, step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("constant_lr", rate)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        observed: list[torch.Tensor] = []
        for micro in range(run.accumulation):
            torch.manual_seed((run.seed * 1_000_003 + step * 64 + micro) * 4096 + self.accelerator.process_index)
            with self._without_sync(micro == run.accumulation - 1):
                loss, result, parts = self.loss(self.network, self.batch(step, self.positions(micro)))
                (loss / run.accumulation).backward()
            observed += self._observed(result)
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + value.float() / run.accumulation
        limit = self.config.optimizer.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.bare.parameters(), limit)
        sums["gradient_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.weighting is not None:
            shared = self.weighting.log_variance.grad
            shared.copy_(self.accelerator.reduce(shared, reduction="mean"))
        self.optimizer.step()
        if observed:
            mean = self.accelerator.reduce(torch.stack(observed).mean(dim=0), reduction="mean")
            self.objective.after_step(self.bare, mean)
        if self.ema is not None:
            self.ema.step(self.bare.parameters())
        return sums

    def _reduced(self, collected: list[dict[str, torch.Tensor]]) -> list[dict[str, float]]:
        """Means over processes of the scalars of several steps."""
        if not collected:
            return []
        names = list(collected[0])
        table = torch.stack([torch.stack([each[name] for name in names]) for each in collected])
        table = self.accelerator.reduce(table, reduction="mean").tolist()
        return [dict(zip(names, row, strict=True)) for row in table]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the live network, in evaluation mode, for the length of a block."""
        training = self.bare.training
        parameters = list(self.bare.parameters())
        kept = [parameter.detach().clone() for parameter in parameters]
        if self.ema is not None:
            self.ema.copy_to(parameters)
        self.bare.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
            self.bare.train(training)

    def _agree(self, value: Any) -> Any:
        """The main process's value on every process."""
        return broadcast_object_list([value])[0] if self.accelerator.num_processes > 1 else value

    def _preview(self, step: int, monitor: Monitor) -> None:
        with self.averaged(), self.accelerator.autocast():
            grid = preview(self.config, self.bare, self.conditioner.preview(self.config.run.preview_count))
        if self.accelerator.is_main_process:
            save_picture(self.config.output / "previews" / f"step_{step:08d}.png", grid)
            monitor.picture(step, grid)

    def _save(self) -> None:
        folder = self.config.output / "state"
        save_state(folder, self.accelerator, self.bare, self.optimizer, self.ema, self.progress, self.weighting)

    def _log(self, monitor: Monitor, since: int) -> None:
        """One line: means of the pending steps, the present rate, throughput."""
        progress, config = self.progress, self.config
        if not progress.pending:
            return
        names = progress.pending[0]
        values = {name: sum(row[name] for row in progress.pending) / len(progress.pending) for name in names}
        values["learning_rate"] = learning_rate(config.optimizer, progress.step - 1, progress.total)
        speed = monitor.rate((progress.step - since) * config.run.batch_size)
        values["samples_per_second"] = speed
        if self.flops:
            values["tflops_per_device"] = speed * self.flops / 1e12 / self.accelerator.num_processes
            peak = peak_tflops(self.accelerator.device, config.run.peak_tflops)
            values |= {"mfu": values["tflops_per_device"] / peak} if peak else {}
        monitor.write(progress.step, values)
        self.report(f"step {progress.step}/{progress.total} loss {values['loss']:.4f} {speed:.1f} samples/s")
        progress.pending = []

    def run(self) -> Path | None:
        """Trains to the end or to the time limit.

        Returns:
            The exported checkpoint folder; None when a stop was requested (the state is saved, the run can go on).
        """
        config, run, progress = self.config, self.config.run, self.progress
        begin = time.monotonic()
        if self.accelerator.is_main_process:
            config.output.mkdir(parents=True, exist_ok=True)
            for stale in (config.output / "state").glob(".step_*"):  # what a killed run left
                shutil.rmtree(stale)
        self.accelerator.wait_for_everyone()
        self.progress = progress = load_state(
            config.output / "state", self.bare, self.optimizer, self.ema, progress.identity, self.weighting
        )
        if self.accelerator.is_main_process:
            write_text(config.output / "config.yaml", config_text(config))
        progress.total = progress.total or run.max_steps
        provisional = progress.total or 10**9
        monitor = Monitor(config.output, progress.step, self.accelerator.is_main_process)
        self.report(f"{config.name}: {self._describe()}, from step {progress.step}")
        collected: list[dict[str, torch.Tensor]] = []
        since, first, mark = progress.step, progress.step, (0, 0.0)
        stopped = False
        while progress.step < (progress.total or provisional) and not stopped:
            collected.append(self.step(progress.step, progress.total or provisional))
            progress.step += 1
            if progress.step == first + _WARM_STEPS:
                mark = (progress.step, time.monotonic())
            if not run.max_steps and self._may_derive_total(progress.step - first - _WARM_STEPS):
                progress.total, mark = self._derive_total(begin, mark)
            logging = progress.step % run.log_every == 0
            if logging or self.accelerator.num_processes == 1:
                out_of_time = run.max_minutes and time.monotonic() - begin > run.max_minutes * 60.0
                self.stop_requested = self._agree(self.stop_requested)
                stopped = self._agree(bool(out_of_time)) or self.stop_requested
            saving = progress.step % run.save_every == 0 or progress.step == progress.total or stopped
            if logging or saving:
                progress.collect(self._reduced(collected))
                collected = []
            if logging:
                self._log(monitor, since)
                since = progress.step
            if saving:
                self._save()
            if run.preview_every and progress.step % run.preview_every == 0:
                self._preview(progress.step, monitor)
            if run.export_every and progress.step % run.export_every == 0:
                self._export(config.output / "checkpoints" / f"step_{progress.step:08d}")
        return self._finish(monitor, since)

    def _may_derive_total(self, timed: int) -> bool:
        """First after some timed steps, then at every saved state until the decay begins: until then the learning rate
        does not depend on the total, so a machine that got slower or faster changes only what is to come."""
        decay_begins = (1.0 - self.config.optimizer.decay_share) * self.progress.total
        saving = self.progress.step % self.config.run.save_every == 0
        due = timed == _TIMED_STEPS or (timed > _TIMED_STEPS and saving)
        return due and (not self.progress.total or self.progress.step < decay_begins)

    def _derive_total(self, begin: float, mark: tuple[int, float]) -> tuple[int, tuple[int, float]]:
        """How many steps fit into the time limit at the speed since `mark` (step, time), and the new mark."""
        step, now = self.progress.step, time.monotonic()
        per_step = max(now - mark[1], 1e-9) / (step - mark[0])
        remaining = self.config.run.max_minutes * 60.0 - (now - begin)
        total = self._agree(step + max(1, int(0.97 * remaining / per_step)))
        self.report(f"{per_step:.3f} s a step: {total} steps fit into {self.config.run.max_minutes:g} minutes")
        return total, (step, now)

    def _describe(self) -> str:
        count = sum(parameter.numel() for parameter in self.bare.parameters())
        operations = f", {self.flops / 1e9:.2f} GFLOP a sample" if self.flops else ""
        return (
            f"{count / 1e6:.2f} M parameters, {len(self.source)} rows, batch {self.config.run.batch_size}, "
            f"{self.accelerator.num_processes} process(es) on {self.accelerator.device.type}{operations}"
        )

    def _finish(self, monitor: Monitor, since: int) -> Path | None:
        """What is left to do after the last step, whose state is saved."""
        if self._agree(self.stop_requested):
            monitor.close()
            return None
        if self.progress.step > since:
            self._log(monitor, since)
        target = self._export(self.config.output / "checkpoint", last_loss=self.progress.last_loss)
        monitor.close()
        return target

    def _export(self, target: Path, **about: Any) -> Path:
        """The averaged weights as a checkpoint folder."""
        tensors = network_tensors(self.bare, self.ema)
        if self.accelerator.is_main_process:
            about = {"steps": self.progress.step, "planned_steps": self.progress.total, **about}
            export(self.config, tensors, target, about, self.source.class_names)
            self.report(f"wrote {target}")
        self.accelerator.wait_for_everyone()
        return target


def train(config: TrainConfig, report: Callable[[str], None] = lambda line: None) -> Path | None:
    """Builds a `Trainer` and runs it; see `Trainer.run`."""
    return Trainer(config, report).run()

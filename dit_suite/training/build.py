"""From a config to objects: the network, its processes, the optimizer, the pipeline that saves it."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.models.embeddings import LabelEmbedding
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dit_suite.compact_weights import load_network
from dit_suite.registry import TECHNIQUES, acceleration, resolve_named, technique
from dit_suite.training.config import OptimizerSection, Part, RunSection, TrainConfig


def find_class(name: str) -> type:
    """A registry name, `module:Class`, or the name of a diffusers class.

    Raises:
        ValueError: nothing is called that.
    """
    for row in TECHNIQUES:
        if row.name == name:
            return row.model_class()
    if ":" in name:
        return resolve_named(name)
    found = getattr(diffusers, name, None)
    if not isinstance(found, type):
        names = ", ".join(row.name for row in TECHNIQUES)
        raise ValueError(f"{name!r} is no class of diffusers, no module:Class, and none of {names}")
    return found


def construct(part: Part) -> Any:
    """Calls the class with its options; one that it does not take, or can't be built with, is a `ValueError`."""
    cls = find_class(part.name)
    known = inspect.signature(cls.__init__).parameters
    for key in part.options:
        if key not in known:
            accepted = ", ".join(name for name in known if name != "self")
            raise ValueError(f"{part.name} has no option {key!r}; it accepts {accepted}")
    try:
        return cls(**part.options)
    except (ArithmeticError, AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"{part.name} can't be built with these options: {error}") from error


def build_network(config: TrainConfig) -> torch.nn.Module:
    """The network in training mode: new weights from the seed, or those of `init_from`.

    Raises:
        ValueError: unknown class or option, the weights do not fit, or `optimizer.only` names nothing.
        FileNotFoundError: `init_from` is not a folder.
    """
    torch.manual_seed(config.run.seed)
    network = construct(config.model)
    if config.init_from:
        folder = Path(config.init_from)
        folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
        if not folder.is_dir():
            raise FileNotFoundError(f"init_from: there is no folder {folder}")
        stored = load_network(type(network), folder)
        missing, unexpected = network.load_state_dict(stored.state_dict(), strict=False)
        if missing or unexpected:
            first = (missing or unexpected)[0]
            raise ValueError(f"the weights in {folder} do not fit {config.model.name}: {first}")
    for module in network.modules():
        # diffusers' DiT owns one label embedder per block and each would drop labels on its own
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    if config.run.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    freeze_others(network, config.optimizer.only)
    return network.train()


def freeze_others(network: torch.nn.Module, only: Sequence[str]) -> None:
    """Leaves gradients to the parameters whose names begin with one of `only`; nothing named: to all.

    Raises:
        ValueError: a beginning that no parameter has.
    """
    if not only:
        return
    for start in only:
        if not any(name.startswith(start) for name, _ in network.named_parameters()):
            raise ValueError(f"optimizer.only: no parameter's name begins with {start!r}")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(only)))


def attach_attention(config: TrainConfig, network: torch.nn.Module) -> Any:
    """Applies the attention plug-in that the config names; returns its handle or None."""
    if config.attention is None or config.attention.name == "none":
        return None
    row = acceleration(config.attention.name)
    return row.apply_to(network, row.config_class().from_dict(config.attention.options))


def make_accelerator(run: RunSection) -> Accelerator:
    """Processes, devices and autocast. Without an accelerator several processes talk over gloo.

    Raises:
        ValueError: the processes can't share the batch evenly, or were started but did not find each other.
    """
    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=run.find_unused_parameters, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    # accelerate joins processes on a machine without an accelerator only when it is told to use the CPU
    on_cpu = None if torch.accelerator.is_available() else True
    accelerator = Accelerator(mixed_precision=run.precision, kwargs_handlers=[ddp], cpu=on_cpu)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ValueError(f"{started} processes were started, but {accelerator.num_processes} found each other")
    share = run.batch_size // run.accumulation
    if share % accelerator.num_processes:
        raise ValueError(
            f"a micro-batch of {share} samples can't be shared by {accelerator.num_processes} processes: "
            "choose batch_size divisible by accumulation x processes"
        )
    return accelerator


def spread(network: torch.nn.Module, run: RunSection, accelerator: Accelerator) -> torch.nn.Module:
    """The network on its device, compiled when asked, wrapped for the processes.

    "fsdp" is FSDP2: `fully_shard` on every block that the network lists in `_no_split_modules`, then on the whole. It
    moves one block after the other, so that no device ever holds the whole network.
    """
    if run.parallel == "fsdp" and accelerator.num_processes > 1:
        policy = MixedPrecisionPolicy()
        if run.precision == "bf16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        mesh = torch.distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        blocks = tuple(getattr(network, "_no_split_modules", None) or ())
        for module in list(network.modules()):
            if type(module).__name__ in blocks:
                if run.compile:
                    module.compile()
                fully_shard(module, mesh=mesh, mp_policy=policy)
        return fully_shard(network, mesh=mesh, mp_policy=policy)
    network = network.to(accelerator.device)
    if run.compile:
        network.compile()
    if accelerator.num_processes == 1:
        return network
    return accelerator.prepare_model(network)


def unwrap(network: torch.nn.Module) -> torch.nn.Module:
    """The network itself, without DDP around it."""
    return network.module if isinstance(network, torch.nn.parallel.DistributedDataParallel) else network


def make_weighting(objective: Any, run: RunSection, accelerator: Accelerator) -> torch.nn.Module | None:
    """The learned weighting of an objective that has one.

    Raises:
        ValueError: a process's micro-batch does not hold every timestep cluster equally often.
    """
    weighting = objective.learned_weighting() if hasattr(objective, "learned_weighting") else None
    if weighting is None:
        return None
    share = run.batch_size // run.accumulation // accelerator.num_processes
    if share % weighting.clusters:
        raise ValueError(
            f"uncertainty weighting needs every micro-batch of a process, here {share} samples, to be a multiple of "
            f"its {weighting.clusters} timestep clusters"
        )
    return weighting.to(accelerator.device)


def make_optimizer(
    network: torch.nn.Module,
    section: OptimizerSection,
    device: torch.device,
    weighting: torch.nn.Module | None = None,
) -> torch.optim.AdamW:
    """AdamW; with `decay_matrices_only` one-dimensional tensors get no weight decay. A learned weighting is a group
    with a constant learning rate of its own."""
    trained = [p for p in network.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1 or not section.decay_matrices_only]
    others = [p for p in trained if not (p.ndim > 1 or not section.decay_matrices_only)]
    groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if weighting is not None:
        own = {"weight_decay": 0.0, "constant_lr": weighting.learning_rate}
        groups.append({"params": list(weighting.parameters()), **own})
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=device.type == "cuda",
    )


def make_pipeline(config: TrainConfig, network: torch.nn.Module, class_names: Mapping[int, str] | None = None) -> Any:
    """The registry's pipeline around the network.

    Args:
        config: its `pipeline` holds further constructor arguments.
        network: the transformer.
        class_names: kept as `id2label` by a pipeline that has such an argument.

    Raises:
        ValueError: the pipeline does not take one of the arguments.
    """
    cls = technique(config.technique).pipeline_class()
    names = {"id2label": {str(key): value for key, value in class_names.items()}} if class_names else {}
    given = {"transformer": network, "scheduler": construct(config.scheduler), **config.pipeline}
    if given.get("id2label") is None:
        given |= names
    known = inspect.signature(cls.__init__).parameters
    for key in config.pipeline:
        if key not in known:
            raise ValueError(f"pipeline: {cls.__name__} takes no {key!r}")
    return cls(**{key: value for key, value in given.items() if key in known})

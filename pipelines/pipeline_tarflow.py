"""Class to image with a TarFlow: noise is carried through the inverse of every block by the GS-Jacobi scheduler."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput

from dit_suite.models.tarflow import TarFlowModel
from dit_suite.pipelines.sampling_mixins import ClassLabelsMixin, SamplingMixin, initial_noise
from dit_suite.schedulers.gs_jacobi import BlockStrategy, BlockTrace, FlowGuidance, GSJacobiScheduler
from dit_suite.schedulers.tarflow_strategy import GUESSES
from dit_suite.step_plan import Run, StepContext, publish_step

STRATEGIES = ("planned", "sequential", "jacobi", "gauss-seidel")
DENOISE_ROWS = 16


@dataclass
class TarFlowPipelineOutput(BaseOutput):
    """Pictures and how each block was solved.

    Attributes:
        images: list of PIL images, array `(batch, height, width, channels)` in [0, 1], or tensor.
        blocks: one trace per block in sampling order (its tokens included), see `BlockTrace`.
    """

    images: Any
    blocks: list[BlockTrace]


def _has_hooks(model: torch.nn.Module) -> bool:
    """Whether accelerate or diffusers hooked a module: to move or cast its weights, or to change what it computes."""
    modules = [vars(module) for module in model.modules()]
    return any("_hf_hook" in own or getattr(own.get("_diffusers_hook"), "hooks", {}) for own in modules)


class TarFlowPipeline(ClassLabelsMixin, SamplingMixin, DiffusionPipeline):
    """Generates pictures of classes with a normalizing flow on pixels.

    Args:
        transformer: the flow.
        scheduler: its config is the strategy that the planner saved (`scripts/plan_tarflow.py`).
        id2label: class id to name.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents", "class_labels"]

    def __init__(
        self, transformer: TarFlowModel, scheduler: GSJacobiScheduler, id2label: dict[str, str] | None = None
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        names = None if id2label is None else {str(key): value for key, value in id2label.items()}
        self.register_to_config(id2label=names)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def num_classes(self) -> int:
        return self.transformer.config.num_classes

    @property
    def null_class(self) -> int:
        """Label that means "no class"."""
        return -1

    def check_inputs(
        self,
        total: int,
        num_images_per_prompt: int,
        denoise_strength: float,
        strategy: str,
        sweeps: int,
        modules: int,
        tolerance: float,
        guess: str,
        bfloat16_sweeps: int | None,
        cuda_graphs: bool,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_tensor_inputs: list[str],
    ) -> None:
        """Raises `ValueError` with one sentence for anything the call can't use."""
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        if not denoise_strength >= 0:
            raise ValueError(f"denoise_strength must be at least 0, got {denoise_strength}")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        if sweeps < 1 or modules < 1:
            raise ValueError(f"sweeps and modules must be at least 1, got {sweeps} and {modules}")
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        if guess not in GUESSES:
            raise ValueError(f"guess must be one of {', '.join(GUESSES)}, got {guess!r}")
        if bfloat16_sweeps is not None and bfloat16_sweeps < 0:
            raise ValueError(f"bfloat16_sweeps must be at least 0, or None for the plan's, got {bfloat16_sweeps}")
        if cuda_graphs and _has_hooks(self.transformer):
            raise ValueError("cuda_graphs run the flow without its hooks: not with offloading, casting or plug-ins")
        guesses = {each.guess for each in self.block_strategies(strategy, sweeps, modules, guess)}
        if "linear" in guesses and not self.transformer.config.guess_kernel:
            raise ValueError(
                'the strategy starts from the guess "linear", but the model has none (guess_kernel is 0): run '
                "scripts/plan_tarflow.py on it, or choose another strategy"
            )
        shape = self._latent_shape(total)
        self.check_sampling(shape, generator, latents, output_type, callback_tensor_inputs)

    def _latent_shape(self, total: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        return (total, config.in_channels, config.sample_size, config.sample_size)

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Float32 noise `(batch, channels, side, side)`; a list of generators draws row i from generator i."""
        if latents is None:
            latents = initial_noise(shape, device, generator)
        return latents.to(device=device, dtype=torch.float32)

    def block_strategies(
        self, strategy: str, sweeps: int, modules: int, guess: str = "latent", bfloat16_sweeps: int | None = None
    ) -> list[BlockStrategy]:
        """How each block is solved, in sampling order; arguments as for the call."""
        count = len(self.transformer.blocks)
        if strategy == "planned":
            rows = [self.scheduler.strategy_of(block, count) for block in reversed(range(count))]
        elif strategy == "sequential":
            rows = [BlockStrategy()] * count
        else:
            rows = [BlockStrategy(1 if strategy == "jacobi" else modules, sweeps, guess)] * count
        if bfloat16_sweeps is None:
            return rows
        most = [row.sweeps - 1 if row.modules else 0 for row in rows]
        return [replace(row, bfloat16_sweeps=min(bfloat16_sweeps, m)) for row, m in zip(rows, most, strict=True)]

    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Pictures from a state `(batch, channels, side, side)`: the final one, or a preview after any block."""
        return self.image_processor.postprocess(latents, output_type=output_type)

    def denoise(
        self, latents: torch.Tensor, class_labels: torch.Tensor | None, denoise_strength: float
    ) -> torch.Tensor:
        """Score step on the final state, a few rows at a time (it backpropagates through the whole flow)."""
        parts = []
        for start in range(0, len(latents), DENOISE_ROWS):
            rows = slice(start, start + DENOISE_ROWS)
            labels = None if class_labels is None else class_labels[rows]
            parts.append(self.transformer.denoise(latents[rows], labels, denoise_strength))
        return torch.cat(parts)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | None | list[int | str | None] = None,
        guidance_scale: float = 1.0,
        denoise_strength: float = 1.0,
        strategy: str = "planned",
        sweeps: int = 16,
        modules: int = 8,
        tolerance: float = 0.0,
        guess: str = "latent",
        bfloat16_sweeps: int | None = None,
        cuda_graphs: bool = False,
        guidance_parameters: str = "ab",
        attention_temperature: float = 1.0,
        annealed_guidance: bool = True,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        callback_on_network_call: Callable[["TarFlowPipeline", int, int], None] | None = None,
    ) -> TarFlowPipelineOutput | tuple:
        """Generates pictures. One step is one block; the progress bar counts network calls.

        Args:
            class_labels: class id or name, or one per picture; None is "no class".
            guidance_scale: 1 + the weight w of the TarFlow paper; 1 or less turns guidance off.
            denoise_strength: share of the training noise that the final score step removes; 0 skips the step.
            strategy: "planned" (the scheduler's), "sequential", "jacobi" (whole sequence) or "gauss-seidel".
            sweeps, modules, tolerance: for "jacobi" and "gauss-seidel", the same for every block; a sample leaves a
                module when its root mean square error, estimated from the last two sweeps, is within `tolerance`.
            guess: where "jacobi" and "gauss-seidel" start: "latent" (the noise), "zero", or "linear" (a fitted one).
            bfloat16_sweeps: how many of the first sweeps of a module run in bfloat16, never its last one; they stay in
                float32 where that is known to be faster (each trace's `note` says so). None: as many as planned, none
                for "jacobi" and "gauss-seidel".
            cuda_graphs: on a GPU, run sequential blocks and sweeps over the whole sequence as CUDA graphs, recorded at
                the first call of a kind (batch size, guidance) and kept until a call without (see
                `GSJacobiScheduler.set_cuda_graphs`). Elsewhere nothing changes.
            guidance_parameters: "ab", "a" (log-scale only) or "b" (shift only).
            attention_temperature: attention temperature of the weaker branch; what guides a model without classes.
            annealed_guidance: the guidance weight grows linearly over the tokens of a block.
            num_images_per_prompt: pictures per label.
            generator: one generator, or one per picture (row i is then a function of generator i alone).
            latents: noise `(batch, channels, side, side)` instead of drawing it.
            output_type: "pil", "np", "pt", or "latent" for the state after the last block, not denoised.
            return_dict: `TarFlowPipelineOutput`, or the tuple `(images,)`.
            callback_on_step_end: called as `callback(pipe, block_number, block_index, tensors)` after every block;
                `pipe.decode(tensors["latents"])` is a preview. Setting `pipe._interrupt` stops before the next call
                of the network.
            callback_on_step_end_tensor_inputs: names among `latents`, `class_labels`.
            callback_on_network_call: called as `callback(pipe, done, total)` within the blocks: after every sweep or
                token, with the calls of the network so far (those that early stopping saves count as done) of all.

        Raises:
            ValueError: an argument is out of range or does not fit the model.
            FlowOverflow: a block overflowed (guidance too strong); both a `ValueError` and a `FloatingPointError`.
        """
        callback_inputs = self.callback_tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        ids = [label for label in self.get_label_ids(class_labels) for _ in range(num_images_per_prompt)]
        total = len(ids)
        self.check_inputs(
            total, num_images_per_prompt, denoise_strength, strategy, sweeps, modules, tolerance, guess,
            bfloat16_sweeps, cuda_graphs, generator, latents, output_type, callback_inputs,
        )  # fmt: skip
        FlowGuidance(guidance_scale - 1.0, guidance_parameters, attention_temperature, annealed_guidance)
        self._guidance_scale = guidance_scale
        self._interrupt = False

        device, count = self._execution_device, len(self.transformer.blocks)
        class_labels = torch.tensor(ids, device=device) if self.num_classes else None
        self.scheduler.set_cuda_graphs(cuda_graphs)
        self.scheduler.set_timesteps(count, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        strategies = self.block_strategies(strategy, sweeps, modules, guess, bfloat16_sweeps)
        limit = None if strategy == "planned" else tolerance
        latents = self.prepare_latents(self._latent_shape(total), device, generator, latents)
        latents = self.transformer.unpatchify(self.transformer.scale_noise(self.transformer.patchify(latents)))
        calls = sum(len(each.calls(self.transformer.num_tokens)) for each in strategies)
        run, traces, done = Run(), [], 0
        denoising = output_type != "latent" and denoise_strength > 0
        num_steps = count + int(denoising)

        with self.progress_bar(total=calls) as progress_bar:

            def count_calls(made: int) -> None:
                nonlocal done
                done += made
                progress_bar.update(made)
                if callback_on_network_call is not None:
                    callback_on_network_call(self, done, calls)

            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                guidance = FlowGuidance(
                    self._guidance_scale - 1.0, guidance_parameters, attention_temperature, annealed_guidance
                )
                block = int(timestep)
                with publish_step(StepContext(index, num_steps, float(block), run=run)):
                    trace = self.scheduler.step(
                        self.transformer.blocks[block],
                        block,
                        self.transformer.patchify(latents),
                        class_labels,
                        guidance,
                        strategies[index],
                        limit,
                        progress=count_calls,
                        should_stop=lambda: self.interrupt,
                    )
                traces.append(trace)
                latents = self.transformer.unpatchify(trace.prev_sample)
                latents, class_labels = self.after_step(
                    callback_on_step_end, index, timestep, callback_inputs, latents=latents, class_labels=class_labels
                )

        if denoising and not self.interrupt:
            with publish_step(StepContext(count, num_steps, 0.0, run=run)):
                latents = self.denoise(latents, class_labels, denoise_strength)
        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return TarFlowPipelineOutput(images=images, blocks=traces) if return_dict else (images,)

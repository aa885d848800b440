"""Class to image with LEGO bricks: EDM-Heun sampling that leaves bricks out where they are not needed."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from dit_suite.models.lego import LegoTransformer2DModel
from dit_suite.pipelines.sampling_mixins import (
    ClassLabelsMixin,
    LatentImagesMixin,
    LoraMixin,
    SamplingMixin,
    check_positive,
    initial_noise,
)
from dit_suite.schedulers.edm_heun import EDMHeunScheduler
from dit_suite.schedulers.guidance import guide_branches
from dit_suite.step_plan import PlannedStep, StepPlan, plan_steps, publish_step

DIRECTIONS = ("auto", "early", "late")
CANVASES = ("auto", "grid", "overlap", "drift")
DEFAULT_GUIDANCE = 1.5


def skipped_steps(num_inference_steps: int, t_break: float, direction: str) -> range:
    """Steps in which the last brick does not run: the first or the last `round(N * t_break)` of N."""
    count = round(num_inference_steps * t_break)
    return range(count) if direction == "early" else range(num_inference_steps - count, num_inference_steps)


def window_starts(length: int, window: int, offset: int = 0) -> list[int]:
    """Where overlapping windows of half stride start along an axis. With an offset below half a window the inner ones
    move by it, and a first and a last one keep the ends covered."""
    last = length - window
    return sorted({0, *range(offset, last + 1, window // 2), last})


def window_offset(step_index: int, window: int) -> int:
    """How far the windows of a step have drifted: every step another amount, spread over half a window. It is no
    multiple of a brick or a token, so that their borders move over the picture too."""
    half = window // 2
    return step_index * (round(0.38 * half) | 1) % half


def window_weights(window: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A hat `(window, window)`: largest in the middle, small but positive at the border, so that overlapping
    predictions fade into each other."""
    middle = (torch.arange(window, device=device, dtype=dtype) + 0.5) / window
    ramp = 0.5 - (middle - 0.5).abs()
    return ramp[:, None] * ramp[None]


class LegoPipeline(ClassLabelsMixin, LatentImagesMixin, SamplingMixin, DiffusionPipeline, LoraMixin):
    """Generates pictures of classes, or without condition, on any canvas.

    Args:
        transformer: the brick chain.
        scheduler: EDM's Heun solver.
        vae: a diffusers VAE; None for pixel space.
        id2label: class id to name, or to a comma list of names.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "class_labels"]

    def __init__(
        self,
        transformer: LegoTransformer2DModel,
        scheduler: EDMHeunScheduler,
        vae: Any = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_labels(id2label)
        self.attach_image_processor()

    @property
    def num_classes(self) -> int:
        """Number of classes, the null class not counted; 0 for an unconditional network."""
        return self.transformer.config.num_classes

    @property
    def null_class(self) -> int:
        """Label that means "no class"."""
        return self.num_classes

    def resolve_skip(self, t_break: float, skip_direction: str) -> str:
        """The direction of skipping; raises `ValueError` where the stack does not say and the caller did not."""
        if skip_direction not in DIRECTIONS:
            raise ValueError(f"skip_direction must be one of {', '.join(DIRECTIONS)}, got {skip_direction!r}")
        if not 0 <= t_break <= 1:
            raise ValueError(f"t_break must be between 0 and 1, got {t_break}")
        sizes = list(self.transformer.config.brick_sizes)
        if t_break > 0 and len(sizes) == 1:
            raise ValueError("a network of one brick can't leave one out: set t_break to 0")
        if skip_direction != "auto":
            return skip_direction
        if t_break > 0 and self.transformer.skip_direction is None:
            raise ValueError(f"bricks of sizes {sizes} do not say when the last may be skipped: give skip_direction")
        return self.transformer.skip_direction or "late"

    def resolve_canvas(self, canvas: str, height: int, width: int) -> str:
        """The mode for a canvas in latent pixels; "auto" takes the grid at the training size.

        Raises:
            ValueError: the size does not fit the mode; the sentence names the sizes that do.
        """
        if canvas not in CANVASES:
            raise ValueError(f"canvas must be one of {', '.join(CANVASES)}, got {canvas!r}")
        side = self.transformer.config.sample_size
        if canvas == "auto":
            canvas = "grid" if (height, width) == (side, side) else "drift"
        unit = max(self.transformer.config.brick_sizes) if canvas == "grid" else 1
        least = unit if canvas == "grid" else side
        factor = self.vae_scale_factor
        for name, value in (("height", height), ("width", width)):
            if value < least or value % unit:
                sizes = f"multiples of {unit * factor}" if unit * factor > 1 else "any size"
                raise ValueError(
                    f"{name} {value * factor} does not fit the {canvas} canvas: "
                    f"it takes {sizes} from {least * factor} up"
                )
        return canvas

    def check_inputs(
        self,
        count: int,
        guidance_scale: float,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_tensor_inputs: list[str],
    ) -> None:
        """Raises `ValueError` with one sentence for anything the call can't use."""
        if not isinstance(self.scheduler, EDMHeunScheduler):
            raise ValueError(f"LEGO networks are sampled with EDMHeunScheduler, not {type(self.scheduler).__name__}")
        if guidance_scale > 1 and not self.num_classes:
            raise ValueError("this network is unconditional, so it can't be guided: set guidance_scale to 1")
        for name, value in (("height", height), ("width", width)):
            if value % self.vae_scale_factor:
                raise ValueError(f"{name} must be a multiple of {self.vae_scale_factor}, got {value}")
        shape = self._latent_shape(count, height, width)
        self.check_sampling(shape, generator, latents, output_type, callback_tensor_inputs)
        if self.vae is None and self.transformer.config.in_channels not in (1, 3) and output_type != "latent":
            raise ValueError("this network makes latents and the pipeline has no vae: ask for output_type='latent'")

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial state `shape`: unit noise (a list draws row i from generator i) times the largest noise level, in
        float64 where the device has it, as EDM's sampler keeps it."""
        if latents is None:
            latents = initial_noise(shape, device, generator)
        precision = torch.float32 if device.type == "mps" else torch.float64
        return latents.to(device=device, dtype=precision) * self.scheduler.init_noise_sigma

    def run_network(
        self,
        scaled: torch.Tensor,
        timestep: float,
        labels: torch.Tensor,
        canvas: str,
        stop_after: int | None,
        step_index: int = 0,
    ) -> torch.Tensor:
        """The raw prediction on the whole canvas `(B, C, H, W)`: in one pass, or as the weighted mean of overlapping
        windows of the training size (one batch), summed in float32."""
        time = torch.full((1,), timestep, device=scaled.device)
        labels = labels if self.num_classes else None
        if canvas == "grid":
            return self.transformer(scaled, time, labels, stop_after=stop_after, return_dict=False)[0]
        side = self.transformer.config.sample_size
        batch, _, height, width = scaled.shape
        offset = window_offset(step_index, side) if canvas == "drift" else 0
        places = [(y, x) for y in window_starts(height, side, offset) for x in window_starts(width, side, offset)]
        windows = torch.cat([scaled[:, :, y : y + side, x : x + side] for y, x in places])
        repeated = None if labels is None else labels.repeat(len(places))
        parts = self.transformer(windows, time, repeated, stop_after=stop_after, return_dict=False)[0].split(batch)
        weight = window_weights(side, scaled.device, torch.float32)
        total = torch.zeros_like(scaled, dtype=torch.float32)
        mass = torch.zeros_like(total[:1, :1])
        for (y, x), part in zip(places, parts, strict=True):
            total[:, :, y : y + side, x : x + side] += weight * part
            mass[:, :, y : y + side, x : x + side] += weight
        return total / mass

    def predict(
        self,
        plan: StepPlan,
        step: PlannedStep,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        canvas: str,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The guided raw prediction of one evaluation, `(B, C, H, W)`. The plan says where the chain stops; `dtype` is
        the network's, which takes longer to ask for than a scheduler's step."""
        scaled = self.scheduler.scale_model_input(latents).to(dtype)
        timestep = self.scheduler.model_timestep()
        null = torch.full_like(class_labels, self.num_classes)
        labels = {
            "none": class_labels,
            "cond": class_labels,
            "uncond": null,
            "batched": torch.cat([null, class_labels]),
        }
        outputs = {}
        for branch in step.branches:
            model_input = torch.cat([scaled] * (len(labels[branch]) // len(scaled)))
            with publish_step(plan.context(step, branch)):
                stop = step.extras.get("stop_after")
                raw = self.run_network(model_input, timestep, labels[branch], canvas, stop, step.step_index)
                outputs[branch] = raw.float()
        return guide_branches(outputs, self._guidance_scale)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0 and self.num_classes > 0

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str | None] | None = None,
        num_inference_steps: int = 18,
        guidance_scale: float | None = None,
        t_break: float = 0.0,
        skip_direction: str = "auto",
        s_churn: float | None = None,
        height: int | None = None,
        width: int | None = None,
        canvas: str = "auto",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        batched_guidance: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generates one picture per label.

        Args:
            class_labels: class ids or names; None (or a list of None) is the null class and all an unconditional
                network takes.
            num_inference_steps: Heun steps N; the network runs 2 N - 1 times.
            guidance_scale: classifier-free guidance; 1 or less turns it off. Default: 1.5, or 1 without classes.
            t_break: share of the steps in which the last brick is left out, 0 to 1.
            skip_direction: "early" (the first steps), "late" (the last ones), or "auto": late where patches grow
                along the chain, early where they shrink.
            s_churn: fresh noise per step, 0 is deterministic (default: the scheduler's, like its range and scale).
            height, width: pixels; default: the network's training size.
            canvas: "grid" runs the bricks over the whole canvas, "overlap" averages windows of the training size,
                "drift" does so with windows that lie elsewhere in every step, so that the borders of windows and
                bricks leave no seam; "auto" takes the grid at the training size and drift elsewhere.
            generator: one generator for the batch, or one per picture (row i then depends on generator i alone).
            latents: initial noise `(B, C, h, w)` with unit variance, instead of drawing it.
            batched_guidance: both guidance halves in one batch (faster), or one after the other (less memory).
            output_type: "pil", "np" `(B, H, W, 3)` in [0, 1], "pt" `(B, 3, H, W)` in [0, 1], or "latent".
            return_dict: an `ImagePipelineOutput`, or a plain tuple.
            callback_on_step_end: `callback(pipe, evaluation_index, timestep, tensors) -> dict of replaced tensors`,
                called after every network evaluation; it may set `pipe._interrupt = True` to stop before the next.
            callback_on_step_end_tensor_inputs: which tensors the callback gets.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: one sentence about the first input that can't be used.

        Examples:
            >>> pipe = dit_suite.load_pipeline("my-lego")
            >>> pipe([3, 5], t_break=0.4).images[0].save("picture.png")
            >>> pipe(3, height=64, width=160).images[0].save("panorama.png")
        """
        callback_inputs = self.callback_tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_positive(num_inference_steps=num_inference_steps)
        ids = self.get_label_ids(class_labels)
        height = height or self._default_size()
        width = width or self._default_size()
        if guidance_scale is None:
            guidance_scale = DEFAULT_GUIDANCE if self.num_classes else 1.0
        self.check_inputs(len(ids), guidance_scale, height, width, generator, latents, output_type, callback_inputs)
        direction = self.resolve_skip(t_break, skip_direction)
        shape = self._latent_shape(len(ids), height, width)
        canvas = self.resolve_canvas(canvas, *shape[2:])
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device

        class_labels = torch.tensor(ids, device=device)
        self.scheduler.set_timesteps(num_inference_steps, device)
        timesteps = self.scheduler.timesteps
        plan = plan_steps(
            timesteps,
            order=self.scheduler.order,
            guidance=self.do_classifier_free_guidance,
            batched=batched_guidance,
        )
        stop = {"stop_after": len(self.transformer.config.brick_sizes) - 2}
        plan = plan.with_extras({step: stop for step in skipped_steps(num_inference_steps, t_break, direction)})
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(shape, device, generator, latents)
        dtype = self.transformer.dtype

        with self.progress_bar(total=plan.num_steps) as progress_bar:
            for index, (timestep, step) in enumerate(zip(timesteps, plan.steps, strict=True)):
                if self.interrupt:
                    continue
                latents = self.scheduler.churn(latents, generator, s_churn)
                prediction = self.predict(plan, step, latents, class_labels, canvas, dtype)
                latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
                latents, class_labels = self.after_step(
                    callback_on_step_end, index, timestep, callback_inputs, latents=latents, class_labels=class_labels
                )
                if step.evaluation == 0:
                    progress_bar.update()

        latents = latents.to(torch.float32)
        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

"""Class to image with any network of the DiT interface: `DiTModel`, Switch-DiT, and diffusers' own DiT class."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from dit_suite.models.dit import DiTModel
from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel
from dit_suite.pipelines.sampling_mixins import (
    ClassLabelsMixin,
    LatentImagesMixin,
    LoraMixin,
    SamplingMixin,
    cache_context,
    check_positive,
    check_size,
    initial_noise,
)
from dit_suite.schedulers.diffusers_schedulers import check_scheduler, step_arguments
from dit_suite.schedulers.guidance import guide_branches
from dit_suite.step_plan import PlannedStep, StepPlan, plan_steps, publish_step

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")


def read_labels(path: str | Path) -> dict[str, str]:
    """Class names from a JSON object `{"0": "tench, Tinca tinca", ...}`; several names of a class share a comma list.

    Raises:
        ValueError: the file is not such an object.
    """
    try:
        table = json.loads(Path(path).read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict) or not all(k.isdecimal() and isinstance(v, str) for k, v in table.items()):
        raise ValueError(f"{path} must hold an object from class ids to names")
    return table


class ClassToImagePipeline(ClassLabelsMixin, LatentImagesMixin, SamplingMixin, DiffusionPipeline, LoraMixin):
    """Generates pictures of classes, in pixel space (no `vae`) or in the latent space of any diffusers VAE.

    Args:
        transformer: a network with the DiT interface: `forward(hidden_states (B, C, H, W), timestep (B,),
            class_labels (B,))` returning C channels, or 2C with a learned variance in the second half.
        scheduler: one of FlowMatchEuler, FlowMatchHeun, DDIM, DDPM, DPMSolverMultistep, UniPC. The learned variance is
            used by DDPM with `variance_type="learned_range"` and ignored by the others.
        vae: AutoencoderKL, AutoencoderTiny or AutoencoderDC; None for pixel space.
        id2label: class id to name, or to a comma list of names.
        prediction_type: what the network predicts: "epsilon", "v_prediction" or "flow_prediction"; None takes what the
            scheduler integrates.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "class_labels"]

    def __init__(
        self,
        transformer: DiTModel | SwitchDiTTransformer2DModel | DiTTransformer2DModel | ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None = None,
        id2label: dict[str, str] | None = None,
        prediction_type: str | None = None,
    ) -> None:
        super().__init__()
        if prediction_type is None:
            flow = type(scheduler).__name__.startswith("FlowMatch")
            prediction_type = "flow_prediction" if flow else scheduler.config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_labels(id2label)
        self.register_to_config(prediction_type=prediction_type)
        self.attach_image_processor()

    @property
    def num_classes(self) -> int:
        """Number of classes, the null class not counted."""
        config = self.transformer.config
        return config.get("num_classes") or config.get("num_embeds_ada_norm")

    @property
    def null_class(self) -> int | None:
        """Label that means "no class" for guidance; None where the network was trained without label dropout."""
        return self.num_classes if self.transformer.config.get("class_dropout_prob", 0.1) > 0 else None

    def check_inputs(
        self,
        count: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_channels: int | None,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_tensor_inputs: list[str],
    ) -> None:
        """Raises `ValueError` with one sentence for anything the call can't use."""
        config = self.transformer.config
        check_positive(num_inference_steps=num_inference_steps)
        if guidance_scale > 1 and self.null_class is None:
            raise ValueError("this network has no null class, so it can't be guided: set guidance_scale to 1")
        if guidance_channels is not None and not 1 <= guidance_channels <= config.in_channels:
            raise ValueError(f"guidance_channels must be between 1 and {config.in_channels}, got {guidance_channels}")
        check_size(self.vae_scale_factor * config.patch_size, height=height, width=width)
        if height != width and isinstance(self.transformer, DiTTransformer2DModel):
            raise ValueError(f"diffusers' DiT class makes square pictures only, got {height}x{width}")
        shape = self._latent_shape(count, height, width)
        self.check_sampling(shape, generator, latents, output_type, callback_tensor_inputs)
        if self.vae is None and config.in_channels not in (1, 3) and output_type != "latent":
            raise ValueError(
                f"this network makes latents of {config.in_channels} channels and the pipeline has no vae: "
                "add one, or ask for output_type='latent'"
            )
        check_scheduler(self.scheduler, self.config.prediction_type)
        if self._wants_variance() and self._output_channels() != 2 * config.in_channels:
            raise ValueError("the scheduler expects a learned variance, which this network does not predict")

    def _wants_variance(self) -> bool:
        return self.scheduler.config.get("variance_type") in ("learned", "learned_range")

    def _output_channels(self) -> int:
        channels = getattr(self.transformer, "out_channels", None)
        return channels or self.transformer.config.in_channels

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise `shape` in float32, scaled for the scheduler; a list draws row i from generator i."""
        if latents is None:
            latents = initial_noise(shape, device, generator)
        latents = latents.to(device=device, dtype=torch.float32)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def predict(
        self,
        plan: StepPlan,
        step: PlannedStep,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        dtype: torch.dtype,
        guidance_channels: int | None = None,
    ) -> torch.Tensor:
        """The guided output of one step in float32, `(B, C, H, W)`, or `(B, 2C, H, W)` for a scheduler that uses the
        learned variance (guidance leaves that half alone). `dtype` is the network's, whose look-up walks all modules.
        Every evaluation runs under its own `StepContext`."""
        branches = step.branches if self.do_classifier_free_guidance else ("none",)
        null = torch.full_like(class_labels, self.null_class if self.null_class is not None else 0)
        labels = {
            "none": class_labels,
            "cond": class_labels,
            "uncond": null,
            "batched": torch.cat([null, class_labels]),
        }
        outputs = {}
        for branch in branches:
            repeats = len(labels[branch]) // len(latents)
            model_input = torch.cat([latents] * repeats)
            if hasattr(self.scheduler, "scale_model_input"):
                model_input = self.scheduler.scale_model_input(model_input, timestep)
            with publish_step(plan.context(step, branch)), cache_context(self.transformer, branch):
                outputs[branch] = self.transformer(
                    model_input.to(dtype),
                    timestep=timestep.expand(len(model_input)),
                    class_labels=labels[branch],
                    return_dict=False,
                )[0].float()
        channels = latents.shape[1]
        output = guide_branches(outputs, self.guidance_scale, guidance_channels or channels)
        return output if self._wants_variance() else output[:, :channels]

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0 and self.null_class is not None

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
        eta: float = 0.0,
        height: int | None = None,
        width: int | None = None,
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
            class_labels: class ids or names (see `labels`); the null class samples without a class.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 or less turns it off, which halves the network's work.
            guidance_channels: guides only the first N latent channels; 3 is what the published DiT numbers used.
            eta: noise of DDIM, 0 (deterministic) to 1; other schedulers take 0 only.
            height, width: pixels; default: the network's training size.
            generator: one generator for the whole batch, or one per picture (row i then depends on generator i alone).
            latents: initial noise `(B, C, h, w)` with unit variance, instead of drawing it.
            batched_guidance: both guidance halves in one batch (faster), or one after the other (less memory).
            output_type: "pil", "np" `(B, H, W, 3)` in [0, 1], "pt" `(B, 3, H, W)` in [0, 1], or "latent".
            return_dict: an `ImagePipelineOutput`, or a plain tuple.
            callback_on_step_end: `callback(pipe, step_index, timestep, tensors) -> dict of replaced tensors`; it may
                set `pipe._interrupt = True` to stop before the next step.
            callback_on_step_end_tensor_inputs: which tensors the callback gets.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: one sentence about the first input that can't be used.

        Examples:
            >>> import dit_suite
            >>> pipe = dit_suite.load_pipeline("my-dit")
            >>> pipe(["golden retriever", 207], num_inference_steps=50).images[0].save("dog.png")
        """
        callback_inputs = self.callback_tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        ids = self.get_label_ids(class_labels)
        height = height or self._default_size()
        width = width or self._default_size()
        self.check_inputs(
            len(ids), num_inference_steps, guidance_scale, guidance_channels, height, width, generator, latents,
            output_type, callback_inputs,
        )  # fmt: skip
        step_kwargs = step_arguments(self.scheduler, generator)
        if type(self.scheduler).__name__ == "DDIMScheduler":
            step_kwargs["eta"] = eta
        elif eta:
            raise ValueError(f"eta belongs to DDIM; {type(self.scheduler).__name__} takes 0 only")
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device

        class_labels = torch.tensor(ids, device=device)
        timesteps, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device)
        guidance = self.do_classifier_free_guidance
        plan = plan_steps(timesteps, order=self.scheduler.order, guidance=guidance, batched=batched_guidance)
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(self._latent_shape(len(ids), height, width), device, generator, latents)
        dtype = self.transformer.dtype

        with self.progress_bar(total=plan.num_steps) as progress_bar:
            for index, (timestep, step) in enumerate(zip(timesteps, plan.steps, strict=True)):
                if self.interrupt:
                    continue
                prediction = self.predict(plan, step, latents, timestep, class_labels, dtype, guidance_channels)
                latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]
                latents, class_labels = self.after_step(
                    callback_on_step_end, index, timestep, callback_inputs, latents=latents, class_labels=class_labels
                )
                if index + 1 == len(plan.steps) or plan.steps[index + 1].step_index > step.step_index:
                    progress_bar.update()

        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

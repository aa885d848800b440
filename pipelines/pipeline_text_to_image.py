"""Text to image with PixArt-class transformers (PixArt-alpha/Sigma of diffusers, PT-DiT of this suite)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    PixArtTransformer2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from dit_suite.models.pt_dit import PTDiTTransformer3DModel
from dit_suite.pipelines.sampling_mixins import (
    LatentImagesMixin,
    LoraMixin,
    PromptMixin,
    SamplingMixin,
    cache_context,
    check_positive,
    check_size,
    initial_noise,
)
from dit_suite.schedulers.diffusers_schedulers import (
    check_levels,
    check_scheduler,
    step_arguments,
    temporary_shift,
)
from dit_suite.schedulers.guidance import guide_branches
from dit_suite.schedulers.pt_dit_flow import flow_sigmas, resolution_warp
from dit_suite.step_plan import StepPlan, plan_steps, publish_step

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")
LEVELS = ("scheduler", "resolution")


class TextToImagePipeline(PromptMixin, LatentImagesMixin, SamplingMixin, DiffusionPipeline, LoraMixin):
    """Generates pictures from text, in pixel space (no `vae`) or in the latent space of any diffusers VAE.

    Args:
        transformer: a network with PixArt's interface: `forward(hidden_states (B, C, H, W), encoder_hidden_states
            (B, L, D), timestep (B,), encoder_attention_mask (B, L))`.
        scheduler: one of FlowMatchEuler, FlowMatchHeun, DDIM, DDPM, DPMSolverMultistep, UniPC.
        text_encoder, tokenizer: any transformers encoder whose first output is `(B, L, D)`; optional when callers pass
            `prompt_embeds`.
        vae: AutoencoderKL, AutoencoderTiny or AutoencoderDC; None for pixel space.
        prediction_type: what the network predicts: "epsilon", "v_prediction" or "flow_prediction" (eps - x0).
        max_sequence_length: tokens per prompt; shorter prompts are padded to it, longer ones are cut.
        text_encoder_source: where `load_pipeline` finds a text encoder that the folder does not carry.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer", "vae"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        transformer: PixArtTransformer2DModel | PTDiTTransformer3DModel | ModelMixin,
        scheduler: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None = None,
        prediction_type: str = "epsilon",
        max_sequence_length: int = 300,
        text_encoder_source: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae
        )
        self.register_to_config(
            prediction_type=prediction_type,
            max_sequence_length=max_sequence_length,
            text_encoder_source=text_encoder_source,
        )
        self.attach_image_processor()

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        num_inference_steps: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
        output_type: str,
        callback_tensor_inputs: list[str],
        sigmas: Sequence[float] | None = None,
        shift: float | None = None,
        compress_ratios: Sequence[int] | None = None,
    ) -> int:
        """Raises `ValueError` with one sentence for anything the call can't use; returns the number of pictures."""
        count = self.check_prompt(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        if prompt_embeds is not None and prompt_attention_mask is None:
            raise ValueError("prompt_embeds needs its prompt_attention_mask")
        if negative_prompt_embeds is not None and negative_prompt_attention_mask is None:
            raise ValueError("negative_prompt_embeds needs its negative_prompt_attention_mask")
        check_positive(num_images_per_prompt=num_images_per_prompt, num_inference_steps=num_inference_steps)
        check_size(self.vae_scale_factor * self.transformer.config.patch_size, height=height, width=width)
        total = count * num_images_per_prompt
        shape = self._latent_shape(total, height, width)
        self.check_sampling(shape, generator, latents, output_type, callback_tensor_inputs)
        check_scheduler(self.scheduler, self.config.prediction_type)
        check_levels(self.scheduler, sigmas, shift)
        if isinstance(self.transformer, PTDiTTransformer3DModel):
            patch = self.transformer.config.patch_size
            self.transformer.resolve_windows((1, shape[2] // patch, shape[3] // patch), compress_ratios)
        elif compress_ratios is not None:
            raise ValueError(f"compress_ratios belong to PT-DiT; {type(self.transformer).__name__} has no windows")
        return total

    def resolve_levels(
        self,
        num_inference_steps: int,
        height: int,
        width: int,
        levels: str,
        sigmas: Sequence[float] | None,
        shift: float | None,
    ) -> tuple[list[float] | None, float | None]:
        """Noise levels before the shift, and the shift; None stands for the scheduler's own.

        Raises:
            ValueError: the choice of levels is unknown, or they are given twice.
        """
        if levels not in LEVELS:
            raise ValueError(f"levels must be one of {', '.join(LEVELS)}, got {levels!r}")
        if levels == "scheduler":
            return None if sigmas is None else list(sigmas), shift
        if sigmas is not None:
            raise ValueError("give either sigmas or levels='resolution', not both")
        return flow_sigmas(num_inference_steps), resolution_warp(height, width) if shift is None else shift

    def encode_prompt(
        self, prompt: list[str], device: torch.device, max_sequence_length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states `(B, L, D)` and their mask `(B, L)` (1 for real tokens), padded to one length."""
        states, mask = self.encode_tokens(prompt, device, max_sequence_length)
        return states.to(self.transformer.dtype), mask

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise `shape`, scaled for the scheduler; a list of generators draws row i from generator i."""
        if latents is None:
            latents = initial_noise(shape, device, generator)
        latents = latents.to(device=device, dtype=dtype)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _added_conditions(self, batch: int, height: int, width: int, device: torch.device) -> dict[str, Any]:
        """PixArt-alpha's 1024 px networks are told the size; the others take None."""
        if not self.transformer.config.get("use_additional_conditions"):
            return {"resolution": None, "aspect_ratio": None}
        resolution = torch.tensor([[height, width]], device=device, dtype=self.transformer.dtype)
        ratio = torch.tensor([[height / width]], device=device, dtype=self.transformer.dtype)
        return {"resolution": resolution.repeat(batch, 1), "aspect_ratio": ratio.repeat(batch, 1)}

    def predict(
        self,
        plan: StepPlan,
        step: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        conditions: dict[str, tuple[torch.Tensor, torch.Tensor]],
        guidance_scale: float,
        added_cond_kwargs: dict[str, Any],
        **network_kwargs: Any,
    ) -> torch.Tensor:
        """The guided network output of one step, `(B, C, H, W)`. Every evaluation runs under its own `StepContext`;
        `network_kwargs` go to the network as they are."""
        outputs = {}
        for branch in step.branches:
            states, mask = conditions[branch]
            repeats = len(states) // len(latents)
            model_input = torch.cat([latents] * repeats)
            with publish_step(plan.context(step, branch)), cache_context(self.transformer, branch):
                outputs[branch] = self.transformer(
                    model_input.to(self.transformer.dtype),
                    encoder_hidden_states=states,
                    timestep=timestep.expand(len(model_input)),
                    added_cond_kwargs={
                        name: None if value is None else torch.cat([value] * repeats)
                        for name, value in added_cond_kwargs.items()
                    },
                    encoder_attention_mask=mask,
                    return_dict=False,
                    **network_kwargs,
                )[0]
        # Networks trained with a learned variance put it into a second half of the channels.
        return guide_branches(outputs, guidance_scale)[:, : latents.shape[1]]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        batched_guidance: bool = True,
        levels: str = "scheduler",
        sigmas: Sequence[float] | None = None,
        shift: float | None = None,
        compress_ratios: Sequence[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generates pictures.

        Args:
            prompt: text, or one text per picture.
            negative_prompt: text to steer away from; used when guidance is on. Default: the empty text.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 or less turns it off, which halves the network's work.
            num_images_per_prompt: pictures per prompt, next to each other in the result.
            height, width: pixels; default: the network's training size.
            generator: one generator for the whole batch, or one per picture (row i then depends on generator i alone).
            latents: initial noise `(B, C, h, w)` with unit variance, instead of drawing it.
            prompt_embeds, prompt_attention_mask: `(B, L, D)` and `(B, L)` instead of `prompt`; likewise the negatives.
            batched_guidance: both guidance halves in one batch (faster), or one after the other (less memory).
            levels: which noise levels are visited: the "scheduler"'s own, or "resolution": 1 - i/N, leaning to high
                noise for large pictures (1 for 512 x 512 pixels), as the released PT-DiT is sampled.
            sigmas: the levels themselves before the shift, falling from at most 1 to above 0; they decide the number of
                steps. FlowMatchEuler only, like "resolution" and `shift`.
            shift: how far the levels lean to high noise, s' = a s / (1 + (a - 1) s). Default: the scheduler's, or what
                "resolution" gives.
            compress_ratios: PT-DiT's tokens per window (frames, height, width) for this call. Default: the network's.
            output_type: "pil", "np" `(B, H, W, 3)` in [0, 1], "pt" `(B, 3, H, W)` in [0, 1], or "latent".
            return_dict: an `ImagePipelineOutput`, or a plain tuple.
            callback_on_step_end: `callback(pipe, step_index, timestep, tensors) -> dict of replaced tensors`; it may
                set `pipe._interrupt = True` to stop after the step.
            callback_on_step_end_tensor_inputs: which of `latents`, `prompt_embeds`, `negative_prompt_embeds` it gets.

        Raises:
            ValueError: an argument is out of range, shapes disagree, or the scheduler does not fit the network.

        Examples:
            >>> pipe = dit_suite.load_pipeline("emoji-pixart-64")
            >>> pipe("red apple, flat style", generator=torch.Generator().manual_seed(0)).images[0].save("apple.png")
        """
        callback_inputs = self.callback_tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        height = height or self._default_size()
        width = width or self._default_size()
        sigmas, shift = self.resolve_levels(num_inference_steps, height, width, levels, sigmas, shift)
        total = self.check_inputs(
            prompt, negative_prompt, num_images_per_prompt, num_inference_steps, height, width, generator, latents,
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask, output_type,
            callback_inputs, sigmas, shift, compress_ratios,
        )  # fmt: skip
        self._guidance_scale = guidance_scale
        self._interrupt = False
        guidance = self.do_classifier_free_guidance
        device = self._execution_device

        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds, prompt_attention_mask = self.encode_prompt(prompts, device)
        if guidance and negative_prompt_embeds is None:
            count, length = prompt_embeds.shape[:2]
            negatives = self.negative_texts(negative_prompt, count)
            negative_prompt_embeds, negative_prompt_attention_mask = self.encode_prompt(negatives, device, length)
        prompt_embeds, mask, negative_prompt_embeds, negative_mask = (
            None if states is None else states.to(device).repeat_interleave(num_images_per_prompt, dim=0)
            for states in (
                prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask
            )
        )  # fmt: skip

        with temporary_shift(self.scheduler, shift):
            timesteps, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, sigmas=sigmas)
        plan = plan_steps(timesteps, order=self.scheduler.order, guidance=guidance, batched=batched_guidance)
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(
            self._latent_shape(total, height, width), device, prompt_embeds.dtype, generator, latents
        )
        added = self._added_conditions(total, height, width, device)
        step_kwargs = step_arguments(self.scheduler, generator)
        network_kwargs = {} if compress_ratios is None else {"compress_ratios": tuple(compress_ratios)}

        with self.progress_bar(total=plan.num_steps) as progress_bar:
            for index, (timestep, step) in enumerate(zip(timesteps, plan.steps, strict=True)):
                if self.interrupt:
                    continue
                conditions = {"none": (prompt_embeds, mask), "cond": (prompt_embeds, mask)}
                if guidance:
                    conditions["uncond"] = (negative_prompt_embeds, negative_mask)
                    conditions["batched"] = (
                        torch.cat([negative_prompt_embeds, prompt_embeds]),
                        torch.cat([negative_mask, mask]),
                    )
                prediction = self.predict(
                    plan, step, latents, timestep, conditions, self._guidance_scale, added, **network_kwargs
                )
                dtype = latents.dtype
                latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]
                latents = latents.to(dtype)
                latents, prompt_embeds, negative_prompt_embeds = self.after_step(
                    callback_on_step_end, index, timestep, callback_inputs,
                    latents=latents, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
                )  # fmt: skip
                last_of_step = index + 1 == len(plan.steps) or plan.steps[index + 1].step_index > step.step_index
                if last_of_step:
                    progress_bar.update()

        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

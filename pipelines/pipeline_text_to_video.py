"""Text to video with Wan-class transformers, in pixel space or in the latent space of a Wan VAE."""

from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, ModelMixin, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.video_processor import VideoProcessor

from dit_suite.pipelines.pipeline_output import VideoPipelineOutput
from dit_suite.pipelines.sampling_mixins import (
    PromptMixin,
    SamplingMixin,
    cache_context,
    check_positive,
    check_size,
    initial_noise,
)
from dit_suite.schedulers.diffusers_schedulers import check_scheduler, step_arguments
from dit_suite.schedulers.guidance import guide_branches
from dit_suite.step_plan import StepPlan, plan_steps, publish_step


class TextToVideoPipeline(PromptMixin, SamplingMixin, DiffusionPipeline, WanLoraLoaderMixin):
    """Generates clips from text.

    Args:
        transformer: a network with Wan's interface: `forward(hidden_states (B, C, T, H, W), timestep (B,),
            encoder_hidden_states (B, L, D))`, predicting the flow velocity eps - x0.
        scheduler: FlowMatchEuler, FlowMatchHeun, or UniPC / DPMSolverMultistep set to flow prediction.
        text_encoder, tokenizer: any transformers encoder whose first output is `(B, L, D)`; optional when callers pass
            `prompt_embeds`.
        vae: AutoencoderKLWan; None for pixel space.
        transformer_2, boundary_ratio: a second network for timesteps below `boundary_ratio` of the training range.
        sample_size: default (frames, height, width) of a clip.
        max_sequence_length: tokens per prompt; states of padding are set to zero.
        text_encoder_source: where `load_pipeline` finds a text encoder that the folder does not carry.
        expand_timesteps: Wan 2.2's per-token timesteps, which this pipeline does not run.
    """

    model_cpu_offload_seq = "text_encoder->transformer->transformer_2->vae"
    _optional_components = ["text_encoder", "tokenizer", "vae", "transformer_2"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        transformer: WanTransformer3DModel | ModelMixin,
        scheduler: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        vae: AutoencoderKLWan | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        prediction_type: str = "flow_prediction",
        sample_size: list | tuple = (81, 480, 832),
        max_sequence_length: int = 512,
        text_encoder_source: dict[str, Any] | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__()
        if prediction_type != "flow_prediction":
            raise ValueError(f"video networks predict a flow velocity (flow_prediction), got {prediction_type!r}")
        if expand_timesteps:
            raise ValueError("networks with one timestep per token (expand_timesteps) are not supported")
        if (transformer_2 is None) != (boundary_ratio is None):
            raise ValueError("transformer_2 and boundary_ratio belong together: give both or neither")
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vae=vae,
            transformer_2=transformer_2,
        )
        self.register_to_config(
            boundary_ratio=boundary_ratio,
            prediction_type=prediction_type,
            sample_size=tuple(sample_size),
            max_sequence_length=max_sequence_length,
            text_encoder_source=text_encoder_source,
            expand_timesteps=expand_timesteps,
        )
        self.vae_scale_factor_temporal = 1 if vae is None else vae.config.get("scale_factor_temporal") or 4
        self.vae_scale_factor_spatial = 1 if vae is None else vae.config.get("scale_factor_spatial") or 8
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        image: Any,
        num_videos_per_prompt: int,
        num_inference_steps: int,
        num_frames: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        output_type: str,
        callback_tensor_inputs: list[str],
    ) -> int:
        """Raises `ValueError` with one sentence for anything the call can't use; returns the number of clips."""
        count = self.check_prompt(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        check_positive(num_videos_per_prompt=num_videos_per_prompt, num_inference_steps=num_inference_steps)
        self._check_size(num_frames, height, width)
        total = count * num_videos_per_prompt
        if image is not None:
            self._check_image(image, total)
        elif self.takes_start_image:
            raise ValueError("this model needs a start image: its network has channels for one")
        shape = self._latent_shape(total, num_frames, height, width)
        self.check_sampling(shape, generator, latents, output_type, callback_tensor_inputs)
        check_scheduler(self.scheduler, self.config.prediction_type)
        return total

    def _check_size(self, num_frames: int, height: int, width: int) -> None:
        patch = self.transformer.config.patch_size
        check_size(patch[1] * self.vae_scale_factor_spatial, height=height)
        check_size(patch[2] * self.vae_scale_factor_spatial, width=width)
        factor = self.vae_scale_factor_temporal
        if num_frames < 1 or (num_frames - 1) % factor:
            raise ValueError(f"num_frames must be 1 more than a multiple of {factor}, got {num_frames}")
        if ((num_frames - 1) // factor + 1) % patch[0]:
            raise ValueError(f"num_frames must give a multiple of {patch[0]} latent frames, got {num_frames}")

    @property
    def takes_start_image(self) -> bool:
        """Whether the network has Wan's input channels for a first frame: a mask and a clip beside the latent."""
        extra = self.transformer.config.in_channels - self._latent_channels
        return extra == self._latent_channels + self.vae_scale_factor_temporal

    def _check_image(self, image: Any, total: int) -> None:
        if not self.takes_start_image:
            raise ValueError("this model takes no start image: its network has no channels for one")
        if self.transformer.config.get("image_dim"):
            raise ValueError("networks that also need an image encoder's states are not supported")
        images = image if isinstance(image, list) else [image]
        if not all(isinstance(i, PIL.Image.Image) for i in images) or len(images) not in (1, total):
            raise ValueError(f"image must be a PIL picture, or a list of 1 or {total} of them")

    @property
    def _latent_channels(self) -> int:
        return self.transformer.config.out_channels or self.transformer.config.in_channels

    def encode_prompt(
        self, prompt: list[str], device: torch.device, max_sequence_length: int | None = None
    ) -> torch.Tensor:
        """Token states `(B, L, D)`, padded to one length, the states of padding zero."""
        states, mask = self.encode_tokens(prompt, device, max_sequence_length)
        return (states * mask[..., None]).to(self.transformer.dtype)

    def _latent_shape(self, total: int, num_frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        frames = (num_frames - 1) // self.vae_scale_factor_temporal + 1
        factor = self.vae_scale_factor_spatial
        return (total, self._latent_channels, frames, height // factor, width // factor)

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise `shape` in float32, scaled for the scheduler; row i comes from generator i of a list."""
        if latents is None:
            latents = initial_noise(shape, device, generator)
        return latents.to(device=device, dtype=torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def prepare_image_condition(
        self, image: Any, total: int, num_frames: int, height: int, width: int, device: torch.device
    ) -> torch.Tensor:
        """Channels that tell the network the first frame: a mask, then a clip that holds the frame and is grey after.

        Wan's image-to-video layout: `(B, mask + latent channels, T', h, w)`, one mask channel per frame that a latent
        frame stands for.
        """
        images = image if isinstance(image, list) else [image]
        first = self.video_processor.preprocess(images, height=height, width=width).to(device)
        first = first.expand(total, -1, -1, -1)[:, :, None]
        clip = torch.cat([first, first.new_zeros(*first.shape[:2], num_frames - 1, height, width)], dim=2)
        if self.vae is not None:
            mean, std = self._latent_statistics(device)
            latent = self.vae.encode(clip.to(self.vae.dtype)).latent_dist.mode().float()
            clip = (latent - mean) / std
        mask = clip.new_zeros(total, self.vae_scale_factor_temporal, *clip.shape[2:])
        mask[:, :, 0] = 1.0
        return torch.cat([mask, clip], dim=1)

    def _latent_statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents, `(1, C, 1, 1, 1)`."""
        config = self.vae.config
        if config.get("latents_mean") is None:
            scale = torch.ones(1, 1, 1, 1, 1, device=device) / (config.get("scaling_factor") or 1.0)
            return torch.zeros_like(scale), scale
        mean, std = (
            torch.tensor(config[name], device=device).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        return mean, std

    def _network(self, timestep: float) -> ModelMixin:
        if self.config.boundary_ratio is None:
            return self.transformer
        boundary = self.config.boundary_ratio * self.scheduler.config.num_train_timesteps
        return self.transformer if timestep >= boundary else self.transformer_2

    def predict(
        self,
        plan: StepPlan,
        step: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        guidance_scale: float,
        image_condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The guided network output of one step, `(B, C, T, H, W)`. Every evaluation runs under its own context."""
        network = self._network(step.timestep)
        model_input = latents if image_condition is None else torch.cat([latents, image_condition], dim=1)
        outputs = {}
        for branch in step.branches:
            states = conditions[branch]
            batch = torch.cat([model_input] * (len(states) // len(latents))).to(network.dtype)
            with publish_step(plan.context(step, branch)), cache_context(network, branch):
                outputs[branch] = network(
                    hidden_states=batch,
                    timestep=timestep.expand(len(batch)),
                    encoder_hidden_states=states,
                    return_dict=False,
                )[0].float()
        return guide_branches(outputs, guidance_scale)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: PIL.Image.Image | list[PIL.Image.Image] | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        num_videos_per_prompt: int = 1,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: int = 8,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        batched_guidance: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> VideoPipelineOutput | tuple:
        """Generates clips.

        Args:
            prompt: text, or one text per clip.
            negative_prompt: text to steer away from; used when guidance is on. Default: the empty text.
            image: picture that the first frame shows, for networks with channels for it (which can't do without).
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 or less turns it off, which halves the network's work.
            num_videos_per_prompt: clips per prompt, next to each other in the result.
            num_frames, height, width: size of a clip; default: the checkpoint's own.
            fps: frames per second at which the clip is meant to be shown; does not change the frames.
            generator: one generator for the whole batch, or one per clip (row i then depends on generator i alone).
            latents: initial noise `(B, C, T, h, w)` with unit variance, instead of drawing it.
            prompt_embeds, negative_prompt_embeds: token states `(B, L, D)` instead of texts.
            batched_guidance: both guidance halves in one batch, or one after the other (less memory).
            output_type: "pil", "np" `(B, T, H, W, 3)` in [0, 1], "pt" `(B, T, 3, H, W)` in [0, 1], or "latent".
            return_dict: a `VideoPipelineOutput`, or a plain tuple.
            callback_on_step_end: `callback(pipe, step_index, timestep, tensors) -> dict of replaced tensors`; it may
                set `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.

        Examples:
            >>> from dit_suite import load_pipeline, sample_generators
            >>> pipe = load_pipeline("emoji-wan-16x64")
            >>> frames = pipe("red heart", generator=sample_generators(0, [0])).frames[0]

        Returns:
            The clips in `frames`.

        Raises:
            ValueError: an argument can't be used; the sentence says which and why.
        """
        callback_inputs = self.callback_tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        default = self.config.sample_size
        num_frames, height, width = num_frames or default[0], height or default[1], width or default[2]
        check_positive(fps=fps)
        total = self.check_inputs(
            prompt,
            negative_prompt,
            image,
            num_videos_per_prompt,
            num_inference_steps,
            num_frames,
            height,
            width,
            generator,
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            output_type,
            callback_inputs,
        )
        self._guidance_scale = guidance_scale
        self._interrupt = False
        guidance = self.do_classifier_free_guidance
        device = self._execution_device

        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt([prompt] if isinstance(prompt, str) else prompt, device)
        if guidance and negative_prompt_embeds is None:
            count, length = prompt_embeds.shape[:2]
            negatives = self.negative_texts(negative_prompt, count)
            negative_prompt_embeds = self.encode_prompt(negatives, device, length)
        prompt_embeds, negative_prompt_embeds = (
            None
            if states is None
            else states.to(device, self.transformer.dtype).repeat_interleave(num_videos_per_prompt, 0)
            for states in (prompt_embeds, negative_prompt_embeds)
        )

        timesteps, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device)
        plan = plan_steps(timesteps, order=self.scheduler.order, guidance=guidance, batched=batched_guidance)
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(self._latent_shape(total, num_frames, height, width), device, generator, latents)
        image_condition = None
        if image is not None:
            image_condition = self.prepare_image_condition(image, total, num_frames, height, width, device)
        step_kwargs = step_arguments(self.scheduler, generator)

        with self.progress_bar(total=plan.num_steps) as progress_bar:
            for index, (timestep, step) in enumerate(zip(timesteps, plan.steps, strict=True)):
                if self.interrupt:
                    continue
                conditions = {"none": prompt_embeds, "cond": prompt_embeds}
                if guidance:
                    conditions["uncond"] = negative_prompt_embeds
                    conditions["batched"] = torch.cat([negative_prompt_embeds, prompt_embeds])
                prediction = self.predict(
                    plan, step, latents, timestep, conditions, self._guidance_scale, image_condition
                )
                latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]
                latents, prompt_embeds, negative_prompt_embeds = self.after_step(
                    callback_on_step_end, index, timestep, callback_inputs,
                    latents=latents, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
                )  # fmt: skip
                if index + 1 == len(plan.steps) or plan.steps[index + 1].step_index > step.step_index:
                    progress_bar.update()

        frames = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return VideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Clips from latents `(B, C, T, h, w)`: through the VAE if there is one, else the latents are the pixels."""
        if self.vae is not None:
            mean, std = self._latent_statistics(latents.device)
            latents = self.vae.decode((latents * std + mean).to(self.vae.dtype), return_dict=False)[0]
        return self.video_processor.postprocess_video(latents.float(), output_type=output_type)

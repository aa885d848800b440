"""Class to picture or clip, block by block, with a key-value cache of the finished blocks (ACDiT)."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.video_processor import VideoProcessor

from dit_suite.models.acdit import ACDiTTransformer3DModel
from dit_suite.pipelines.pipeline_output import VideoPipelineOutput
from dit_suite.pipelines.sampling_mixins import ClassLabelsMixin, SamplingMixin, check_positive, initial_noise
from dit_suite.schedulers.diffusers_schedulers import step_arguments
from dit_suite.schedulers.guidance import guide
from dit_suite.step_plan import Run, StepContext, publish_step


class ACDiTPipeline(ClassLabelsMixin, SamplingMixin, DiffusionPipeline):
    """Denoises one block after another; each sees the finished blocks before it.

    Args:
        transformer: the network.
        scheduler: a diffusers scheduler whose `prediction_type` is what the network was trained to predict ("epsilon"
            in released weights, or "sample"); a fresh copy serves every block.
        vae: an image autoencoder (clips are coded frame by frame), or None for pixel space.
        id2label: class id to name.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ACDiTTransformer3DModel,
        scheduler: Any,
        vae: Any = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_labels(id2label)
        self.video_processor = VideoProcessor(vae_scale_factor=1, do_resize=False)

    @property
    def num_classes(self) -> int:
        return self.transformer.config.num_classes

    @property
    def null_class(self) -> int | None:
        """Label that means "no class"; None where the network was trained without label dropout."""
        return self.transformer.null_label

    def check_inputs(
        self,
        count: int,
        num_inference_steps: int,
        guidance_scale: float,
        block_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        prefix: torch.Tensor | None,
        num_prefix_blocks: int,
        output_type: str,
        callback_tensor_inputs: list[str],
    ) -> None:
        """Raises `ValueError` with one sentence for anything the call can't use."""
        check_positive(num_inference_steps=num_inference_steps)
        if guidance_scale > 1 and self.transformer.null_label is None:
            raise ValueError("this network has no null class, so it can't be guided: set guidance_scale to 1")
        self.transformer.check_block_size(block_size)
        num_blocks = self.transformer.num_tokens // block_size
        shape = self._latent_shape(count)
        self.check_sampling(shape, generator, latents, output_type, callback_tensor_inputs)
        if prefix is not None and tuple(prefix.shape) != shape:
            raise ValueError(f"prefix must have the shape {shape}, got {tuple(prefix.shape)}")
        if (prefix is None) != (num_prefix_blocks == 0) or not 0 <= num_prefix_blocks < num_blocks:
            raise ValueError(
                f"prefix and num_prefix_blocks (1 to {num_blocks - 1}) go together, got num_prefix_blocks="
                f"{num_prefix_blocks}"
            )
        if self.scheduler.config.get("prediction_type", "epsilon") not in ("epsilon", "sample"):
            raise ValueError(
                "ACDiT predicts the noise, or the sample: make the scheduler with prediction_type='epsilon' or 'sample'"
            )

    def _latent_shape(self, count: int) -> tuple[int, ...]:
        config = self.transformer.config
        return (count, config.in_channels, config.num_frames, config.sample_height, config.sample_width)

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise of all blocks `(batch, channels, frames, height, width)`; row i comes from generator i."""
        if latents is None:
            latents = initial_noise(shape, device, generator)
        return latents.to(device=device, dtype=torch.float32)

    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Pictures, or clips where the network has several frames, from latents in [-1, 1] or of the autoencoder."""
        if self.vae is not None:
            flat = latents.transpose(1, 2).flatten(0, 1).to(self.vae.dtype) / self.vae.config.scaling_factor
            latents = self.vae.decode(flat).sample.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)
        latents = latents.float()
        if self.transformer.config.num_frames > 1:
            return self.video_processor.postprocess_video(latents, output_type=output_type)
        return self.video_processor.postprocess(latents[:, :, 0], output_type=output_type)

    def preview_sample(self, latents: torch.Tensor) -> torch.Tensor:
        """What a callback's sample shows by now: blocks not begun are grey (0), frames not begun are left out.

        Args:
            latents: the whole sample so far `(batch, channels, frames, height, width)`, as a callback gets it.
        """
        model = self.transformer
        index, block_size = self._block
        blocks = model.to_blocks(latents, block_size).clone()
        blocks[:, index + 1 :] = 0.0
        frames = -(-(index + 1) * block_size * model.config.num_frames // model.num_tokens)
        return model.from_blocks(blocks)[:, :, :frames]

    def _predict(
        self, hidden: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor, step: StepContext, **cached: Any
    ) -> torch.Tensor:
        """The guided prediction of one block in float32; both halves of guidance read one cache of clean keys."""
        repeats = labels.shape[0] // hidden.shape[0]
        hidden = hidden.to(self.transformer.dtype).repeat(repeats, 1, 1, 1)
        with publish_step(step):
            out = self.transformer(hidden, timestep, labels, return_dict=False, **cached)[0].float()
        if repeats == 1:
            return out
        uncond, cond = out.chunk(2)
        return guide(uncond, cond, self.guidance_scale)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        num_inference_steps: int = 25,
        guidance_scale: float = 1.5,
        block_size: int | None = None,
        prefix: torch.Tensor | None = None,
        num_prefix_blocks: int = 0,
        fps: int = 8,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | VideoPipelineOutput | tuple:
        """Generates one picture or clip per label.

        Args:
            class_labels: class ids or names.
            num_inference_steps: denoising steps per block.
            guidance_scale: classifier-free guidance; 1 or less turns it off.
            block_size: tokens per block; default: what the network was trained with. All tokens: plain diffusion.
            prefix: a sample whose first `num_prefix_blocks` blocks are kept (outpainting, continuation of a clip),
                latents `(batch, channels, frames, height, width)`.
            num_prefix_blocks: blocks of `prefix` that are given.
            fps: not used here; the frame rate of a written file.
            generator: one for the batch, or one per sample; drives every random draw.
            latents: initial noise of all blocks, shaped like `prefix`.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: an output object, or a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, {"latents": whole sample so far})`; steps count on
                over the blocks. The block under way is taken from a replaced sample. `pipe._interrupt = True` stops.
            callback_on_step_end_tensor_inputs: only "latents".

        Returns:
            `ImagePipelineOutput` with `images`, or `VideoPipelineOutput` with `frames` for a network of several frames.

        Raises:
            ValueError: one sentence about the first input that can't be used.

        Examples:
            >>> import dit_suite
            >>> pipe = dit_suite.load_pipeline("my-acdit")
            >>> pipe([3, 7], num_inference_steps=25).images[0].save("sample.png")
        """
        callback_inputs = self.callback_tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        ids = self.get_label_ids(class_labels)
        block_size = block_size or self.transformer.config.block_size
        self.check_inputs(
            len(ids), num_inference_steps, guidance_scale, block_size, generator, latents, prefix,
            num_prefix_blocks, output_type, callback_inputs,
        )  # fmt: skip
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device, model = self._execution_device, self.transformer
        labels = torch.tensor(ids, device=device)
        if self.do_classifier_free_guidance:
            labels = torch.cat([torch.full_like(labels, model.null_label), labels])
        noise = self.prepare_latents(self._latent_shape(len(ids)), device, generator, latents)
        blocks = model.to_blocks(noise, block_size)
        num_blocks = blocks.shape[1]
        if prefix is not None:
            kept = model.to_blocks(prefix.to(blocks), block_size)[:, :num_prefix_blocks]
            blocks = torch.cat([kept, blocks[:, num_prefix_blocks:]], dim=1)
        self._num_timesteps = num_inference_steps * (num_blocks - num_prefix_blocks)

        step_kwargs = step_arguments(self.scheduler, generator)
        cache = model.new_cache(len(ids), block_size)
        number = 0
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for index in range(num_prefix_blocks, num_blocks):
                self._block = index, block_size
                scheduler = type(self.scheduler).from_config(self.scheduler.config)
                scheduler.set_timesteps(num_inference_steps, device=device)
                block = blocks[:, index : index + 1] * scheduler.init_noise_sigma
                new = blocks[:, cache.length : index].to(model.dtype) if index > cache.length else None
                run = Run()
                for step_index, timestep in enumerate(scheduler.timesteps):
                    if self.interrupt:
                        continue
                    step = StepContext(
                        step_index, num_inference_steps, float(timestep),
                        "batched" if self.do_classifier_free_guidance else "none", run=run, extras={"block": index},
                    )  # fmt: skip
                    cached = {"kv_cache": cache, "block_index": index, "clean_hidden_states": new}
                    hidden = scheduler.scale_model_input(block, timestep)
                    prediction, new = self._predict(hidden, timestep, labels, step, **cached), None
                    block = scheduler.step(prediction, timestep, block, **step_kwargs, return_dict=False)[0]
                    blocks = torch.cat([blocks[:, :index], block, blocks[:, index + 1 :]], dim=1)
                    if callback_on_step_end is not None:
                        tensors = {name: {"latents": model.from_blocks(blocks)}[name] for name in callback_inputs}
                        replaced = callback_on_step_end(self, number, timestep, tensors) or {}
                        if "latents" in replaced:
                            blocks = model.to_blocks(replaced["latents"].to(blocks), block_size)
                            block = blocks[:, index : index + 1]
                    number += 1
                    progress_bar.update()
                if self.interrupt:
                    break

        sample = model.from_blocks(blocks)
        result = sample if output_type == "latent" else self.decode(sample, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (result,)
        if model.config.num_frames > 1:
            return VideoPipelineOutput(frames=result)
        return ImagePipelineOutput(images=result)

"""Actions in, clip out: scripted rollouts of a Next-Frame Diffusion model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.video_processor import VideoProcessor
from PIL import Image

from dit_suite.conditions import action_ids
from dit_suite.metadata import write_png
from dit_suite.models.nfd import NFDTransformer3DModel
from dit_suite.pipelines.pipeline_output import VideoPipelineOutput
from dit_suite.pipelines.sampling_mixins import SamplingMixin, check_positive
from dit_suite.schedulers.frame_sampler import FrameNoise, FrameSampler, FrameSamplerOptions
from dit_suite.schedulers.speculative import SpeculativeOptions, SpeculativeSampler
from dit_suite.schedulers.trigflow import FrameFlowScheduler, TrigFlowScheduler

START_FRAMES = "start_frames.png"
_SEED_LIMIT = 2**62


def write_start_frames(frames: np.ndarray, folder: str | Path) -> Path:
    """Puts frames `(count, height, width, 3)` uint8 side by side into `start_frames.png` of a checkpoint's folder."""
    path = Path(folder) / START_FRAMES
    sheet = Image.fromarray(np.concatenate(list(frames), axis=1))
    write_png(sheet, path, None)
    return path


class _GivenNoise(FrameNoise):
    """Initial noise that the caller hands in; the other draws are as usual."""

    def __init__(self, base_seeds: Sequence[int], latents: torch.Tensor, first: int):
        super().__init__(base_seeds, tuple(latents.shape[i] for i in (1, 3, 4)))
        self.latents, self.first = latents, first

    def initial(self, first: int, count: int) -> torch.Tensor:
        given = self.latents[:, :, first - self.first : first - self.first + count]
        missing = count - given.shape[2]
        return given if not missing else torch.cat([given, super().initial(first + count - missing, missing)], dim=2)


class NFDPipeline(SamplingMixin, DiffusionPipeline):
    """Samples a clip frame by frame, one action per frame.

    Args:
        transformer: the network.
        scheduler: `TrigFlowScheduler` for a consistency student, `FrameFlowScheduler` for a flow teacher.
        vae: an autoencoder of single frames, or None for pixel space.
        action_names: what the entries of an action vector are called.
        fps: frames per second of the game.
        default_steps: denoising passes per frame that the weights were trained for.
        context_noise: noise level of finished frames in the context that the weights were trained for.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: NFDTransformer3DModel,
        scheduler: TrigFlowScheduler | FrameFlowScheduler,
        vae: Any = None,
        action_names: Sequence[str] | None = None,
        fps: int = 8,
        default_steps: int = 2,
        context_noise: float = 0.05,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = list(action_names) if action_names else [str(i) for i in range(transformer.config.num_actions)]
        if len(names) != transformer.config.num_actions:
            raise ValueError(f"{len(names)} action names were given for {transformer.config.num_actions} actions")
        self.register_to_config(action_names=names, fps=fps, default_steps=default_steps, context_noise=context_noise)
        self.video_processor = VideoProcessor(vae_scale_factor=1, do_resize=False)

    @property
    def guidance_scale(self) -> float:
        """These models are not guided."""
        return 1.0

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        config = self.transformer.config
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        return config.sample_height * factor, config.sample_width * factor

    def start_frames(self) -> torch.Tensor | None:
        """Start frames that come with the checkpoint, `(count, 3, height, width)` in [-1, 1], or None.

        They lie side by side in `start_frames.png` of the checkpoint's folder.
        """
        path = Path(self.config.get("_name_or_path") or ".") / START_FRAMES
        if not path.is_file():
            return None
        width = self.frame_size[1]
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
        return pixels.permute(2, 0, 1).unflatten(2, (-1, width)).permute(2, 0, 1, 3).float() / 127.5 - 1.0

    def action_vectors(self, actions: Sequence[Any] | torch.Tensor) -> torch.Tensor:
        """Action vectors `(batch, frames, num_actions)` of indices, names, or vectors.

        Args:
            actions: one list per clip (all of one length), a single list, or a tensor of vectors.

        Raises:
            ValueError: an action does not exist, or the lists differ in length.
        """
        size, names = self.transformer.config.num_actions, self.config.action_names
        if isinstance(actions, torch.Tensor) and actions.ndim == 3 and actions.shape[-1] == size:
            return actions.float()
        rows = actions.tolist() if isinstance(actions, torch.Tensor) else list(actions)
        rows = [rows] if rows and not isinstance(rows[0], (list, tuple)) else [list(row) for row in rows]
        if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
            raise ValueError("actions must be one or several non-empty lists of one length")
        indices = [action_ids(row, names) for row in rows]
        return torch.nn.functional.one_hot(torch.tensor(indices), size).float()

    def check_inputs(
        self,
        count: int,
        num_frames: int,
        num_inference_steps: int,
        image: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_tensor_inputs: list[str],
    ) -> None:
        """Raises `ValueError` with one sentence for anything the call can't use."""
        config = self.transformer.config
        check_positive(num_inference_steps=num_inference_steps)
        shape = (count, config.in_channels, num_frames, config.sample_height, config.sample_width)
        self.check_sampling(shape, generator, latents, output_type, callback_tensor_inputs)
        if image is None:
            return
        wanted = (config.in_channels if self.vae is None else 3, *self.frame_size)
        if image.ndim != 5 or (image.shape[1], *image.shape[3:]) != wanted:
            sizes = "x".join(map(str, wanted))
            raise ValueError(f"start images must be {sizes} (channels, height, width), got {tuple(image.shape)}")
        if image.shape[0] not in (1, count):
            raise ValueError(f"{image.shape[0]} start images were given for {count} clips")

    def _start(self, image: Any, start_frame: int | None) -> torch.Tensor | None:
        """Given frames `(batch, 3, frames, height, width)` in [-1, 1]."""
        if start_frame is not None:
            if image is not None:
                raise ValueError("give image or start_frame, not both")
            frames = self.start_frames()
            if frames is None:
                raise ValueError("this checkpoint has no start frames: give image, or neither")
            if not 0 <= start_frame < len(frames):
                raise ValueError(f"start_frame must be between 0 and {len(frames) - 1}, got {start_frame}")
            return frames[start_frame][None, :, None]
        if image is None:
            return None
        if not isinstance(image, torch.Tensor):
            images = image if isinstance(image, (list, tuple)) else [image]
            arrays = [np.asarray(picture.convert("RGB")) for picture in images]
            image = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        return image[:, :, None] if image.ndim == 4 else image

    @staticmethod
    def base_seeds(count: int, generator: torch.Generator | list[torch.Generator] | None) -> list[int]:
        """One seed per clip, drawn from its generator; every random number of the clip follows from it."""
        generators = generator if isinstance(generator, list) else [generator] * count
        return [
            int(torch.randint(_SEED_LIMIT, (1,), generator=g, device="cpu" if g is None else g.device))
            for g in generators
        ]

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Pixels `(batch, 3, frames, height, width)` in [-1, 1] to what the network works on."""
        if self.vae is None:
            return frames
        flat = frames.transpose(1, 2).flatten(0, 1).to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode(flat).latent_dist.mode() * self.vae.config.scaling_factor
        return latents.unflatten(0, (frames.shape[0], -1)).transpose(1, 2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`."""
        if self.vae is None:
            return latents
        flat = latents.transpose(1, 2).flatten(0, 1).to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(flat).sample.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)

    def sampler(self, base_seeds: Sequence[int], options: FrameSamplerOptions, draft_frames: int = 1) -> FrameSampler:
        """A fresh sampler with its own copy of the scheduler, so that calls share no state."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        return FrameSampler(self.transformer, scheduler, options, base_seeds, draft_frames)

    @torch.no_grad()
    def __call__(
        self,
        actions: Sequence[Any] | torch.Tensor,
        image: Any = None,
        start_frame: int | None = None,
        num_inference_steps: int | None = None,
        speculation: str = "off",
        draft_length: int = 3,
        adaptive_draft: bool = False,
        context_noise: float | None = None,
        context_mode: str = "rolling",
        fixed_passes: str = "off",
        fps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> VideoPipelineOutput | tuple:
        """Plays the actions.

        Args:
            actions: indices, names or vectors; one list per clip. The action at place i leads to the frame at place
                i + 1; the first frame is given, or dreamed under the null action.
            image: first frame of each clip (PIL, or tensor `(batch, 3, height, width)` or with several frames
                `(batch, 3, frames, height, width)` in [-1, 1]).
            start_frame: number of a start frame that comes with the checkpoint, instead of `image`.
            num_inference_steps: denoising passes per frame; default: what the weights were trained for.
            speculation: "off", "joint" (drafts whose later frames differ from plain sampling, much with few passes),
                "staggered" (less so, more passes) or "run_ahead".
            draft_length: frames per draft.
            adaptive_draft: choose the draft length from how long actions are held.
            context_noise: noise level of finished frames; default: what the weights were trained with.
            context_mode: "rolling" (key-value cache), "recompute" (window encoded for each frame) or "none".
            fixed_passes: "compiled" runs every pass in one shape through `torch.compile`, on a GPU as a CUDA graph;
                "eager" does the same uncompiled.
            fps: not used here; the frame rate of a written file.
            generator: one for the batch, or one per clip.
            latents: initial noise of the generated frames `(batch, channels, frames, height, width)`.
            output_type: "pil" (lists of lists), "np" `(batch, frames, height, width, 3)`, "pt" or "latent".
            return_dict: a `VideoPipelineOutput`, or a tuple.
            callback_on_step_end: called after every frame as `callback(pipe, frame, timestep, {"latents": clip})` with
                the clip so far; a replaced clip counts, its last frame also as context. `pipe._interrupt = True` stops.
            callback_on_step_end_tensor_inputs: only "latents".

        Returns:
            `VideoPipelineOutput` with `frames`: start frames and one frame per action.

        Raises:
            ValueError: one sentence about the first input that can't be used.

        Examples:
            >>> import dit_suite
            >>> pipe = dit_suite.load_pipeline("moving-square-nfd")
            >>> clip = pipe([["right"] * 4 + ["down"] * 4], start_frame=0).frames[0]
        """
        callback_inputs = self.callback_tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        vectors = self.action_vectors(actions)
        start = self._start(image, start_frame)
        if start is None:
            vectors = torch.cat([torch.zeros_like(vectors[:, :1]), vectors], dim=1)
        batch, num_new = vectors.shape[:2]
        options = FrameSamplerOptions(
            num_inference_steps=self.config.default_steps if num_inference_steps is None else num_inference_steps,
            context_noise=self.config.context_noise if context_noise is None else context_noise,
            context_mode=context_mode,
            fixed_passes=fixed_passes,
        )
        drafting = SpeculativeOptions(speculation=speculation, draft_length=draft_length, adaptive_draft=adaptive_draft)
        self.check_inputs(
            batch, num_new, options.num_inference_steps, start, generator, latents, output_type, callback_inputs
        )
        self._interrupt = False
        self._num_timesteps = num_new
        device = self._execution_device
        seeds = self.base_seeds(batch, generator)
        if start is not None:
            start = self.encode(start.expand(batch, -1, -1, -1, -1).to(device))
        groups = [list(range(batch))] if speculation == "off" else [[i] for i in range(batch)]

        clips = []
        with self.progress_bar(total=num_new * len(groups)) as progress_bar:
            for rows in groups:
                sampler = self.sampler([seeds[i] for i in rows], options, drafting.num_ahead)
                clip = vectors.new_zeros(len(rows), *sampler.noise.frame_shape)[:, :, None][:, :, :0].to(device)
                if start is not None:
                    clip = start[rows].to(self.transformer.dtype)
                    nothing = vectors.new_zeros(len(rows), clip.shape[2], vectors.shape[-1])
                    sampler.extend(clip, nothing)
                if latents is not None:
                    sampler.noise = _GivenNoise([seeds[i] for i in rows], latents[rows].cpu(), sampler.num_frames)
                machine = None if speculation == "off" else SpeculativeSampler(sampler, drafting)
                for index in range(num_new):
                    if self.interrupt:
                        continue
                    action = vectors[rows, index]
                    if machine is None:
                        frame = sampler.draft(action[:, None])[:, :, 0]
                        sampler.append(frame, action)
                    else:
                        frame = machine.tick(tuple(action[0].tolist()))
                    clip = torch.cat([clip, frame[:, :, None]], dim=2)
                    if callback_on_step_end is not None:
                        tensors = {name: {"latents": clip}[name] for name in callback_inputs}
                        last = sampler.timesteps[-1]
                        replaced = callback_on_step_end(self, index, last, tensors) or {}
                        if "latents" in replaced:
                            clip = replaced["latents"]
                            sampler.replace_last(clip[:, :, -1])
                    progress_bar.update()
                clips.append(clip)

        shortest = min(clip.shape[2] for clip in clips)
        result = torch.cat([clip[:, :, :shortest] for clip in clips])
        if output_type != "latent":
            result = self.video_processor.postprocess_video(self.decode(result).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return VideoPipelineOutput(frames=result) if return_dict else (result,)

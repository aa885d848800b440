"""What the pipelines share: callbacks, common checks, initial noise, text and class conditions, decoding."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import CacheMixin, ModelMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin

from dit_suite.conditions import ClassLabels
from dit_suite.schedulers.generators import randn_per_sample

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Generators = torch.Generator | list[torch.Generator] | None


class SamplingMixin:
    """For a `DiffusionPipeline` that sets `_guidance_scale`, `_num_timesteps` and `_interrupt` in its call."""

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Calls of `callback_on_step_end` in the present run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @staticmethod
    def callback_tensor_names(callback: Any, names: Sequence[str] | None) -> list[str]:
        """The tensors that a callback asks for: a `PipelineCallback` names them itself."""
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        return list(names or ["latents"])

    def after_step(
        self, callback: Callable | None, step_index: int, timestep: Any, names: Sequence[str], **tensors: Any
    ) -> tuple[Any, ...]:
        """The given tensors after the caller's callback saw those in `names` and replaced what it wanted, in order."""
        if callback is None:
            return tuple(tensors.values())
        replaced = callback(self, step_index, timestep, {name: tensors[name] for name in names}) or {}
        return tuple(replaced.get(name, tensor) for name, tensor in tensors.items())

    def check_sampling(
        self,
        shape: tuple[int, ...],
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str,
        callback_tensor_inputs: Sequence[str],
        output_types: Sequence[str] = OUTPUT_TYPES,
    ) -> None:
        """The checks that every pipeline makes, for noise of `shape` (samples first).

        Raises:
            ValueError: generators or latents do not fit the shape, or an output type or callback tensor is unknown.
        """
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators were given for {shape[0]} samples")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        if output_type not in output_types:
            raise ValueError(f"output_type must be one of {', '.join(output_types)}, got {output_type!r}")
        unknown = [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callbacks can have {', '.join(self._callback_tensor_inputs)}, not {unknown[0]}")


class LatentImagesMixin:
    """For a `DiffusionPipeline` with a `transformer` and an optional `vae`: sizes, and pictures from latents."""

    def attach_image_processor(self) -> None:
        """Sets `vae_scale_factor` (pixels per latent along one side) and `image_processor`."""
        self.vae_scale_factor = 1
        if self.vae is not None:
            config = self.vae.config
            channels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
            self.vae_scale_factor = config.get("spatial_compression_ratio") or 2 ** (len(channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Pictures from latents `(B, C, h, w)`: through the VAE if there is one, else the latents are the pixels."""
        if self.vae is not None:
            config = self.vae.config
            latents = latents.to(self.vae.dtype) / config.scaling_factor + (config.get("shift_factor") or 0.0)
            latents = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(latents, output_type=output_type)

    def _latent_shape(self, count: int, height: int, width: int) -> tuple[int, int, int, int]:
        factor = self.vae_scale_factor
        return (count, self.transformer.config.in_channels, height // factor, width // factor)

    def _default_size(self) -> int:
        return self.transformer.config.sample_size * self.vae_scale_factor


class LoraMixin(SanaLoraLoaderMixin):
    """For a `DiffusionPipeline` with a `transformer`: `load_lora_weights`, `unload_lora_weights`, `fuse_lora` and
    `set_adapters` of diffusers, for weights named `transformer.*`."""

    @classmethod
    def load_lora_into_transformer(cls, state_dict: dict[str, torch.Tensor], transformer: ModelMixin, **kwargs) -> None:
        """Injects LoRA weights; a diffusers class without the adapter mixin gets it for this instance."""
        if not isinstance(transformer, PeftAdapterMixin):
            base = type(transformer)
            namespace = {"__module__": base.__module__, "__doc__": base.__doc__}
            transformer.__class__ = type(base.__name__, (base, PeftAdapterMixin), namespace)
        super().load_lora_into_transformer(state_dict, transformer, **kwargs)


class PromptMixin:
    """For a `DiffusionPipeline` with an optional `text_encoder` and `tokenizer`."""

    def check_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> int:
        """The number of prompts.

        Raises:
            ValueError: both or neither of prompt and prompt_embeds, a prompt that is not text, a missing text encoder,
                or negatives that do not fit.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds, and not both")
        if prompt is not None and not (
            isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt))
        ):
            raise ValueError(f"prompt must be a string or a non-empty list of strings, got {prompt!r}")
        if prompt is not None and (self.text_encoder is None or self.tokenizer is None):
            raise ValueError(
                "this pipeline has no text encoder: open it with dit_suite.load_pipeline, hand text_encoder= and "
                "tokenizer= to from_pretrained, or pass prompt_embeds"
            )
        count = len(prompt_embeds) if prompt_embeds is not None else 1 if isinstance(prompt, str) else len(prompt)
        if isinstance(negative_prompt, list) and len(negative_prompt) != count:
            raise ValueError(f"negative_prompt has {len(negative_prompt)} entries for {count} prompts")
        shapes = [tuple(x.shape) for x in (prompt_embeds, negative_prompt_embeds) if x is not None]
        if len(set(shapes)) > 1:
            raise ValueError(f"prompt_embeds {shapes[0]} and negative_prompt_embeds {shapes[1]} must have one shape")
        return count

    def encode_tokens(
        self, prompt: list[str], device: torch.device, max_sequence_length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states `(B, L, D)` in the encoder's type and their mask `(B, L)`, padded to one length."""
        tokens = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=max_sequence_length or self.config.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        states = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return states, tokens.attention_mask

    def negative_texts(self, negative_prompt: str | list[str] | None, count: int) -> list[str]:
        """One text per prompt to steer away from, by default the empty one.

        Raises:
            ValueError: there is no text encoder to read it.
        """
        if self.text_encoder is None:
            raise ValueError("guidance without a text encoder needs negative_prompt_embeds")
        return negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * count


def check_size(multiple: int, **sides: int) -> None:
    """Raises `ValueError` for the first side that is not a positive multiple of `multiple`, by its name."""
    for name, value in sides.items():
        if value < multiple or value % multiple:
            raise ValueError(f"{name} must be a positive multiple of {multiple}, got {value}")


def check_positive(**values: int) -> None:
    """Raises `ValueError` for the first value below 1, by its name."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def cache_context(model: ModelMixin, branch: str) -> contextlib.AbstractContextManager:
    """Tells diffusers' own caches which guidance branch runs, where the class supports them."""
    return model.cache_context(branch) if isinstance(model, CacheMixin) else contextlib.nullcontext()


def initial_noise(shape: tuple[int, ...], device: torch.device, generator: Generators) -> torch.Tensor:
    """Standard normal float32 noise on `device`; with a list of generators, row i comes from generator i alone."""
    if isinstance(generator, list):
        return randn_per_sample(shape[1:], generator, device)
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source, dtype=torch.float32).to(device)


class ClassLabelsMixin:
    """Class labels by id or by name, from the pipeline's config entry `id2label` ({id: "name, other name"})."""

    def register_labels(self, id2label: dict[str, str] | None) -> None:
        """Keeps `id2label` in the config, ids as text as JSON has them."""
        names = None if id2label is None else {str(key): value for key, value in id2label.items()}
        self.register_to_config(id2label=names)

    @property
    def known_labels(self) -> ClassLabels:
        """The classes of the network, with their names."""
        return ClassLabels(self.num_classes, self.null_class, self.config.id2label)

    @property
    def labels(self) -> dict[str, tuple[int, ...]]:
        """Class ids by name (lower case); in ImageNet a few names belong to two classes."""
        return self.known_labels.by_name

    def get_label_ids(self, labels: Any) -> list[int]:
        """Class ids of names or ids, as `ClassLabels.ids`."""
        return self.known_labels.ids(labels)

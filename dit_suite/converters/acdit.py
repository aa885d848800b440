"""Released ACDiT checkpoints (`ACDiT-XL-img.pt` and its siblings) to an `ACDiTPipeline`.

The file holds the weights and the training arguments; what the shapes do not tell (patch size, block size, frames) is
read from those arguments unless a flag gives it. Released weights need `rope_style="reference"`.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler

from dit_suite.converters import ConversionError, build_strict, check_keys, read_checkpoint
from dit_suite.models.acdit import ACDiTTransformer3DModel

NAME = "acdit"
ABOUT = "released ACDiT checkpoint (.pt), pictures or clips"

_STEMS = {
    "x_embedder": "token_embed",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "y_embedder.embedding_table": "label_embed.embedding_table",
    "final_layer.norm_final": "norm_out",
    "final_layer.adaLN_modulation.1": "modulation_out",
    "final_layer.linear": "proj_out",
}
_BLOCK_STEMS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "attn.to_qkv",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "attn.proj": "attn.to_out",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "modulation",
}
_VAE_SCALE = 8


def rename_keys(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Released names to ours, one to one. An unknown name stays as it is, and the strict build reports it."""
    renamed = {}
    for key, value in tensors.items():
        stem, _, leaf = key.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
        if stem in _STEMS:
            key = f"{_STEMS[stem]}.{leaf}"
        elif block and block[2] in _BLOCK_STEMS:
            key = f"transformer_blocks.{block[1]}.{_BLOCK_STEMS[block[2]]}.{leaf}"
        renamed[key] = value
    return renamed


def config_from(
    renamed: Mapping[str, torch.Tensor],
    *,
    grid: tuple[int, int, int],
    patch_size: int,
    block_size: int,
    rope_split: tuple[int, ...] | None = None,
    class_dropout_prob: float = 0.1,
) -> dict[str, Any]:
    """The arguments of `ACDiTTransformer3DModel` for these weights.

    Args:
        renamed: weights under our names.
        grid: tokens (frames, rows, columns).
        rope_split: proportions of the position axes; None for the default.

    Raises:
        ConversionError: a tensor that tells a size is missing or odd.
    """
    needed = ["token_embed.weight", "label_embed.embedding_table.weight"]
    needed += ["transformer_blocks.0.attn.norm_q.weight", "transformer_blocks.0.ff.net.0.proj.bias"]
    check_keys([key for key in needed if key not in renamed], [])
    width, token_channels = renamed[needed[0]].shape
    head_dim = renamed[needed[2]].shape[0]
    if token_channels % patch_size**2 or width % head_dim:
        raise ConversionError(f"{token_channels} channels a token do not fit patches of {patch_size}x{patch_size}")
    layers = {int(m[1]) for key in renamed if (m := re.match(r"transformer_blocks\.(\d+)\.", key))}
    return {
        "in_channels": token_channels // patch_size**2,
        "sample_height": grid[1] * patch_size,
        "sample_width": grid[2] * patch_size,
        "num_frames": grid[0],
        "patch_size": patch_size,
        "block_size": block_size,
        "num_layers": len(layers),
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "mlp_ratio": renamed[needed[3]].shape[0] / width,
        "num_classes": renamed[needed[1]].shape[0] - int(class_dropout_prob > 0),
        "class_dropout_prob": class_dropout_prob,
        "rope_style": "reference",
        "rope_split": rope_split,
    }


def build_model(tensors: Mapping[str, torch.Tensor], **shape: Any) -> ACDiTTransformer3DModel:
    """The network of released weights; `shape` as in `config_from`."""
    renamed = rename_keys(tensors)
    return build_strict(ACDiTTransformer3DModel, config_from(renamed, **shape), renamed)


def make_scheduler() -> DPMSolverMultistepScheduler:
    """The released sampler: DPM-Solver++ of order 2 over the DDPM schedule with linear betas."""
    return DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")


def read_training_arguments(path: Path) -> dict[str, Any]:
    """The `args` that the training script saved beside the weights, or nothing."""
    if path.suffix == ".safetensors":
        return {}
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="meta", weights_only=True)
    args = content.get("args") if isinstance(content, dict) else None
    return vars(args) if isinstance(args, argparse.Namespace) else dict(args or {})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for what the file does not tell (each overrides the arguments saved in it)."""
    parser.add_argument("--image-size", type=int, help="pixels (default: from the file, else 256)")
    parser.add_argument("--patch-size", type=int, help="latent pixels per token side (default: from the file)")
    parser.add_argument("--block-size", type=int, help="tokens per block (default: from the file)")
    parser.add_argument("--num-frames", type=int, help="frames of a clip (default: from the file, else 1)")
    parser.add_argument("--rope-split", help="proportions of the position axes, such as 2_3_3")
    parser.add_argument("--vae", type=Path, help="folder of a diffusers AutoencoderKL to put beside the network")
    parser.add_argument("--labels", type=Path, help="JSON file, class id to class name")


def convert(source: Path, arguments: argparse.Namespace) -> Any:
    """Builds the `ACDiTPipeline` of a released file.

    Raises:
        ConversionError: the weights do not fit the network, or a size is neither in the file nor given.
    """
    from dit_suite.pipelines.pipeline_acdit import ACDiTPipeline
    from dit_suite.pipelines.pipeline_class_to_image import read_labels

    saved = read_training_arguments(source)

    def setting(name: str, default: int | None = None) -> int:
        value = getattr(arguments, name) or saved.get(name) or default
        if value is None:
            raise ConversionError(f"the file does not tell {name}: give --{name.replace('_', '-')}")
        return int(value)

    patch, frames = setting("patch_size"), setting("num_frames", 1)
    side = setting("image_size", 256) // int(saved.get("vae_patch_pixels") or _VAE_SCALE) // patch
    split = arguments.rope_split or saved.get("nd_split")
    model = build_model(
        read_checkpoint(source),
        grid=(frames, side, side),
        patch_size=patch,
        block_size=setting("block_size", None if frames > 1 else (side // 2) ** 2 or 1),
        rope_split=tuple(int(part) for part in str(split).split("_")) if split else None,
    )
    ar_len = saved.get("ar_len")
    if ar_len and model.num_tokens != int(ar_len) * model.config.block_size:
        blocks = model.num_tokens / model.config.block_size
        raise ConversionError(f"the file was trained with {ar_len} blocks, these sizes give {blocks:g}")
    vae = AutoencoderKL.from_pretrained(arguments.vae) if arguments.vae else None
    labels = read_labels(arguments.labels) if arguments.labels else None
    if vae is not None and 2 ** (len(vae.config.block_out_channels) - 1) != _VAE_SCALE:
        raise ConversionError(f"released ACDiT weights need an autoencoder of factor {_VAE_SCALE}")
    return ACDiTPipeline(transformer=model, scheduler=make_scheduler(), vae=vae, id2label=labels)

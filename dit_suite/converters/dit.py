"""Official DiT checkpoints (`DiT-XL-2-256x256.pt` and training files) to a `DiTModel` pipeline, and back.

The published weights are licensed CC-BY-NC 4.0 (non-commercial use). The renaming is a bijection. The fixed position
table of the official file is compared with the computed one and then dropped; every other tensor is used exactly once.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler

from dit_suite.converters import ConversionError, build_strict, check_keys, read_checkpoint
from dit_suite.models.dit import DiTModel
from dit_suite.models.dit_blocks import sincos_2d

NAME = "dit"
ABOUT = "official DiT checkpoint (.pt), or the diffusers DiTTransformer2DModel weights made from one"

_EMBEDDERS = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "final_layer.adaLN_modulation.1": "final_layer.adaln",
    "final_layer.linear": "final_layer.linear",
}
_BLOCK = {
    "adaLN_modulation.1": "adaln",
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_STOCK_EMBEDDERS = {
    "pos_embed.proj": "patch_embed.proj",
    "proj_out_1": "final_layer.adaln",
    "proj_out_2": "final_layer.linear",
}
_STOCK_BLOCK = {
    "norm1.linear": "adaln",
    "attn1.to_q": "attn.to_q",
    "attn1.to_k": "attn.to_k",
    "attn1.to_v": "attn.to_v",
    "attn1.to_out.0": "attn.to_out.0",
    "ff.net.0.proj": "ff.net.0.proj",
    "ff.net.2": "ff.net.2",
}
_STOCK_COPIES = {
    "norm1.emb.timestep_embedder.linear_1": "time_embed.linear_1",
    "norm1.emb.timestep_embedder.linear_2": "time_embed.linear_2",
    "norm1.emb.class_embedder.embedding_table": "label_embed.embedding_table",
}
_LABELS = ("y_embedder.embedding_table.weight", "label_embed.embedding_table.weight")
_PARTS = ("to_q", "to_k", "to_v")
_POSITION_TOLERANCE = 1e-5
HEADS_OF_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}


def rename_from_official(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official names to `DiTModel` names; the fused query/key/value tensors are split, `pos_embed` is left out.

    A name that is not part of the layout is kept as it is, so that the strict build reports it.
    """
    renamed = {}
    for key, value in tensors.items():
        stem, _, leaf = key.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
        if key == "pos_embed":
            continue
        if key == _LABELS[0]:
            renamed[_LABELS[1]] = value
        elif stem in _EMBEDDERS:
            renamed[f"{_EMBEDDERS[stem]}.{leaf}"] = value
        elif block and block[2] == "attn.qkv" and value.shape[0] % 3 == 0:
            for part, piece in zip(_PARTS, value.chunk(3, dim=0), strict=True):
                renamed[f"transformer_blocks.{block[1]}.attn.{part}.{leaf}"] = piece
        elif block and block[2] in _BLOCK:
            renamed[f"transformer_blocks.{block[1]}.{_BLOCK[block[2]]}.{leaf}"] = value
        else:
            renamed[key] = value
    return renamed


def to_official(model: DiTModel) -> dict[str, torch.Tensor]:
    """The state dict of `model` under the official names, with the fused projections and the position table."""
    embedders = {ours: official for official, ours in _EMBEDDERS.items()}
    parts = {ours: official for official, ours in _BLOCK.items()}
    state = model.state_dict()
    official = {"pos_embed": model.pos_embed.detach().clone()[None]}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
        if key == _LABELS[1]:
            official[_LABELS[0]] = value
        elif stem in embedders:
            official[f"{embedders[stem]}.{leaf}"] = value
        elif block and block[2] in parts:
            official[f"blocks.{block[1]}.{parts[block[2]]}.{leaf}"] = value
        elif block and block[2] == "attn.to_q":
            pieces = [state[f"transformer_blocks.{block[1]}.attn.{part}.{leaf}"] for part in _PARTS]
            official[f"blocks.{block[1]}.attn.qkv.{leaf}"] = torch.cat(pieces)
    return official


def rename_from_stock(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of diffusers' `DiTTransformer2DModel` to `DiTModel` names.

    Raises:
        ConversionError: the embedders, which diffusers copies into every block, are not equal (such a model was
            trained there and cannot be expressed with one embedder).
    """
    renamed: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        stem, _, leaf = key.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
        if block and block[2] in _STOCK_COPIES:
            name = f"{_STOCK_COPIES[block[2]]}.{leaf}"
            if name in renamed and not torch.equal(renamed[name], value):
                raise ConversionError(f"{key} differs from its copy in another block: there is no single embedder")
            renamed[name] = value
        elif block and block[2] in _STOCK_BLOCK:
            renamed[f"transformer_blocks.{block[1]}.{_STOCK_BLOCK[block[2]]}.{leaf}"] = value
        elif stem in _STOCK_EMBEDDERS:
            renamed[f"{_STOCK_EMBEDDERS[stem]}.{leaf}"] = value
        else:
            renamed[key] = value
    return renamed


def infer_config(
    renamed: Mapping[str, torch.Tensor],
    *,
    sample_size: int | None = None,
    num_heads: int | None = None,
    class_dropout_prob: float = 0.1,
    learn_sigma: bool = True,
    positions: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The `DiTModel` arguments that the shapes tell; heads come from the published sizes unless they are given.

    Args:
        renamed: the weights under `DiTModel` names.
        sample_size: latent side; taken from the official position table `positions (1, T, D)` when it is not given.

    Raises:
        ConversionError: a needed tensor is missing, or neither shapes nor arguments settle a value.
    """
    needed = ("patch_embed.proj.weight", "final_layer.linear.bias", _LABELS[1])
    check_keys([key for key in needed if key not in renamed], [])
    width, channels, patch, _ = renamed["patch_embed.proj.weight"].shape
    layers = {int(m[1]) for key in renamed if (m := re.match(r"transformer_blocks\.(\d+)\.", key))}
    fc1 = renamed.get("transformer_blocks.0.ff.net.0.proj.bias")
    heads = num_heads or HEADS_OF_WIDTH.get(width)
    if heads is None or width % heads:
        raise ConversionError(f"width {width} is not a published size: give the number of heads (--num-heads)")
    if sample_size is None:
        if positions is None:
            raise ConversionError("the file has no position table: give the latent side (--sample-size)")
        sample_size = round(positions.shape[-2] ** 0.5) * patch
    rows = renamed[_LABELS[1]].shape[0]
    return {
        "sample_size": sample_size,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": len(layers),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "mlp_ratio": 4.0 if fc1 is None else fc1.shape[0] / width,
        "num_classes": rows - int(class_dropout_prob > 0),
        "class_dropout_prob": class_dropout_prob,
        "learn_sigma": learn_sigma,
    }


def check_positions(positions: torch.Tensor, config: Mapping[str, Any]) -> None:
    """Raises `ConversionError` unless the official table `(1, T, D)` is the sin-cos table that `DiTModel` computes."""
    side = config["sample_size"] // config["patch_size"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if tuple(positions.shape) != (1, side * side, width):
        raise ConversionError(f"pos_embed has shape {tuple(positions.shape)}, expected {(1, side * side, width)}")
    if (positions[0].float() - sincos_2d(side, side, width)).abs().max() > _POSITION_TOLERANCE:
        raise ConversionError("pos_embed is not the fixed sin-cos table: this network has no learned positions")


def build_model(tensors: Mapping[str, torch.Tensor], **shape: Any) -> DiTModel:
    """A `DiTModel` from official or diffusers weights (told apart by their names); see `infer_config` for `shape`."""
    stock = any("norm1.emb." in key for key in tensors)
    renamed = rename_from_stock(tensors) if stock else rename_from_official(tensors)
    positions = None if stock else tensors.get("pos_embed")
    config = infer_config(renamed, positions=positions, **shape)
    if not stock:
        check_keys([] if positions is not None else ["pos_embed"], [])
        check_positions(positions, config)
    return build_strict(DiTModel, config, renamed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for what the weights do not tell."""
    parser.add_argument("--num-heads", type=int, help="attention heads (default: those of the published width)")
    parser.add_argument("--sample-size", type=int, help="latent side (default: from the position table)")
    parser.add_argument("--no-null-class", action="store_true", help="trained without label dropout")
    parser.add_argument("--no-learn-sigma", action="store_true", help="the model predicts no variance")
    parser.add_argument("--vae", type=Path, help="folder of a diffusers AutoencoderKL to put beside the network")
    parser.add_argument("--labels", type=Path, help="JSON file, class id to class name")
    parser.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim", help="scheduler to save")
    parser.add_argument("--noise-schedule", choices=("linear", "squaredcos_cap_v2"), default="linear")


def make_scheduler(sampler: str, noise_schedule: str, learn_sigma: bool) -> DDIMScheduler | DDPMScheduler:
    """The diffusers scheduler that reproduces the official sampler: DDIM, or DDPM with the learned variance range."""
    shared = {"num_train_timesteps": 1000, "beta_schedule": noise_schedule, "clip_sample": False}
    if noise_schedule == "linear":
        shared |= {"beta_start": 1e-4, "beta_end": 2e-2}
    if sampler == "ddim":
        return DDIMScheduler(**shared, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0)
    variance = "learned_range" if learn_sigma else "fixed_small"
    return DDPMScheduler(**shared, variance_type=variance, timestep_spacing="linspace")


def _stock_folder(source: Path) -> tuple[Path, dict[str, Any]]:
    """The weight file and the config of a diffusers transformer folder (or the pipeline folder around it)."""
    folder = source / "transformer" if (source / "transformer").is_dir() else source
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors")) or sorted(folder.glob("*.bin"))
    if len(files) != 1 or not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} must hold config.json and one weight file, found {len(files)}")
    return files[0], DiTModel.load_config(folder)


def _stock_labels(source: Path) -> dict[str, str] | None:
    """Class names that a pipeline folder carries."""
    path = source / "model_index.json"
    return json.loads(path.read_text("utf-8")).get("id2label") if path.is_file() else None


def convert(source: Path, arguments: argparse.Namespace) -> Any:
    """Builds the `ClassToImagePipeline` of an official file, or of a folder with diffusers' DiT class, whose VAE and
    class names come along."""
    from dit_suite.pipelines.pipeline_class_to_image import ClassToImagePipeline, read_labels

    heads, sample_size, vae_folder = arguments.num_heads, arguments.sample_size, arguments.vae
    labels = read_labels(arguments.labels) if arguments.labels else None
    if source.is_dir():
        labels = labels or _stock_labels(source)
        if vae_folder is None and (source / "vae").is_dir():
            vae_folder = source / "vae"
        source, config = _stock_folder(source)
        heads = heads or config.get("num_attention_heads")
        sample_size = sample_size or config.get("sample_size")
    learn_sigma = not arguments.no_learn_sigma
    model = build_model(
        read_checkpoint(source),
        num_heads=heads,
        sample_size=sample_size,
        class_dropout_prob=0.0 if arguments.no_null_class else 0.1,
        learn_sigma=learn_sigma,
    )
    vae = AutoencoderKL.from_pretrained(vae_folder, local_files_only=True) if vae_folder else None
    scheduler = make_scheduler(arguments.sampler, arguments.noise_schedule, learn_sigma)
    return ClassToImagePipeline(transformer=model, scheduler=scheduler, vae=vae, id2label=labels)

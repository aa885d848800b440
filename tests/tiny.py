"""Tiny real components with fixed random weights, for tests only."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    WanTransformer3DModel,
)
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from dit_suite.pipelines.pipeline_text_to_image import TextToImagePipeline
from dit_suite.pipelines.pipeline_text_to_video import TextToVideoPipeline

WORDS = ("red", "green", "blue", "apple", "sun", "cat", "flat", "style", ",")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def tiny_text_encoder(width: int = 16) -> BertModel:
    """A one-layer BERT."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
    )
    return BertModel(config).eval()


def tiny_vae() -> AutoencoderKL:
    """A two-level VAE with a factor of 2 and 4 latent channels."""
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    ).eval()


def tiny_pixart(
    channels: int = 3, out_channels: int | None = None, sample_size: int = 8, layers: int = 2
) -> PixArtTransformer2DModel:
    """A PixArt of few layers whose zero-initialised parts are made random, so that text and time matter."""
    torch.manual_seed(3)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=out_channels or channels,
        num_layers=layers,
        cross_attention_dim=16,
        sample_size=sample_size,
        patch_size=2,
        caption_channels=16,
        use_additional_conditions=False,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def tiny_text_to_image(vae: bool = False, **changes: Any) -> TextToImagePipeline:
    """A complete text-to-image pipeline of about 20,000 parameters, 8x8 pixels (16x16 with a VAE)."""
    components = {
        "transformer": tiny_pixart(channels=4 if vae else 3),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(),
        "vae": tiny_vae() if vae else None,
        "prediction_type": "flow_prediction",
        "max_sequence_length": 8,
    }
    pipe = TextToImagePipeline(**components | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_lora(network: torch.nn.Module, folder: Path) -> None:
    """Strong random LoRA weights for the queries and values of `network` (which is changed), as pipelines load them."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    donor = inject_adapter_in_model(config, network)
    for name, parameter in donor.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    weights = {f"transformer.{k}": v.contiguous() for k, v in get_peft_model_state_dict(donor).items()}
    save_file(weights, folder / "pytorch_lora_weights.safetensors")


def save_tiny(folder: Path, **changes: Any) -> Path:
    """A saved `tiny_text_to_image`."""
    tiny_text_to_image(**changes).save_pretrained(folder)
    return folder


def tiny_text_to_video(in_channels: int = 3) -> TextToVideoPipeline:
    """A complete text-to-video pipeline in pixel space, 4 frames of 8x8; 7 input channels take a start image."""
    torch.manual_seed(4)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=3,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return TextToVideoPipeline(
        transformer.eval(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        tiny_text_encoder(),
        tiny_tokenizer(),
        sample_size=(4, 8, 8),
        max_sequence_length=8,
    )

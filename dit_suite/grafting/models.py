"""Grafted transformers: the classes of the originals with a graft plan in their config, so that they save and load."""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config

from dit_suite.grafting.plan import GraftPlan
from dit_suite.grafting.surgery import apply_plan, block_list, inherit, seed_operators, transplant
from dit_suite.models.dit import DiTModel

_KEPT_PRECISE = ("filter", "conv1d")  # convolutions whose weights are read outside their own forward


def _sizes(config: Any) -> tuple[int, int, int]:
    """Width, number of tokens and heads of a model."""
    dim = config.num_attention_heads * config.attention_head_dim
    return dim, (config.sample_size // config.patch_size) ** 2, config.num_attention_heads


def _carry_out(model: Any, plan: dict[str, Any] | None) -> None:
    if plan:
        apply_plan(model, GraftPlan.from_dict(plan, len(block_list(model))), *_sizes(model.config))


class GraftedPixArtTransformer2DModel(PixArtTransformer2DModel, ModelMixin, ConfigMixin):
    """`PixArtTransformer2DModel` after a graft; the other arguments are those of that class."""

    _skip_layerwise_casting_patterns = [*PixArtTransformer2DModel._skip_layerwise_casting_patterns, *_KEPT_PRECISE]

    @register_to_config
    def __init__(
        self,
        graft_plan: dict[str, Any] | None = None,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
    ) -> None:
        values = {key: value for key, value in locals().items() if key not in ("self", "graft_plan", "__class__")}
        super().__init__(**values)
        _carry_out(self, graft_plan)


class GraftedDiTModel(DiTModel, ModelMixin, ConfigMixin):
    """`DiTModel` after a graft; the other arguments are those of that class."""

    _skip_layerwise_casting_patterns = [*DiTModel._skip_layerwise_casting_patterns, *_KEPT_PRECISE]

    @register_to_config
    def __init__(
        self,
        graft_plan: dict[str, Any] | None = None,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
    ) -> None:
        values = {key: value for key, value in locals().items() if key not in ("self", "graft_plan", "__class__")}
        super().__init__(**values)
        _carry_out(self, graft_plan)


_GRAFTED = ((PixArtTransformer2DModel, GraftedPixArtTransformer2DModel), (DiTModel, GraftedDiTModel))


def graft(model: torch.nn.Module, plan: GraftPlan, seed: int | None = None) -> torch.nn.Module:
    """A new model with the plan carried out. What is not exchanged keeps its weights; `model` stays as it is.

    Args:
        model: a trained PixArt or DiT.
        plan: what to exchange.
        seed: the fresh operators of layer l start from `seed + l`, whatever else the plan holds; None takes PyTorch's
            global generator as it is.

    Raises:
        ValueError: the class can't be grafted, is grafted already, the plan does not fit its depth, or an operator is
            to inherit weights that are not there.
    """
    if isinstance(model, tuple(grafted for _, grafted in _GRAFTED)) and model.config.graft_plan:
        raise ValueError("this model is grafted already; graft the original with a plan that holds both")
    grafted = next((grafted for original, grafted in _GRAFTED if isinstance(model, original)), None)
    if grafted is None:
        names = ", ".join(original.__name__ for original, _ in _GRAFTED)
        raise ValueError(f"{type(model).__name__} can't be grafted; {names} can")
    plan.check_depth(len(block_list(model)))
    config = {key: value for key, value in model.config.items() if not key.startswith("_") and key != "graft_plan"}
    new = grafted(graft_plan=plan.to_dict(), **config)
    if seed is not None:
        seed_operators(new, plan, len(block_list(model)), seed, *_sizes(new.config))
    transplant(model, new, plan)
    inherit(model, new, plan)
    parameter = next(model.parameters())
    return new.to(device=parameter.device, dtype=parameter.dtype).train(model.training)

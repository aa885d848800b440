"""PT-DiT fixtures: one forward pass with the intermediate values of block 0, and a four-step flow sampling."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit_suite.converters import build_strict
from dit_suite.converters.pt_dit import config_from, convert_keys
from dit_suite.golden import Result, Tensors, compare, section
from dit_suite.models.pt_dit import PTDiTTransformer3DModel
from dit_suite.models.shifted_windows import shift_region_mask
from dit_suite.pipelines.pipeline_text_to_image import TextToImagePipeline
from dit_suite.schedulers.pt_dit_flow import flow_sigmas, resolution_warp

FAMILY = "pt_dit"
PREFIXES = ("pt_dit_",)
FORWARD_TOLERANCE = 1e-4
SAMPLE_TOLERANCE = 1e-3


def build(tensors: Tensors, config: dict[str, Any]) -> PTDiTTransformer3DModel:
    """The network of a fixture, loaded strictly."""
    weights = section(tensors, "state_dict")
    ours = config_from(weights, config["num_heads"], config["sample_size"])
    ours["compress_ratios"] = tuple(config["compress_ratios"])
    ours["proxy_compress_ratios"] = tuple(config["proxy_compress_ratios"])
    return build_strict(PTDiTTransformer3DModel, ours, convert_keys(weights))


def as_released(output: torch.Tensor, channels: int) -> torch.Tensor:
    """The network's output with the reference's sign, x0 - noise, of the prediction channels."""
    return torch.cat([-output[:, :channels], output[:, channels:]], dim=1)


def trace(model: PTDiTTransformer3DModel, inputs: Tensors) -> dict[str, torch.Tensor]:
    """One forward pass; returns every recorded value by the fixture's names."""
    values: dict[str, torch.Tensor] = {}
    block = model.transformer_blocks[0]

    def keep_input(name: str):
        return lambda module, args: values.__setitem__(name, args[0])

    def keep_output(name: str):
        return lambda module, args, output: values.__setitem__(name, output)

    before = {block: "block0_in", block.norm1: "block0_after_giim", block.norm2: "block0_after_text"}
    after = {
        block: "block0_out",
        block.proxy_attn1: "block0_proxy_attn",
        block.pvisual_attn2: "block0_visual_cross_attn",
    }
    if block.shift_window:
        before[block.norm_shift] = "block0_shifted_in"
        after[block.attn3] = "block0_shift_attn"
    handles = [module.register_forward_pre_hook(keep_input(name)) for module, name in before.items()]
    handles += [module.register_forward_hook(keep_output(name)) for module, name in after.items()]
    handles.append(model.adaln_single.register_forward_hook(keep_output("adaln")))
    try:
        made = model(
            inputs["latent"], inputs["text_embeds"], inputs["timestep"], encoder_attention_mask=inputs["text_mask"]
        ).sample
        values["model"] = as_released(made, model.config.in_channels)
    finally:
        for handle in handles:
            handle.remove()
    values["adaln_params"], values["embedded_timestep"] = values.pop("adaln")

    grid = (inputs["latent"].shape[2], *(side // model.config.patch_size for side in inputs["latent"].shape[3:]))
    window, proxy_window, shift = model.resolve_windows(grid, None)
    values["block0_proxy_tokens"] = block.extract_proxies(values["block0_in"], window, proxy_window)
    mask = shift_region_mask(grid, window, shift, inputs["latent"].device)[:, 0]
    values["shift_mask"] = torch.where(mask, 0.0, -1.0)
    per_window = ("block0_in", "block0_after_giim", "block0_after_text", "block0_out", "block0_shifted_in")
    for name in per_window:
        if name in values:
            values[name] = values[name].reshape(-1, window[0] * window[1] * window[2], values[name].shape[-1])
    return values


def sample(model: PTDiTTransformer3DModel, tensors: Tensors, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The reference's guided flow sampling (rectified flow, Euler, warped levels) by the pipeline."""
    pipe = TextToImagePipeline(model, FlowMatchEulerDiscreteScheduler(), prediction_type="flow_prediction")
    pipe.set_progress_bar_config(disable=True)
    text, mask = tensors["input.text_embeds"], tensors["input.text_mask"]
    cond, uncond = slice(settings["text_row_cond"], None), slice(settings["text_row_uncond"], None)
    noise = tensors["input.sample_noise"][:, :, 0]
    states = [noise]
    pipe(
        prompt_embeds=text[cond][:1],
        prompt_attention_mask=mask[cond][:1],
        negative_prompt_embeds=text[uncond][:1],
        negative_prompt_attention_mask=mask[uncond][:1],
        guidance_scale=settings["cfg_scale"],
        sigmas=flow_sigmas(settings["steps"]),
        shift=resolution_warp(*settings["pixel_h_w_frames"]),
        height=noise.shape[2],
        width=noise.shape[3],
        latents=noise,
        output_type="latent",
        callback_on_step_end=lambda pipe, index, time, seen: states.append(seen["latents"]) or {},
    )
    return {
        "sample_timesteps": pipe.scheduler.timesteps,
        "sample_latents_in": torch.cat(states[:-1])[:, :, None],
        "sample_final": states[-1][:, :, None],
    }


@torch.no_grad()
def check(tensors: Tensors, config: dict[str, Any]) -> list[Result]:
    """Compares every output tensor of a fixture."""
    model = build(tensors, config)
    values = trace(model, section(tensors, "input"))
    if config.get("sample"):
        values |= sample(model, tensors, config["sample"])
    results = []
    for name, expected in section(tensors, "output").items():
        tolerance = SAMPLE_TOLERANCE if name.startswith("sample_") else FORWARD_TOLERANCE
        results.append(compare(name, values[name], expected, tolerance))
    return results

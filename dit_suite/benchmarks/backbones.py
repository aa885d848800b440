"""Backbones: PT-DiT, Switch-DiT and LEGO beside dense twins of the same width: parameters, FLOPs, seconds per pass.

FLOPs come from torch's counter on the meta device, where attention is two batched products (`attention_gflops`) and
everything else is linear layers. Times are medians over rounds that run baseline and technique in turn, so that a busy
machine slows both alike; `speedup` is the median ratio of wall times and `cpu_speedup` of CPU times. Weights are
random: none of this depends on them. The part `trained` is about checkpoints: see `trained_backbones`.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from dit_suite.benchmarks import trained_backbones
from dit_suite.benchmarks.clock import interleaved

NAME = "backbones"
UNTRAINED = ("text", "class", "lego")

PIXELS_PER_TOKEN = 16
CAPTION = (1, 24, 384)
GIGA = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--parts", nargs="+", choices=(*UNTRAINED, "trained"), default=list(UNTRAINED))
    parser.add_argument(
        "--pixels", type=int, nargs="+", default=[256, 512, 640, 768, 1024, 2048], help="sides, for FLOPs"
    )
    parser.add_argument(
        "--timed-pixels", type=int, nargs="*", default=[256, 512, 640, 768, 1024], help="sides that are timed"
    )
    parser.add_argument("--heads", type=int, default=6, help="heads of the text networks (6 x 48: the S-Class model)")
    parser.add_argument("--head-dim", type=int, default=48, help="features per head of the text networks")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the text networks")
    parser.add_argument("--pairs", type=int, default=10, help="interleaved pairs per time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the untrained parts")
    trained_backbones.add_arguments(parser)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Networks and inputs made inside are of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def count_flops(make: Callable[[], Any]) -> tuple[float, float]:
    """(attention, all) GFLOP of a call. `make` builds on the current default device and returns the call."""
    with torch.device("meta"):
        call = make()
        with FlopCounterMode(display=False) as counter:
            call()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "bmm" in str(op) or "attention" in str(op))
    return attention / GIGA, sum(counts.values()) / GIGA


def ratio(baseline: list[tuple[float, float]], technique: list[tuple[float, float]], clock: int) -> float:
    """Median of baseline / technique over rounds; clock 0 is wall time, 1 CPU time."""
    return statistics.median(base[clock] / ours[clock] for base, ours in zip(baseline, technique, strict=True))


def summary(baseline: list[tuple[float, float]], technique: list[tuple[float, float]]) -> dict[str, float]:
    """Median seconds of both and the median ratios."""
    return {
        "baseline_s": statistics.median(wall for wall, _ in baseline),
        "seconds": statistics.median(wall for wall, _ in technique),
        "speedup": ratio(baseline, technique, 0),
        "cpu_speedup": ratio(baseline, technique, 1),
    }


def paired(baseline: Callable[[], Any], technique: Callable[[], Any], pairs: int, device: str) -> dict[str, float]:
    """`summary` of two calls timed in turn."""
    return summary(*interleaved([baseline, technique], pairs, device))


def millions(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def text_networks(latent: int, args: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.Module]:
    """PixArt and PT-DiT of one width and depth for a latent side, in eval mode."""
    from dit_suite.models.pt_dit import PTDiTTransformer3DModel

    shape = {
        "num_attention_heads": args.heads,
        "attention_head_dim": args.head_dim,
        "num_layers": args.layers,
        "sample_size": latent,
    }
    dense = PixArtTransformer2DModel(
        **shape,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=args.heads * args.head_dim,
        caption_channels=CAPTION[2],
        use_additional_conditions=False,
    )
    proxy = PTDiTTransformer3DModel(**shape, caption_channels=CAPTION[2])
    return dense.eval(), proxy.eval()


def text_call(model: torch.nn.Module, latent: int) -> Callable[[], Any]:
    """One forward pass of a picture."""
    inputs = torch.zeros(1, 4, latent, latent), torch.zeros(CAPTION), torch.full((1,), 500.0)
    added = {"resolution": None, "aspect_ratio": None}
    return lambda: model(inputs[0], encoder_hidden_states=inputs[1], timestep=inputs[2], added_cond_kwargs=added)


def text_flops(pixels: int, args: argparse.Namespace) -> tuple[tuple[float, float], tuple[float, float]]:
    """((attention, all) of PixArt, the same of PT-DiT), in GFLOP."""
    latent = pixels // 8
    return tuple(
        count_flops(lambda which=which: text_call(text_networks(latent, args)[which], latent)) for which in (0, 1)
    )


def self_attention_share(pixels: int, dense: tuple[float, float], proxy: tuple[float, float], args: Any) -> float:
    """Percent of PixArt's self-attention products that PT-DiT needs; the text attention of both is left out."""
    width, tokens = args.heads * args.head_dim, (pixels // PIXELS_PER_TOKEN) ** 2
    text = args.layers * 2 * 2 * tokens * CAPTION[1] * width / GIGA
    return 100 * (proxy[0] - text) / (dense[0] - text)


def text_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """PixArt and PT-DiT by resolution (8x VAE, patch 2)."""
    rows = []
    for pixels in args.pixels:
        latent = pixels // 8
        dense, proxy = text_flops(pixels, args)
        row = {
            "network": "PT-DiT",
            "baseline": "PixArt, same width and depth",
            "setting": f"{pixels} px, {(pixels // PIXELS_PER_TOKEN) ** 2} tokens",
            "gflops": proxy[1],
            "baseline_gflops": dense[1],
            "attention_gflops": proxy[0],
            "linear_gflops": proxy[1] - proxy[0],
            "baseline_linear_gflops": dense[1] - dense[0],
            "attention_percent": self_attention_share(pixels, dense, proxy, args),
            "total_percent": 100 * proxy[1] / dense[1],
        }
        if pixels in args.timed_pixels:
            with torch.device(args.device):
                networks = text_networks(latent, args)
                calls = [text_call(network, latent) for network in networks]
                parts = attention_calls(networks, latent)
            row |= {"params_m": millions(networks[1]), "baseline_params_m": millions(networks[0])}
            row |= paired(calls[0], calls[1], args.pairs, args.device)
            row["attention_speedup"] = paired(parts[0], parts[1], args.pairs, args.device)["speedup"]
        rows.append(row)
    return rows


def attention_calls(networks: tuple[torch.nn.Module, torch.nn.Module], latent: int) -> tuple[Callable, Callable]:
    """The self-attention of a PixArt block, projections included, and what stands for it in a PT-DiT block."""
    from dit_suite.models.pt_dit import PTDiTTransformerBlock
    from dit_suite.models.pt_dit_lean import can_run_lean, lean_attention
    from dit_suite.models.shifted_windows import window_layout

    dense, proxy = (network.transformer_blocks[0] for network in networks)
    grid = (1, latent // 2, latent // 2)
    tokens = torch.randn(1, grid[1] * grid[2], proxy.norm1.normalized_shape[0])
    layout = window_layout(grid, *networks[1].resolve_windows(grid, None), tokens.device)
    modulation = torch.zeros(1, 6, tokens.shape[-1])
    attend = lean_attention if can_run_lean([proxy], tokens) else PTDiTTransformerBlock.attend
    return lambda: dense.attn1(tokens), lambda: attend(proxy, tokens, modulation, layout)


def break_even_row(args: argparse.Namespace) -> dict[str, Any]:
    """The smallest side, in steps of 128 px, where PT-DiT needs fewer FLOPs than its dense twin."""
    for pixels in range(128, 4097, 128):
        dense, proxy = text_flops(pixels, args)
        if proxy[1] < dense[1]:
            break
    else:
        raise ValueError("PT-DiT needs more FLOPs at every size up to 4096 px for this width")
    return {
        "network": "PT-DiT",
        "baseline": "PixArt, same width and depth",
        "setting": f"break-even at {pixels} px (width {args.heads * args.head_dim})",
        "gflops": proxy[1],
        "baseline_gflops": dense[1],
        "total_percent": 100 * proxy[1] / dense[1],
    }


def class_networks(routing: str) -> torch.nn.Module:
    """S/2 for 256 px, 1000 classes."""
    from dit_suite.models.dit import dit_config
    from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel

    return SwitchDiTTransformer2DModel(**dit_config("DiT-S/2"), routing=routing).eval()


def share_blocks(network: torch.nn.Module, plain: torch.nn.Module) -> torch.nn.Module:
    """`network` with the blocks of its plain twin: the weights that both have then lie in the same memory. Copies
    timed in turn differ by where they lie and by what the cache still holds of them."""
    for name in ("patch_embed", "time_embed", "label_embed", "transformer_blocks", "final_layer"):
        setattr(network, name, getattr(plain, name))
    return network


def class_call(model: torch.nn.Module, latent: int, batch: int) -> Callable[[], Any]:
    """One guided sampling step: a batch at one timestep, expanded as pipelines do; it moves on with every call."""
    device = model.pos_embed.device
    images = torch.zeros(batch, model.config.in_channels, latent, latent, device=device)
    labels = torch.arange(batch, device=device)
    state = {"step": 999}

    def call() -> Any:
        state["step"] = (state["step"] - 1) % 1000
        return model(images, torch.full((1,), state["step"], device=device).expand(batch), labels)

    return call


def class_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Switch-DiT and DTR against DiT at S/2: a step of two samples (one picture with guidance)."""
    with torch.device(args.device):
        plain = class_networks("none")
    base_flops = count_flops(lambda: class_call(class_networks("none"), 32, 2))
    rows = []
    for name, routing in (("Switch-DiT", "experts"), ("DTR", "channels")):
        with torch.device(args.device):
            network = share_blocks(class_networks(routing), plain)
        times = paired(class_call(plain, 32, 2), class_call(network, 32, 2), args.pairs, args.device)
        flops = count_flops(lambda routing=routing: class_call(class_networks(routing), 32, 2))
        rows.append(
            {
                "network": f"{name}-S/2",
                "baseline": "DiT-S/2",
                "setting": "256 px, 256 tokens, batch 2, one timestep",
                "params_m": millions(network),
                "baseline_params_m": millions(plain),
                "gflops": flops[1],
                "baseline_gflops": base_flops[1],
                "total_percent": 100 * flops[1] / base_flops[1],
                **times,
                "overhead_percent": 100 * (1 / times["speedup"] - 1),
                "cpu_overhead_percent": 100 * (1 / times["cpu_speedup"] - 1),
            }
        )
    return rows


def lego_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The 64 px preset's chain by `t_break` against a DiT of the same width, depth, token size and evaluations.
    `speedup` compares whole pipelines, LEGO's with the DiT's; `network_speedup` the bare passes of both."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from dit_suite.models.lego import LegoTransformer2DModel
    from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel
    from dit_suite.pipelines.pipeline_class_to_image import ClassToImagePipeline
    from dit_suite.pipelines.pipeline_lego import LegoPipeline, skipped_steps
    from dit_suite.schedulers.edm_heun import EDMHeunScheduler

    heads = {"num_attention_heads": 5, "attention_head_dim": 32, "sample_size": 64, "in_channels": 3, "num_classes": 49}
    bricks = {"brick_sizes": (8, 16, 64), "patch_sizes": (4, 8, 4), "brick_depths": (1, 1, 5)}
    dit = {"patch_size": 4, "num_layers": 7, "learn_sigma": False, "routing": "none"}
    steps, batch = 8, 1
    evaluations = 2 * steps - 1

    def pass_flops(**choice: Any) -> float:
        def make() -> Callable[[], Any]:
            model = LegoTransformer2DModel(**heads, **bricks)
            return lambda: model(torch.zeros(batch, 3, 64, 64), torch.zeros(1), torch.arange(batch), **choice)

        return count_flops(make)[1]

    full, short = pass_flops(), pass_flops(stop_after=1)
    dense = count_flops(lambda: class_call(SwitchDiTTransformer2DModel(**heads, **dit), 64, batch))[1]
    with torch.device(args.device):
        twin = SwitchDiTTransformer2DModel(**heads, **dit).eval()
        step = class_call(twin, 64, batch)
        chain = LegoTransformer2DModel(**heads, **bricks).eval()
        picture, level, label = torch.zeros(batch, 3, 64, 64), torch.zeros(1), torch.zeros(batch, dtype=torch.long)
    twin_pipe = ClassToImagePipeline(twin, FlowMatchEulerDiscreteScheduler())
    pipe = LegoPipeline(chain, EDMHeunScheduler())
    for each in (twin_pipe, pipe):
        each.set_progress_bar_config(disable=True)
    common = {"guidance_scale": 1.0, "output_type": "latent"}

    def shortened(t_break: float) -> int:
        """Evaluations without the last brick."""
        late = skipped_steps(steps, t_break, "late")
        return 2 * len(late) - (1 if late else 0)

    def sample(t_break: float) -> Callable[[], Any]:
        return lambda: pipe([0], num_inference_steps=steps, t_break=t_break, **common)

    def passes(t_break: float) -> Callable[[], Any]:
        stops = [None] * (evaluations - shortened(t_break)) + [1] * shortened(t_break)
        return lambda: [chain(picture, level, label, stop_after=stop, return_dict=False) for stop in stops]

    breaks = (0.0, 0.25, 0.5, 0.75, 1.0)
    calls = [lambda: twin_pipe([0], num_inference_steps=evaluations, **common), *(sample(t) for t in breaks)]
    calls += [lambda: [step() for _ in range(evaluations)], *(passes(t) for t in breaks)]
    every = interleaved(calls, args.pairs, args.device)
    (dit_times, *lego_times), (dit_passes, *lego_passes) = every[: len(every) // 2], every[len(every) // 2 :]
    rows = []
    for t_break, times, network in zip(breaks, lego_times, lego_passes, strict=True):
        truncated = shortened(t_break)
        flops = (evaluations - truncated) * full + truncated * short
        rows.append(
            {
                "network": "LEGO, emoji-lego-64",
                "baseline": "DiT, same width, depth and tokens",
                "setting": f"t_break {t_break}, {steps} Heun steps, batch {batch}",
                "params_m": millions(pipe.transformer),
                "baseline_params_m": millions(twin),
                "gflops": flops,
                "baseline_gflops": evaluations * dense,
                "total_percent": 100 * flops / (evaluations * dense),
                **summary(dit_times, times),
                "speedup_to_unskipped": ratio(lego_times[0], times, 0),
                **{f"network_{name}": value for name, value in summary(dit_passes, network).items()},
                "last_brick_percent": 100 * (1 - short / full),
            }
        )
    return rows


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of the chosen parts."""
    rows: list[dict[str, Any]] = []
    with default_dtype(getattr(torch, args.dtype)):
        if "text" in args.parts:
            rows += text_rows(args) + [break_even_row(args)]
        if "class" in args.parts:
            rows += class_rows(args)
        if "lego" in args.parts:
            rows += lego_rows(args)
    if "trained" in args.parts:
        rows += trained_backbones.trained_rows(args)
    settings = {key: str(value) if key == "data" else value for key, value in vars(args).items() if key != "output"}
    return {"settings": settings, "rows": rows}

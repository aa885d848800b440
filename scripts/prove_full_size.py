"""Takes networks of the published full sizes through convert, load and one sampling step, with random weights.

    python scripts/prove_full_size.py dit
    python scripts/prove_full_size.py all --workdir /data/tmp

Every network is written to a file in its official key layout, converted by `scripts/convert.py`, opened again and run
for one sampling step, together with tiny random parts in the official layouts of the VAE and the T5 text encoder. Each
stage is a process of its own; its time and peak memory are printed. Exit status 1 where a stage fails or needs more
memory than `--memory-gb`.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dit_suite.models.dit_blocks import sincos_2d

Shape = tuple[int, ...]
Layout = dict[str, Shape]
CLASSES = 1000
SEED = 0
POOL = 1_048_583


def _linear(name: str, outputs: int, inputs: int) -> Layout:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _dit_blocks(prefix: str, depth: int, width: int) -> Layout:
    found: Layout = {}
    for block in (f"{prefix}blocks.{i}" for i in range(depth)):
        found |= _linear(f"{block}.attn.qkv", 3 * width, width) | _linear(f"{block}.attn.proj", width, width)
        found |= _linear(f"{block}.mlp.fc1", 4 * width, width) | _linear(f"{block}.mlp.fc2", width, 4 * width)
        found |= _linear(f"{block}.adaLN_modulation.1", 6 * width, width)
    return found


def _dit_ends(prefix: str, width: int, channels: int, outputs: int, patch: int, side: int) -> Layout:
    found: Layout = {f"{prefix}x_embedder.proj.weight": (width, channels, patch, patch)}
    found |= {f"{prefix}x_embedder.proj.bias": (width,), f"{prefix}pos_embed": (1, side * side, width)}
    found |= _linear(f"{prefix}final_layer.linear", patch * patch * outputs, width)
    return found | _linear(f"{prefix}final_layer.adaLN_modulation.1", 2 * width, width)


def _time_mlp(prefix: str, width: int) -> Layout:
    return _linear(f"{prefix}t_embedder.mlp.0", width, 256) | _linear(f"{prefix}t_embedder.mlp.2", width, width)


def dit_layout() -> Layout:
    """DiT-XL/2 at 256 px, as in `DiT-XL-2-256x256.pt`."""
    width = 1152
    found = _dit_blocks("", 28, width) | _dit_ends("", width, 4, 8, 2, 16) | _time_mlp("", width)
    return found | {"y_embedder.embedding_table.weight": (CLASSES + 1, width)}


def lego_layout() -> Layout:
    """LEGO S_U_64 on 3 channels, as the state dict inside the published pickles."""
    width, found = 384, {}
    bricks = ((64, 2, 6), (16, 8, 4), (4, 2, 2), (16, 8, 4), (64, 2, 6))
    for index, (size, patch, depth) in enumerate(bricks):
        prefix = f"model.model.{index}."
        channels = 3 + 2 + (3 if index else 0)
        found |= _dit_blocks(prefix, depth, width) | _dit_ends(prefix, width, channels, 3, patch, size // patch)
    return found | _time_mlp("model.", width) | _linear("model.y_embedder.embedding_table", width, CLASSES)


def acdit_layout() -> Layout:
    """ACDiT-XL for 256 px pictures, as in `ACDiT-XL-img.pt`."""
    width, channels = 1152, 4
    found = _dit_blocks("", 28, width) | _time_mlp("", width)
    for block in (f"blocks.{i}" for i in range(28)):
        found |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
        found |= {f"{block}.attn.q_norm.weight": (64,), f"{block}.attn.k_norm.weight": (64,)}
    found |= {"x_embedder.weight": (width, channels), "final_layer.norm_final.weight": (width,)}
    found |= _linear("final_layer.linear", channels, width)
    found |= _linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return found | {"y_embedder.embedding_table.weight": (CLASSES + 1, width)}


def tarflow_layout() -> Layout:
    """TarFlow with 8 blocks of 8 layers and width 1024 on 64 px ImageNet, patch 4, as the GS-Jacobi authors publish."""
    width, tokens, token_dim = 1024, 256, 48
    found: Layout = {"var": (tokens, token_dim)}
    for block in (f"blocks.{i}" for i in range(8)):
        found |= _linear(f"{block}.proj_in", width, token_dim) | _linear(f"{block}.proj_out", 2 * token_dim, width)
        found |= {f"{block}.pos_embed": (tokens, width), f"{block}.class_embed": (CLASSES, 1, width)}
        found |= {f"{block}.attn_mask": (tokens, tokens)}
        for layer in (f"{block}.attn_blocks.{i}" for i in range(8)):
            for norm in ("attention.norm", "mlp.norm"):
                found |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
            found |= _linear(f"{layer}.attention.qkv", 3 * width, width)
            found |= _linear(f"{layer}.attention.proj", width, width)
            found |= _linear(f"{layer}.mlp.main.0", 4 * width, width) | _linear(f"{layer}.mlp.main.2", width, 4 * width)
    return found


def pt_dit_layout() -> Layout:
    """PT-DiT-XL (Qihoo-T2X) without size conditions, as its published inference code names the tensors."""
    width, side = 1152, 64
    found: Layout = {"pos_embed.proj.weight": (width, 4, 2, 2), "pos_embed.proj.bias": (width,)}
    found |= {"pos_embed.pos_embed": (1, 1, side * side, width), "scale_shift_table": (2, width)}
    found |= _linear("adaln_single.emb.timestep_embedder.linear_1", width, 256)
    found |= _linear("adaln_single.emb.timestep_embedder.linear_2", width, width)
    found |= _linear("adaln_single.linear", 6 * width, width)
    found |= _linear("caption_projection.linear_1", width, 4096) | _linear("caption_projection.linear_2", width, width)
    for block in (f"transformer_blocks.{i}" for i in range(28)):
        found |= {f"{block}.scale_shift_table": (6, width), f"{block}.proxy_scale_shift_table": (3, width)}
        for attention in ("proxy_attn1", "pvisual_attn2", "attn1", "attn2", "attn3"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                found |= _linear(f"{block}.{attention}.{part}", width, width)
        found |= _linear(f"{block}.linear_1_visual", width, width) | _linear(f"{block}.linear_2", width, width)
        found |= _linear(f"{block}.ff.net.0.proj", 4 * width, width) | _linear(f"{block}.ff.net.2", width, 4 * width)
    return found | _linear("proj_out", 4 * 8, width)


def random_weights(layout: Layout) -> dict[str, torch.Tensor]:
    """Normal weights of standard deviation 0.02, ones for norms, and the fixed tables where the layout stores them.

    The normal numbers are a pool that is read round and round, from another place for every tensor, its length prime to
    every width: drawing a billion of them would take longer than the rest of the proof.
    """
    pool = 0.02 * torch.randn(POOL, generator=torch.Generator().manual_seed(SEED))
    weights = {}
    for name, shape in layout.items():
        if _is_table(name, shape):
            side = math.isqrt(shape[-2])
            weights[name] = sincos_2d(side, side, shape[-1]).reshape(shape)
        elif "norm" in name and name.endswith("weight") or name == "var":
            weights[name] = torch.ones(shape)
        elif name.endswith("attn_mask"):
            weights[name] = torch.ones(shape, dtype=torch.bool).tril()
        else:
            count, start = math.prod(shape), 7919 * len(weights) % POOL
            values = pool.roll(-start).repeat(-(-count // POOL))[:count].reshape(shape)
            # A flow exponentiates this output, and random weights must not overflow it.
            weights[name] = 0.01 * values if ".proj_out." in name else values.clone()
    return weights


def count_learned(layout: Layout) -> tuple[int, int]:
    """Numbers that training changes, and those with the fixed position tables."""
    fixed = ("attn_mask", "var")
    learned = sum(math.prod(s) for n, s in layout.items() if not (n.endswith(fixed) or _is_table(n, s)))
    return learned, learned + sum(math.prod(s) for n, s in layout.items() if _is_table(n, s))


def _is_table(name: str, shape: Shape) -> bool:
    """TarFlow's learned positions have no leading 1; the others' fixed sin-cos tables do."""
    return name.endswith("pos_embed") and shape[0] == 1


def save_parts(folder: Path) -> None:
    """Tiny random VAE (four levels, factor 8, four latent channels) and T5 encoder (4096 wide states)."""
    from diffusers import AutoencoderKL
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(SEED)
    levels = 4
    AutoencoderKL(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        layers_per_block=1,
        scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")
    T5EncoderModel(T5Config(vocab_size=64, d_model=4096, d_kv=64, num_heads=2, d_ff=64, num_layers=1)).save_pretrained(
        folder / "text_encoder"
    )
    (folder / "labels.json").write_text(json.dumps({str(i): f"class {i}" for i in range(CLASSES)}))


def tiny_tokenizer() -> Any:
    """A word tokenizer for the tiny T5."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "<unk>", "a", "red", "apple")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def sample_classes(folder: Path, parts: Path, **call: Any) -> tuple[torch.nn.Module, Any]:
    """One step of a pipeline folder that `load_pipeline` opens."""
    from dit_suite import load_pipeline

    pipe = load_pipeline(folder)
    return pipe.transformer, pipe(**call, return_dict=False, output_type="np", generator=[_generator()])[0]


def sample_lego(folder: Path, parts: Path) -> tuple[torch.nn.Module, Any]:
    from dit_suite.models.lego import LegoTransformer2DModel
    from dit_suite.pipelines.pipeline_lego import LegoPipeline
    from dit_suite.schedulers.edm_heun import EDMHeunScheduler

    model = LegoTransformer2DModel.from_pretrained(folder)
    pipe = LegoPipeline(model, EDMHeunScheduler())
    return model, pipe([207], 1, output_type="np", generator=[_generator()]).images


def sample_pt_dit(folder: Path, parts: Path) -> tuple[torch.nn.Module, Any]:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import T5EncoderModel

    from dit_suite.models.pt_dit import PTDiTTransformer3DModel
    from dit_suite.pipelines.pipeline_text_to_image import TextToImagePipeline

    model = PTDiTTransformer3DModel.from_pretrained(folder)
    pipe = TextToImagePipeline(
        model,
        FlowMatchEulerDiscreteScheduler(),
        text_encoder=T5EncoderModel.from_pretrained(parts / "text_encoder"),
        tokenizer=tiny_tokenizer(),
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        prediction_type="flow_prediction",
        max_sequence_length=120,
    )
    return model, pipe("a red apple", num_inference_steps=1, height=256, width=256, levels="resolution",
                       generator=_generator(), output_type="np").images  # fmt: skip


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@dataclass(frozen=True)
class FullSize:
    """One network at its published size.

    Attributes:
        title: what is printed.
        millions: the published parameter count, with or without fixed position tables.
        layout: official tensor names and shapes.
        converter: name for `convert.py --from`.
        flags: its flags; `{parts}` stands for the folder of tiny components.
        sample: opens the converted folder and runs one sampling step; returns the network and the pictures.
    """

    title: str
    millions: float
    layout: Callable[[], Layout]
    converter: str
    flags: tuple[str, ...]
    sample: Callable[[Path, Path], tuple[torch.nn.Module, Any]]


NETWORKS: dict[str, FullSize] = {
    "dit": FullSize(
        "DiT-XL/2, 256 px", 674.8, dit_layout, "dit", ("--vae", "{parts}/vae", "--labels", "{parts}/labels.json"),
        lambda folder, parts: sample_classes(folder, parts, class_labels=["class 207"], num_inference_steps=1),
    ),
    "pt_dit": FullSize(
        "PT-DiT-XL (Qihoo-T2X)", 1131.6, pt_dit_layout, "pt_dit", (), sample_pt_dit,
    ),
    "lego": FullSize("LEGO S_U_64", 62.0, lego_layout, "lego", ("--heads", "6"), sample_lego),
    "tarflow": FullSize(
        "TarFlow 1024x8, ImageNet 64 patch 4", 817.6, tarflow_layout, "tarflow", (),
        lambda folder, parts: sample_classes(
            folder, parts, class_labels=[207], strategy="jacobi", sweeps=1, denoise_strength=0.0
        ),
    ),
    "acdit": FullSize(
        "ACDiT-XL, 256 px", 674.9, acdit_layout, "acdit",
        ("--patch-size", "1", "--block-size", "256", "--vae", "{parts}/vae"),
        lambda folder, parts: sample_classes(folder, parts, class_labels=[207], num_inference_steps=1),
    ),
}  # fmt: skip


def stage_weights(network: FullSize, workdir: Path) -> None:
    """Writes the tiny parts and the official file."""
    save_parts(workdir)
    torch.save(random_weights(network.layout()), workdir / "official.pt")


def stage_sample(network: FullSize, workdir: Path) -> None:
    """Loads, counts and samples."""
    torch.set_grad_enabled(False)
    model, pictures = network.sample(workdir / "converted", workdir)
    count = sum(parameter.numel() for parameter in model.parameters())
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RuntimeError("parameters without values after loading")
    learned, stored = count_learned(network.layout())
    if count != learned:
        raise RuntimeError(f"the network has {count} parameters, the official layout {learned}")
    if min(abs(total / 1e6 - network.millions) for total in (learned, stored)) > 0.06:
        raise RuntimeError(f"{learned} parameters ({stored} with tables), published are {network.millions} M")
    if not (pictures == pictures).all() or pictures.std() == 0:
        raise RuntimeError("the pictures are constant or not numbers")
    print(f"  {count:,} parameters, pictures {pictures.shape}, mean {pictures.mean():.3f}")


STAGES = {"weights": stage_weights, "sample": stage_sample}


def run_stage(command: Sequence[str]) -> tuple[int, float, float]:
    """Exit status, seconds, and peak memory in GB of a process."""
    start = time.perf_counter()
    process = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *command])
    _, status, usage = os.wait4(process, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def prove(name: str, workdir: Path, memory_gb: float) -> bool:
    """Runs the three stages of one network and prints a line for each; True when all passed within the limit."""
    network, script = NETWORKS[name], Path(__file__).resolve()
    flags = [flag.format(parts=workdir) for flag in network.flags]
    convert = [str(script.with_name("convert.py")), "--from", network.converter, *flags]
    commands = {
        "weights": [str(script), name, "--stage", "weights", "--workdir", str(workdir)],
        "convert": [*convert, str(workdir / "official.pt"), str(workdir / "converted")],
        "sample": [str(script), name, "--stage", "sample", "--workdir", str(workdir)],
    }
    print(network.title, flush=True)
    for stage, command in commands.items():
        status, seconds, peak = run_stage(command)
        verdict = "ok" if status == 0 and peak <= memory_gb else "FAILED"
        print(f"  {stage:8} {verdict:6} {seconds:7.1f} s  peak {peak:5.2f} GB", flush=True)
        if verdict == "FAILED":
            return False
        if stage == "convert":
            (workdir / "official.pt").unlink()
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=[*NETWORKS, "all"], help="which networks, or all")
    parser.add_argument("--memory-gb", type=float, default=24.0, help="limit of every stage (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, help="folder for temporary files (up to 10 GB; default: the system's)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.stage:
        STAGES[arguments.stage](NETWORKS[arguments.networks[0]], arguments.workdir)
        return 0
    names = list(NETWORKS) if "all" in arguments.networks else arguments.networks
    passed = []
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix="full_size_", dir=arguments.workdir))
        try:
            passed.append(prove(name, folder, arguments.memory_gb))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())

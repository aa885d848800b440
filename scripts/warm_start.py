"""Makes starting weights of a small network from layers of a trained PixArt network of the same width.

    python scripts/warm_start.py --config configs/emoji_ptdit_64_cpu.yaml --layers 1 4 7 \\
        --output runs/start/emoji-ptdit-64

Writes a network folder that the config's `init_from` names. PixArt, PT-DiT, DiT and Switch-DiT networks can be started
so (see dit_suite/training/warm_start.py for what is copied and what is approximated).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.checkpoints import find_checkpoint
from dit_suite.models.dit import DiTModel
from dit_suite.models.pt_dit import PTDiTTransformer3DModel
from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel
from dit_suite.training.build import construct
from dit_suite.training.config import TrainConfig, load_config
from dit_suite.training.warm_start import level_batch, mean_text, spread_layers, start_dit, start_pixart, start_pt_dit


def start(config: TrainConfig, teacher: PixArtTransformer2DModel, layers: Sequence[int] | None) -> torch.nn.Module:
    """The config's network with starting weights; `layers` default to evenly spaced ones.

    Raises:
        ValueError: the network is of another kind, or its shapes differ from the teacher's.
        FileNotFoundError: the data set is absent.
    """
    torch.manual_seed(config.run.seed)
    network = construct(config.model)
    known = PixArtTransformer2DModel | PTDiTTransformer3DModel | DiTModel | SwitchDiTTransformer2DModel
    if not isinstance(network, known):
        raise ValueError(f"a {type(network).__name__} can't be started from a PixArt network")
    chosen = list(layers) if layers else spread_layers(network.config.num_layers, teacher.config.num_layers)
    if isinstance(network, PTDiTTransformer3DModel):
        start_pt_dit(teacher, network, chosen)
    elif isinstance(network, PixArtTransformer2DModel):
        start_pixart(teacher, network, chosen)
    else:
        start_dit(teacher, network, chosen, mean_text(teacher, *level_batch(config, teacher)))
    return network


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after one sentence about a bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="training config of the network")
    parser.add_argument("--teacher", default="emoji-pixart-64", help="bundled name or folder of a PixArt pipeline")
    parser.add_argument("--layers", type=int, nargs="+", help="teacher layer of each block (default: evenly spaced)")
    parser.add_argument("--output", type=Path, required=True, help="network folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        folder = find_checkpoint(arguments.teacher).folder / "transformer"
        teacher = PixArtTransformer2DModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        network = start(config, teacher.float().eval(), arguments.layers)
    except (ValueError, OSError) as error:
        print(f"warm_start.py: {error}", file=sys.stderr)
        return 2
    network.save_pretrained(arguments.output, safe_serialization=True)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

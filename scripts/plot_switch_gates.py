"""Draws how a Switch-DiT routes timesteps: gate heat map, prior, and which timesteps share experts.

    python scripts/plot_switch_gates.py CHECKPOINT gates.png

CHECKPOINT is a bundled name, a pipeline folder or a network folder. Three panels, timesteps from left (clean) to right
(noise): the gate values of the chosen experts (one row per expert of each block), the sliding-window prior with rows
matched to the experts, and the share of experts that two timesteps have in common.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.files import write_atomically
from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel
from dit_suite.training.auxiliary import diffusion_prior, match_units, prior_loss

ROW, MARGIN, TITLE = 12, 10, 16
INK, PAPER = (20, 20, 20), (255, 255, 255)
LOW, HIGH = np.array([247, 251, 255.0]), np.array([8, 48, 107.0])


def open_network(name: str) -> SwitchDiTTransformer2DModel:
    """The network of a bundled name, a pipeline folder or a network folder.

    Raises:
        ValueError: it is not a Switch-DiT with experts.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        network, info = SwitchDiTTransformer2DModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(f"{name} is not a Switch-DiT with experts: it has no {info['missing_keys'][0]}")
    else:
        from dit_suite import load_pipeline

        network = load_pipeline(name).transformer
    if not isinstance(network, SwitchDiTTransformer2DModel) or network.config.routing != "experts":
        raise ValueError(f"{name} is not a Switch-DiT with experts")
    return network


@torch.no_grad()
def routing(network: SwitchDiTTransformer2DModel) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Gates `(units, T)`, the matched prior `(units, T)`, shared experts `(T, T)` as a share of k per block, and the
    mean prior loss over all timesteps."""
    config = network.config
    prior = diffusion_prior(config.num_timesteps, config.num_layers, config.num_experts, config.experts_per_timestep)
    chosen = network.routing_table().flatten(1)
    assignment, _ = match_units(chosen, prior)
    probabilities = network.routing_probabilities(torch.arange(config.num_timesteps))
    loss = prior_loss(probabilities, prior[:, assignment]).mean()
    gates = probabilities.flatten(1) * chosen
    shared = chosen.float() @ chosen.float().T / (config.num_layers * config.experts_per_timestep)
    return gates.T.numpy(), prior[:, assignment].T.numpy(), shared.numpy(), float(loss)


def heat_map(values: np.ndarray, height: int, width: int) -> Image.Image:
    """Values in [0, 1] as a picture, light to dark blue; each row and column keeps its own pixels when enlarged."""
    colours = LOW + np.clip(values, 0, 1)[..., None] * (HIGH - LOW)
    picture = Image.fromarray(colours.round().astype(np.uint8))
    return picture.resize(
        (width, height), Image.Resampling.BOX if width < values.shape[1] else Image.Resampling.NEAREST
    )


def draw(network: SwitchDiTTransformer2DModel, width: int = 800) -> Image.Image:
    """The three panels with titles."""
    gates, prior, shared, loss = routing(network)
    units = len(gates)
    panels = [
        (f"gates of the chosen experts, {units} units (prior loss {loss:.4f})", gates, units * ROW),
        ("sliding-window prior, matched to the units", prior, units * ROW),
        ("experts two timesteps share (dark: all)", shared, width // 2),
    ]
    total = sum(TITLE + height + MARGIN for _, _, height in panels) + MARGIN
    page = Image.new("RGB", (width + 2 * MARGIN, total), PAPER)
    pen = ImageDraw.Draw(page)
    top = MARGIN
    for title, values, height in panels:
        pen.text((MARGIN, top), title, fill=INK)
        page.paste(heat_map(values, height, width), (MARGIN, top + TITLE))
        top += TITLE + height + MARGIN
    for block in range(1, network.config.num_layers):
        y = MARGIN + TITLE + block * network.config.num_experts * ROW
        pen.line([(MARGIN, y), (MARGIN + width, y)], fill=PAPER, width=1)
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after one sentence about a bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a bundled name, a pipeline folder or a network folder")
    parser.add_argument("output", type=Path, help="PNG file")
    arguments = parser.parse_args(argv)
    try:
        page = draw(open_network(arguments.checkpoint))
    except (ValueError, OSError) as error:
        print(f"plot_switch_gates.py: {error}", file=sys.stderr)
        return 2
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, lambda temporary: page.save(temporary, format="PNG"))
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

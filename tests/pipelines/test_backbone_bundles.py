"""The bundled PT-DiT, Switch-DiT and LEGO: within their size, and no longer noise."""

import pytest
import torch

from dit_suite.checkpoints import find_checkpoint, load_pipeline

LIMITS = {"emoji-ptdit-64": 12e6, "emoji-switchdit-64": 8e6, "emoji-lego-64": 8e6}


@pytest.mark.parametrize("name", LIMITS)
def test_weights_are_float16_and_small(name):
    folder = find_checkpoint(name).folder
    assert sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors")) <= LIMITS[name]


@torch.no_grad()
@pytest.mark.parametrize("name", ["emoji-switchdit-64", "emoji-lego-64"])
def test_classes_make_different_pictures_on_a_light_ground(name):
    """Emoji lie on white: corners of a trained model's pictures are light, those of noise are not."""
    pipe = load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    made = pipe([1, 3, 3], num_inference_steps=6, guidance_scale=1.0, generator=generators, output_type="pt").images
    corners = made[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 0.8
    assert (made[0] - made[1]).abs().mean() > 0.005 and (made[1] - made[2]).abs().mean() > 0.005


@torch.no_grad()
def test_skipping_keeps_the_layout_of_a_picture():
    """The last brick draws the layout in the first steps: leaving it out late changes little, leaving it out always
    changes much more."""
    pipe = load_pipeline("emoji-lego-64")
    pipe.set_progress_bar_config(disable=True)

    def make(t_break: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        call = {"num_inference_steps": 6, "guidance_scale": 1.0, "generator": generator, "output_type": "pt"}
        return pipe([1], t_break=t_break, **call).images

    full = make(0.0)
    assert (make(0.34) - full).square().mean() < 0.3 * (make(1.0) - full).square().mean()


@torch.no_grad()
def test_the_text_model_listens_to_captions():
    """Predictions of the clean picture at high noise differ between captions, and are lighter than the noise."""
    network = load_pipeline("emoji-ptdit-64").transformer
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, 64, 64, generator=generator).repeat(2, 1, 1, 1)
    text = torch.randn(2, 6, 384, generator=generator)
    clean = noise - network(noise, text, torch.tensor([990.0])).sample
    assert (clean[0] - clean[1]).abs().mean() > 0.01
    assert clean[:, :, :4, :4].mean() > 0.6

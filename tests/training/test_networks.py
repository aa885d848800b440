"""Every kind of network trains a few steps through the same loop, its loss is finite and its weights move."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from dit_suite.data.captions import save_states
from dit_suite.data.draws import Draws
from dit_suite.data.procedural import COLORS, SHAPES
from dit_suite.training.conditioning import ClassCondition, TextCondition
from dit_suite.training.config import config_from_dict
from dit_suite.training.trainer import Trainer

from .conftest import curve, tiny_values

FLOW, DDPM = "FlowMatchEulerDiscreteScheduler", {"name": "DDPMScheduler", "options": {"clip_sample": False}}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
PIXART = {
    **HEADS,
    "sample_size": 8,
    "patch_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "use_additional_conditions": False,
}
WAN = {
    **HEADS,
    "patch_size": [1, 4, 4],
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 32,
    "rope_max_seq_len": 32,
}
DIFFUSERS_DIT = {
    **HEADS,
    "in_channels": 3,
    "out_channels": 6,
    "sample_size": 8,
    "patch_size": 4,
    "num_embeds_ada_norm": 16,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
OURS = {**HEADS, "sample_size": 8, "patch_size": 4, "in_channels": 3, "num_classes": 16}
TEXT = {"pipeline": {"prediction_type": "flow_prediction", "max_sequence_length": 6}}
SPRITES = {"data": {"kind": "sprites", "size": 8, "frames": 4, "count": 16}}

PT_DIT = {
    **HEADS,
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 3,
    "caption_channels": 12,
    "compress_ratios": [1, 2, 2],
}

CASES: dict[str, dict[str, Any]] = {
    "pixart": {"task": "text-to-image", "technique": "pixart", **TEXT}
    | {"model": {"name": "PixArtTransformer2DModel", "options": PIXART}},
    "pt-dit": {"task": "text-to-image", "technique": "pt_dit", **TEXT}
    | {"model": {"name": "pt_dit", "options": PT_DIT}},
    "wan": {"task": "text-to-video", "technique": "wan", **TEXT, **SPRITES}
    | {"model": {"name": "WanTransformer3DModel", "options": WAN}},
    "diffusers-dit": {"model": {"name": "DiTTransformer2DModel", "options": DIFFUSERS_DIT}}
    | {"objective": "diffusion", "scheduler": DDPM},
    "dit-v": {"model": {"name": "dit", "options": {**OURS, "learn_sigma": False}}, "scheduler": DDPM}
    | {"objective": {"name": "diffusion", "options": {"prediction": "v", "schedule": "cosine"}}},
    "switch-dit": {"technique": "switch_dit", "objective": "diffusion", "scheduler": DDPM}
    | {"model": {"name": "switch_dit", "options": {**OURS, "num_timesteps": 1000}}}
    | {"auxiliary": {"name": "dit_suite.training.auxiliary:DiffusionPriorLoss", "weight": 0.5}},
    "tarflow": {"technique": "tarflow", "objective": {"name": "flow_nll", "options": {"noise_std": 0.1}}}
    | {
        "model": {
            "name": "tarflow",
            "options": {
                "sample_size": 8,
                "patch_size": 4,
                "hidden_size": 16,
                "num_blocks": 2,
                "num_layers": 1,
                "head_dim": 8,
                "num_classes": 16,
                "noise_std": 0.1,
            },
        },
        "condition": {"null_label": -1},
    },
    "nfd": {"task": "action-to-video", "technique": "nfd", "data": {"kind": "square", "frames": 4, "count": 4}}
    | {"objective": {"name": "rectified_flow", "options": {"per": "frame", "timestep_scale": 1.0}}}
    | {
        "model": {
            "name": "nfd",
            "options": {
                **HEADS,
                "attention_head_dim": 16,
                "sample_height": 16,
                "sample_width": 16,
                "patch_size": 8,
                "num_actions": 5,
                "window": 4,
            },
        },
    },
    "acdit": {"technique": "acdit", "scheduler": DDPM}
    | {"objective": {"name": "block_diffusion", "options": {"patch_size": 2, "block_size": 4}}}
    | {
        "model": {
            "name": "acdit",
            "options": {
                **HEADS,
                "in_channels": 3,
                "sample_height": 8,
                "sample_width": 8,
                "patch_size": 2,
                "block_size": 4,
                "num_classes": 16,
            },
        }
    },
    "lego": {"technique": "lego", "objective": "edm"}
    | {"scheduler": "dit_suite.schedulers.edm_heun:EDMHeunScheduler"}
    | {
        "model": {
            "name": "lego",
            "options": {
                "sample_size": 8,
                "brick_sizes": [4, 8],
                "patch_sizes": [2, 4],
                "brick_depths": [1, 1],
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_classes": 16,
            },
            "call": {"output_bricks": True},
        }
    },
}


def _states(path: Path) -> Path:
    captions = ["", *(f"{color} {shape}" for color in COLORS for shape in SHAPES)]
    generator = torch.Generator().manual_seed(0)
    save_states(path, captions, [torch.randn(4, 12, generator=generator) for _ in captions])
    return path


@pytest.mark.parametrize("name", CASES)
def test_trains(name, tmp_path):
    values = {**tiny_values(tmp_path / "run", max_steps=3, batch_size=4), **CASES[name]}
    if values["task"].startswith("text"):
        states = _states(tmp_path / "captions.safetensors")
        values["condition"] = {"states": str(states), "max_length": 6, "dropout": 0.5}
        values["data"] = {**values["data"], "captions": [1.0]}
    trainer = Trainer(config_from_dict(values))
    before = {key: value.clone() for key, value in trainer.bare.state_dict().items()}
    target = trainer.run()
    losses = [loss for _, loss, _ in curve(tmp_path / "run")]
    assert len(losses) == 3 and all(torch.isfinite(torch.tensor(losses)))
    after = trainer.bare.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    from dit_suite.checkpoints import load_pipeline

    loaded = load_pipeline(target).transformer
    assert type(loaded) is type(trainer.bare) and not any(p.is_meta for p in loaded.parameters())


@pytest.mark.parametrize("name", ["pt-dit", "switch-dit"])
def test_bfloat16_training_is_near_float32(name, tmp_path):
    losses = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / precision
        values = {**tiny_values(folder, max_steps=2, batch_size=4, precision=precision), **CASES[name]}
        if values["task"].startswith("text"):
            values["condition"] = {"states": str(_states(tmp_path / "captions.safetensors")), "max_length": 6}
            values["data"] = {**values["data"], "captions": [1.0]}
        Trainer(config_from_dict(values)).run()
        losses[precision] = torch.tensor([loss for _, loss, _ in curve(folder)])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not torch.equal(losses["no"], losses["bf16"])
    torch.testing.assert_close(losses["bf16"], losses["no"], atol=0, rtol=0.02)


def test_preview_of_a_text_model(tmp_path):
    values = {**tiny_values(tmp_path / "run", max_steps=1, batch_size=4), **CASES["pixart"]}
    values["condition"] = {"states": str(_states(tmp_path / "captions.safetensors")), "max_length": 6}
    values["data"] = {**values["data"], "captions": [1.0]}
    values["run"] |= {"preview_every": 1, "preview_steps": 2, "preview_count": 2}
    values["run"] |= {"preview_prompts": ["red circle", "blue ring"]}
    Trainer(config_from_dict(values)).run()
    assert (tmp_path / "run/previews/step_00000001.png").is_file()
    values["run"]["preview_prompts"] = ["a castle"]
    with pytest.raises(ValueError, match="preview prompt 'a castle'"):
        Trainer(config_from_dict(values))


def test_label_dropout_is_outside_and_at_its_rate():
    condition = ClassCondition(frozenset({"class_labels", "force_drop_ids"}), 16, None, 0.1)
    draws = Draws(0, 0, torch.arange(4000))
    labels = torch.arange(4000) % 16
    found = condition.arguments({"class_labels": labels}, draws)
    gone = found["class_labels"] == 16
    assert abs(gone.float().mean() - 0.1) < 0.015 and torch.equal(found["force_drop_ids"].bool(), gone)
    assert torch.equal(found["class_labels"][~gone], labels[~gone])
    half = condition.arguments({"class_labels": labels[:50]}, Draws(0, 0, torch.arange(50)))
    assert torch.equal(half["class_labels"], found["class_labels"][:50])
    assert "force_drop_ids" not in ClassCondition(frozenset({"class_labels"}), 16, -1, 0.5).arguments(
        {"class_labels": labels}, draws
    )


def test_dropped_captions_become_the_empty_one(tmp_path):
    from dit_suite.data.captions import CaptionStates

    states = CaptionStates(_states(tmp_path / "captions.safetensors"), 6)
    masked = TextCondition(frozenset({"encoder_attention_mask"}), states, 1.0, ["red circle"])
    found = masked.arguments({"captions": ["red circle"] * 3}, Draws(0, 0, torch.arange(3)))
    empty, mask = states.lookup([""] * 3)
    assert torch.equal(found["encoder_hidden_states"], empty) and torch.equal(found["encoder_attention_mask"], mask)
    kept = TextCondition(frozenset(), states, 0.0, ["red circle"])
    found = kept.arguments({"captions": ["red circle"]}, Draws(0, 0, torch.arange(1)))
    assert set(found) == {"encoder_hidden_states"} and not torch.equal(found["encoder_hidden_states"], empty[:1])


def test_sets_without_captions_are_refused(tmp_path):
    values = {**tiny_values(tmp_path / "run"), **CASES["pixart"], "data": CASES["nfd"]["data"]}
    with pytest.raises(ValueError, match="has no captions"):
        Trainer(config_from_dict(values))
    values["data"] = {"kind": "shapes", "size": 8, "count": 16}
    with pytest.raises(FileNotFoundError, match="prepare_data.py captions"):
        Trainer(config_from_dict(values))


@pytest.fixture
def another_precision():
    """accelerate allows one precision per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_sparse_attention_while_training_changes_the_loss_and_leaves_no_trace(tmp_path, precision, another_precision):
    states = _states(tmp_path / "captions.safetensors")
    sparse = {"topk": [1, 1, 1], "block_1d": 1.0, "block_2d": [1, 2], "block_3d": [2, 1, 1], "min_tokens": 1}
    losses = {}
    whole = {"name": "vmoba", "options": {"select": "threshold", "pool": "head_global", "tau": 1.0, "min_tokens": 1}}
    for name, attention in (("dense", "none"), ("sparse", {"name": "vmoba", "options": sparse}), ("whole", whole)):
        values = {**tiny_values(tmp_path / name, max_steps=3, batch_size=4), **CASES["wan"], "attention": attention}
        values["run"] = {**values["run"], "precision": precision}
        values["condition"] = {"states": str(states), "max_length": 6}
        values["data"] = {**values["data"], "captions": [1.0]}
        Trainer(config_from_dict(values)).run()
        losses[name] = [loss for _, loss, _ in curve(tmp_path / name)]
        from dit_suite.checkpoints import load_pipeline

        assert load_pipeline(tmp_path / name / "checkpoint").transformer.config.num_layers == 2
    assert losses["dense"] != losses["sparse"] and abs(losses["dense"][0] - losses["sparse"][0]) < 1.0
    assert losses["whole"] == pytest.approx(losses["dense"], abs=1e-5 if precision == "no" else 5e-3)


@pytest.mark.parametrize("case", ["dit-v", "switch-dit", "pixart"])
def test_our_pictures_train_with_vmoba_too(tmp_path, case):
    """`attention: vmoba` reaches the self-attention of networks other than Wan's: the curve is another one."""
    sparse = {"topk": [1, 1, 1], "block_1d": 0.5, "block_2d": [1, 1], "block_3d": [1, 1, 2], "min_tokens": 1}
    curves = {}
    for name, attention in (("dense", "none"), ("sparse", {"name": "vmoba", "options": sparse})):
        values = {**tiny_values(tmp_path / name, max_steps=3, batch_size=4), **CASES[case], "attention": attention}
        if case == "pixart":
            values["condition"] = {"states": str(_states(tmp_path / "captions.safetensors")), "max_length": 6}
        Trainer(config_from_dict(values)).run()
        curves[name] = [loss for _, loss, _ in curve(tmp_path / name)]
    assert curves["dense"] != curves["sparse"]
    assert all(abs(a - b) < 1.0 for a, b in zip(*curves.values(), strict=True))


def test_the_prior_of_a_volume_preserving_flow_follows_the_batch(tmp_path):
    """After one step in two micro-batches: a tenth of the way from 1 to the mean z^2 of the whole batch."""
    values = {**tiny_values(tmp_path, batch_size=8, accumulation=2), **CASES["tarflow"]}
    options = {**values["model"]["options"], "volume_preserving": True}
    trainer = Trainer(config_from_dict({**values, "model": {"name": "tarflow", "options": options}}))
    with torch.no_grad():
        result = trainer.objective.loss(trainer.network, trainer.batch(0, torch.arange(8)))
    wanted = 0.9 + 0.1 * result.prediction[0].square().mean(dim=0)
    assert torch.equal(trainer.bare.var, torch.ones_like(wanted))
    trainer.step(0, 10)
    torch.testing.assert_close(trainer.bare.var, wanted)
    assert (wanted - 1).abs().max() > 0.01


def test_a_flow_that_removes_another_noise_than_it_was_given_is_refused(tmp_path):
    values = {**tiny_values(tmp_path), **CASES["tarflow"]}
    for objective in ({"noise_std": 0.05}, {"noise": "uniform", "noise_std": 0.1}):
        values["objective"] = {"name": "flow_nll", "options": objective}
        with pytest.raises(ValueError, match="the model's noise_std is 0.1: they must be equal"):
            Trainer(config_from_dict(values))

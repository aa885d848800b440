"""Uncertainty weighting: its formula, its timesteps, and training with it: learned, resumed, shared, not exported."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dit_suite.data.draws import Draws
from dit_suite.training.config import config_from_dict
from dit_suite.training.objectives import Diffusion
from dit_suite.training.state import states
from dit_suite.training.trainer import Trainer
from dit_suite.training.uncertainty import UncertaintyWeighting, uncertainty_weighted

from .conftest import curve, tiny_values
from .test_trainer import ENVIRONMENT, ROOT


def values(output, **run) -> dict:
    """The tiny run with four clusters of timesteps."""
    options = {"schedule": "cosine", "uncertainty_clusters": 4}
    return tiny_values(output, **({"max_steps": 6, "save_every": 3} | run)) | {
        "objective": {"name": "diffusion", "options": options},
        "scheduler": "DDIMScheduler",
    }


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weighted") / "run"
    torch.set_num_threads(1)
    Trainer(config_from_dict(values(folder))).run()
    return folder


def test_fresh_weights_are_one_half_of_the_mean_and_the_optimum_is_known():
    """Fact 11 of Switch-DiT; the minimum over s_i is at exp(s_i) = L_i / n."""
    losses = torch.rand(16) + 0.5
    t = torch.arange(16) * 125 // 2
    means = losses.reshape(8, 2).mean(1)
    fresh = uncertainty_weighted(losses, t, torch.zeros(8), 1000)
    assert fresh.item() == pytest.approx(0.5 * means.mean().item(), abs=1e-6)
    s = (means / 8).log().requires_grad_()
    uncertainty_weighted(losses, t, s, 1000).backward()
    assert s.grad.abs().max() < 1e-6
    with pytest.raises(ValueError, match="every one of the 8 timestep clusters"):
        uncertainty_weighted(losses, torch.zeros(16), torch.zeros(8), 1000)


def test_timesteps_come_from_every_cluster_in_turn():
    objective = Diffusion(uncertainty_clusters=8)
    drawn = objective.draw_timesteps(Draws(0, 3, torch.arange(4096)))
    assert (drawn // 125).tolist() == [n % 8 for n in range(4096)]
    assert (torch.bincount(drawn % 125, minlength=125) - 4096 / 125).abs().max() < 25
    later = objective.draw_timesteps(Draws(0, 3, torch.arange(16, 24)))
    assert torch.equal(later, drawn[16:24])
    plain = Diffusion().draw_timesteps(Draws(0, 3, torch.arange(4096)))
    assert (plain // 125)[:8].tolist() != list(range(8)) and plain.max() > 900


def test_weights_are_learned_at_their_own_rate_and_logged(weighted):
    lines = log(weighted)
    assert [lines[0][f"weight_{i}"] for i in range(4)] == [0.5] * 4
    assert lines[0]["loss"] == pytest.approx(lines[0]["unweighted"] / 2, rel=1e-5)
    # s falls while L_i / n < exp(s_i); Adam's first step is one learning rate
    assert lines[1]["weight_0"] == pytest.approx(0.5 * 2.718281828**0.025, rel=1e-4)
    assert lines[-1]["weight_0"] > lines[1]["weight_0"] > 0.5


def test_a_stopped_run_goes_on_bit_for_bit_with_its_weights(weighted, tmp_path):
    config = config_from_dict(values(tmp_path / "run"))
    first = Trainer(config)
    take = first.step

    def counted(step, total):
        if step == 3:
            first.request_stop()
        return take(step, total)

    first.step = counted
    assert first.run() is None
    kept = load_file(states(tmp_path / "run/state")[-1] / "weighting.safetensors")
    assert kept["log_variance"].abs().min() > 0 and kept["log_variance/step"] == 4
    Trainer(config).run()
    assert curve(tmp_path / "run") == curve(weighted)
    ends = [
        load_file(states(folder / "state")[-1] / "weighting.safetensors") for folder in (weighted, tmp_path / "run")
    ]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_the_checkpoint_holds_the_network_alone(weighted):
    (path,) = (weighted / "checkpoint/transformer").glob("*.safetensors")
    assert not any("log_variance" in name for name in load_file(path))
    about = json.loads((weighted / "checkpoint/training.json").read_text())
    assert about["config"]["objective"]["options"]["uncertainty_clusters"] == 4


def test_micro_batches_and_processes_share_the_weights(weighted, tmp_path):
    Trainer(config_from_dict(values(tmp_path / "micro", accumulation=2))).run()
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path / "two")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts/train.py"), "--config", str(path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in (tmp_path / "micro", tmp_path / "two"):
        for line, expected in zip(log(folder), log(weighted), strict=True):
            for name in ("loss", "unweighted", "weight_0", "weight_3"):
                assert line[name] == pytest.approx(expected[name], abs=1e-5)


def test_what_does_not_fit_is_one_sentence(tmp_path):
    for options, message in (
        ({"uncertainty_clusters": 7}, "1000 timesteps do not split into 7"),
        ({"uncertainty_clusters": 8, "min_snr_gamma": 5.0}, "min_snr_gamma or uncertainty_clusters, not both"),
        ({"uncertainty_clusters": 8, "per": "frame"}, "not with per: frame"),
    ):
        with pytest.raises(ValueError, match=message):
            Diffusion(**options)
    with pytest.raises(ValueError, match="here 2 samples, to be a multiple of its 4"):
        Trainer(config_from_dict(values(tmp_path, accumulation=4)))
    assert Diffusion().learned_weighting() is None
    assert isinstance(Diffusion(uncertainty_clusters=8).learned_weighting(), UncertaintyWeighting)


def test_min_snr_without_a_limit_is_no_weight():
    """Fact 11."""
    x0, noise, output = torch.randn(3, 6, 4, 8, 8).unbind()
    t = torch.tensor([1, 200, 400, 600, 800, 999])
    plain, unlimited, limited = (
        Diffusion(schedule="cosine", min_snr_gamma=gamma).terms(output, x0, noise, x0, t)["mse"]
        for gamma in (0.0, float("inf"), 5.0)
    )
    torch.testing.assert_close(unlimited, plain)
    assert limited[0] < 0.1 * plain[0] and torch.equal(limited[-1], plain[-1])

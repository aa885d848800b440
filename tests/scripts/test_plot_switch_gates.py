"""The gate plot: its numbers are the routing of the network, and it refuses other networks."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit_suite.models.dit import DiTModel
from dit_suite.models.switch_dit import SwitchDiTTransformer2DModel
from dit_suite.training.auxiliary import uniform_gate_divergence

SCRIPT = Path(__file__).parents[2] / "scripts" / "plot_switch_gates.py"
SHAPE = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 3}


def load():
    spec = importlib.util.spec_from_file_location("plot_switch_gates", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plots_the_routing(tmp_path, capsys):
    script = load()
    torch.manual_seed(0)
    network = SwitchDiTTransformer2DModel(**SHAPE)
    network.save_pretrained(tmp_path / "network")
    gates, prior, shared, loss = script.routing(network)
    assert gates.shape == (6, 1000) and (np.count_nonzero(gates, axis=0) == 4).all()
    assert (prior.sum(0) == 4).all() and np.allclose(np.diag(shared), 1)
    with torch.no_grad():
        for router in network.routers:
            router.gate.weight.zero_()
    assert abs(script.routing(network)[3] - uniform_gate_divergence(3, 2)) < 1e-4
    assert loss != script.routing(network)[3]
    assert script.main([str(tmp_path / "network"), str(tmp_path / "plots" / "gates.png")]) == 0
    with Image.open(tmp_path / "plots" / "gates.png") as picture:
        assert picture.size[0] == 820 and len(set(picture.convert("L").getdata())) > 10
    DiTModel(**SHAPE).save_pretrained(tmp_path / "dit")
    capsys.readouterr()
    for wrong in ("missing", "dit"):
        assert script.main([str(tmp_path / wrong), str(tmp_path / "x.png")]) == 2
        assert capsys.readouterr().err.startswith("plot_switch_gates.py: ") and not (tmp_path / "x.png").exists()

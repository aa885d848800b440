"""Playing: sessions, real-time loop, recordings, rooms, and the tab over HTTP."""

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dit_suite.metadata import read_record
from dit_suite.models.nfd import NFDTransformer3DModel
from dit_suite.pipelines.pipeline_nfd import START_FRAMES, NFDPipeline
from dit_suite.sampling import job_of_record, sample_batch
from dit_suite.schedulers.trigflow import TrigFlowScheduler
from dit_suite.ui.play import Player, PlayOptions, PlaySession, enlargement, keys_of_actions
from dit_suite.ui.play_tab import PlayContext, PlayRooms, build_play_tab, enlarge, start_choice, start_pictures
from dit_suite.video import read_video

NAMES = ("stay", "left", "forward+left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = NFDTransformer3DModel(
        3, 8, 8, 4, num_layers=1, num_attention_heads=1, attention_head_dim=16, num_actions=3, window=3
    ).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("model")
    NFDPipeline(model, TrigFlowScheduler(), action_names=NAMES, fps=8).save_pretrained(path)
    Image.fromarray((np.arange(8 * 16 * 3) % 251).astype(np.uint8).reshape(8, 16, 3)).save(path / START_FRAMES)
    return path


@pytest.fixture(scope="module")
def pipe(folder) -> NFDPipeline:
    return NFDPipeline.from_pretrained(folder)


def play(pipe, actions, **options) -> PlaySession:
    session = PlaySession(pipe, PlayOptions(**options))
    for action in actions:
        session.step(action)
    return session


ACTIONS = [0, 1, 1, 1, 2, 2, 0, 0]


def made_again(pipe, record) -> np.ndarray:
    job, indices = job_of_record(json.loads(json.dumps(record)))
    return sample_batch(pipe, job, indices)[0]


@pytest.mark.parametrize("start", [1, None])
def test_a_game_follows_from_its_record_through_the_pipeline(pipe, start):
    first = play(pipe, ACTIONS, seed=3, start_frame=start)
    assert np.array_equal(np.stack(first.frames), made_again(pipe, first.record("m", "0" * 64)))
    assert len(first.frames) == len(ACTIONS) + 1
    other = play(pipe, ACTIONS, seed=4, start_frame=start)
    assert not np.array_equal(first.frames[-1], other.frames[-1])


def test_passes_of_one_shape_show_the_same_game_and_say_so_in_its_record(pipe):
    plain, fixed = (play(pipe, ACTIONS, fixed_passes=kind) for kind in ("off", "eager"))
    assert np.abs(np.stack(plain.frames).astype(int) - np.stack(fixed.frames)).max() <= 1
    record = fixed.record("m", "0" * 64)
    assert record["options"]["fixed_passes"] == "eager"
    assert np.array_equal(np.stack(fixed.frames), made_again(pipe, record))


def test_visitors_share_a_model_and_no_state(pipe):
    alone = play(pipe, ACTIONS)
    one, two = PlaySession(pipe), PlaySession(pipe, PlayOptions(seed=9))
    for action in ACTIONS:
        one.step(action)
        two.step(2 - action)
    assert all(np.array_equal(a, b) for a, b in zip(one.frames, alone.frames, strict=True))


def test_start_frames_given_or_dreamed(pipe):
    given = PlaySession(pipe, PlayOptions(start_frame=1))
    assert np.array_equal(given.frames[0], ((pipe.start_frames()[1] + 1) * 127.5).round().byte().permute(1, 2, 0))
    assert not np.array_equal(PlaySession(pipe, PlayOptions(start_frame=None)).frames[0], given.frames[0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        PlaySession(pipe, PlayOptions(start_frame=2))


def test_figures(pipe):
    session = play(pipe, [1] * 12, speculation="joint", draft_length=4, adaptive_draft=False, num_inference_steps=3)
    stats = session.stats()
    assert (stats.frames, stats.draft_length, stats.num_inference_steps) == (12, 4, 3)
    assert stats.hit_rate == pytest.approx(0.75)
    assert stats.discard_rate == 0
    assert stats.model_fps > 0
    assert "hits 75%" in stats.line()


def test_frames_per_second_of_the_model_and_of_the_game_are_told_apart(pipe):
    """A clock by hand: a frame takes two ticks of the model, and the page asks for the next one much later."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.02
        return now[0]

    session = PlaySession(pipe, clock=clock)
    assert session.stats().game_fps == 0
    session.step(0)
    assert session.stats().game_fps == 0
    for _ in range(60):
        now[0] += 0.21
        session.step(1)
    stats = session.stats()
    assert stats.model_fps == pytest.approx(50)
    assert stats.game_fps == pytest.approx(4)
    assert "game 4.0 frames/s | model 50.0 frames/s" in stats.line()


def test_frames_made_in_pauses_cost_the_model_their_time(pipe):
    """A clock by hand: every frame is made in a pause and shown afterwards, both take a tick."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    session = PlaySession(pipe, PlayOptions(speculation="run_ahead", adaptive_draft=False), clock=clock)
    session.step(1)
    for _ in range(60):
        assert session.idle()
        session.step(1)
    assert session.stats().model_fps == pytest.approx(50)


def test_a_game_saved_while_it_runs_has_an_action_for_every_frame(pipe, tmp_path):
    """The save comes at the worst moment: another thread asks for it while a frame is being added."""
    session = PlaySession(pipe, PlayOptions(frames_per_second=10))
    saves = []

    class Watched(list):
        def append(self, picture) -> None:
            saves.append(threading.Thread(target=session.save, args=(tmp_path / f"{len(saves)}.mp4", "toy", "a" * 64)))
            saves[-1].start()
            saves[-1].join(0.3)  # long enough to look, not to finish where it has to wait
            super().append(picture)

    session.frames = Watched(session.frames)
    for action in (0, 1, 2):
        session.step(action)
    for number, thread in enumerate(saves):
        thread.join()
        path = tmp_path / f"{number}.mp4"
        played = read_record(path)["condition"]
        assert played == [0, 1, 2][: len(played)]
        assert len(played) > number
        assert len(read_video(path)) == len(played) + 1


def test_running_ahead_shows_what_plain_sampling_shows(pipe):
    plain = play(pipe, ACTIONS, speculation="off")
    ahead = PlaySession(pipe, PlayOptions(speculation="run_ahead"))
    for action in ACTIONS:
        ahead.step(action)
        while ahead.idle():
            pass
    assert all(np.array_equal(a, b) for a, b in zip(ahead.frames, plain.frames, strict=True))
    assert ahead.stats().hit_rate > 0


def test_bad_actions_and_the_longest_game(pipe):
    session = PlaySession(pipe, PlayOptions(max_frames=2))
    with pytest.raises(ValueError, match=r"they are 0\.\.2"):
        session.step(3)
    session.step(0)
    session.step(0)
    with pytest.raises(ValueError, match="over after 2 frames"):
        session.step(0)
    assert len(list(Player(session).frames())) == 0


def test_the_loop_keeps_time_reads_the_held_action_and_stops(pipe):
    session = PlaySession(pipe, PlayOptions(frames_per_second=20, max_frames=100))
    player = Player(session)
    stream = player.frames()
    next(stream)
    player.held = 2
    for _ in range(3):
        next(stream)
    player.stopped.set()
    assert list(stream) == []
    assert session.actions == [0, 2, 2, 2]


def test_a_recording_holds_the_frames_and_the_actions(pipe, tmp_path):
    session = play(pipe, ACTIONS, frames_per_second=10)
    path = session.save(tmp_path / "game.mp4", "toy", "a" * 64)
    frames, record = read_video(path), read_record(path)
    assert frames.shape == (len(ACTIONS) + 1, 256, 256, 3)
    assert record["condition"] == ACTIONS
    again = made_again(pipe, record).repeat(32, axis=1).repeat(32, axis=2)
    assert np.abs(frames[:, 16::32, 16::32].astype(int) - again[:, 16::32, 16::32]).mean() < 12


def test_keys():
    assert keys_of_actions(("stay", "up", "forward-left", "TURN_RIGHT", "fire")) == [
        [], ["up"], ["left", "up"], ["right"], [],
    ]  # fmt: skip
    assert enlargement(16) == 16
    assert enlargement(48) == 5
    assert enlarge(np.zeros((16, 16, 3), np.uint8)).size == (256, 256)


def test_start_frames_are_chosen_by_their_pictures(pipe):
    tiles = start_pictures(pipe)
    assert [label for _, label in tiles] == ["0", "1", "dream"]
    for number in range(2):
        picture = np.asarray(tiles[number][0])[16::32, 16::32]
        assert np.array_equal(picture, PlaySession(pipe, PlayOptions(start_frame=number)).frames[0])
    assert [start_choice(pipe, index) for index in range(3)] == [0, 1, None]
    bare = NFDPipeline(pipe.transformer, pipe.scheduler, action_names=NAMES)
    assert [label for _, label in start_pictures(bare)] == ["dream"]
    assert start_choice(bare, 0) is None


def test_rooms_limit_games_and_know_their_models(folder, tmp_path):
    rooms = PlayRooms(PlayContext((str(folder),), tmp_path, max_visitors=2))
    with pytest.raises(ValueError, match="model must be one of"):
        rooms.pipe("other")
    rooms.start("a", str(folder), PlayOptions())
    second = rooms.start("b", str(folder), PlayOptions())
    with pytest.raises(ValueError, match="2 games are running"):
        rooms.start("c", str(folder), PlayOptions())
    rooms.hold("b", 2)
    assert second.held == 2
    rooms.stop("a")
    rooms.start("c", str(folder), PlayOptions())
    with pytest.raises(ValueError, match="play first"):
        rooms.save("b")
    next(second.frames())
    assert rooms.save("b").suffix == ".mp4"
    rooms.forget("b")
    with pytest.raises(ValueError, match="play first"):
        rooms.save("b")


def test_the_tab_streams_frames_and_follows_the_held_action(folder, tmp_path):
    """Two visitors through Gradio's own server: frames arrive, and each visitor's button moves only that one's game."""
    import gradio as gr
    from gradio_client import Client

    with gr.Blocks() as page:
        rooms = build_play_tab(PlayContext((str(folder),), tmp_path))
    starts = [fn for fn in page.fns.values() if fn.fn is not None and fn.fn.__name__ == "play"]
    starts[0].api_visibility = "public"
    starts[0].api_name = "play"
    _, url, _ = page.queue().launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", ssr_mode=False)
    try:
        clients = [Client(url, verbose=False) for _ in range(2)]
        jobs = [
            client.submit(str(folder), seed, 1, 20, "off", 1, False, api_name="/play")
            for seed, client in enumerate(clients)
        ]
        reached = threading.Event()
        for _ in range(600):
            if len(rooms._players) == 2 and all(len(p.session.actions) > 3 for p in rooms._players.values()):
                reached.set()
                break
            reached.wait(0.05)
        assert reached.is_set()
        visitors = list(rooms._players)
        rooms.hold(visitors[0], 2)
        length = len(rooms._players[visitors[0]].session.actions)
        for _ in range(600):
            if len(rooms._players[visitors[0]].session.actions) > length + 3:
                break
            reached.clear()
            reached.wait(0.05)
        games = [rooms._players[visitor].session for visitor in visitors]
        assert games[0].actions[-1] == 2
        assert set(games[1].actions) == {0}
        for visitor in visitors:
            rooms.stop(visitor)
        outputs = [job.result(timeout=30) for job in jobs]
        assert all("frames/s" in line for _, line in outputs)
        assert all(len(job.outputs()) > 4 for job in jobs)
    finally:
        page.close()

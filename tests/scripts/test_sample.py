"""scripts/sample.py: equal samples however the work is cut, resuming after a kill, and refusals."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dit_suite.attention import AdaSpaConfig, apply_adaspa
from dit_suite.converters.acdit import make_scheduler
from dit_suite.metadata import read_record
from dit_suite.models.acdit import ACDiTTransformer3DModel
from dit_suite.pipelines.pipeline_acdit import ACDiTPipeline
from dit_suite.schedulers.generators import sample_generators
from dit_suite.video import read_video
from scripts.sample import main, read_actions
from tests.tiny import save_tiny, tiny_text_to_video

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPTS = ["red apple", "green cat", "blue sun"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def arguments(model, output, *more, num_samples=7, batch_size=2):
    return [
        "--model", str(model), "--prompts", *PROMPTS, "--num-samples", str(num_samples),
        "--batch-size", str(batch_size), "--num-inference-steps", "3",
        "--seed", "11", "--device", "cpu", "--output", str(output), *more,
    ]  # fmt: skip


def pixels(folder, count=7):
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(count)])


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """The same run in one process."""
    folder = tmp_path_factory.mktemp("one")
    assert main(arguments(model, folder, "--npz", "--sheet")) == 0
    return folder


def test_npz_has_the_adm_layout(reference):
    with np.load(reference / "samples_7x8x8x3.npz") as file:
        assert file.files == ["arr_0"]
        array = file["arr_0"]
    assert array.dtype == np.uint8 and array.flags.c_contiguous
    assert np.array_equal(array, pixels(reference))
    assert len(np.unique(array.reshape(7, -1), axis=0)) == 7


def test_another_batch_size_changes_a_pixel_by_one_level_at_most(model, reference, tmp_path):
    assert main(arguments(model, tmp_path, batch_size=5)) == 0
    assert np.abs(pixels(tmp_path).astype(int) - pixels(reference)).max() <= 1


def test_from_image_makes_the_same_pixels(reference, tmp_path):
    for index in (2, 6):
        assert (
            main(["--from-image", str(reference / f"{index:06d}.png"), "--output", str(tmp_path), "--device", "cpu"])
            == 0
        )
        assert (tmp_path / f"{index:06d}.png").read_bytes() == (reference / f"{index:06d}.png").read_bytes()


def test_what_a_checkpoint_recommends_is_used_and_recorded(tmp_path, capsys):
    """Without flags its steps and guidance count, a flag wins, and the help tells them."""
    model = save_tiny(tmp_path / "model")
    (model / "sampling.json").write_text('{"num_inference_steps": 3, "guidance_scale": 1.5}')
    call = ["--model", str(model), "--prompts", "red apple", "--device", "cpu"]
    for flags, expected in (([], (3, 1.5)), (["--num-inference-steps", "2", "--guidance-scale", "4"], (2, 4.0))):
        output = tmp_path / f"steps-{expected[0]}"
        assert main([*call, *flags, "--output", str(output)]) == 0
        for options in (
            read_record(output / "000000.png")["options"],
            json.loads((output / "run.json").read_text())["options"],
        ):
            assert (options["num_inference_steps"], options["guidance_scale"]) == expected
    capsys.readouterr()
    assert main(["--model", str(model), "--help"]) == 0
    assert "denoising steps: fewer are faster (default: 3)" in " ".join(capsys.readouterr().out.split())


def test_no_metadata(model, tmp_path):
    assert main(arguments(model, tmp_path, "--no-metadata", num_samples=1)) == 0
    assert Image.open(tmp_path / "000000.png").info == {}


def launch(command, **kwargs):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **kwargs
    )


def launch_processes(count, *more):
    """torchrun, as accelerate's launcher starts several processes on accelerators only."""
    port = str(29500 + os.getpid() % 400)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", port]
    return [*launcher, "scripts/sample.py", *more]


def wait_for_files(folder, count, process):
    deadline = time.monotonic() + 240
    while len(list(folder.glob("0*.png"))) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)


def test_killed_and_started_again(model, reference, tmp_path):
    """SIGKILL in mid-run, then the same command: the same npz, no half files, and finished samples are kept."""
    command = [sys.executable, "scripts/sample.py", *arguments(model, tmp_path, "--npz", num_samples=7)]
    process = launch(command)
    wait_for_files(tmp_path, 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("0*.png")}
    for path in kept:
        Image.open(path).load()
    assert main(command[2:]) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert (tmp_path / "samples_7x8x8x3.npz").read_bytes() == (reference / "samples_7x8x8x3.npz").read_bytes()


def is_rank(process):
    return any(part.endswith("scripts/sample.py") for part in process.cmdline()) and "torch.distributed.run" not in (
        process.cmdline()
    )


def test_two_processes_one_killed_then_resumed(model, reference, tmp_path):
    """Two gloo ranks; one dies; three ranks finish the folder: the same bytes as one process."""
    many = arguments(model, tmp_path, num_samples=400)
    process = launch(launch_processes(2, *many), start_new_session=True)
    wait_for_files(tmp_path, 4, process)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child)]
    assert len(workers) == 2
    workers[-1].kill()
    process.communicate(timeout=240)
    assert process.returncode != 0
    for path in tmp_path.glob("0*.png"):
        Image.open(path).load()
    again = launch(launch_processes(3, *arguments(model, tmp_path, "--npz")))
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    digests = [hashlib.sha256((f / "samples_7x8x8x3.npz").read_bytes()).hexdigest() for f in (tmp_path, reference)]
    assert digests[0] == digests[1]


def test_other_options_in_the_same_folder_are_refused(model, reference, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in reference.iterdir()}
    assert main([*arguments(model, reference), "--guidance-scale", "9"]) == 2
    expected = "holds samples that were made otherwise: options.guidance_scale was 4.0 and is 9.0 now; choose another"
    assert expected in capsys.readouterr().err
    assert main([*arguments(model, reference), "--accelerate", "bac"]) == 2
    assert "otherwise: accelerations.bac was not given and is given now; choose" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in reference.iterdir()} == before


def test_a_file_in_the_place_of_the_folder_is_refused(model, tmp_path, capsys):
    (tmp_path / "taken").write_text("x")
    for output in (tmp_path / "taken", tmp_path / "taken" / "deeper" / "still"):
        assert main(arguments(model, output)) == 2
        assert "taken is a file; choose a folder" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(model, tmp_path, capsys):
    absent = "cuda:63"
    assert main([a if a != "cpu" else absent for a in arguments(model, tmp_path)]) == 2
    assert f"the device '{absent}' can't be used on this machine" in capsys.readouterr().err


def test_a_plug_in_given_twice_is_refused(model, tmp_path, capsys):
    twice = ["--accelerate", "bac:budget=2", "--accelerate", "bac:flop_fraction=0.5"]
    assert main([*arguments(model, tmp_path), *twice]) == 2
    assert "--accelerate names bac twice" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--seed", "5"], ["--dtype", "bfloat16"], ["--npz"], ["--num-samples", "3"]])
def test_settings_beside_from_image_are_refused(reference, tmp_path, flags, capsys):
    assert main(["--from-image", str(reference / "000002.png"), "--output", str(tmp_path), *flags]) == 2
    assert f"leave out {flags[0]}" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(model, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dit_suite.sample_files.sample_batch", interrupted)
    assert main(arguments(model, tmp_path)) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_run_without_samples_does_not_bind_the_folder(model, tmp_path):
    (tmp_path / "run.json").write_text('{"options": {"guidance_scale": 99.0}}')
    assert main(arguments(model, tmp_path, num_samples=2)) == 0
    assert json.loads((tmp_path / "run.json").read_text())["options"]["num_inference_steps"] == 3


def test_more_samples_continue_the_folder(model, tmp_path):
    assert main(arguments(model, tmp_path, num_samples=2)) == 0
    first = (tmp_path / "000001.png").read_bytes()
    assert main(arguments(model, tmp_path, num_samples=4)) == 0
    assert len(list(tmp_path.glob("0*.png"))) == 4 and (tmp_path / "000001.png").read_bytes() == first
    assert json.loads((tmp_path / "run.json").read_text())["conditions"] == PROMPTS


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-samples", "0"], "num_samples must be at least 1, got 0"),
        (["--num-inference-steps", "0"], "num_inference_steps must be between 1 and 1000, got 0"),
        (["--batch-size", "-1"], "batch_size must be at least 1, got -1"),
        (["--seed", "-5"], "seed must be between"),
        (["--scheduler", "ddim"], "DDIMScheduler can't integrate"),
        (["--scheduler", "fast"], "scheduler must be one of"),
        (["--accelerate", "warp"], "there is no acceleration 'warp'"),
        (["--model", "nowhere"], "there is no checkpoint 'nowhere'"),
    ],
)
def test_bad_input_gets_one_sentence(model, tmp_path, capsys, more, message):
    assert main([*arguments(model, tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not (tmp_path / "out").exists()


def test_a_class_or_action_that_is_not_there_is_refused_before_the_network_is_opened(tmp_path, capsys, monkeypatch):
    """Nothing is written and no weights are read; the null class of a network is a class."""
    import dit_suite.sampling

    def never(*args, **kwargs):
        raise AssertionError("the network was opened")

    monkeypatch.setattr(dit_suite.sampling, "open_pipeline", never)
    actions = tmp_path / "actions.json"
    actions.write_text('[["up"], ["jump"]]')
    for model, flags, message in (
        ("emoji-dit-32", ["--class-labels", "3", "5"], "class_labels must lie between 0 and 3, got 5"),
        ("emoji-lego-64", ["--class-labels", "noto/smileys"], "close names: noto/smileys-emotion"),
        ("moving-square-nfd", ["--actions-file", str(actions)], "there is no action 'jump'; they are 0..4: stay, up"),
    ):
        assert main(["--model", model, *flags, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert message in error and "0%|" not in error
        assert not (tmp_path / "out").exists()
    with pytest.raises(AssertionError, match="was opened"):
        main(["--model", "emoji-dit-32", "--class-labels", "4", "--output", str(tmp_path / "out"), "--device", "cpu"])


def test_what_the_pipeline_refuses_leaves_no_folder(model, tmp_path, capsys):
    assert main(arguments(model, tmp_path / "out", "--height", "9")) == 2
    assert "height must be a positive multiple of 2, got 9" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_foreign_pictures_is_refused(model, reference, tmp_path, capsys):
    (tmp_path / "000000.png").write_bytes((reference / "000000.png").read_bytes())
    assert main(arguments(model, tmp_path)) == 2
    assert "but no run.json" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\x00"])
def test_prompt_files(model, tmp_path, capsys, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["--model", str(model), "--prompts-file", str(path), "--output", str(tmp_path / "out")]) == 2
    assert "prompts.txt" in capsys.readouterr().err


def test_missing_sample_stops_the_npz(model, tmp_path, reference):
    from dit_suite.sample_files import SampleFolder
    from scripts.sample import job_from_arguments

    _, job, _ = job_from_arguments(arguments(model, tmp_path))
    with pytest.raises(ValueError, match="sample 0 is missing"):
        SampleFolder(tmp_path, job).write_npz(7)


def test_help_lists_the_options_of_a_pipeline(capsys):
    assert main(["--pipeline", "pixart", "--help"]) == 0
    assert "--guidance-scale" in capsys.readouterr().out


def test_clips_as_gif_with_frames(tmp_path):
    """The bundled game model: a GIF and its frames, and the clip is what marks the sample as done."""
    actions = tmp_path / "actions.json"
    actions.write_text("[[4, 2, 1]]")
    command = ["--pipeline", "nfd", "--actions-file", str(actions), "--start-frame", "0", "--device", "cpu"]
    output = tmp_path / "out"
    assert main([*command, "--output", str(output), "--clip-format", "gif", "--frames"]) == 0
    frames = sorted((output / "000000").glob("*.png"))
    with Image.open(output / "000000.gif") as clip:
        assert clip.n_frames == len(frames) == 4


def save_acdit(folder, num_frames):
    torch.manual_seed(0)
    network = ACDiTTransformer3DModel(
        3, 8, 8, num_frames, 4, block_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=16, num_classes=2
    )
    ACDiTPipeline(network.eval(), make_scheduler()).save_pretrained(folder)
    return ["--model", str(folder), "--class-labels", "1", "--num-inference-steps", "2", "--device", "cpu"]


def test_acdit_writes_clips_where_its_network_has_frames(tmp_path, capsys):
    """The technique makes pictures and clips; the checkpoint decides. A clip's file can be made again."""
    command = save_acdit(tmp_path / "clips", 2)
    assert main([*command, "--output", str(tmp_path / "a"), "--clip-format", "gif", "--frames"]) == 0
    frames = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "a" / "000000").glob("*.png"))]
    assert len(frames) == 2 and not np.array_equal(*frames)
    assert read_video(tmp_path / "a" / "000000.gif").shape == (2, 8, 8, 3)
    again = ["--from-image", str(tmp_path / "a" / "000000.gif"), "--device", "cpu", "--clip-format", "gif", "--frames"]
    assert main([*again, "--output", str(tmp_path / "b")]) == 0
    for number, path in enumerate(sorted((tmp_path / "b" / "000000").glob("*.png"))):
        assert np.array_equal(np.asarray(Image.open(path)), frames[number])
    assert main([*command, "--output", str(tmp_path / "c"), "--clip-format", "gif", "--sheet"]) == 2
    assert "a sheet is written for pictures" in capsys.readouterr().err
    assert main([*save_acdit(tmp_path / "pictures", 1), "--output", str(tmp_path / "d")]) == 0
    assert np.asarray(Image.open(tmp_path / "d" / "000000.png")).shape == (8, 8, 3)


def test_actions_are_numbers_or_names(tmp_path):
    path = tmp_path / "actions.json"
    path.write_text('[["right", 1], [0]]')
    assert read_actions(path) == (("right", 1), (0,))
    for text, message in (("[[1.5]]", "must be numbers or names"), ("[[]]", "non-empty"), ("{", "can't be read")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_actions(path)
    with pytest.raises(ValueError, match="there is no file"):
        read_actions(tmp_path / "nothing.json")


def test_a_network_with_a_scheduler_of_its_kind_takes_no_other(tmp_path, capsys):
    command = ["--pipeline", "tarflow", "--class-labels", "1", "--scheduler", "ddim", "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path)]) == 2
    assert "a scheduler of its kind only (GSJacobiScheduler)" in capsys.readouterr().err


def test_an_actions_file_decides_the_clips_and_is_part_of_their_metadata(tmp_path):
    """Clip i plays list i; a list that differs from frame 2 on changes the frames from there on only."""
    path, lists = tmp_path / "actions.json", [[4, 4, 1], [4, 3, 1]]
    path.write_text(json.dumps(lists))
    command = ["--pipeline", "nfd", "--actions-file", str(path), "--start-frame", "0", "--device", "cpu"]
    command += ["--clip-format", "gif"]
    for name, seed in (("a", 5), ("b", 4)):  # sample i draws from seed + i: clip 0 of a and clip 1 of b share it
        assert main([*command, "--seed", str(seed), "--frames", "--output", str(tmp_path / name)]) == 0
    one, other = (
        np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted((tmp_path / clip).glob("*.png"))])
        for clip in ("a/000000", "b/000001")
    )
    assert one.shape == other.shape == (4, 16, 16, 3)
    assert np.abs(one[:2] - other[:2]).max() <= 1
    assert np.abs(one[2] - other[2]).max() > 50
    for clip, actions in (("a/000000", lists[0]), ("b/000001", lists[1])):
        assert read_record(tmp_path / f"{clip}.gif")["condition"] == actions


def test_frames_are_for_clips(model, tmp_path, capsys):
    assert main(arguments(model, tmp_path / "out", "--frames")) == 2
    assert "frames are written for clips" in capsys.readouterr().err


def video_command(tmp_path, in_channels, *more):
    tiny_text_to_video(in_channels).save_pretrained(tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--prompts", "red sun", "--num-inference-steps", "2"]
    return [*command, "--device", "cpu", "--clip-format", "gif", "--output", str(tmp_path / "out"), *more]


def test_a_start_image_decides_the_clip_and_is_part_of_its_metadata(tmp_path, capsys):
    picture = tmp_path / "start.png"
    clips = {}
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(picture)
        output = ["--output", str(tmp_path / colour)]
        assert main(video_command(tmp_path, 7, "--start-image", str(picture), *output)) == 0
        clips[colour] = read_video(tmp_path / colour / "000000.gif")
    assert not np.array_equal(clips["red"], clips["blue"])
    blue = tmp_path / "blue" / "000000.gif"
    expected = {"path": str(picture), "sha256": hashlib.sha256(picture.read_bytes()).hexdigest()}
    assert read_record(blue)["start_image"] == expected
    again = ["--output", str(tmp_path / "again"), "--device", "cpu", "--clip-format", "gif"]
    assert main(["--from-image", str(blue), *again]) == 0
    assert (tmp_path / "again" / "000000.gif").read_bytes() == blue.read_bytes()
    assert main(["--from-image", str(tmp_path / "red" / "000000.gif"), *again]) == 2
    assert "is not the file it was" in capsys.readouterr().err


def test_a_start_image_that_does_not_fit_is_one_sentence(tmp_path, capsys):
    picture, text = tmp_path / "start.png", tmp_path / "start.txt"
    Image.new("RGB", (8, 8)).save(picture)
    text.write_text("no picture")
    for in_channels, more, message in (
        (3, ["--start-image", str(picture)], "takes no start image"),
        (7, [], "needs a start image"),
        (7, ["--start-image", str(text)], "can't be read as a picture"),
        (7, ["--start-image", str(tmp_path / "nowhere.png")], "nowhere.png can't be read: No such file"),
    ):
        assert main(video_command(tmp_path, in_channels, *more)) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_a_cache_from_the_command_line(tmp_path, monkeypatch):
    """BAC on a bundle with its own profile: half of the steps run the blocks, and the picture is the Python way's."""
    from dit_suite import BACConfig, apply_bac, load_pipeline
    from dit_suite.sampling import to_uint8
    from dit_suite.schedulers.generators import sample_generators

    pipe = load_pipeline("emoji-dit-32")
    pipe.set_progress_bar_config(disable=True)
    block, calls = type(pipe.transformer.transformer_blocks[0]), []
    original = block.forward
    monkeypatch.setattr(block, "forward", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    call = ["--model", "emoji-dit-32", "--class-labels", "1", "--num-inference-steps", "10", "--device", "cpu"]
    depth, counts, pictures = len(pipe.transformer.transformer_blocks), [], []
    for name, flags in (("plain", ()), ("cached", ("--accelerate", "bac:budget=5,interpolate=true"))):
        calls.clear()
        assert main([*call, *flags, "--output", str(tmp_path / name)]) == 0
        counts.append(len(calls))
        pictures.append(np.asarray(Image.open(tmp_path / name / "000000.png")))
    assert counts == [10 * depth, 5 * depth]
    assert read_record(tmp_path / "cached" / "000000.png")["accelerations"]["bac"]["budget"] == 5
    error = np.square(pictures[0].astype(float) - pictures[1]).mean()
    assert 0 < error < 255**2 / 10**2
    with apply_bac(pipe, BACConfig(budget=5, interpolate=True)):
        given = {"num_inference_steps": 10, "guidance_scale": 2.0, "output_type": "np"}
        image = pipe(class_labels=[1], **given, generator=sample_generators(0, [0]))
    assert np.array_equal(to_uint8(image.images)[0], pictures[1])
    assert main([*call, "--accelerate", "bac:budget=5", "--output", str(tmp_path / "refused")]) == 2


def test_adaspa_from_the_command_line(tmp_path):
    """A clip made with the plug-in is the clip the library makes with it."""
    options = "adaspa:sparsity=0.75,block_size=16,search_steps=0,min_tokens=0"
    clips = {}
    for name, flags in (("plain", ()), ("sparse", ("--accelerate", options))):
        output = ["--output", str(tmp_path / name), "--num-inference-steps", "3", *flags]
        assert main(video_command(tmp_path, 3, *output)) == 0
        clips[name] = np.asarray(read_video(tmp_path / name / "000000.gif"))
    assert not np.array_equal(clips["plain"], clips["sparse"])
    pipe = tiny_text_to_video(3)
    pipe.set_progress_bar_config(disable=True)
    config = AdaSpaConfig(sparsity=0.75, block_size=16, search_steps=(0.0,), min_tokens=0)
    with apply_adaspa(pipe, config) as handle:
        frames = pipe("red sun", num_inference_steps=3, generator=sample_generators(0, [0]), output_type="np").frames[0]
        assert handle.stats()["sparse_calls"] > 0
    assert np.abs(clips["sparse"].astype(float) - frames * 255).mean() < 4  # a GIF has 256 colours

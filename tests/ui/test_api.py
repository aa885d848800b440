"""The server without a browser: endpoints, limits, cancelling, many clients, and who may reach it."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

import app
from dit_suite.metadata import read_record
from dit_suite.ui.page import build_page, launch_arguments
from dit_suite.ui.settings import PUBLIC_LIMITS, ServerSettings
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "model"))


def serve(settings):
    page = build_page(settings)
    _, url, _ = page.launch(**launch_arguments(settings) | {"prevent_thread_lock": True, "quiet": True})
    return page, url


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    page, url = serve(ServerSettings(output=tmp_path_factory.mktemp("output"), models=(model,)))
    yield url
    page.close()


@pytest.fixture(scope="module")
def client(server):
    return Client(server, verbose=False)


@pytest.fixture
def evaluations(monkeypatch):
    """Start and end of every network evaluation, whoever asked for it."""
    from diffusers import PixArtTransformer2DModel

    spans, original = [], PixArtTransformer2DModel.forward

    def forward(self, *args, **kwargs):
        start = time.perf_counter()
        result = original(self, *args, **kwargs)
        spans.append((start, time.perf_counter()))
        return result

    monkeypatch.setattr(PixArtTransformer2DModel, "forward", forward)
    return spans


def ask(client, model, seed=0, count=1, steps=2, prompt="red apple"):
    return client.predict(prompt, model, seed, count, {"num_inference_steps": steps}, api_name="/generate_image")


def test_only_the_named_endpoints_are_public(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert {"/generate_image", "/list_models"} <= set(endpoints)
    assert all(
        name.startswith(("/generate_", "/list_models", "/compare", "/load_settings", "/play")) for name in endpoints
    )


def test_list_models(client, model):
    rows = {row["name"]: row for row in client.predict(api_name="/list_models")}
    assert rows[model]["technique"] == "pixart" and rows["emoji-pixart-64"]["condition"] == "prompt"
    for name, steps, guidance in (("emoji-pixart-64", 20, 4.0), ("emoji-dit-32", 20, 2.0), ("emoji-lego-64", 10, 2.0)):
        options = rows[name]["options"]
        assert (options["num_inference_steps"], options["guidance_scale"]) == (steps, guidance), name


def test_count_equals_single_runs(client, model):
    files, info = ask(client, model, seed=3, count=3)
    assert info["seed"] == 3 and info["finished"] == 3
    for i, path in enumerate(files):
        (alone,), _ = ask(client, model, seed=3 + i)
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(alone)))
        assert read_record(path)["seed"] + read_record(path)["index"] == 3 + i


def test_random_seed_is_told(client, model):
    _, first = ask(client, model, seed=-1)
    _, second = ask(client, model, seed=-1)
    assert first["seed"] != second["seed"] and first["seed"] >= 0


def test_cancel_stops_within_a_step(client, model, evaluations):
    job = client.submit("red apple", model, 0, 16, {"num_inference_steps": 200}, api_name="/generate_image")
    while len(evaluations) < 3:
        time.sleep(0.005)
    job.cancel()
    time.sleep(1.5)
    after_cancel = len(evaluations)
    time.sleep(1.0)
    assert len(evaluations) == after_cancel < 16 * 200
    assert ask(client, model)[1]["finished"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 201}, "num_inference_steps may be at most 200 on this server, got 201"),
        ({"steps": 0}, "num_inference_steps must be between 1 and 1000, got 0"),
        ({"count": 17}, "count may be at most 16 on this server, got 17"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"prompt": "x" * 1001}, "a prompt may have 1000 characters, got 1001"),
        ({"model": "/etc"}, "model must be one of"),
    ],
)
def test_limits_hold_on_the_server(client, model, arguments, message):
    with pytest.raises(AppError, match=message):
        ask(client, **{"model": model, **arguments})


def test_twenty_clients_lose_nothing_and_never_overlap(server, model, evaluations):
    def one(seed):
        return ask(Client(server, verbose=False), model, seed=seed)

    one(0)
    before = psutil.Process().memory_info().rss
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    grown = psutil.Process().memory_info().rss - before
    assert grown < 400e6, f"{grown / 1e6:.0f} MB for 20 clients, the clients themselves included"
    assert [info["seed"] for _, info in answers] == list(range(20))
    pictures = {Image.open(files[0]).tobytes() for files, _ in answers}
    assert len(pictures) == 20
    spans = sorted(evaluations)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def test_a_full_queue_says_so_and_keeps_what_it_accepted(model, tmp_path):
    settings = ServerSettings(output=tmp_path / "output", models=(model,))
    page = build_page(settings)
    page.queue(max_size=2, default_concurrency_limit=1)
    _, url, _ = page.launch(**launch_arguments(settings) | {"prevent_thread_lock": True, "quiet": True})
    results, errors = [], []

    def one(seed):
        client = Client(url, verbose=False)
        ready.wait()
        try:
            results.append(ask(client, model, seed=seed, steps=60))
        except Exception as error:
            errors.append(str(error))

    ready = threading.Barrier(8, timeout=120)
    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(8)]
    [t.start() for t in threads]
    [t.join(240) for t in threads]
    page.close()
    assert len(results) + len(errors) == 8 and results and errors
    assert all("queue is full" in text.lower() for text in errors), errors
    assert len(list((tmp_path / "output").rglob("*.png"))) == len(results)


def test_login_protects_every_endpoint(model, tmp_path):
    import httpx

    page, url = serve(ServerSettings(output=tmp_path, models=(model,), auth=("a", "secret")))
    for path in ("config", "gradio_api/info"):
        assert httpx.get(url + path, timeout=60).status_code == 401
    assert Client(url, auth=("a", "secret"), verbose=False).predict(api_name="/list_models")
    page.close()


@pytest.mark.parametrize("flags", [["--share"], ["--host", "0.0.0.0"], ["--host", "::"], ["--host", "example.org"]])
def test_public_addresses_need_protection(flags, capsys):
    assert app.main(flags) == 2
    assert "add --auth USER:PASSWORD, or --public" in capsys.readouterr().err
    assert app.read_settings([*flags, "--auth", "a:b"]).auth == ("a", "b")
    assert app.read_settings([*flags, "--public"]).limits is PUBLIC_LIMITS


def test_defaults_and_space(monkeypatch):
    settings = app.read_settings([])
    assert (settings.host, settings.public, settings.share) == ("127.0.0.1", False, False)
    monkeypatch.setenv("SPACE_ID", "owner/space")
    settings = app.read_settings([])
    assert (settings.host, settings.public) == ("0.0.0.0", True)


def test_a_taken_port_is_one_sentence(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert app.main(["--port", str(port), "--output", str(tmp_path), "--device", "cpu"]) == 2
    assert f"app.py: can't listen on port {port} of 127.0.0.1; choose another --port" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(capsys):
    assert app.main(["--device", "cuda:63"]) == 2
    assert "the device 'cuda:63' can't be used on this machine" in capsys.readouterr().err


def test_bad_auth(capsys):
    assert app.main(["--auth", "nocolon"]) == 2
    assert "USER:PASSWORD" in capsys.readouterr().err

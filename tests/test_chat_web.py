"""The command: what its options mean, and that it stops in order."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from jaxchat.checkpoint import CheckpointStore, stage_directory
from jaxchat.server.settings import LOOPBACK, ServerSettings
from scripts import chat_web
from tests.servers import backend, running, tokenizer
from tests.test_server import GREEDY, HELLO, LONG, chat, error_of, wait_for
from torch_ref.torch_backend import TorchBackend

ROOT = Path(__file__).parents[1]


def settings(**options):
    return chat_web.server_settings(chat_web.Config(**options), "m")


def test_the_defaults_are_safe(monkeypatch):
    monkeypatch.delenv("JAXCHAT_API_KEYS", raising=False)
    assert chat_web.Config().host == "127.0.0.1"
    default = settings()
    assert set(default.allowed_hosts) == set(LOOPBACK)
    assert (default.api_keys, default.allowed_origins) == ((), ())
    assert settings(host="0.0.0.0").allowed_hosts == ()
    assert "my.example" in settings(host="0.0.0.0", allowed_hosts=("my.example",)).allowed_hosts


def test_keys_come_from_a_file_and_the_environment_and_are_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCHAT_API_KEYS", "one, two")
    file = tmp_path / "keys"
    file.write_text("three\n\nfour\n")
    made = settings(api_key_file=file)
    assert made.api_keys == ("one", "two", "three", "four")
    assert "three" not in repr(made)
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no API key"):
        settings(api_key_file=file)


def test_values_out_of_range_are_named():
    with pytest.raises(ValueError, match="replicas=0"):
        chat_web.Config(replicas=0)
    with pytest.raises(ValueError, match="timeout_s=0"):
        settings(timeout_s=0)
    with pytest.raises(ValueError, match="an API key is empty"):
        ServerSettings("m", api_keys=("",))


def test_all_stages_are_those_with_a_checkpoint(base_dir):
    with pytest.raises(FileNotFoundError, match="base_train"):
        chat_web.stages(chat_web.Config(source="all"))
    for stage, tag in (("base", "d2"), ("base", "d4"), ("sft", "d2")):
        store = CheckpointStore(stage_directory(stage, tag))
        store.save(1, backend(), {"tokenizer": tokenizer().fingerprint})
        store.finish()
    assert chat_web.stages(chat_web.Config(source="all")) == {"sft": "d2", "base": "d4"}
    assert chat_web.stages(chat_web.Config(source="all", model_tag="d4")) == {"base": "d4"}
    assert chat_web.stages(chat_web.Config(source="sft")) == {"sft": "d2"}
    with pytest.raises(FileNotFoundError, match="no stage has a model d9"):
        chat_web.stages(chat_web.Config(source="all", model_tag="d9"))
    with pytest.raises(ValueError, match="step=3 belongs to one stage"):
        chat_web.Config(source="all", step=3)


def test_replies_under_way_end_when_the_server_is_told_to_stop():
    with ThreadPoolExecutor() as threads:
        with running() as one:
            step = one.engine.step
            one.engine.step = lambda: time.sleep(0.01) or step()
            reply = threads.submit(chat, one, **LONG)
            wait_for(lambda: one.pool.workers[0].load == 1)
            one.pool.draining = True
            assert "is stopping" in error_of(one.get("/ready"), 503)["message"]
            error_of(chat(one), 503)
            assert one.get("/health").json()["ready"] is False
        assert reply.result().json()["choices"][0]["finish_reason"] == "length"


def save_checkpoint(base_dir, framework):
    """A finetuned model in a base directory of its own."""
    model = backend()
    if framework == "torch":
        model = TorchBackend(model.config)
        model.set_params(backend().get_params())
    store = CheckpointStore(stage_directory("sft", "d2"))
    store.save(1, model, {"tokenizer": tokenizer().fingerprint})
    store.finish()
    tokenizer().save(base_dir / "tokenizer")


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_sigterm_drains_and_exits_with_0(base_dir, framework):
    save_checkpoint(base_dir, framework)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scripts.chat_web", "--port", str(port), "--slots", "2"]
    process = subprocess.Popen(
        [*command, "--backend", framework, "--grace-s", "60"],
        cwd=ROOT,
        env={**os.environ, "JAXCHAT_BASE_DIR": str(base_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"

    def ready():
        assert process.poll() is None, process.stdout.read()
        try:
            return httpx.get(url + "/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(ready, seconds=120)
        answer = httpx.post(url + "/chat/completions", json={"messages": HELLO, **GREEDY})
        assert answer.json()["usage"]["completion_tokens"] == 12
        body = {"prompt": ["the dog"] * 10, **LONG, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        ends = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
        assert ends.count("length") == 10
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")
    finally:
        process.kill()
        output = process.communicate()[0]
    assert "Traceback" not in output

"""The command: what its options mean, and that it stops in order."""

import json
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from jaxchat.checkpoint import CheckpointStore
from jaxchat.server import serve
from jaxchat.server.settings import LOOPBACK, ServerSettings
from jaxchat.stages import stage_directory
from scripts import chat_web
from tests.server.asking import GREEDY, HELLO, LONG, chat, error_of, wait_for
from tests.servers import Process, backend, running, tokenizer, torch_backend


def settings(**options):
    return chat_web.server_settings(chat_web.Config(**options), "m")


def test_engines_are_what_was_asked_for(monkeypatch):
    model = SimpleNamespace(backend=backend(), tokenizer=tokenizer())
    monkeypatch.setattr(chat_web, "load_model", lambda *_, **__: model)
    for asked in (False, True):
        config = chat_web.Config(replicas=2, slots=3, max_length=99, batch_invariant=asked)
        for engine in chat_web.load_engines(config, "sft", "d2"):
            assert (engine.slots, engine.max_length, engine.batch_invariant) == (3, 99, asked)


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
    file.write_text("five\n")
    for nothing in ("", " , "):  # a variable of Compose that nobody has filled in
        monkeypatch.setenv("JAXCHAT_API_KEYS", nothing)
        for given in (None, file):
            with pytest.raises(
                ValueError, match=r"JAXCHAT_API_KEYS is set and holds no .* unset it"
            ):
                settings(api_key_file=given)
    monkeypatch.delenv("JAXCHAT_API_KEYS")
    assert settings(api_key_file=file).api_keys == ("five",)


def test_values_out_of_range_are_named():
    with pytest.raises(ValueError, match="replicas=0"):
        chat_web.Config(replicas=0)
    with pytest.raises(ValueError, match="slots=0, grace_s=-5"):
        chat_web.Config(slots=0, grace_s=-5)
    with pytest.raises(ValueError, match=r"timeout_s=0, top_k=-5, temperature=-1 \(0 to 2\)"):
        settings(timeout_s=0, top_k=-5, temperature=-1)
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


def test_a_port_in_use_is_told_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(chat_web, "find_model_tag", lambda stage: "d2")
    monkeypatch.setattr(chat_web, "load_engines", lambda *_: pytest.fail("a model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}: .*--port"):
            chat_web.main(chat_web.Config(port=port))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the system has no IPv6 for both")
@pytest.mark.parametrize("to", ["127.0.0.1", "::1"])
def test_two_colons_are_every_address_those_of_ipv4_too(to):
    with serve._listen("::", 0) as listener:
        socket.create_connection((to, listener.getsockname()[1]), timeout=10).close()


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
    model = backend() if framework == "jax" else torch_backend()
    store = CheckpointStore(stage_directory("sft", "d2"))
    store.save(1, model, {"tokenizer": tokenizer().fingerprint})
    store.finish()
    tokenizer().save(base_dir / "tokenizer")


def command(framework):
    line = [sys.executable, "-m", "scripts.chat_web", "--slots", "2", "--grace-s", "60"]
    return [*line, "--backend", framework, "--port"]


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_sigterm_drains_and_exits_with_0(base_dir, framework):
    save_checkpoint(base_dir, framework)
    with Process(command(framework), JAXCHAT_BASE_DIR=str(base_dir)) as one:
        one.wait_ready()
        answer = httpx.post(one.url + "/chat/completions", json={"messages": HELLO, **GREEDY})
        assert answer.json()["usage"]["completion_tokens"] == 12
        body = {"prompt": ["the dog"] * 10, **LONG, "stream": True}
        with httpx.stream("POST", one.url + "/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            one.signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        ends = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
        assert ends.count("length") == 10
        assert one.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(one.url + "/health")
    assert "Traceback" not in one.output


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_second_sigterm_ends_replies_and_exits_with_0(base_dir, framework):
    save_checkpoint(base_dir, framework)
    with (
        ThreadPoolExecutor() as threads,
        Process(command(framework), JAXCHAT_BASE_DIR=str(base_dir)) as one,
    ):
        one.wait_ready()
        body = {"messages": HELLO, **LONG, "n": 128}
        reply = threads.submit(httpx.post, one.url + "/chat/completions", json=body, timeout=60)
        wait_for(lambda: one.load)
        for _ in range(2):
            one.signal(signal.SIGTERM)
            time.sleep(0.2)
        error_of(reply.result(), 503)
        assert one.wait(10) == 0
    assert "Traceback" not in one.output

"""Connections: clients that stop half way or do not read, more of them than fit, and the stop."""

import contextlib
import json
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from jaxchat.server import connection, gate
from tests.server.asking import HELLO, LONG, chat, error_of, wait_for
from tests.servers import Process, make_engine, running

HALF_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: "
HALF_BODY = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100\r\n\r\n{"
)
REFUSED = b"POST /v1/completions HTTP/1.1\r\nHost: evil\r\nContent-Length: 100\r\n\r\n"


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture
def hasty(engine, monkeypatch):
    """A server that waits for a client hardly at all."""
    monkeypatch.setattr(connection, "PATIENCE_S", 0.3)
    monkeypatch.setattr(gate, "BODY_S", 0.3)
    monkeypatch.setattr(gate, "DRAIN_S", 0.3)
    with running([engine]) as one:
        yield one


def everything(client):
    """What the server sends until it closes the connection."""
    chunks = []
    while chunk := client.recv(1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def answer(client):
    """(status, error) of what the server sends until it closes the connection."""
    head, _, body = everything(client).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_half_a_request_is_not_waited_for(hasty):
    with hasty.connect(HALF_HEAD) as head, hasty.connect() as nothing:
        assert (everything(head), everything(nothing)) == (b"", b"")
    with hasty.connect(HALF_BODY) as body:
        status, error = answer(body)
    assert (status, error["type"]) == (408, "timeout_error")
    with hasty.connect(REFUSED) as refused:
        assert answer(refused)[0] == 403
    with hasty.connect(HALF_BODY + b" " * 99 + HALF_HEAD) as second:  # after a whole one
        assert answer(second)[0] == 400
    wait_for(lambda: not hasty.server.server_state.connections)
    assert chat(hasty).status_code == 200


def test_a_body_that_trickles_in_has_a_limit_as_a_whole(hasty):
    with hasty.connect(HALF_BODY) as client:
        start = time.monotonic()
        client.settimeout(0.05)
        while time.monotonic() < start + 5:
            try:
                assert b" 408 " in client.recv(1 << 16)
                break
            except TimeoutError:
                client.sendall(b" ")
    assert time.monotonic() < start + 2


def test_connections_beyond_the_limit_are_sent_away(hasty, monkeypatch):
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    idle = [hasty.connect() for _ in range(3)]
    with hasty.connect() as fourth:
        status, error = answer(fourth)
    assert (status, error["message"]) == (503, "The server has too many connections.")
    for one in idle:
        assert everything(one) == b""  # nothing was asked
        one.close()
    assert hasty.get("/health").status_code == 200


@contextlib.contextmanager
def unread(server):
    """A stream of more than fits between the two ends, of which nothing is read."""
    body = {"messages": HELLO, **LONG, "n": 64, "logprobs": True, "top_logprobs": 20}
    content = json.dumps({**body, "stream": True}).encode()
    head = HALF_BODY.replace(b"completions", b"chat/completions")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        client.sendall(head.replace(b"100\r\n\r\n{", b"%d\r\n\r\n" % len(content)) + content)
        yield


def test_a_client_that_does_not_read_is_dropped(hasty):
    with unread(hasty):
        wait_for(lambda: hasty.server.server_state.connections)
        wait_for(lambda: not hasty.server.server_state.connections, seconds=30)
        hasty.wait_idle()


def test_a_reply_that_nobody_reads_is_no_load_once_it_is_written(engine):
    with running([engine]) as one, unread(one):
        wait_for(lambda: one.pool.workers[0].load)
        one.wait_idle(seconds=30)
        assert len(one.server.server_state.connections) == 1  # it is still not read


# --- the stop ------------------------------------------------------------------------------------


def test_a_stop_does_not_wait_for_half_a_request(engine):
    with running([engine], grace_s=60) as one:
        start = time.monotonic()
        with one.connect(HALF_HEAD) as head, one.connect(HALF_BODY) as body:
            wait_for(lambda: len(one.server.server_state.tasks) == 1)
            one.server.should_exit = True
            assert everything(head) == b""
            status, error = answer(body)
        assert (status, error["message"]) == (503, "The server is stopping.")
        wait_for(lambda: not one.server.server_state.connections)
    assert time.monotonic() < start + 10


def test_replies_that_outlast_the_grace_period_are_told_why(engine, caplog, monkeypatch):
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.1) or step())
    with ThreadPoolExecutor() as threads, running([engine], grace_s=1) as one:
        whole = threads.submit(chat, one, **LONG)
        stream = threads.submit(chat, one, **LONG, stream=True)
        wait_for(lambda: one.pool.workers[0].load == 2)
        one.server.should_exit = True
        reply = whole.result()
        assert error_of(reply, 503)["message"] == "The server is stopping."
        assert reply.headers["retry-after"] == "10"
        last = stream.result().text.strip().split("\n\n")[-1].removeprefix("data: ")
        assert json.loads(last)["error"]["message"] == "The server is stopping."
    assert "Traceback" not in caplog.text


STUCK = """
import sys, time
from jaxchat.config import GPTConfig
from jaxchat.engine import Engine
from jaxchat.server import pool, serve
from jaxchat.server.app import create_app
from jaxchat.server.settings import ServerSettings
from jaxchat.tokenizer import Tokenizer
from tests.scripted import ScriptedBackend

tokenizer = Tokenizer.train(["hello"] * 4, vocab_size=280)
backend = ScriptedBackend(GPTConfig(vocab_size=280), lambda held: time.sleep(60))
engine = Engine(backend, tokenizer)
engine.warm_up = lambda: None
backend.devices = lambda: None
backend.devices.description = "none"
app = create_app([engine], ServerSettings("stuck"))
pool.STOP_S = 0.5
serve.run(app, host="127.0.0.1", port=int(sys.argv[2]), grace_s=int(sys.argv[1]), name="m")
"""


@pytest.mark.parametrize(("signals", "grace_s"), [(1, 1), (2, 60)])
def test_a_server_whose_engine_is_stuck_ends_all_the_same(signals, grace_s):
    with (
        ThreadPoolExecutor() as threads,
        Process([sys.executable, "-c", STUCK, str(grace_s)]) as one,
    ):
        one.wait_ready()
        body = {"prompt": "hello"}
        reply = threads.submit(httpx.post, one.url + "/v1/completions", json=body, timeout=60)
        wait_for(lambda: one.load)
        for _ in range(signals):
            one.signal(signal.SIGTERM)
            time.sleep(0.3)
        assert error_of(reply.result(), 503)["message"] == "The server is stopping."
        assert one.wait(10) == 0
    assert "Traceback" not in one.output


COMPILING = STUCK.replace("warm_up = lambda: None", "warm_up = lambda: time.sleep(60)")
COMPILING = COMPILING.replace("pool.STOP_S = 0.5\n", "")


def test_a_server_that_compiles_is_not_waited_for():
    """A reply may have its last step, half a minute; before the warm-up there is none."""
    with Process([sys.executable, "-c", COMPILING, "60"]) as one:
        wait_for(lambda: answers(one), seconds=60)
        assert httpx.get(one.url + "/ready").status_code == 503
        one.signal(signal.SIGTERM)
        assert one.wait(10) == 0
    assert "Traceback" not in one.output


def answers(process):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(process.url + "/health").status_code == 200


def test_a_flood_of_connections_leaves_descriptors_for_the_rest():
    limited = ["bash", "-c", 'ulimit -n 128; exec "$@"', "bash", sys.executable, "-c", STUCK, "1"]
    with Process(limited) as one, contextlib.ExitStack() as flood:
        one.wait_ready()
        address = ("127.0.0.1", int(one.url.rsplit(":", 1)[1]))
        for _ in range(130):
            flood.enter_context(socket.create_connection(address)).sendall(HALF_HEAD[:9])
        assert httpx.get(one.url + "/health").status_code == 503
        one.signal(signal.SIGTERM)
        assert one.wait(10) == 0
    assert "Too many open files" not in one.output

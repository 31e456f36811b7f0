"""Streams that have nothing to tell yet: proxies must not take them for dead, or hold them back."""

import json
import socket
import threading

import httpx
import openai
import pytest

from jaxchat.server import sse
from tests.server.asking import GREEDY, HELLO, LONG, complete, events, in_slots, wait_for
from tests.servers import MODEL, SLOTS

SIGN = ": keep-alive\n\n"
STREAMS = {
    "chat": ("/v1/chat/completions", {"messages": HELLO}),
    "alias": ("/chat/completions", {"messages": HELLO}),
    "text": ("/v1/completions", {"prompt": "hello"}),
    "texts": ("/v1/completions", {"prompt": ["hello", "dog"]}),
    "scores": ("/v1/completions", {"prompt": "hello", "echo": True, "logprobs": 1}),
}


@pytest.fixture
def stuck(idle, monkeypatch):
    """The server, whose engine does nothing until the event is set; signs come every 20 ms."""
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.02)
    go = threading.Event()
    for name in ("step", "score_prompt"):
        monkeypatch.setattr(idle.engine, name, waiting(go, getattr(idle.engine, name)))
    yield idle, go
    go.set()


def waiting(go, function):
    return lambda *arguments: go.wait(30) and function(*arguments)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_waits_shows_signs_of_life_and_is_the_same_else(stuck, kind):
    server, go = stuck
    path, body = STREAMS[kind]
    body = {**body, **GREEDY, "stream": True, "stream_options": {"include_usage": True}}
    go.set()
    told = by_reply(events(without_signs(server.post(path, body).text)))
    go.clear()
    text = ""
    with httpx.stream("POST", server.url + path, json=body, timeout=60) as answer:
        for piece in answer.iter_text():
            text += piece
            if text.count(SIGN) == 3:
                go.set()
    assert text.count(SIGN) >= 3
    assert by_reply(events(without_signs(text))) == told


def without_signs(text):
    """A busy machine lets replies wait that nobody has asked to."""
    return httpx.Response(200, text=text.replace(SIGN, ""))


def by_reply(documents):
    """What came of each reply, in its order, without what differs from one request to the next:
    how replies to two prompts alternate is a matter of when the second one arrives."""
    told = {}
    for document in documents:
        rest = {name: x for name, x in document.items() if name not in ("id", "created")}
        told.setdefault(tuple(choice["index"] for choice in rest["choices"]), []).append(rest)
    return told


def test_an_openai_client_sees_none_of_the_signs(stuck):
    server, go = stuck
    threading.Timer(0.3, go.set).start()
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        ask = {"model": MODEL, "temperature": 0, "max_tokens": 12, "messages": HELLO}
        ask["extra_body"] = {"ignore_eos": True}
        chunks = list(client.chat.completions.create(stream=True, **ask))
        whole = client.chat.completions.create(**ask)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == whole.choices[0].message.content != ""


def test_signs_are_shown_while_a_request_waits_for_its_slot_and_the_client_may_leave(stuck):
    server, go = stuck
    body = json.dumps({"messages": HELLO, **LONG, "n": SLOTS + 1, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    with server.connect(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body) as one:
        received = b""
        while received.count(SIGN.encode()) < 3:
            received += one.recv(1 << 16)
        one.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: server.pool.workers[0].load == 0)
    go.set()
    wait_for(lambda: in_slots(server) == 0)


@pytest.mark.parametrize("path", [STREAMS["chat"][0], STREAMS["text"][0]])
def test_no_proxy_may_keep_a_stream_or_hold_it_back(idle, path):
    body = {"messages": HELLO, "prompt": "hello", **GREEDY, "stream": True}
    answer = idle.post(path, body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers
    assert SIGN not in complete(idle, stream=True).text  # a quick one has no need of them

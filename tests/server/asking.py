"""What the tests ask a server, and how they read its answers."""

import json
import time

from jaxchat.tokenizer import SPECIAL_NAMES

SPECIALS = [f"<|{name}|>" for name in SPECIAL_NAMES]
HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
POISON = 7
"""A token that no honest prompt has."""
LONG = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}


def chat(server, **fields):
    return server.post("/v1/chat/completions", {"messages": HELLO, **GREEDY, **fields})


def complete(server, **fields):
    return server.post("/v1/completions", {"prompt": "hello", **GREEDY, **fields})


def events(response):
    """The documents of a stream that ended as it should."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def in_slots(server):
    return sum(slot.sample is not None for slot in server.engine._slots)


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def fail_once(function):
    failures = ["out of memory"]

    def failing(*arguments):
        if failures:
            raise RuntimeError(failures.pop())
        return function(*arguments)

    return failing

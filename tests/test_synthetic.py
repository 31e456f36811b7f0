"""Conversations made up by another model, which is here a scripted one behind our own server."""

import contextlib
import gc
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest

from jaxchat.config import GPTConfig
from jaxchat.engine import Engine
from jaxchat.synthetic import PEOPLE, TOPICS, Unusable, converse, draw_scenario
from jaxchat.tasks.customjson import CustomJSON
from scripts.gen_synthetic_data import PATIENCE_S, REFUSALS, Config, connected, main, patiently
from tests.scripted import ScriptedBackend
from tests.servers import running, tokenizer

ABOUT = "Ada is a small model. Zoe made her in {2026}."
ENGLISH = {"languages": ("English",), "max_turns": 3}


def by_prompt(prompt):
    """Another reply after every prompt."""
    return f"reply {zlib.crc32(prompt.encode())}"


@contextlib.contextmanager
def writer(reply, monkeypatch, slots=4, **settings):
    """A server whose model answers a prompt with `reply(prompt)`; the prompts it was given."""
    special, replies = tokenizer().special_id, {}

    def next_token(held):
        begin = len(held) - held[::-1].index(special("assistant_start"))
        prompt = tokenizer().decode(held[:begin])
        if prompt not in replies:
            replies[prompt] = [*tokenizer().encode(reply(prompt)), special("assistant_end")]
        return replies[prompt][len(held) - begin]

    config = GPTConfig(sequence_len=4096, vocab_size=tokenizer().vocab_size)
    engine = Engine(ScriptedBackend(config, next_token), tokenizer(), slots=slots)
    engine.warm_up = lambda: None
    with running([engine], **settings) as one:
        monkeypatch.setenv("OPENAI_BASE_URL", one.url + "/v1")
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        yield replies


@pytest.fixture(autouse=True)
def abandoned_threads_end_here():
    """With the sockets that nobody closes for them, of which another test would be warned."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@contextlib.contextmanager
def stub(respond, monkeypatch):
    """A server that is not ours; `respond(request)` gives status, content and headers, if any."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content, *headers = respond(json.loads(asked or "{}"))
            given = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            kind = "text/html" if isinstance(content, str) else "application/json"
            for name, value in {"Content-Type": kind, **dict(*headers)}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(given)))
            self.end_headers()
            self.wfile.write(given)

        do_POST = do_GET  # noqa: N815 (http.server's name)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # somebody who left before the answer
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield
    server.shutdown()
    server.server_close()


def completion(text):
    """An answer in the API's form."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return 200, {"id": "1", "object": "chat.completion", "choices": [choice]}


def answered(request):
    return completion(by_prompt(json.dumps(request["messages"])))


@pytest.fixture
def config(tmp_path):
    about = tmp_path / "about.md"
    about.write_text(ABOUT)
    return Config(about, tmp_path / "new" / "made.jsonl", num_conversations=12)


def lines(config):
    return [json.loads(line) for line in config.output.read_text().splitlines()]


def test_both_sides_are_played_and_the_stages_read_the_result(config, monkeypatch, capsys):
    with writer(by_prompt, monkeypatch) as prompts:
        main(config)
    made = lines(config)
    assert sorted(line["number"] for line in made) == list(range(12))
    assert len(CustomJSON(config.output)) == 12
    said = [message for line in made for message in line["messages"]]
    answering = [prompt for prompt in prompts if ABOUT in prompt]
    assert {m["content"] for m in said if m["role"] == "assistant"} == set(
        map(by_prompt, answering)
    )
    asking = [prompt for prompt in prompts if ABOUT not in prompt]
    assert {m["content"] for m in said if m["role"] == "user"} == set(map(by_prompt, asking))
    assert f"{len(said)} messages" in capsys.readouterr().out
    turns = [len(line["messages"]) // 2 for line in made]
    keys = [f"{config.seed}/{line['number']}/0" for line in made]
    assert turns == [draw_scenario(key, **ENGLISH).turns for key in keys]


def test_an_interrupted_collection_asks_for_what_is_missing(config, monkeypatch):
    with writer(by_prompt, monkeypatch):
        main(config)
        whole = config.output.read_bytes().splitlines(keepends=True)
        for kept in (b"".join(whole[:7]) + whole[7][:25], whole[0][:5]):
            config.output.write_bytes(kept)
            main(config)
            assert config.output.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
            assert sorted(config.output.read_bytes().splitlines(keepends=True)) == sorted(whole)
    with writer(by_prompt, monkeypatch) as prompts:
        main(replace(config, num_conversations=10))
    assert not prompts


def test_a_busy_server_is_waited_for(config, monkeypatch):
    with writer(by_prompt, monkeypatch, slots=1, max_waiting=1):
        main(replace(config, num_conversations=4, max_turns=1))
    assert len(lines(config)) == 4


def test_what_is_no_conversation_is_not_kept(config, monkeypatch, capsys):
    with writer(lambda prompt: "always this", monkeypatch):
        main(replace(config, max_turns=1))
    assert len(lines(config)) == 1
    assert "11 given up after 3 attempts: a conversation that is there" in capsys.readouterr().out
    config.output.unlink()
    with writer(lambda prompt: "", monkeypatch), pytest.raises(ValueError, match="no conversation"):
        main(config)
    assert "12 given up after 3 attempts: an empty message" in capsys.readouterr().out


def test_a_refused_message_costs_its_conversation_alone(config, monkeypatch, capsys):
    before = itertools.count()

    def ever_longer(prompt):
        """After some time, questions that nobody can answer within the context."""
        return by_prompt(prompt) + "x" * 1500 * (next(before) > 30 and ABOUT not in prompt)

    config.about.write_text(ABOUT + "z" * 800)
    config = replace(config, num_conversations=18, max_turns=1, workers=1)
    with writer(ever_longer, monkeypatch):
        main(config)
        assert len(lines(config)) == 16
        assert re.search(r"given up after 3 attempts: .*4,?096", capsys.readouterr().out)
        with pytest.raises(OSError, match=r"refuses: .*temperature"):
            main(replace(config, temperature=9.0))


def test_what_keeps_it_from_beginning_is_told_with_the_remedy(config, monkeypatch):
    with writer(by_prompt, monkeypatch, api_keys=("secret",)):
        with pytest.raises(OSError, match=r"does not accept OPENAI_API_KEY(.|\n)*continues"):
            main(replace(config, model="tiny"))
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        with pytest.raises(OSError, match=r"refuses: .*'gpt-4'"):
            main(replace(config, model="gpt-4"))
    monkeypatch.setattr("scripts.gen_synthetic_data.RETRIES", 0)
    with pytest.raises(OSError, match="cannot be reached, check OPENAI_BASE_URL"):
        main(config)
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="set OPENAI_API_KEY, or OPENAI_BASE_URL"):
        main(config)
    with pytest.raises(ValueError, match="max_turns 0"):
        replace(config, max_turns=0)
    config.about.write_text(" \n")
    with pytest.raises(ValueError, match="is empty; it should describe the assistant"):
        main(config)


def test_a_strict_server_gets_the_limit_by_its_older_name(config, monkeypatch, capsys):
    """Mistral's: 422, and a body without "error", which the client's message leaves out."""
    seen = []

    def strict(request):
        seen.append(request)
        if "max_completion_tokens" in request:
            told = {"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"]}
            return 422, {"object": "error", "detail": [told]}
        if request.get("temperature", 0) > 1:
            return 422, {"object": "error", "detail": [{"loc": ["body", "temperature"]}]}
        return answered(request)

    config = replace(config, model="m", workers=2)
    with stub(strict, monkeypatch):
        main(config)
        assert len(lines(config)) == 12
        assert sum("max_completion_tokens" in request for request in seen) <= config.workers
        assert all(request.get("max_tokens", 2000) == 2000 for request in seen)
        with pytest.raises(OSError, match=r'refuses: status 422: .*"temperature"'):
            main(replace(config, num_conversations=18, temperature=9.0))


def test_one_refused_prompt_costs_its_attempt_alone(config, monkeypatch, capsys):
    """Even the first of all, which the same command would draw again."""
    numbers = itertools.count()

    def moderated(request):
        number = next(numbers)
        if number in (0, 6):
            return 403, {"error": {"message": f"moderated {number}"}}
        return (500, {}, {"x-should-retry": "false"}) if number == 9 else answered(request)

    config = replace(config, model="m", workers=1)
    with stub(moderated, monkeypatch):
        main(config)
    assert len(lines(config)) == 12
    assert "given up" not in capsys.readouterr().out


def test_refusals_without_end_are_about_something_else(config, monkeypatch):
    numbers = itertools.count()

    def exhausted(request):
        return answered(request) if next(numbers) < 2 else (402, {"detail": "pay first"})

    config = replace(config, model="m", workers=1, max_turns=1, num_conversations=200)
    with stub(exhausted, monkeypatch), pytest.raises(OSError, match=r"pay first(.|\n)*continues"):
        main(config)
    assert len(lines(config)) == 1
    assert next(numbers) <= 2 + REFUSALS + 2  # the thread may have begun one more


@pytest.mark.parametrize("page", ["<html>Welcome</html>", {"status": "ok"}, [1]])
def test_a_server_that_speaks_something_else_is_told_from_one_that_refuses(
    config, monkeypatch, page
):
    with stub(lambda request: (200, page), monkeypatch):
        with pytest.raises(OSError, match=r"not as OpenAI's API does: .*end in /v1"):
            main(config)
        with pytest.raises(OSError, match=r"end in /v1|no answer: .*'ok'"):
            main(replace(config, model="m"))


ODD_ANSWERS = {
    "empty": "",
    "cut off": '{"id": "1", "choi',
    "null": None,
    "an error": {"error": {"message": "overloaded"}},
    "a choice without a message": {"id": "1", "choices": [{"index": 0, "finish_reason": "stop"}]},
}


@pytest.mark.parametrize("odd", ODD_ANSWERS.values(), ids=ODD_ANSWERS)
def test_an_odd_answer_among_good_ones_costs_its_attempt(config, monkeypatch, odd):
    """It ended the collection, some of them with a traceback."""
    numbers = itertools.count()

    def respond(request):
        return (
            (200, odd, {"Content-Type": "application/json"})
            if next(numbers) == 5
            else answered(request)
        )

    with stub(respond, monkeypatch):
        main(replace(config, model="m", workers=1, num_conversations=8))
    assert len(lines(config)) == 8


def test_an_answer_in_parts_is_its_text(config, monkeypatch):
    def respond(request):
        status, answer = answered(request)
        message = answer["choices"][0]["message"]
        message["content"] = [
            {"type": "thinking", "thinking": "hm"},
            {"type": "text", "text": message["content"]},
        ]
        answer["usage"] = {"prompt_tokens": None, "completion_tokens": 3, "total_tokens": 3}
        return status, answer

    with stub(respond, monkeypatch):
        main(replace(config, model="m", num_conversations=3))
    assert "hm" not in str(lines(config))
    assert len(lines(config)) == 3


class Clock:
    """In place of the event of an interrupt: nobody interrupts, and nobody waits."""

    def __init__(self):
        self.waits = []

    def wait(self, seconds):
        self.waits.append(seconds)
        return False


def test_a_server_is_waited_for_as_long_as_it_asks(monkeypatch):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=300), usegmt=True)
    answers = iter(
        [
            (429, {}, {"Retry-After": "90"}),
            (503, {}, {"Retry-After": later}),
            (500, {}, {"retry-after-ms": "20000"}),
            (409, {}),
            (429, {}, {"Retry-After": str(PATIENCE_S + 1)}),
        ]
    )
    clock = Clock()
    with (
        stub(lambda request: next(answers), monkeypatch),
        connected() as client,
        pytest.raises(openai.RateLimitError),
    ):
        patiently(client.models.list, clock)
    assert clock.waits[:3] == [90, pytest.approx(280, abs=20.5), 20]
    assert 0 < clock.waits[3] <= 4
    assert len(clock.waits) == 4


def test_a_server_that_hangs_is_told_in_its_own_words(config, monkeypatch):
    monkeypatch.setattr("scripts.gen_synthetic_data.TIMEOUT_S", 0.2)
    asked, rest = itertools.count(), threading.Event()

    def hanging(request):
        next(asked)
        rest.wait(20)
        return answered(request)

    config = replace(config, model="m", num_conversations=1)
    with stub(hanging, monkeypatch), pytest.raises(OSError, match=r"not answer within 0.2 s"):
        main(config)
    rest.set()
    assert next(asked) == 3


def test_an_error_does_not_wait_for_other_requests(config, monkeypatch):
    rest, numbers = threading.Event(), itertools.count()

    def one_thinks(request):
        if next(numbers) == 0:
            rest.wait(60)
        return 401, {"error": {"message": "no"}}

    began = time.monotonic()
    with stub(one_thinks, monkeypatch), pytest.raises(OSError, match="does not accept"):
        main(replace(config, model="m", workers=2))
    assert time.monotonic() - began < 30
    rest.set()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_does_not_wait_for_requests_under_way(config, monkeypatch):
    asked, rest = threading.Event(), threading.Event()

    def thinking(request):
        asked.set()
        rest.wait(90)
        return answered(request)

    words = ["--about", config.about, "-o", config.output, "-m", "m", "-n", "2"]
    command = [sys.executable, "-m", "scripts.gen_synthetic_data", *map(str, words)]
    with (
        stub(thinking, monkeypatch),
        subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ) as process,
    ):
        try:
            assert asked.wait(120)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
            assert time.monotonic() - began < 30
        finally:
            process.kill()
            rest.set()
    assert process.returncode == 130
    assert said.decode().strip().endswith("interrupted")


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: b"\n" + c.replace(b"\n", b"\n\n")])
def test_a_file_that_somebody_has_read_in_an_editor_still_counts(config, monkeypatch, change):
    """Without the last newline, or with empty lines."""
    with writer(by_prompt, monkeypatch) as prompts:
        main(replace(config, num_conversations=3))
        whole = config.output.read_bytes()
        config.output.write_bytes(change(whole))
        prompts.clear()
        main(replace(config, num_conversations=3))
        assert not prompts
        main(replace(config, num_conversations=4))
    kept = [line for line in config.output.read_bytes().splitlines(keepends=True) if line.strip()]
    assert b"".join(kept[:3]) == whole
    assert sorted(json.loads(line)["number"] for line in kept) == [0, 1, 2, 3]
    assert len(CustomJSON(config.output)) == 4


@pytest.mark.parametrize("foreign", ['{"messages": []}\n', "a diary\n", '{"number": 1}\n'])
def test_a_file_of_another_kind_is_left_alone(config, monkeypatch, foreign):
    config.output.parent.mkdir()
    config.output.write_text(foreign)
    with writer(by_prompt, monkeypatch), pytest.raises(ValueError, match="another file with -o"):
        main(config)
    assert config.output.read_text() == foreign


def test_two_collections_do_not_write_to_one_file(config, monkeypatch):
    def meanwhile(prompt):
        with pytest.raises(OSError, match="written by another process"):
            main(config)
        return by_prompt(prompt)

    with writer(meanwhile, monkeypatch):
        main(replace(config, num_conversations=1))
    assert len(lines(config)) == 1


def test_draws_differ_by_key_alone():
    drawn = [draw_scenario(f"42/{number}/0", **ENGLISH) for number in range(1000)]
    assert drawn == [draw_scenario(f"42/{number}/0", **ENGLISH) for number in range(1000)]
    assert {scenario.topic for scenario in drawn} == set(TOPICS)
    assert {scenario.person for scenario in drawn} == set(PEOPLE)
    assert {scenario.turns for scenario in drawn} == {1, 2, 3}
    assert len(set(drawn)) > 950


def test_messages_are_what_is_said_and_nothing_around_it():
    scenario = replace(draw_scenario("0", **ENGLISH), turns=2)
    answers = iter(
        ['"Hi?" ', "<think>a\nb</think>\n Yes. ", "<think></think>So?", '"No," she said.']
    )
    said = converse(lambda _: next(answers), ABOUT, scenario)
    assert [m["content"] for m in said] == ["Hi?", "Yes.", "So?", '"No," she said.']
    assert [m["role"] for m in said] == ["user", "assistant"] * 2
    answers = iter(["a\n<b>b</b></think>\n\nHi?", "Yes.", " </think>So?", "I think, so I am."])
    said = converse(lambda _: next(answers), ABOUT, scenario)
    assert [m["content"] for m in said] == ["Hi?", "Yes.", "So?", "I think, so I am."]
    with pytest.raises(Unusable):
        converse(lambda _: "<think>only thoughts</think>", ABOUT, scenario)

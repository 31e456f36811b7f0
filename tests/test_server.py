"""The server: answers, limits, errors, and what happens when clients or engines fail."""

import asyncio
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxchat.config import GPTConfig
from jaxchat.conversation import render_for_completion
from jaxchat.engine import Engine
from jaxchat.reply import Reply
from jaxchat.request import Completion, Event, Request
from jaxchat.sampling_params import SamplingParams
from jaxchat.server import sse, worker
from jaxchat.server.errors import ApiError
from jaxchat.server.gate import RateLimit
from jaxchat.server.logprobs import TokenLog
from jaxchat.tokenizer import SPECIAL_NAMES
from tests.scripted import ScriptedBackend
from tests.servers import CONTEXT, MODEL, SLOTS, make_engine, running, tokenizer

SPECIALS = [f"<|{name}|>" for name in SPECIAL_NAMES]
HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
POISON = 7
"""A token that no honest prompt has."""
LONG = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


@pytest.fixture
def idle(server):
    """The server, checked to have nothing under way before and after."""
    server.wait_idle()
    yield server
    server.wait_idle()


@pytest.fixture
def slow(idle, monkeypatch):
    """The server with an engine that takes 20 ms longer for a step."""
    step = idle.engine.step

    def slow_step():
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(idle.engine, "step", slow_step)
    return idle


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


# --- answers -------------------------------------------------------------------------------------


def test_a_chat_answer_is_what_the_engine_says(idle):
    answer = chat(idle).json()
    ids = render_for_completion(tokenizer(), {"messages": HELLO})
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    (expected,) = make_engine().complete([Request(ids, params)])
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 12,
        "total_tokens": len(ids) + 12,
    }


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_adds_up_to_the_whole_answer(idle, path):
    body = {"messages": HELLO, "prompt": "hello", **GREEDY, "n": 3, "temperature": 1, "seed": 5}
    body |= {"logprobs": True, "top_logprobs": 2} if "chat" in path else {"logprobs": 2}
    idle.post(path, body)  # both find the prompt in the cache: the same arithmetic to the last bit
    whole = idle.post(path, body).json()
    stream = idle.post(path, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert stream.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(stream)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)
    for index, choice in enumerate(whole["choices"]):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert [c["finish_reason"] for c in own][-1] == choice["finish_reason"]
        told = [c["logprobs"] for c in own if c["logprobs"]]
        if "chat" in path:
            text = "".join(c["delta"].get("content", "") for c in own)
            assert text == choice["message"]["content"]
            assert [x for one in told for x in one["content"]] == choice["logprobs"]["content"]
        else:
            assert "".join(c["text"] for c in own) == choice["text"]
            for name, values in choice["logprobs"].items():
                assert [x for one in told for x in one[name]] == values
    assert len({str(choice) for choice in whole["choices"]}) == 3


def test_the_same_seed_gives_the_same_answer_and_none_gives_others(idle):
    hot = {"temperature": 2, "top_k": 0}
    assert (
        chat(idle, seed=-3, **hot).json()["choices"] == chat(idle, seed=-3, **hot).json()["choices"]
    )
    texts = {chat(idle, **hot).json()["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(texts) == 3


def test_prompts_may_be_texts_or_ids_alone_or_several(idle):
    ids = [tokenizer().bos_id, *tokenizer().encode("hello")]
    one = complete(idle).json()["choices"][0]["text"]
    assert complete(idle, prompt=ids).json()["choices"][0]["text"] == one
    for prompt in (["hello", "hello"], [ids, ids]):
        choices = complete(idle, prompt=prompt, n=2).json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        assert {choice["text"] for choice in choices} == {one}


def test_echo_scores_the_prompt_and_zero_tokens_score_it_alone(idle):
    ids = [tokenizer().bos_id, *tokenizer().encode("the lazy dog")]
    scores = make_engine().score_prompt(ids)
    for wanted in (0, 2):
        options = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": wanted}
        (choice,) = complete(idle, **options).json()["choices"]
        logprobs = choice["logprobs"]
        assert choice["text"].startswith("the lazy dog")
        assert {len(column) for column in logprobs.values()} == {len(ids) + wanted}
        assert logprobs["token_logprobs"][0] is None
        own = logprobs["token_logprobs"][1 : len(ids)]
        assert own == pytest.approx(scores.logprobs[1:].tolist(), abs=1e-6)
        for token, best in zip(own, logprobs["top_logprobs"][1:], strict=False):
            assert token in best.values()


def test_a_stop_string_leaks_neither_as_text_nor_as_log_probabilities(idle):
    free = complete(idle).json()["choices"][0]["text"]
    stop = free[4:7]
    end = free.index(stop)
    options = {"stop": [stop, "never said"], "logprobs": 0, "stream": True}
    chunks = [c for chunk in events(complete(idle, **options)) for c in chunk["choices"]]
    shown = ""
    for chunk in chunks:
        shown += chunk["text"]
        assert free[:end].startswith(shown)
        assert all(offset < end for offset in (chunk["logprobs"] or {}).get("text_offset", []))
    assert (shown, chunks[-1]["finish_reason"]) == (free[:end], "stop")


def reply_events(ids, stops=()):
    """The events of a reply of these tokens."""
    reply, out = Reply(tokenizer(), stops=stops, tools=False), []
    for token in ids:
        part, text = reply.push(token)
        out.append(Event(0, 0, part, text, token, -1.0))
        if reply.stopped:
            break
    return [*out, Event(0, 0, reply.part, reply.flush(), finish_reason="stop")]


@pytest.mark.parametrize(
    ("ids", "stops", "expected"),
    [
        ("the quick", "c", "the qui"),  # within a token
        ("a你b", "你", "a"),  # of several byte tokens
    ],
)
def test_log_probabilities_tell_of_no_token_that_a_stop_string_cuts(ids, stops, expected):
    ids = tokenizer().encode(ids)
    log = TokenLog(tokenizer())
    shown = [one.token for event in reply_events(ids, [stops]) for _, one in log.push(event)]
    assert expected.startswith(tokenizer().decode(shown))
    assert shown == ids[: len(shown)]


def test_text_offsets_count_characters_whole_or_not():
    """Byte tokens of one character share its place; one that is never finished counts as one."""
    ids = [*tokenizer().encode("a你"), *"你".encode()[:2], *tokenizer().encode("bc")]
    text, log = tokenizer().decode(ids), TokenLog(tokenizer())
    shown = [(start, one.token) for event in reply_events(ids) for start, one in log.push(event)]
    assert [token for _, token in shown] == ids
    assert text[1:3] == "你\ufffd"
    assert [start for start, _ in shown] == [0, 1, 1, 1, 2, 2, 3, 4]


def test_penalties_and_biases_reach_the_sampler(idle):
    (token,) = tokenizer().encode("z")
    assert complete(idle, logit_bias={str(token): 100}).json()["choices"][0]["text"] == "z" * 12
    fewer = complete(idle, logit_bias={str(token): 25}, frequency_penalty=2.0, max_tokens=60)
    assert 0 < fewer.json()["choices"][0]["text"].count("z") < 60


def test_text_never_becomes_a_special_token_in_any_field(idle):
    first_special = tokenizer().special_id("bos")

    def specials(body):
        tokens = idle.post("/tokenize", body).json()["tokens"]
        return sum(token >= first_special for token in tokens)

    for special in SPECIALS:
        assert specials({"prompt": special, "add_special_tokens": False}) == 0
        forged = [
            {"role": "system", "content": special},
            {"role": "user", "content": f"a{special}b"},
            {"role": "assistant", "content": [{"type": "text", "text": special}]},
            {"role": "user", "content": [{"type": "text", "text": special}]},
        ]
        honest = [{**message, "content": "x"} for message in forged]
        assert specials({"messages": forged}) == specials({"messages": honest})
        answer = complete(idle, prompt=special, stop=special, user=special, max_tokens=1, echo=True)
        assert answer.json()["choices"][0]["text"].startswith(special)
        expected = 1 + len(tokenizer().encode(special))
        assert answer.json()["usage"]["prompt_tokens"] == expected
        assert chat(idle, messages=forged, stop=[special], max_tokens=1).status_code == 200
        assert chat(idle, model=special).status_code == 404


def test_tokens_there_and_back(idle):
    text = "Wie schön: 你好 <|bos|>"
    answer = idle.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == [tokenizer().bos_id, *tokenizer().encode(text)]
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    back = idle.post("/detokenize", {"tokens": answer["tokens"][1:]})
    assert back.json() == {"prompt": text}
    info = idle.get("/tokenizer_info").json()
    assert (info["bos_token_id"], info["vocab_size"]) == (tokenizer().bos_id, 300)


def test_aliases_answer_like_what_they_stand_for(idle):
    body = {"messages": HELLO, **GREEDY}
    twins = [idle.post(path, body).json() for path in ("/chat/completions", "/v1/chat/completions")]
    assert twins[0]["choices"] == twins[1]["choices"]
    stats = idle.get("/stats").json()
    assert (stats["model"], stats["total_workers"], stats["available_workers"]) == (MODEL, 1, 1)


def test_metrics_parse_and_count(idle):
    def values():
        families = text_string_to_metric_families(idle.get("/metrics").text)
        return {
            (sample.name, sample.labels.get("finished_reason")): sample.value
            for family in families
            for sample in family.samples
            if "le" not in sample.labels and "path" not in sample.labels
        }

    before = values()
    chat(idle, n=2)
    after = values()

    def grew(name, reason=None):
        return after[f"jaxchat:{name}", reason] - before.get((f"jaxchat:{name}", reason), 0)

    prompt = len(render_for_completion(tokenizer(), {"messages": HELLO}))
    assert grew("generation_tokens_total") == 24
    assert grew("prompt_tokens_total") == prompt
    assert grew("request_success_total", "length") == 2
    assert grew("time_to_first_token_seconds_count") == 1
    assert grew("inter_token_latency_seconds_count") == 22
    assert grew("prefix_cache_queries_total") == 2 * prompt
    assert after["jaxchat:num_requests_running", None] == 0


# --- the calculator ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calculating():
    """A server whose model says the same after every prompt: a call, and what it makes of it."""
    special, encode = tokenizer().special_id, tokenizer().encode
    call = [special("python_start"), *encode("6*7"), special("python_end")]
    output = [special("output_start"), *encode("42"), special("output_end")]
    script = [*encode("I ask: "), *call, *output, *encode(" it is"), special("assistant_end")]

    def next_token(held):
        begin = len(held) - held[::-1].index(special("assistant_start"))
        return script[len(held) - begin]

    config = GPTConfig(sequence_len=CONTEXT, vocab_size=tokenizer().vocab_size)
    engine = Engine(ScriptedBackend(config, next_token), tokenizer())
    engine.warm_up = lambda: None
    with running([engine]) as one:
        yield one


PARTS = [
    {"type": "text", "text": "I ask: "},
    {"type": "python", "text": "6*7"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": " it is"},
]


def test_a_call_of_the_calculator_is_a_part_whole_and_streamed(calculating):
    body = {"messages": HELLO, "temperature": 0}
    (choice,) = calculating.post("/v1/chat/completions", body).json()["choices"]
    assert choice["message"]["content"] == "I ask:  it is"
    assert choice["message"]["parts"] == PARTS
    whole = Completion(0, 0)
    for chunk in events(calculating.post("/v1/chat/completions", body | {"stream": True})):
        delta = chunk["choices"][0]["delta"]
        part = delta.get("part") or {"type": "text", "text": delta.get("content", "")}
        whole.add(Event(0, 0, part["type"], part["text"]))
    assert whole.parts == PARTS


def test_an_answer_that_is_sent_back_keeps_its_calls(calculating):
    body = {"messages": HELLO, "temperature": 0}
    (choice,) = calculating.post("/v1/chat/completions", body).json()["choices"]
    messages = [*HELLO, choice["message"], *HELLO]
    honest = [HELLO[0], {"role": "assistant", "content": PARTS}, HELLO[0]]
    expected = render_for_completion(tokenizer(), {"messages": honest})
    assert calculating.post("/tokenize", {"messages": messages}).json()["tokens"] == expected
    usage = calculating.post("/v1/chat/completions", {"messages": messages}).json()["usage"]
    assert usage["prompt_tokens"] == len(expected)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 0 (user): content is empty"),
        ({"messages": [*HELLO, *HELLO]}, "take turns"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "nothing to answer"),
        ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, "parts"),
        (
            {
                "messages": [
                    {"role": "user", "content": "x", "parts": [{"type": "text", "text": "x"}]}
                ]
            },
            "a user message has no parts",
        ),
        (
            {
                "messages": [
                    *HELLO,
                    {
                        "role": "assistant",
                        "content": "x",
                        "parts": [{"type": "text", "text": "y"}],
                    },
                    *HELLO,
                ]
            },
            "differs from the text of its parts",
        ),
        ({"messages": "hello"}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": CONTEXT}, f"maximum context length is {CONTEXT} tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "the vocabulary ends at 300"),
        ({"logit_bias": {"7": 1, "07": 2}}, ""),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_a_chat_request_that_cannot_be_served_is_told_why(idle, fields, message):
    if fields == {"logit_bias": {"7": 1, "07": 2}}:
        assert chat(idle, **fields).status_code == 200  # one token, named twice: the last counts
        return
    error = error_of(chat(idle, **fields), 400)
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "outside of the vocabulary"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 129}, "at most 128"),
        ({"prompt": ["x"] * 64, "n": 3}, "at most 128"),
        ({"prompt": "x" * 500}, "maximum context length"),
        ({"max_tokens": 0}, "without echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_completion_that_cannot_be_served_is_told_why(idle, fields, message):
    assert message in error_of(complete(idle, **fields), 400)["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"messages": NaN}', b"[" * 10_000, b'"\xff"', b"null"]
)
def test_bodies_that_are_no_request_are_refused(idle, body):
    answer = httpx.post(
        idle.url + "/v1/chat/completions",
        content=body,
        headers={"Content-Type": "application/json"},
    )
    error_of(answer, 400)


def test_numbers_that_json_has_not_are_refused(idle):
    content = b'{"prompt": "x", "temperature": NaN}'
    headers = {"Content-Type": "application/json"}
    error_of(httpx.post(idle.url + "/v1/completions", content=content, headers=headers), 400)


def test_a_bias_beyond_the_vocabulary_is_the_bias_at_fault(idle):
    for send in (chat, complete):
        error = error_of(send(idle, logit_bias={"300": 1}), 400)
        assert error["param"] == "logit_bias"


def test_half_a_surrogate_pair_does_no_harm(idle):
    headers = {"Content-Type": "application/json"}
    for content in (b'{"prompt": "\\ud800"}', b'{"prompt": "x", "model": "\\ud800"}'):
        answer = httpx.post(idle.url + "/v1/completions", content=content, headers=headers)
        assert answer.status_code in (200, 400, 404)


def test_other_paths_methods_and_models_are_refused(idle):
    assert error_of(idle.get("/v2/models"), 404)["type"] == "not_found_error"
    answer = idle.get("/v1/completions")
    error_of(answer, 405)
    assert answer.headers["allow"] == "POST"
    assert error_of(chat(idle, model="gpt-4"), 404)["code"] == "model_not_found"
    assert error_of(idle.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"
    assert idle.get(f"/v1/models/{MODEL}").json()["max_model_len"] == CONTEXT


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_long_is_refused_declared_or_not(idle, declared):
    body = b'{"prompt": "' + b"x" * 1_100_000 + b'"}'
    content = body if declared else iter([body[:600_000], body[600_000:]])
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(idle.url + "/v1/completions", content=content, headers=headers)
    assert "1,048,576 bytes" in error_of(answer, 413)["message"]


def test_every_answer_has_the_security_headers_and_none_opens_the_door(idle):
    answers = [
        chat(idle),
        chat(idle, stream=True),
        chat(idle, n=0),
        idle.get("/nope"),
        idle.get("/", headers={"Host": "evil.example"}),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert error_of(answers[-1], 403)["type"] == "permission_error"
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(idle.url + "/v1/chat/completions", headers=preflight)
    assert "access-control-allow-origin" not in answer.headers
    form = httpx.post(
        idle.url + "/v1/completions",
        content=b'{"prompt": "x"}',
        headers={"Content-Type": "text/plain"},
    )
    error_of(form, 400)  # what a page of another site may send without asking


def test_no_word_of_a_prompt_is_logged(idle, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG, logger="jaxchat")
    caplog.set_level(logging.DEBUG, logger="uvicorn")
    secret = [{"role": "user", "content": "xylophone"}]
    chat(idle, messages=secret)
    chat(idle, messages=secret, n=0)
    chat(idle, messages=[*secret, *secret])
    monkeypatch.setattr(idle.engine.backend, "decode", fail_once(idle.engine.backend.decode))
    chat(idle, messages=secret)
    assert "POST /v1/chat/completions 200" in caplog.text
    assert "RuntimeError: out of memory" in caplog.text
    assert "xylophone" not in caplog.text


def test_keys_rates_and_origins():
    settings = {
        "api_keys": ("first", "second"),
        "requests_per_minute": 3,
        "allowed_origins": ("https://page.example",),
        "allowed_hosts": ("127.0.0.1", "My.Example"),
    }
    with running(**settings) as one:
        assert one.get("/health", headers={"Host": "mY.example:80"}).status_code == 200
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}):
            answer = one.get("/v1/models", headers=headers)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert [one.get(path).status_code for path in ("/", "/health", "/ready")] == [200] * 3
        first = {"Authorization": "Bearer first"}
        assert [one.get("/v1/models", headers=first).status_code for _ in range(3)] == [200] * 3
        answer = one.get("/v1/models", headers=first)
        assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(answer.headers["retry-after"]) <= 21
        second = {"Authorization": "Bearer second", "Origin": "https://page.example"}
        answer = one.get("/v1/models", headers=second)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        asked = {
            "Origin": "https://page.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        }
        url = one.url + "/v1/chat/completions"
        assert httpx.options(url, headers=asked).status_code == 200
        asked["Origin"] = "https://other.example"
        assert httpx.options(url, headers=asked).status_code == 400


def test_without_a_key_only_what_tells_nothing_is_answered():
    with running(api_keys=("first",)) as one:
        paths = one.get("/openapi.json").json()["paths"]
        told = {
            path
            for path, methods in paths.items()
            for method in methods
            if httpx.request(method, one.url + path, json={}).status_code != 401
        }
        assert told <= {"/health", "/ready"}
        assert {"/metrics", "/stats", "/v1/models", "/v1/completions"} <= paths.keys()
        second = {"Authorization": "Bearer firs"}
        assert one.get("/metrics", headers=second).status_code == 401


def test_a_rate_limit_fills_at_an_even_pace():
    now = [0.0]
    limit = RateLimit(60, clock=lambda: now[0])
    for _ in range(60):
        limit.spend(0)
    with pytest.raises(ApiError) as refused:
        limit.spend(0)
    assert refused.value.retry_after_s == 1
    limit.spend(1)
    now[0] = 1.0
    limit.spend(0)
    with pytest.raises(ApiError):
        limit.spend(0)
    now[0] = 3600.0  # an hour of silence saves no more than a minute's
    for _ in range(60):
        limit.spend(0)
    with pytest.raises(ApiError):
        limit.spend(0)


# --- clients that leave, engines that fail -------------------------------------------------------


def in_slots(server):
    return sum(slot.sample is not None for slot in server.engine._slots)


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots_within_one_dispatch(slow, stream):
    body = json.dumps({"messages": HELLO, **LONG, "n": 3, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(slow.url.rsplit(":", 1)[1]))) as client:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        )
        client.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
        wait_for(lambda: in_slots(slow) == 3)
    steps = []
    step = slow.engine.step
    slow.engine.step = lambda: steps.append(in_slots(slow)) or step()
    wait_for(lambda: in_slots(slow) == 0)
    slow.engine.step = step
    assert len(steps) <= 2  # the one under way when the connection closed, and the one after
    assert slow.pool.workers[0].load == 0


def test_a_full_queue_sends_requests_away_and_takes_them_again():
    with ThreadPoolExecutor() as threads, running(max_waiting=2) as one:
        step = one.engine.step
        one.engine.step = lambda: time.sleep(0.02) or step()
        first = [threads.submit(chat, one, n=n, **LONG) for n in (SLOTS, 2)]
        wait_for(lambda: one.pool.workers[0].load == SLOTS + 2)
        answer = chat(one)
        assert error_of(answer, 503)["type"] == "overloaded_error"
        assert int(answer.headers["retry-after"]) >= 1
        assert [future.result().status_code for future in first] == [200, 200]
        assert chat(one).status_code == 200


@pytest.mark.parametrize(("send", "stream"), [(chat, True), (complete, False)])
def test_a_burst_cannot_overfill_the_queue(monkeypatch, send, stream):
    engine = make_engine()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.01) or step())
    with ThreadPoolExecutor(12) as threads, running([engine], max_waiting=2) as one:
        sent = [threads.submit(send, one, **LONG, n=SLOTS, stream=stream) for _ in range(12)]
        statuses = [future.result().status_code for future in sent]
        assert (statuses.count(200), statuses.count(503)) == (1, 11)
        error_of(send(one, n=SLOTS + 3), 400)  # would never fit
        error_of(send(one, n=2, temperature=9), 400)
        assert send(one, n=SLOTS + 2, max_tokens=1).status_code == 200  # every place is free again
        assert one.pool.reserved == 0


def test_a_request_that_takes_too_long_is_ended(monkeypatch):
    with running(timeout_s=0.3) as one:
        step = one.engine.step
        one.engine.step = lambda: time.sleep(0.1) or step()
        answer = chat(one, **LONG)
        assert "longer than 0.3 s" in error_of(answer, 503)["message"]
        assert "retry-after" in answer.headers
        stream = chat(one, **LONG, stream=True)
        assert stream.status_code == 200
        last = stream.text.strip().split("\n\n")[-1]
        assert "longer than 0.3 s" in json.loads(last.removeprefix("data: "))["error"]["message"]
        one.wait_idle()


def test_equal_prompts_without_a_seed_differ(idle):
    prompts = [[5, 6, 7]] * 4
    texts = [
        choice["text"] for choice in complete(idle, prompt=prompts, temperature=1).json()["choices"]
    ]
    assert len(set(texts)) > 1
    texts = [
        c["text"] for c in complete(idle, prompt=prompts, temperature=1, seed=3).json()["choices"]
    ]
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{}] * 250_000}),
        ("/v1/completions", {"prompt": [{}] * 250_000}),
        ("/v1/completions", {"prompt": [[""]] * 150_000}),
        ("/detokenize", {"tokens": [""] * 250_000}),
    ],
)
def test_a_body_full_of_errors_holds_nobody_up(idle, path, body):
    with ThreadPoolExecutor() as threads:
        sent = threads.submit(idle.post, path, body)
        longest = 0.0
        while not sent.done():
            started = time.monotonic()
            assert idle.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - started)
        assert "error" in error_of(sent.result(), 400)["type"]
    assert longest < 2


def test_a_client_that_reads_slowly_is_told_that_its_time_is_over(monkeypatch):
    write = sse._write

    async def slowly(*arguments, **options):
        await asyncio.sleep(0.5)
        await write(*arguments, **options)

    monkeypatch.setattr(sse, "_write", slowly)
    with running(timeout_s=0.3) as one:
        step = one.engine.step
        one.engine.step = lambda: time.sleep(0.05) or step()
        last = chat(one, **LONG, stream=True).text.strip().split("\n\n")[-1]
        assert "longer than 0.3 s" in json.loads(last.removeprefix("data: "))["error"]["message"]
        one.wait_idle()


def test_a_prompt_that_fails_ends_its_siblings_in_the_stream(idle, monkeypatch):
    score = idle.engine.score_prompt
    monkeypatch.setattr(
        idle.engine, "score_prompt", lambda ids: 1 / 0 if len(ids) == 2 else score(ids)
    )
    prompts = [[5, 6], [5, 6, 7], [5, 6, 7, 8]]
    stream = complete(idle, prompt=prompts, echo=True, logprobs=1, stream=True, **LONG)
    last = json.loads(stream.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    idle.wait_idle()
    wait_for(lambda: idle.pool.reserved == 0)


def fail_once(function):
    failures = ["out of memory"]

    def failing(*arguments):
        if failures:
            raise RuntimeError(failures.pop())
        return function(*arguments)

    return failing


def test_a_failed_step_answers_500_and_the_next_request_is_served(idle, monkeypatch):
    expected = chat(idle).json()["choices"]
    monkeypatch.setattr(idle.engine.backend, "decode", fail_once(idle.engine.backend.decode))
    error = error_of(chat(idle), 500)
    assert error["type"] == "server_error"
    assert "out of memory" not in error["message"]
    assert chat(idle).json()["choices"] == expected
    assert idle.get("/ready").status_code == 200


def test_several_models_stand_beside_each_other():
    with running(others={"other": [make_engine()]}) as one:
        cards = one.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == [MODEL, "other"]
        assert one.get("/v1/models/other").json()["id"] == "other"
        defaults = {"temperature": 0.6, "top_k": 50}
        assert [card["default_sampling_params"] for card in cards] == [defaults, defaults]
        answers = [chat(one, model=name).json() for name in (MODEL, "other", None)]
        assert [answer["model"] for answer in answers] == [MODEL, "other", MODEL]
        assert answers[0]["choices"] == answers[1]["choices"]  # the same weights
        assert complete(one, model="other").json()["model"] == "other"
        assert "'tiny', 'other'" in error_of(chat(one, model="third"), 404)["message"]
        families = text_string_to_metric_families(one.get("/metrics").text)
        prompts = next(family for family in families if family.name == "jaxchat:prompt_tokens")
        counts = {sample.labels["model_name"]: sample.value for sample in prompts.samples}
        assert counts[MODEL] > counts["other"] > 0
        assert one.get("/stats").json()["total_workers"] == 2
        one.app.state.services["other"].pool.draining = True
        assert one.get("/ready").status_code == 503
        assert one.get("/health").json()["ready"] is False
        one.wait_idle()


def test_a_bug_of_ours_answers_500_with_the_headers_of_every_answer(idle, monkeypatch):
    monkeypatch.setattr(idle.service, "reserve", lambda replies: 1 / 0)
    answer = chat(idle)
    assert "log says more" in error_of(answer, 500)["message"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_failed_score_answers_500(idle, monkeypatch):
    monkeypatch.setattr(idle.engine.backend, "score_prompt", lambda ids: 1 / 0)
    error_of(complete(idle, echo=True, logprobs=1), 500)
    assert complete(idle).status_code == 200


def test_a_prompt_that_cannot_be_read_takes_nobody_down_however_often(slow, monkeypatch):
    """Its neighbours' rows are lost with the cache and read again; their replies do not notice."""
    expected = [chat(slow, **LONG).json()["choices"], chat(slow, **LONG, seed=5, n=2).json()]
    prefill = slow.engine.backend.prefill

    def poisoned(cache, row, ids, start):
        if POISON in ids:
            prefill(cache, row, ids, start)  # takes the cache along
            raise RuntimeError("poison")
        return prefill(cache, row, ids, start)

    monkeypatch.setattr(slow.engine.backend, "prefill", poisoned)
    with ThreadPoolExecutor() as threads:
        neighbours = [
            threads.submit(chat, slow, **LONG),
            threads.submit(chat, slow, **LONG, seed=5, n=2, stream=True),
        ]
        wait_for(lambda: in_slots(slow) == 3)
        for stream in (False, True, False, False, False):
            answer = complete(slow, prompt=[1, POISON], n=5, stream=stream)
            assert "Generation failed" in answer.text
        assert neighbours[0].result().json()["choices"] == expected[0]
        chunks = [c for chunk in events(neighbours[1].result()) for c in chunk["choices"]]
    for choice in expected[1]["choices"]:
        own = [chunk["delta"] for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(d.get("content", "") for d in own) == choice["message"]["content"]
    assert slow.get("/ready").status_code == 200


def test_an_engine_that_stays_broken_is_given_up(monkeypatch):
    monkeypatch.setattr(worker, "PAUSE_S", 0.01)
    with running() as one:
        monkeypatch.setattr(one.engine.backend, "prefill", lambda *_: 1 / 0)
        assert [chat(one).status_code for _ in range(2)] == [500, 503]
        answer = one.get("/ready")
        assert "must be started again" in error_of(answer, 503)["message"]
        assert "retry-after" in answer.headers
        assert one.get("/health").status_code == 200


def test_an_engine_that_is_broken_for_a_moment_goes_on(monkeypatch):
    monkeypatch.setattr(worker, "PAUSE_S", 0.01)
    with running() as one:
        backend = one.engine.backend
        new_cache, failures = backend.new_cache, [1, 2]

        def short_of_memory(rows, max_length):
            return new_cache(rows, max_length) if not failures else failures.pop() / 0

        monkeypatch.setattr(backend, "new_cache", short_of_memory)
        monkeypatch.setattr(backend, "decode", fail_once(backend.decode))
        error_of(chat(one), 500)
        assert chat(one).status_code == 200


def test_readiness_waits_for_warm_up(monkeypatch):
    engine, go = make_engine(), threading.Event()
    warm_up = engine.warm_up
    monkeypatch.setattr(engine, "warm_up", lambda: go.wait(30) and warm_up())
    with running([engine], ready=False) as one:
        for answer in (one.get("/ready"), chat(one)):
            error = error_of(answer, 503)
            assert "is starting" in error["message"] and error["code"] == "starting"
            assert 1 <= int(answer.headers["retry-after"]) <= 10
        assert one.get("/health").json() == {"status": "ok", "ready": False}
        go.set()
        wait_for(lambda: one.get("/ready").status_code == 200)
        assert chat(one).status_code == 200


def test_a_failed_warm_up_is_never_ready(monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine, "warm_up", lambda: 1 / 0)
    with running([engine], ready=False) as one:
        wait_for(lambda: one.pool.workers[0].failed)
        assert error_of(one.get("/ready"), 503)["code"] is None  # waiting would not help


def test_replicas_share_the_work_and_give_the_same_answers():
    engines = [make_engine() for _ in range(2)]
    with running(engines) as one, ThreadPoolExecutor(2 * SLOTS) as threads:
        wait_for(lambda: all(worker.available for worker in one.pool.workers))
        for engine in engines:
            step = engine.step
            engine.step = lambda step=step: time.sleep(0.02) or step()
        futures = [threads.submit(chat, one, **LONG) for _ in range(2 * SLOTS)]
        wait_for(lambda: [worker.load for worker in one.pool.workers] == [SLOTS, SLOTS])
        texts = {f.result().json()["choices"][0]["message"]["content"] for f in futures}
        assert len(texts) == 1
        assert one.get("/stats").json()["total_workers"] == 2

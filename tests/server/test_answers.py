"""What the server says: chats, completions, streams, log-probabilities, metrics."""

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxchat.config import GPTConfig
from jaxchat.conversation import render_for_completion
from jaxchat.engine import Engine
from jaxchat.reply import Reply
from jaxchat.request import Completion, Event, Request
from jaxchat.sampling_params import SamplingParams
from jaxchat.server.logprobs import TokenLog
from tests.scripted import ScriptedBackend
from tests.server.asking import GREEDY, HELLO, SPECIALS, chat, complete, events
from tests.servers import CONTEXT, MODEL, make_engine, running, tokenizer


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
    if Path("/proc").is_dir():  # what every dashboard asks of a process
        assert after["process_resident_memory_bytes", None] > 1e6
        assert after["process_cpu_seconds_total", None] > 0


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

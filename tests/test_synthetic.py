"""Conversations made up by another model, which is here a scripted one behind our own server."""

import contextlib
import itertools
import json
import re
import zlib
from dataclasses import replace

import pytest

from jaxchat.config import GPTConfig
from jaxchat.engine import Engine
from jaxchat.synthetic import PEOPLE, TOPICS, Unusable, converse, draw_scenario
from jaxchat.tasks.customjson import CustomJSON
from scripts.gen_synthetic_data import Config, main
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
    with pytest.raises(Unusable):
        converse(lambda _: "<think>only thoughts</think>", ABOUT, scenario)

"""Which row of the cache a prompt takes, and what it finds there that need not be read again."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.config import GPTConfig
from jaxchat.engine import Engine
from jaxchat.request import Request
from jaxchat.slots import common_prefix
from tests.scripted import ScriptedBackend
from tests.test_engine import GREEDY, special, tokenizer


def test_a_new_prompt_takes_the_row_that_was_used_longest_ago():
    """So what was said last is what a conversation finds again."""
    backend = ScriptedBackend(
        GPTConfig(sequence_len=512, vocab_size=tokenizer().vocab_size),
        lambda held: special("assistant_end"),
    )
    engine = Engine(backend, tokenizer(), slots=2)
    for first in (1, 2, 3):  # no two begin alike
        engine.complete([Request([first] * 5, GREEDY)])
    assert [row for row, _, _ in backend.prefills] == [0, 1, 0]
    engine.complete([Request([2] * 9, GREEDY)])
    assert backend.prefills[-1] == (1, 5, 4)
    assert engine.reused_tokens == 5


def scripted_engine(slots):
    backend = ScriptedBackend(
        GPTConfig(sequence_len=512, vocab_size=tokenizer().vocab_size),
        lambda held: special("assistant_end") if len(held) % 10 == 0 else 65,
    )
    return Engine(backend, tokenizer(), slots=slots)


@pytest.mark.parametrize("instruction", [2, 40, 100, 400])
def test_an_instruction_of_any_length_is_read_once_by_all_who_have_it(instruction):
    """From half of a row on, every conversation took the row of the one before it."""
    config = GPTConfig(sequence_len=512, vocab_size=tokenizer().vocab_size)
    engine = Engine(ScriptedBackend(config, lambda held: 65), tokenizer(), slots=6)
    texts = [[1] * instruction + [first] * 40 for first in (11, 12, 13)]
    for _ in range(4):
        for text in texts:
            (reply,) = engine.complete([Request(text, replace(GREEDY, max_tokens=6))])
            text += [*reply.ids, 7, *text[-15:]]
    own = 40 + 3 * (1 + 1 + 15)  # later turns: a reply's last token, what ends it, and new words
    copied = instruction >= 32
    read = sum(tokens for _, _, tokens in engine.backend.prefills)
    assert read == 3 * own + (instruction if copied else 3 * instruction)


def test_a_greeting_does_not_end_the_conversation_that_began_with_it():
    """It took the row of the long one, beside rows that nobody had ever used."""
    engine = scripted_engine(slots=2)
    greeting = [1, 2, 3]
    engine.complete([Request([*greeting, *[11] * 300], replace(GREEDY, max_tokens=4))])
    engine.complete([Request(greeting, replace(GREEDY, max_tokens=4))])
    read = len(engine.backend.prefills)
    engine.complete([Request([*greeting, *[11] * 300, 12, 13], replace(GREEDY, max_tokens=4))])
    assert engine.backend.prefills[read:] == [(0, 303, 2)]


def test_a_reply_is_asked_for_anew_where_it_was_given():
    engine = scripted_engine(slots=2)
    question = Request([1] * 60, replace(GREEDY, max_tokens=40))
    for _ in range(2):
        engine.complete([question])
    assert [row for row, _, _ in engine.backend.prefills] == [0, 0]


@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40))
def test_what_two_lists_have_in_common_is_found(a, b):
    both = min(len(a), len(b))
    expected = next((i for i in range(both) if a[i] != b[i]), both)
    assert common_prefix(a, b) == expected
    assert common_prefix(a + b, a) == len(a)


def test_conversations_that_take_turns_keep_their_rows():
    """All begin alike, with the two tokens of every chat: that is no reason to lose the others."""
    engine = scripted_engine(slots=3)
    texts = {first: [1, 2, *[first] * 4] for first in (11, 12, 13)}
    for turn in range(4):
        for first, text in texts.items():
            read = len(engine.backend.prefills)
            (reply,) = engine.complete([Request(text, GREEDY)])
            row, start, count = engine.backend.prefills[read]
            if turn:
                assert (row, start + count) == (first - 11, len(text))
                assert count <= 7, "its own turn, and the end of the reply before it"
            text += [*reply.ids, reply.stop_id, *[first] * 5]
    assert engine.reused_tokens > 0.6 * engine.prompt_tokens


def test_what_prompts_share_is_copied_and_read_once():
    """A long instruction before eight questions at once; and the answers are those of one alone."""
    engine, instruction = scripted_engine(slots=4), list(range(3, 103))
    questions = [Request([*instruction, 200 + i, 7], GREEDY) for i in range(8)]
    replies = engine.complete(questions)
    assert [count for _, _, count in engine.backend.prefills] == [102] + 7 * [2]
    assert engine.backend.copies == 3, "one row read it, three have copied it"
    assert engine.reused_tokens == 700
    for question, reply in zip(questions, replies, strict=True):
        assert reply.ids == scripted_engine(slots=1).complete([question])[0].ids


@pytest.mark.parametrize("invariant", [False, True])
def test_an_invariant_engine_copies_from_siblings_alone(invariant):
    """A row that another request reads and decodes was rounded in other places."""
    sources = []

    class Spied(ScriptedBackend):
        def copy_row(self, cache, source, target, length):
            sources.append(source)
            return super().copy_row(cache, source, target, length)

    config = GPTConfig(sequence_len=512, vocab_size=tokenizer().vocab_size)
    backend = Spied(config, lambda held: 65)
    engine = Engine(backend, tokenizer(), slots=3, batch_invariant=invariant)
    begin = list(range(3, 80))
    engine.submit(Request([*begin, 100, 101], replace(GREEDY, max_tokens=100)))
    engine.step()
    engine.submit(Request(begin, GREEDY, n=2))
    for _ in range(2):
        engine.step()
    assert sources == ([1] if invariant else [0, 0])


def test_a_warm_up_leaves_nothing_that_a_row_has_held():
    """It writes all over the cache; a prompt that came again was not read again."""

    class Warming(ScriptedBackend):
        def warm_up(self, cache, steps):
            return self.new_cache(len(cache), self.max_length)

    config = GPTConfig(sequence_len=64, vocab_size=tokenizer().vocab_size)
    engine = Engine(Warming(config, lambda held: 65), tokenizer(), slots=1)
    for _ in range(2):
        engine.warm_up()
        engine.complete([Request([1, 2, 3], replace(GREEDY, max_tokens=2))])
    assert engine.backend.prefills == [(0, 0, 3)] * 2

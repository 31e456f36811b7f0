"""Who gets the next step of the engine: prompts that wait, or replies under way."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.config import GPTConfig
from jaxchat.engine import Engine
from jaxchat.request import Request
from tests.scripted import ScriptedBackend
from tests.test_engine import GREEDY, tokenizer

LETTER = 65


class Diary(ScriptedBackend):
    """Says one letter for ever, and notes what it was asked for: tokens read, or rows decoded."""

    def __init__(self):
        config = GPTConfig(sequence_len=512, vocab_size=tokenizer().vocab_size)
        super().__init__(config, lambda held: LETTER)
        self.notes = []

    def prefill(self, cache, row, ids, start):
        self.notes.append(("read", len(ids)))
        return super().prefill(cache, row, ids, start)

    def decode(self, cache, batch):
        self.notes.append(("decode", int(np.count_nonzero(batch.budgets))))
        return super().decode(cache, batch)


def engine_of(**options):
    return Engine(Diary(), tokenizer(), tokens_per_dispatch=4, **options)


def prompt(number, length=20):
    """Prompts that have no beginning in common."""
    return Request([number] * length, GREEDY)


def steps_until(engine, done):
    events = []
    while not done(events):
        events += engine.step()
    return events


def test_a_reply_under_way_waits_for_one_prompt_at_most():
    """Seven long prompts that came at once paused it until all of them had been read."""
    engine = engine_of(slots=4, prefill_tokens=20)
    first = engine.submit(prompt(1))
    engine.step()
    for number in (2, 3, 4):
        engine.submit(prompt(number))
    steps_until(engine, lambda events: len(events) >= 40)
    assert engine.backend.notes[:8] == [
        *(("read", 20), ("decode", 1), ("read", 20), ("decode", 2)),
        *(("read", 20), ("decode", 3), ("read", 20), ("decode", 4)),
    ]
    engine.cancel(first)


def test_short_prompts_share_a_pause():
    engine = engine_of(slots=5, prefill_tokens=50)
    engine.submit(prompt(1))
    engine.step()
    engine.step()
    for number in (2, 3, 4, 5):
        engine.submit(prompt(number))
    steps_until(engine, lambda events: len(events) >= 25)
    reads = ("read", 20)
    assert engine.backend.notes[:8] == [
        *(reads, ("decode", 1), reads, reads, reads, ("decode", 4), reads, ("decode", 5))
    ]


def test_all_prompts_come_first_where_nobody_is_promised_anything():
    engine = engine_of(slots=4)
    engine.complete([replace(prompt(n), params=replace(GREEDY, max_tokens=5)) for n in range(4)])
    assert engine.backend.notes == [("read", 20)] * 4 + [("decode", 4)]


@pytest.mark.parametrize("limit", [None, 20])
def test_a_first_token_does_not_wait_for_other_prompts(limit):
    engine = engine_of(slots=3, prefill_tokens=limit)
    numbers = [engine.submit(prompt(n)) for n in (1, 2, 3)]
    (event,) = engine.step()
    assert (event.request, event.token) == (numbers[0], LETTER)


def test_prompts_are_read_in_the_order_they_came():
    """By slots, newer prompts in the first ones would pass by an older one in the last."""
    engine = engine_of(slots=3, prefill_tokens=1)
    first, second = engine.submit(prompt(1)), engine.submit(prompt(2))
    steps_until(engine, lambda events: {e.request for e in events} == {first, second})
    engine.cancel(first)  # frees the first slot
    third = engine.submit(prompt(3))  # takes the third, which was never used
    fourth = engine.submit(prompt(4))  # takes the first
    events = steps_until(engine, lambda events: {third, fourth} <= {e.request for e in events})
    begun = list(dict.fromkeys(event.request for event in events))
    assert begun.index(third) < begun.index(fourth)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 100),
)
def test_everything_ends_and_pauses_are_bounded(sizes, slots, limit):
    engine = engine_of(slots=slots, prefill_tokens=limit)
    requests = [
        Request([n] * length, replace(GREEDY, max_tokens=most))
        for n, (length, most) in enumerate(sizes)
    ]
    numbers = [engine.submit(request) for request in requests]
    told, under_way, pause = Counter(), set(), 0
    while engine.busy:
        known = len(engine.backend.notes)
        events = engine.step()
        for kind, tokens in engine.backend.notes[known:]:
            waits = kind == "read" and under_way
            assert not waits or pause < limit
            pause = pause + tokens if waits else 0
        for event in events:
            told[event.request] += event.token is not None
            (under_way.discard if event.finish_reason else under_way.add)(event.request)
    assert [told[number] for number in numbers] == [most for _, most in sizes]


def test_who_makes_decoding_fail_is_found_in_two_failures_whatever_the_order_of_rows():
    """All are read again before any is decoded alone: who was passed over is not suspected more."""

    class Poisoned(Diary):
        def decode(self, cache, batch):
            if any(held[0] == 4 for held, n in zip(cache, batch.budgets, strict=True) if n):
                raise ZeroDivisionError
            return super().decode(cache, batch)

    engine = Engine(Poisoned(), tokenizer(), tokens_per_dispatch=4, slots=3, prefill_tokens=1)
    numbers = [engine.submit(prompt(n)) for n in (1, 2, 3)]
    steps_until(engine, lambda events: {event.request for event in events} == set(numbers))
    engine.cancel(numbers[0])
    wrong, failures, ends = engine.submit(prompt(4)), 0, {}  # in the first row, and read last
    while wrong not in ends:
        try:
            events = engine.step()
        except ZeroDivisionError:
            failures, events = failures + 1, engine.reset()
        ends |= {event.request: event.finish_reason for event in events if event.finish_reason}
    assert (failures, ends) == (2, {numbers[0]: "cancelled", wrong: "error"})


def test_a_limit_that_reads_nothing_is_refused():
    with pytest.raises(ValueError, match="prefill_tokens=0 must be at least 1"):
        engine_of(prefill_tokens=0)

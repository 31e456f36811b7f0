"""Packed conversations: nothing is lost, nothing clogs, and every row teaches something."""

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxchat import chat_packing
from jaxchat.backend import IGNORE
from jaxchat.chat_loader import ChatLoader
from jaxchat.chat_packing import forecast
from jaxchat.conversation import render
from jaxchat.dataloader import NUM_STREAMS, merge_states
from jaxchat.tasks.base import Task
from jaxchat.tokenizer import Tokenizer
from tests.real_data import DATA, needs_data
from tests.test_conversation import SHAPES

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
BOS = TOKENIZER.bos_id


class Given(Task):
    """Conversations given as a list."""

    name = "given"

    def __init__(self, conversations):
        self.conversations = conversations

    def _examples(self):
        return len(self.conversations)

    def _example(self, index):
        return self.conversations[index]

    def _identity(self):
        return json.dumps(self.conversations)


def exchange(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def conversations_of(lengths):
    """Conversations that differ, with questions and answers of these lengths."""
    return Given([exchange(f"{i}:" + "q" * a, "r" * b) for i, (a, b) in enumerate(lengths)])


def loader_of(task, **changes):
    options = {"rows_per_batch": 8, "sequence_len": 100, "seed": 3}
    return ChatLoader(task, TOKENIZER, **(options | changes))


def take(loader, batches):
    with loader:
        return [next(loader) for _ in range(batches)]


def contents(batches):
    """The conversations of rows, as ids: a row cut at its bos, padding (bos alone) left out."""
    found = []
    for inputs, targets in ((r, t) for b in batches for r, t in zip(*b[:2], strict=True)):
        row = np.append(inputs, targets[-1] if targets[-1] != IGNORE else -9)
        starts = [*np.flatnonzero(row[:-1] == BOS), len(row)]
        pieces = [row[a:b] for a, b in itertools.pairwise(starts)]
        found += [tuple(piece[piece >= 0]) for piece in pieces if len(piece[piece >= 0]) > 1]
    return found


lengths = st.lists(st.tuples(st.integers(0, 150), st.integers(1, 150)), min_size=1, max_size=60)
slow = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])


@slow
@given(lengths, st.integers(8, 300), st.integers(0, 9))
def test_every_row_has_something_to_learn_and_targets_are_the_next_tokens(sizes, length, seed):
    """Upstream's NaN (its issue 590) was a batch without a supervised token."""
    task = conversations_of(sizes)
    teachable = [any(render(TOKENIZER, c)[1][: length + 1]) for c in task]
    if not any(teachable):
        with pytest.raises(ValueError, match="nothing to learn within"):
            take(loader_of(task, sequence_len=length), 1)
        return
    for batch in take(loader_of(task, sequence_len=length, seed=seed), 3):
        assert batch.inputs.shape == batch.targets.shape == (8, length)
        assert (batch.targets != IGNORE).any(axis=1).all()
        shown = batch.targets[:, :-1] != IGNORE
        np.testing.assert_array_equal(batch.targets[:, :-1][shown], batch.inputs[:, 1:][shown])


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "user only"])
def test_targets_of_every_message_shape_are_the_masked_rendering(shape):
    """Golden ids and masks are those of test_conversation.py; padding is ignored."""
    conversation, _ = SHAPES[shape]
    ids, mask = render(TOKENIZER, conversation)
    loader = loader_of(Given([conversation]), rows_per_batch=1, sequence_len=len(ids) + 20)
    (batch,) = take(loader, 1)
    # the same conversation comes again in every pass, so rows may hold it once more
    expected = [i if m else IGNORE for i, m in zip(ids, mask, strict=True)][1:]
    assert batch.inputs[0, : len(ids)].tolist() == ids
    assert batch.targets[0, : len(ids) - 1].tolist() == expected


def test_user_text_and_tool_output_are_never_targets():
    conversation = {
        "messages": [
            {"role": "system", "content": "s" * 9},
            {"role": "user", "content": "u" * 9},
            {
                "role": "assistant",
                "content": [
                    {"type": "python", "text": "p"},
                    {"type": "python_output", "text": "o" * 9},
                    {"type": "text", "text": "a"},
                ],
            },
        ]
    }
    (batch,) = take(loader_of(Given([conversation] * 20)), 1)
    learnt = set(batch.targets[batch.targets != IGNORE].tolist())
    assert learnt == {
        *map(ord, "pa"),
        *(TOKENIZER.special_id(n) for n in ("python_start", "python_end", "assistant_end")),
    }


@slow
@given(lengths, st.integers(0, 9))
def test_one_pass_emits_every_conversation_whole_truncated_or_counted(sizes, seed):
    task = conversations_of(sizes)
    rendered = [render(TOKENIZER, c) for c in task]
    capacity = 101
    expected = {tuple(i[:capacity]) for i, m in rendered if any(m[1:capacity])}
    if not expected:
        return
    loader = loader_of(task, seed=seed, rows_per_batch=NUM_STREAMS)
    with loader:
        # a batch is a row of every stream, and a row begins with what has waited longest
        seen = set(contents([next(loader) for _ in sizes]))
        stats = loader.stats
    # what ends in an unsupervised last token is seen one token short: inputs lack the last one
    assert {ids[: capacity - 1] for ids in expected} <= {ids[: capacity - 1] for ids in seen} | {
        ids[:-1] for ids in seen
    }
    assert all(any(ids[: len(s)] == s for ids in expected) for s in seen)
    per_pass = stats.conversations / len(sizes) if len(sizes) >= NUM_STREAMS else None
    if per_pass is not None:
        dropped = sum(not any(m[1:capacity]) for _, m in rendered)
        assert (stats.dropped > 0) == (dropped > 0)
        assert stats.malformed == 0


def test_nothing_waits_longer_than_the_buffer(monkeypatch):
    """Best fit alone would leave a middling conversation behind for as long as larger ones come."""
    monkeypatch.setattr(chat_packing, "WAITING", 10)
    middling = exchange("middling", "r" * 40)
    task = Given([middling, *(exchange(f"{i}", "r" * 80) for i in range(4000))])
    loader = loader_of(task, rows_per_batch=NUM_STREAMS)
    ids = tuple(render(TOKENIZER, middling)[0])
    with loader:
        seen = False
        while loader.passes < 1:
            seen |= ids in contents([next(loader)])
        for _ in range(12):
            seen |= ids in contents([next(loader)])
    assert seen


def test_a_long_conversation_does_not_clog_the_buffer():
    """Upstream's packer kept what is longer than a row until rows were nothing but padding."""
    task = Given([exchange(f"{i}", "r" * (20 if i % 3 else 5000)) for i in range(600)])
    loader = loader_of(task)
    with loader:
        batches = [next(loader) for _ in range(200)]
        stats = loader.stats
    late = np.concatenate([batch.targets for batch in batches[-20:]])
    assert (late != IGNORE).mean() > 0.6
    assert stats.truncated == pytest.approx(stats.conversations / 3, rel=0.1)
    assert stats.shares()["data/truncated"] == stats.truncated / stats.conversations


def test_what_teaches_nothing_is_dropped_and_counted(capsys):
    late_answer = exchange("q" * 500, "never seen")
    unanswered = {"messages": [{"role": "user", "content": "hello?"}]}
    malformed = {"messages": [{"role": "assistant", "content": "me first"}]}
    good = exchange("q", "r" * 60)
    task = Given([late_answer, unanswered, malformed, good] * 200)
    loader = loader_of(task)
    with loader:
        while loader.passes < 1:
            next(loader)
        stats = loader.stats
    assert stats.dropped == pytest.approx(0.75 * stats.conversations, rel=0.1)
    assert stats.malformed == pytest.approx(0.25 * stats.conversations, rel=0.2)
    warned = [line for line in capsys.readouterr().out.splitlines() if "is left out" in line]
    assert len(warned) == chat_packing.WARNINGS
    assert re.match(r"warning: given\[\d+\] is left out: .*role must be 'user'", warned[0])
    assert warned[-1].endswith("(more of them are only counted, in data/dropped)")
    # a quarter of them is packed, and malformed ones do not keep the length from being foreseen
    expected = 200 * len(render(TOKENIZER, good)[0]) / (0.97 * 101)
    assert forecast(task, TOKENIZER, sequence_len=100).rows == pytest.approx(expected)


def test_what_does_not_fit_is_told_beforehand():
    """Two thirds of a file were left out, and the screen never said so."""
    late, long, fits = exchange("q" * 500, "r"), exchange("q", "r" * 500), exchange("q", "r")
    unreadable = {"messages": [{"role": "assistant", "content": "me first"}]}

    def told(conversations, **options):
        return forecast(Given(conversations), TOKENIZER, sequence_len=100, **options).misfits()

    assert told([late] * 5 + [long] * 2 + [fits, unreadable]) == (
        "context of 100 tokens: of 9 conversations 5 left out (no reply within it), 2 cut"
    )
    assert told([long, fits]) == "context of 100 tokens: of 2 conversations 1 cut"
    assert told([fits, unreadable]) is None
    assert told([late] * 3000, sample=10) == (
        "context of 100 tokens: of 3,000 conversations about 3,000 left out (no reply within it)"
    )


def test_passes_count_what_is_in_rows_or_dropped():
    unanswered = {"messages": [{"role": "user", "content": "hello?"}]}
    task = Given([exchange(f"{i}", "r" * (i % 50)) if i % 4 else unanswered for i in range(400)])
    with loader_of(task) as loader:
        used = 0
        while loader.passes < 1:
            used += len(contents([next(loader)]))
            state = loader.state()
            waiting = sum(len(stream["waiting"]) for stream in state["streams"].values())
            assert loader.passes == (loader.stats.conversations - waiting) / 400
            assert loader.passes == (used + loader.stats.dropped) / 400
    assert 200 < used <= 400


def test_statistics_count_what_is_in_the_batches():
    task = conversations_of([(10, 20), (30, 5), (200, 1), (60, 60), (1, 1)] * 30)
    loader = loader_of(task)
    with loader:
        batches = [next(loader) for _ in range(25)]
        stats = loader.stats
    assert stats.tokens == 25 * 8 * 101
    assert stats.supervised == sum(int((b.targets != IGNORE).sum()) for b in batches)
    packed = sum(map(len, contents(batches)))
    assert stats.tokens - stats.padding == pytest.approx(packed, abs=25 * 8)  # a row's last token


def test_what_fits_exactly_is_neither_truncated_nor_left_for_another_row():
    """A row has room for one token more than its length."""
    one = exchange("q" * 9, "r" * 9)
    length = len(render(TOKENIZER, one)[0])
    for whole in (1, 2):
        loader = loader_of(Given([one] * 32), sequence_len=whole * length - 1)
        with loader:
            next(loader)
            stats = loader.stats
        assert (stats.truncated, stats.padding) == (0, 0)


def test_rows_are_those_of_the_seed_whatever_the_processes():
    task = conversations_of([(5 * i % 97, 1 + 7 * i % 83) for i in range(500)])
    whole = take(loader_of(task, rows_per_batch=16), 6)
    parts = [
        take(loader_of(task, rows_per_batch=16, process_index=p, process_count=2), 6)
        for p in range(2)
    ]
    for step, batch in enumerate(whole):
        rows = np.arange(16) % NUM_STREAMS % 2
        for process in range(2):
            np.testing.assert_array_equal(
                batch.inputs[rows == process], parts[process][step].inputs
            )
    other = take(loader_of(task, rows_per_batch=16, seed=4), 1)[0]
    assert (other.inputs != whole[0].inputs).any()


@pytest.mark.parametrize("batches", [0, 1, 7, 40])
def test_a_state_resumes_exactly_through_json(batches):
    task = conversations_of([(5 * i % 97, 1 + 7 * i % 183) for i in range(300)])
    loader = loader_of(task)
    with loader:
        for _ in range(batches):
            next(loader)
        state, stats = json.loads(json.dumps(loader.state())), loader.stats
        position = loader.position
        expected = [next(loader) for _ in range(10)]
        assert json.loads(json.dumps(loader.state(position))) == state
    resumed = loader_of(task, state=state)
    assert resumed.stats == stats
    for a, b in zip(take(resumed, 10), expected, strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
        np.testing.assert_array_equal(a.targets, b.targets)


def test_states_of_processes_merge_into_one():
    task = conversations_of([(5 * i % 97, 1 + 7 * i % 83) for i in range(300)])
    states = []
    for process in range(2):
        loader = loader_of(task, process_index=process, process_count=2)
        with loader:
            next(loader)
            states.append(loader.state())
    with loader_of(task) as loader:
        first, second = next(loader), next(loader)
    assert (first.inputs != second.inputs).any()
    np.testing.assert_array_equal(
        take(loader_of(task, state=merge_states(states)), 1)[0].inputs, second.inputs
    )


def test_a_state_of_other_data_is_refused():
    loader = loader_of(conversations_of([(1, 1)] * 20))
    with loader:
        state = loader.state()
    with pytest.raises(ValueError, match="the data of this run is not that of its checkpoint"):
        loader_of(conversations_of([(1, 2)] * 20), state=state)
    with pytest.raises(ValueError, match="sequence_len 100, now 90"):
        loader_of(conversations_of([(1, 1)] * 20), state=state, sequence_len=90)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_batch": 0}, "rows_per_batch=0"),
        ({"process_count": 3}, "3 processes must divide the 8 data streams"),
        ({"process_count": 2, "rows_per_batch": 12}, "the 12 rows of a batch"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        loader_of(conversations_of([(1, 1)]), **changes)
    with pytest.raises(ValueError, match="the 0 conversations"):
        loader_of(Given([]))


@pytest.mark.parametrize("number", [1, 2, 7])
def test_fewer_conversations_than_streams_are_enough(number):
    batches = take(loader_of(conversations_of([(5, 5)] * number)), 3)
    assert len(set(contents(batches))) <= 2 * number
    assert all((batch.targets != IGNORE).any(axis=1).all() for batch in batches)


def test_the_rows_of_a_pass_are_foreseen():
    task = conversations_of([(5 * i % 97, 1 + 7 * i % 83) for i in range(3000)])
    foreseen = forecast(task, TOKENIZER, sequence_len=512).rows
    loader = loader_of(task, sequence_len=512)
    with loader:
        while loader.passes < 5:  # what waits at the end is small, and weighs less over many passes
            next(loader)
        stats, state = loader.stats, loader.state()
    waiting = sum(len(stream["waiting"]) for stream in state["streams"].values())
    packed = stats.tokens / 513 * 3000 / (stats.conversations - waiting)
    assert foreseen == pytest.approx(packed, rel=0.05)


@needs_data
@pytest.mark.parametrize("name", ["chat/oasst_en100.jsonl", "chat/self_instruct_human.jsonl"])
def test_real_chats_pack_with_little_padding(name):
    lines = (DATA / name).read_text().splitlines()
    task = Given([json.loads(line) for line in lines] * 20)  # a buffer as full as in training
    loader = loader_of(task, sequence_len=2048)
    with loader:
        while loader.passes < 2:
            next(loader)
        shares = loader.stats.shares()
    assert shares["data/padding"] < 0.05
    assert shares["data/dropped"] < 0.05
    assert shares["data/supervised"] > 0.2

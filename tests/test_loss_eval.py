"""Bits per byte against the sum written out by hand, and which text it is of."""

import itertools
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat import cli, loss_eval
from jaxchat.backend import IGNORE, Scores
from jaxchat.chat_loader import ChatLoader
from jaxchat.conversation import render
from jaxchat.dataloader import Batch, PackedLoader
from jaxchat.dataset import Corpus, open_corpus
from jaxchat.loss_eval import (
    bits_per_byte,
    conversation_batches,
    full_rows,
    one_pass,
    text_batches,
)
from jaxchat.stages import LoadedModel
from scripts import base_loss
from tests.byte_tokenizer import ByteTokenizer
from tests.test_chat_loader import TOKENIZER, Given, contents, conversations_of, exchange

TOKEN_BYTES = np.array([1, 2, 3, 0], np.int32)  # the last is a special token
NLL = np.array([[0.5, 1.0, 1.5, 2.0]], np.float32)


class Scorer:
    """Gives every position the same nats, whatever its target: what may count is the caller's."""

    def score(self, inputs, targets):
        return Scores(np.broadcast_to(NLL, targets.shape), np.zeros(targets.shape, np.int32))


def batch(*targets):
    ids = np.array([targets], np.int32)
    return Batch(np.zeros_like(ids), ids)


def test_nats_become_bits_and_tokens_become_bytes():
    value = bits_per_byte(Scorer(), [batch(0, 1, 2, 0), batch(2, 2, 2, 2)], TOKEN_BYTES)
    assert value == pytest.approx(2 * 5.0 / (math.log(2) * (7 + 12)))


def test_specials_and_ignored_targets_count_in_neither_sum():
    value = bits_per_byte(Scorer(), [batch(0, 3, -1, 1)], TOKEN_BYTES)
    assert value == pytest.approx(2.5 / (math.log(2) * 3))


class Split:
    """A loader that has handed out all there is after so many batches."""

    def __init__(self, batches):
        self.batches, self.taken = batches, 0

    @property
    def passes(self):
        return self.taken / self.batches

    def __next__(self):
        self.taken += 1
        return self.taken


@pytest.mark.parametrize(
    ("batches", "asked", "shares"),
    [
        (8, 4, [0.25, 0.5, 0.75, 1.0]),
        (4, 8, [0.25, 0.5, 0.75, 1.0]),
        (0.1, 8, [1.0]),
        (8, 0, [1.0]),
    ],
)
def test_no_more_is_read_than_was_asked_for_or_there_is(batches, asked, shares):
    """A folder of 3 MB was once judged on 42 million tokens of its twentieth part."""
    heard = []
    taken = list(one_pass(Split(batches), asked, heard.append))
    assert taken == list(range(1, len(shares) + 1))
    assert heard == shares


def test_nothing_to_count_is_an_error():
    with pytest.raises(ValueError, match="no batch held a token with bytes"):
        bits_per_byte(Scorer(), [batch(3, 3, -1, -1)], TOKEN_BYTES)


class ListCorpus(Corpus):
    """Documents given as groups of texts, all held out; counts how often one is read."""

    def __init__(self, *groups):
        super().__init__("list", "f")
        self._groups, self.reads = groups, 0

    def groups(self, split):
        assert split == "val"
        return [(0, i, len(group)) for i, group in enumerate(self._groups)]

    def read_group(self, split, shard, group):
        assert split == "val"
        self.reads += 1
        return self._groups[group]


def judged(corpus, *, tokens, rows=8, length=16, tokenizer=None, heard=()):
    """All batches, checked for their shape."""
    on_progress = heard.append if isinstance(heard, list) else lambda share: None
    batches = list(
        text_batches(
            corpus,
            tokenizer or ByteTokenizer(),
            on_progress,
            split="val",
            tokens=tokens,
            rows_per_batch=rows,
            sequence_len=length,
        )
    )
    assert all(ids.shape == (rows, length) for batch in batches for ids in batch[:2])
    return batches


def predicted(batches):
    """What stands between one bos and the next where targets count, each as bytes."""
    pieces = []
    for inputs, targets in (row for b in batches for row in zip(b.inputs, b.targets, strict=True)):
        counted = targets[targets >= 0]
        assert (targets[: len(counted)] >= 0).all()  # all that does not count is behind
        row = np.append(inputs[:1], counted)
        np.testing.assert_array_equal(inputs[: len(counted)], row[:-1] if len(counted) else [])
        assert row[0] == ByteTokenizer.bos_id
        starts = [*np.flatnonzero(row == ByteTokenizer.bos_id), len(row)]
        pieces += [bytes(row[a + 1 : b].astype(np.uint8)) for a, b in itertools.pairwise(starts)]
    return Counter(piece for piece in pieces if piece)


texts = st.lists(st.text(st.characters(codec="ascii"), max_size=60), min_size=1, max_size=30)


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 40))
def test_of_a_small_split_every_document_is_predicted_exactly_once(groups, rows, length):
    """Of 50 texts a "pass" held a quarter, the longest ones, and one of them six times."""
    heard = []
    batches = judged(ListCorpus(*groups), tokens=10**6, rows=rows, length=length, heard=heard)
    whole = [text.encode() for group in groups for text in group]
    parts = [text[i : i + length] for text in whole for i in range(0, len(text), length)]
    assert predicted(batches) == Counter(parts)
    assert heard == sorted(heard)
    assert len(heard) == len(batches)
    assert heard[-1] == 1.0


@pytest.mark.parametrize("length", [16, 128])
def test_bits_per_byte_of_a_small_split_do_not_depend_on_how_many_rows_a_batch_has(length):
    """With a model that gives a byte b always b nats: what pads a batch counts in no sum."""

    class Bytes:
        def score(self, inputs, targets):
            return Scores(np.abs(targets).astype(np.float32), targets)

    words = ["a" * 40, "bc", "d" * 17, "", "efghij" * 30]
    sizes = np.array([1] * 256 + [0], np.int32)
    expected = sum(map(sum, map(str.encode, words))) / sum(map(len, words)) / math.log(2)
    for rows in (1, 3, 8):
        batches = judged(ListCorpus(words), tokens=10**6, rows=rows, length=length)
        assert bits_per_byte(Bytes(), batches, sizes) == pytest.approx(expected)


def test_of_a_larger_split_come_the_first_rows_of_trainings_packing():
    """Published figures are of these; 10 texts of 4 tokens are 40, and 40 is no larger."""
    numbers = [f"{i:03d}" for i in range(10)]
    for length, asked, batches in [(4, 39, 9), (7, 28, 4), (7, 34, 4)]:
        options = {"split": "val", "rows_per_batch": 1, "sequence_len": length}
        found = judged(ListCorpus(numbers), tokens=asked, rows=1, length=length)
        with PackedLoader(ListCorpus(numbers), ByteTokenizer(), **options) as loader:
            expected = list(one_pass(loader, batches, lambda share: None))
        np.testing.assert_array_equal([b[:2] for b in found], [b[:2] for b in expected])
    whole = judged(ListCorpus(numbers), tokens=40, rows=1, length=4)
    assert predicted(whole) == Counter(map(str.encode, numbers))


def test_a_split_within_the_least_batch_is_read_once_even_so():
    """Fewer tokens than a batch holds cannot be asked for; it was filled with repetitions."""
    batches = judged(ListCorpus(["one", "two", "three"]), tokens=1)
    assert predicted(batches) == Counter([b"one", b"two", b"three"])


def test_that_a_split_is_larger_is_learnt_once():
    """It costs encoding as much of it as is asked for, in front of every evaluation."""
    corpus, tokenizer = ListCorpus(*[["text"] * 5] * 20), ByteTokenizer()
    for _ in range(2):
        assert loss_eval._whole_split(corpus, tokenizer, "val", 16, 50) is None
        assert corpus.reads == 3


def test_a_split_that_must_be_larger_is_not_encoded_to_where_it_gets_too_large():
    """On a hub set that took 15 seconds of a run of minutes."""
    corpus = ListCorpus(*[["text"] * 1000] * 20)
    assert loss_eval._whole_split(corpus, ByteTokenizer(), "val", 16, 49_000) is None
    assert corpus.reads == 1  # 5,000 of the 100,000 tokens
    assert loss_eval._whole_split(corpus, ByteTokenizer(), "val", 16, 51_000) is None
    assert corpus.reads == 1 + 11
    assert loss_eval._whole_split(corpus, ByteTokenizer(), "val", 16, 100_000)


def told(task, *, tokens, rows=4, length=100, heard=()):
    """Batches of conversations, all of one shape."""
    on_progress = heard.append if isinstance(heard, list) else lambda share: None
    batches = list(
        conversation_batches(
            task,
            TOKENIZER,
            on_progress,
            tokens=tokens,
            rows_per_batch=rows,
            sequence_len=length,
        )
    )
    assert all(ids.shape == (rows, length) for batch in batches for ids in batch[:2])
    return batches


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 90)), min_size=1, max_size=40),
    st.integers(1, 9),
)
def test_few_conversations_are_judged_whole_and_once_each(sizes, rows):
    """Packed as for training, the first ones came again before the last ones came at all."""
    heard = []
    task = conversations_of(sizes)
    batches = told(task, tokens=10**6, rows=rows, heard=heard)
    rendered = [render(TOKENIZER, conversation) for conversation in task]
    taught = [(ids[:101], mask[:101]) for ids, mask in rendered if any(mask[:101])]
    assert Counter(contents(batches)) == Counter(tuple(ids) for ids, _ in taught)
    counted = [batch.targets[batch.targets != IGNORE] for batch in batches]
    expected = [i for ids, mask in taught for i, m in zip(ids, mask, strict=True) if m]
    assert sorted(np.concatenate(counted)) == sorted(expected)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_of_more_conversations_come_the_first_rows_of_trainings_packing():
    task = conversations_of([(20, 30)] * 40)
    found = told(task, tokens=1000, rows=8)
    with ChatLoader(task, TOKENIZER, rows_per_batch=8, sequence_len=100) as loader:
        expected = list(one_pass(loader, 1, lambda share: None))
    np.testing.assert_array_equal([b[:2] for b in found], [b[:2] for b in expected])


def test_of_more_conversations_the_loader_alone_names_what_are_none(capsys):
    """Looking whether all of them fit says nothing, or the first ones were named twice."""
    task = Given([*[{"messages": "nonsense"}] * 4, *[exchange("q" * 20, "a" * 60)] * 40])
    with ChatLoader(task, TOKENIZER, rows_per_batch=8, sequence_len=100) as loader:
        list(one_pass(loader, 1, lambda share: None))
    expected = capsys.readouterr().out
    told(task, tokens=1000, rows=8)
    assert capsys.readouterr().out == expected


def test_conversations_that_are_none_are_named_and_left_out(capsys):
    task = Given([exchange("q", "a"), {"messages": "nonsense"}, exchange("r", "b")])
    assert len(contents(told(task, tokens=10**6))) == 2
    assert "is left out: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing to learn within"):
        told(Given([{"messages": "nonsense"}]), tokens=10**6)


@given(st.lists(st.integers(1, 20), max_size=40))
def test_full_rows_hold_every_piece_once_and_whole(lengths):
    pieces = [np.full(length, number) for number, length in enumerate(lengths)]
    rows = full_rows(pieces, 20)
    assert all(len(row) <= 20 for row in rows)
    runs = [(int(n), len(list(run))) for row in rows for n, run in itertools.groupby(row)]
    assert sorted(runs) == list(enumerate(lengths))


def test_the_longest_piece_comes_first_and_then_what_fits_best():
    rows = full_rows([np.full(n, n) for n in (2, 6, 3, 5, 4)], 10)
    assert [sorted(set(row.tolist()), reverse=True) for row in rows] == [[6, 4], [5, 3, 2]]


def test_help_shows_a_command_a_line(capsys):
    """Two ran together."""
    with pytest.raises(SystemExit):
        cli.parse(base_loss.Config, ["--help"])
    lines = [line.strip(" │") for line in capsys.readouterr().out.splitlines()]
    assert "python -m scripts.base_loss" in lines


def test_a_model_is_scored_on_what_it_was_trained_on(tmp_path, monkeypatch):
    """After training on a book, what it had to say of the embedded corpus was reported."""
    for name in ("book", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(f'{{"text": "one"}}\n{{"text": "{name}"}}\n')
    book, other = str(tmp_path / "book"), str(tmp_path / "other")
    monkeypatch.setattr(base_loss, "default_corpus", lambda: other)
    chosen, unset = base_loss.Config(corpus=other), base_loss.Config()
    trained = {"config": {"corpus": book}, "corpus": open_corpus(book).fingerprint, "step": 9}
    assert base_loss.corpus_for(unset, trained).name == book
    assert base_loss.corpus_for(chosen, trained).name == other
    for meta in ({}, {"config": None}, {"config": {"corpus": None}}):
        assert base_loss.corpus_for(unset, meta).name == other
    model = LoadedModel(None, None, trained, "d4", tmp_path)
    said = base_loss.describe(unset, model, open_corpus(book))
    assert said == f"scoring base d4 step 9 on {book}"
    assert base_loss.describe(unset, model, open_corpus(other)).startswith(
        f"scoring base d4 step 9 on {other}, which it was not trained on"
    )
    (tmp_path / "book").rename(tmp_path / "gone")
    with pytest.raises(
        ValueError, match=r"the model was trained on it; name another with --corpus"
    ):
        base_loss.corpus_for(unset, trained)


@pytest.mark.parametrize("named", [False, True])
def test_a_model_is_scored_on_the_files_it_was_trained_on(tmp_path, named):
    """More have come since: the last of them would be what is validated on."""
    for name in ("0", "1"):
        pq.write_table(pa.table({"text": ["one", name]}), tmp_path / f"{name}.parquet")
    corpus = open_corpus(str(tmp_path))
    trained = {"config": {"corpus": str(tmp_path)}, "shards": list(corpus.shards)}
    pq.write_table(pa.table({"text": ["new"]}), tmp_path / "2.parquet")
    config = base_loss.Config(corpus=str(tmp_path) if named else None)
    assert base_loss.corpus_for(config, trained).fingerprint == corpus.fingerprint

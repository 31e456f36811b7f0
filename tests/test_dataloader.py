"""Packed rows: what is in them, in which order, and how exactly they resume."""

import hashlib
import itertools
import json
import string
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxchat import dataloader
from jaxchat.dataloader import NUM_STREAMS, PackedLoader, merge_states
from jaxchat.dataset import Corpus
from tests.byte_tokenizer import ByteTokenizer


class ListCorpus(Corpus):
    """Documents given as groups of texts."""

    def __init__(self, groups):
        super().__init__("list", f"{hash(tuple(map(tuple, groups))):x}")
        self._groups = groups

    def groups(self, split):
        return [(0, i, len(group)) for i, group in enumerate(self._groups)]

    def read_group(self, split, shard, group):
        return self._groups[group]


def corpus_of(documents=300, groups=3, seed=0):
    rng = np.random.default_rng(seed)
    texts = [f"{i}:" + "x" * int(rng.integers(0, 90)) for i in range(documents)]
    return ListCorpus([texts[i::groups] for i in range(groups)])


def loader_of(corpus, **changes):
    options = {"split": "train", "rows_per_batch": 8, "sequence_len": 50, "seed": 3}
    return PackedLoader(corpus, ByteTokenizer(), **(options | changes))


def take(loader, batches):
    with loader:
        return [next(loader) for _ in range(batches)]


def ids(batches):
    """Inputs and targets alone."""
    return [batch[:2] for batch in batches]


def test_a_continued_loader_reads_every_group_about_once(monkeypatch):
    """The buffer is in order of length, in which neighbours are of different groups."""
    corpus = corpus_of(documents=24_000, groups=400)
    loader = loader_of(corpus)
    with loader:
        next(loader)
        state = loader.state()
    reads = []
    read = corpus.read_group
    monkeypatch.setattr(corpus, "read_group", lambda *where: reads.append(where) or read(*where))
    with loader_of(corpus, state=state) as again:
        next(again)
    assert len(set(reads)) > 4 * NUM_STREAMS
    assert len(reads) < 1.5 * len(set(reads))


texts = st.lists(st.text(st.characters(codec="ascii"), max_size=40), min_size=1, max_size=40)
slow = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@slow
@given(st.lists(texts, min_size=1, max_size=5), st.integers(1, 60), st.integers(0, 9))
def test_rows_start_with_bos_and_hold_whole_documents_or_cropped_ends(groups, length, seed):
    """Cutting a row at its bos gives beginnings of documents, and all but the last are whole."""
    known = {text.encode() for group in groups for text in group}
    batch = take(loader_of(ListCorpus(groups), sequence_len=length, seed=seed), 1)[0]
    assert batch.inputs.shape == batch.targets.shape == (8, length)
    for inputs, targets in zip(*batch[:2], strict=True):
        row = np.append(inputs, targets[-1])
        np.testing.assert_array_equal(row[1:], targets)
        assert row[0] == ByteTokenizer.bos_id
        starts = [*np.flatnonzero(row == ByteTokenizer.bos_id), len(row)]
        pieces = [bytes(row[a + 1 : b].astype(np.uint8)) for a, b in itertools.pairwise(starts)]
        assert all(piece in known for piece in pieces[:-1])
        assert any(text.startswith(pieces[-1]) for text in known)


def test_one_epoch_loses_nothing_silently():
    """Tokens in rows + tokens cropped + tokens waiting in buffers = tokens read."""
    corpus = corpus_of()
    with loader_of(corpus) as loader:
        while loader.passes < 1:
            next(loader)
        state = loader.state()
    kept = sum(s["kept"] for s in state["streams"].values())
    cropped = sum(s["cropped"] for s in state["streams"].values())
    assert kept == state["rows"] * 51
    sizes = {
        (0, g, i): len(text) + 1
        for g, _ in enumerate(corpus._groups)
        for i, text in enumerate(corpus.read_group("train", 0, g))
    }
    waiting = [tuple(where) for s in state["streams"].values() for _, *where in s["buffer"]]
    entered = sum(s["entered"] for s in state["streams"].values())
    assert entered >= 300
    assert 0 < cropped < 0.2 * kept
    consumed = kept + cropped + sum(sizes[where[:3]] for where in waiting)
    whole, rest = divmod(entered, 300)
    assert whole * sum(sizes.values()) <= consumed <= (whole + (rest > 0)) * sum(sizes.values())


def test_a_pass_hands_every_document_to_exactly_one_stream():
    corpus = corpus_of(groups=40)
    for candidate in (corpus, corpus_of(groups=3)):
        reader = dataloader._Reader(candidate, "train", ByteTokenizer())
        seen = [
            (shard, group, int(row))
            for stream in range(NUM_STREAMS)
            for shard, group, count in reader.order(stream, 1, 0)
            for row in reader.rows(stream, 1, 0, (shard, group, count))
        ]
        assert sorted(seen) == sorted(
            (s, g, i) for s, g, count in candidate.groups("train") for i in range(count)
        )


@pytest.mark.parametrize("documents", [1, 2, 7, 9])
def test_a_tiny_corpus_still_fills_rows(documents):
    batch = take(loader_of(corpus_of(documents=documents, groups=1)), 2)[1]
    assert batch.inputs.shape == (8, 50)


@slow
@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 40))
def test_a_state_resumes_bit_for_bit(before, after, rows):
    corpus = corpus_of()
    with loader_of(corpus, rows_per_batch=rows) as loader:
        for _ in range(before):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
        expected = [next(loader) for _ in range(after)]
    resumed = take(loader_of(corpus, rows_per_batch=rows, state=state), after)
    np.testing.assert_array_equal(ids(resumed), ids(expected))


def test_a_position_becomes_the_state_it_was_however_much_has_been_read_since():
    with loader_of(corpus_of()) as loader:
        next(loader)
        position, state = loader.position, loader.state()
        for _ in range(9):
            next(loader)
        assert loader.state(position) == state != loader.state()


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_the_rows_that_one_would_read(processes):
    corpus = corpus_of()
    alone = take(loader_of(corpus, rows_per_batch=16), 5)
    parts = [
        take(loader_of(corpus, rows_per_batch=16, process_index=i, process_count=processes), 5)
        for i in range(processes)
    ]
    for step, batch in enumerate(alone):
        together = np.concatenate([part[step].inputs for part in parts])
        assert sorted(map(bytes, together)) == sorted(map(bytes, batch.inputs))


def test_a_run_of_two_processes_continues_on_one():
    corpus = corpus_of()
    states = []
    for i in range(2):
        with loader_of(corpus, process_index=i, process_count=2) as loader:
            for _ in range(3):
                next(loader)
            states.append(loader.state())
    expected = take(loader_of(corpus), 6)[3:]
    resumed = take(loader_of(corpus, state=merge_states(states)), 3)
    np.testing.assert_array_equal(ids(resumed), ids(expected))


def test_epochs_differ_and_seeds_differ_but_both_repeat():
    corpus = corpus_of(documents=40, groups=1)
    first, again = (take(loader_of(corpus), 6) for _ in range(2))
    np.testing.assert_array_equal(ids(first), ids(again))
    assert not np.array_equal(ids(first), ids(take(loader_of(corpus, seed=4), 6)))


@pytest.mark.parametrize(("documents", "groups"), [(64, 1), (4 * NUM_STREAMS, 4 * NUM_STREAMS)])
def test_every_pass_has_an_order_of_its_own(documents, groups):
    """Of documents within a group, and of groups where these are dealt."""
    reader = dataloader._Reader(corpus_of(documents, groups), "train", ByteTokenizer())

    def order(epoch):
        return [
            (group, int(row))
            for stream in range(NUM_STREAMS)
            for shard, group, count in reader.order(stream, 1, epoch)
            for row in reader.rows(stream, 1, epoch, (shard, group, count))
        ]

    assert order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1))


def test_cropping_is_counted():
    with loader_of(corpus_of(documents=37, groups=1), rows_per_batch=3) as loader:
        cropped = 0
        for _ in range(60):
            next(loader)
            streams = loader.state()["streams"].values()
            cut, kept = (sum(s[name] for s in streams) for name in ("cropped", "kept"))
            assert loader.cropped_share == cut / (cut + kept)
            cropped += 0 < cut < kept
    assert cropped


@pytest.mark.parametrize("processes", [1, 2])
def test_passes_count_the_documents_in_rows(processes):
    """Not those in the buffers: of a small split they hold all, several times."""
    for index in range(processes):
        loader = loader_of(corpus_of(), process_index=index, process_count=processes)
        with loader:
            used = 0
            while loader.passes < 1:
                batch = next(loader)
                rows = np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)
                used += int((rows == ByteTokenizer.bos_id).sum())
                assert loader.passes == used / (300 / processes)
        assert used < 300 / processes + 8 * 50


def test_of_fewer_documents_than_streams_every_stream_reads_one():
    with loader_of(corpus_of(documents=3, groups=1)) as loader:
        next(loader)
        assert loader.passes >= 1


def test_the_fullest_fit_wins():
    """Of documents of 3, 10 and 30 tokens, a row of 34 takes the 30, the 3, then crops."""
    group = ["a" * 29, "b" * 9, "c" * 2]
    stream = dataloader._Stream(
        dataloader._Reader(ListCorpus([group * 8]), "train", ByteTokenizer()), 0, 0, 34, None
    )
    stream._capacity = 3
    row = stream.next_row()
    assert bytes(row[1:30].astype(np.uint8)) == b"a" * 29
    assert bytes(row[31:33].astype(np.uint8)) == b"c" * 2


def stream_of(group, length):
    """A stream of rows over one group, in its order."""
    reader = dataloader._Reader(ListCorpus([group]), "train", ByteTokenizer())
    reader.rows = lambda *_: np.arange(len(group))
    return dataloader._Stream(reader, 0, 0, length, None)


def test_a_document_that_fits_exactly_is_taken():
    stream = stream_of(["c" * 5, "a" * 9] * 200, 10)
    assert bytes(stream.next_row()[1:].astype(np.uint8)) == b"a" * 9
    assert (stream._kept, stream._cropped) == (10, 0)


def test_of_documents_of_one_length_the_oldest_is_taken():
    row = stream_of([f"{i:09d}" for i in range(400)], 30).next_row()
    assert bytes(row[row < 256].astype(np.uint8)) == b"000000000000000001000000002"


def own(groups):
    """Texts of one's own: all of them count."""
    corpus = ListCorpus(groups)
    corpus.keeps_all = True
    return corpus


def test_nothing_of_a_text_of_ones_own_is_lost():
    """Of a book all but the first row was once thrown away, in every pass."""
    alphabet = string.ascii_letters + string.digits
    book = "".join(a + b for a in alphabet for b in alphabet)[:4000]  # no row of it stands twice
    batches = take(loader_of(own([[book, "x"]]), sequence_len=40), 200)
    rows = np.concatenate([batch.targets for batch in batches])  # all but the bos
    said = {bytes(row[row < 256].astype(np.uint8)) for row in rows}
    assert {book[start : start + 40].encode() for start in range(0, len(book), 40)} <= said


def test_parts_of_long_texts_are_continued_counted_and_seldom_cropped():
    corpus = own(corpus_of()._groups)
    lengths = {(0, g, i): len(text) for g in range(3) for i, text in enumerate(corpus._groups[g])}
    with loader_of(corpus) as loader:
        while loader.passes < 1:
            next(loader)
        state = json.loads(json.dumps(loader.state()))
        expected = [next(loader) for _ in range(20)]
    np.testing.assert_array_equal(ids(take(loader_of(corpus, state=state), 20)), ids(expected))
    streams = state["streams"].values()
    kept, cropped, entered = (sum(s[n] for s in streams) for n in ("kept", "cropped", "entered"))
    waiting = [tuple(where) for s in streams for _, *where in s["buffer"]]
    assert any(start for *_, start in waiting)
    assert cropped < 0.01 * kept
    parts = {where: -(-max(1, n) // 50) for where, n in lengths.items()}
    read = sum(n + parts[where] for where, n in lengths.items())  # a bos for each part
    left = sum(min(50, lengths[where[:3]] - where[3]) + 1 for where in waiting)
    whole, rest = divmod(entered, 300)
    assert whole * read <= kept + cropped + left <= (whole + (rest > 0)) * read


class Numbers:
    """Every token of a corpus is another: "3 5" is 3, 4, 5 and 6, 7."""

    bos_id, fingerprint = -1, "numbers"

    def encode_batch(self, texts):
        spans = [tuple(map(int, text.split())) for text in texts]
        return [np.arange(start, start + count) for start, count in spans]


def numbered(lengths, groups=1):
    """Texts of one's own, so many tokens long."""
    starts = np.cumsum([0, *lengths])
    documents = [f"{start} {count}" for start, count in zip(starts, lengths, strict=False)]
    return own([documents[i::groups] for i in range(groups)])


@slow
@given(st.lists(st.integers(0, 90), min_size=1, max_size=60), st.integers(1, 40))
def test_a_pass_hands_out_every_token_of_a_text_of_ones_own_once(lengths, row):
    """A section's end waited until all full rows of several passes were gone, or was cropped."""
    reader = dataloader._Reader(numbered([*lengths, 1] * 8), "train", Numbers())
    stream = dataloader._Stream(reader, 3, 0, row + 1, None)
    share = [where for where in reader.groups for where in reader.rows(3, 0, 0, where).tolist()]
    documents = reader.tokens([dataloader.Address(0, 0, row) for row in share])
    expected = sorted(np.concatenate(documents).tolist())
    found = []
    while len(found) < len(expected):
        found += [int(token) for token in stream.next_row() if token >= 0]
    assert sorted(found[: len(expected)]) == expected
    assert stream._cropped == 0


@pytest.mark.parametrize("sequence_len", [64, 256])
def test_a_book_has_been_read_when_as_many_tokens_have_as_it_has(sequence_len):
    """Of one of 1.5 MB 65% had been, after twice as many still; streams are not all even."""
    lengths = np.random.default_rng(0).integers(250, 320, 140).tolist()
    batches, seen, handed_out = numbered(lengths), set(), 0
    options = {"split": "train", "rows_per_batch": 8, "sequence_len": sequence_len}
    with PackedLoader(batches, Numbers(), **options) as loader:
        while handed_out < sum(lengths):
            batch = next(loader)
            said = batch.targets[batch.targets >= 0].tolist()
            seen.update(said)
            handed_out += len(said)
    assert len(seen) > 0.97 * sum(lengths)


def test_a_row_begins_with_the_part_that_has_waited_longest():
    """The ends of sections are mixed with their beginnings, not kept for the end of a pass."""
    reader = dataloader._Reader(numbered([25] * 200), "train", Numbers())
    stream = dataloader._Stream(reader, 0, 0, 11, None)
    first, second, third = (stream.next_row().tolist() for _ in range(3))
    start = first[1]
    assert (first[1:], second[1:]) == (
        [*range(start, start + 10)],
        [*range(start + 10, start + 20)],
    )
    assert third[1:6] == [*range(start + 20, start + 25)]


def test_what_is_cut_off_a_part_goes_on_in_a_row_of_its_own():
    reader = dataloader._Reader(numbered([7] * 8), "train", Numbers())
    stream = dataloader._Stream(reader, 0, 0, 5, None)
    rows = [stream.next_row().tolist() for _ in range(2)]
    start = rows[0][1]
    assert rows[0] == [-1, *range(start, start + 4)]
    assert rows[1][:4] == [-1, *range(start + 4, start + 7)]


@slow
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 20), st.integers(1, 60))
def test_a_state_of_texts_of_ones_own_resumes_bit_for_bit(before, after, rows, length):
    """With parts that were cut anywhere among those that wait, at any end of a pass."""
    corpus = own(corpus_of(documents=60)._groups)
    options = {"rows_per_batch": rows, "sequence_len": length}
    with loader_of(corpus, **options) as loader:
        for _ in range(before):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
        expected = [next(loader) for _ in range(after)]
        end = loader.state()
    with loader_of(corpus, **options, state=state) as again:
        resumed = [next(again) for _ in range(after)]
        assert again.state() == end
    np.testing.assert_array_equal(ids(resumed), ids(expected))


def test_the_order_of_what_is_not_ones_own_stays_what_it_is():
    """Checkpoints and published figures rest on it."""
    batches = take(loader_of(corpus_of()), 40)
    digest = hashlib.sha256(b"".join(batch.inputs.tobytes() for batch in batches)).hexdigest()
    assert digest[:16] == "e57a257791ef85fb"


def test_another_corpus_or_length_is_refused_by_name():
    with loader_of(corpus_of()) as loader:
        state = loader.state()
    with pytest.raises(ValueError, match="sequence_len 50, now 60"):
        loader_of(corpus_of(), sequence_len=60, state=state)
    with pytest.raises(ValueError, match="corpus"):
        loader_of(corpus_of(seed=1), state=state)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 processes must divide the 8 data streams"):
        loader_of(corpus_of(), rows_per_batch=24, process_count=3)


def test_errors_of_the_reading_thread_arrive_and_no_thread_stays():
    class Broken(ListCorpus):
        def read_group(self, split, shard, group):
            raise OSError("the disk is gone")

    before = threading.active_count()
    with loader_of(Broken([["a", "b"]])) as loader, pytest.raises(OSError, match="the disk is"):
        next(loader)
    assert threading.active_count() == before

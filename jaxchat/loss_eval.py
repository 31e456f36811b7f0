"""Bits per byte: how well a model compresses text, whatever its tokenizer; and on which text.

What is held out is read whole where it is small enough, every token once; of more than that come
the first rows that training would pack of it.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Protocol, TypeAlias

import numpy as np

from jaxchat.backend import IGNORE, Backend
from jaxchat.chat_loader import ChatLoader
from jaxchat.chat_packing import Source
from jaxchat.dataloader import Batch, Encoder, PackedLoader
from jaxchat.dataset import Corpus
from jaxchat.progress import OnProgress
from jaxchat.tasks.base import Task
from jaxchat.tokenizer import Tokenizer

TYPICAL = 1000
"""Documents whose mean length tells that all of them are far too many."""


class TokenRows(Protocol):
    """A batch of rows and the same rows one token later, (B, T) int32 each."""

    @property
    def inputs(self) -> np.ndarray: ...

    @property
    def targets(self) -> np.ndarray: ...


class HeldOut(Protocol):
    """A loader that knows how often it has handed out all that it reads."""

    @property
    def passes(self) -> float: ...

    def __next__(self) -> TokenRows: ...


Rows: TypeAlias = tuple[np.ndarray, ...]
"""Token ids of rows of any length; ~id where a token is not to be predicted."""


def text_batches(
    corpus: Corpus,
    tokenizer: Encoder,
    on_progress: OnProgress,
    *,
    split: str,
    tokens: int,
    rows_per_batch: int,
    sequence_len: int,
) -> Iterator[TokenRows]:
    """Batches of about `tokens` tokens of a split, at least one; all of one shape.

    A split that fits into them comes whole, each of its tokens once: packed as for training, a
    small one was read in part, and that several times (of 50 texts a quarter, the longest). Of a
    larger split come the first rows of training's packing. `on_progress` hears the share that is
    done after each batch. The same on every process: a backend scores rows of all of them.
    """
    return _batches(
        partial(_whole_split, corpus, tokenizer, split, sequence_len),
        lambda: PackedLoader(
            corpus, tokenizer, split=split, rows_per_batch=rows_per_batch, sequence_len=sequence_len
        ),
        on_progress,
        tokens=tokens,
        shape=(rows_per_batch, sequence_len),
        filler=tokenizer.bos_id,
    )


def conversation_batches(
    conversations: Task,
    tokenizer: Tokenizer,
    on_progress: OnProgress,
    *,
    tokens: int,
    rows_per_batch: int,
    sequence_len: int,
) -> Iterator[TokenRows]:
    """The same of conversations, of which only what the model should say counts.

    What is longer than a row ends with it, as in training. Of more conversations than fit come
    those that training would begin with, of seed 0: every run is judged on the same ones.
    """
    return _batches(
        partial(_all_conversations, conversations, tokenizer, sequence_len),
        lambda: ChatLoader(
            conversations, tokenizer, rows_per_batch=rows_per_batch, sequence_len=sequence_len
        ),
        on_progress,
        tokens=tokens,
        shape=(rows_per_batch, sequence_len),
        filler=tokenizer.bos_id,
    )


def full_rows(pieces: Iterable[np.ndarray], length: int) -> list[np.ndarray]:
    """Pieces of at most `length` tokens in rows of at most as many: each once, and none is cut.

    A row is the longest piece that is left and behind it, again and again, the longest that fits.
    """
    waiting, rows = sorted(pieces, key=len), []
    while waiting:
        row, room = [waiting.pop()], length
        room -= len(row[0])
        while fitting := bisect.bisect_right(waiting, room, key=len):
            row.append(waiting.pop(fitting - 1))
            room -= len(row[-1])
        rows.append(np.concatenate(row))
    return rows


def one_pass(loader: HeldOut, batches: int, on_progress: OnProgress) -> Iterator[TokenRows]:
    """At least one batch and at most so many, but none once all there is has been handed out.

    So a split of a few thousand tokens is not judged on millions of them. `on_progress` hears the
    share that is done after each batch.
    """
    taken, done = 0, 0.0
    while done < 1:
        yield next(loader)
        taken += 1
        done = min(1.0, max(taken / max(1, batches), loader.passes))
        on_progress(done)


def bits_per_byte(backend: Backend, batches: Iterable[TokenRows], token_bytes: np.ndarray) -> float:
    """Nats of all counted targets / (ln 2 x their bytes), in float64.

    `token_bytes` is (V,) int32, the raw bytes of each token; targets without bytes (specials) or
    below zero (ignored) count in neither sum. ValueError when nothing counts.
    """
    nats, counted_bytes = 0.0, 0
    for batch in batches:
        scores = backend.score(batch.inputs, batch.targets)
        sizes = np.where(batch.targets >= 0, token_bytes[np.maximum(batch.targets, 0)], 0)
        nats += float(np.sum(scores.nll, dtype=np.float64, where=sizes > 0))
        counted_bytes += int(sizes.sum())
    if not counted_bytes:
        raise ValueError("bits per byte of nothing: no batch held a token with bytes")
    return nats / (math.log(2) * counted_bytes)


def _batches(
    rows_of_all: Callable[[int], Rows | None],
    open_loader: Callable[[], AbstractContextManager[HeldOut]],
    on_progress: OnProgress,
    *,
    tokens: int,
    shape: tuple[int, int],
    filler: int,
) -> Iterator[TokenRows]:
    """All rows, where they fit into so many batches of a shape, or what a loader begins with."""
    count, length = shape
    batches = max(1, tokens // (count * length))
    whole = rows_of_all(batches * count * length)
    if not whole:
        with open_loader() as loader:
            yield from one_pass(loader, batches, on_progress)
        return
    for start in range(0, len(whole), count):
        yield _padded(whole[start : start + count], count, length + 1, filler)
        on_progress(min(1.0, (start + count) / len(whole)))


@lru_cache(maxsize=2)
def _whole_split(
    corpus: Corpus, tokenizer: Encoder, split: str, sequence_len: int, most: int
) -> Rows | None:
    """Rows of a split's documents, a bos before each part; None of more than `most` tokens.

    Remembered, because a run validates again and again.
    """
    bos = np.array([tokenizer.bos_id], np.int32)

    def documents() -> Iterator[list[np.ndarray]]:
        for shard, group, _ in corpus.groups(split):
            for ids in tokenizer.encode_batch(corpus.read_group(split, shard, group)):
                starts = range(0, max(1, len(ids)), sequence_len)
                parts = (ids[start : start + sequence_len] for start in starts)
                yield [np.concatenate([bos, part.astype(np.int32)]) for part in parts]

    count = sum(count for _, _, count in corpus.groups(split))
    return _rows_of_all(documents(), count, sequence_len + 1, most)


@lru_cache(maxsize=2)
def _all_conversations(
    conversations: Task, tokenizer: Tokenizer, sequence_len: int, most: int
) -> Rows | None:
    """Rows of conversations; None of more than `most` tokens. Remembered likewise."""
    source = Source(conversations, tokenizer, sequence_len + 1, 0)
    malformed: list[tuple[int, ValueError]] = []

    def documents() -> Iterator[list[np.ndarray]]:
        for index in range(len(conversations)):
            try:
                rendered = source.read(index)
            except ValueError as error:
                malformed.append((index, error))
                rendered = None
            yield [] if rendered is None else [np.where(rendered.mask, rendered.ids, ~rendered.ids)]

    rows = _rows_of_all(documents(), len(conversations), sequence_len + 1, most)
    for index, error in malformed if rows else ():  # of more of them the loader will tell
        source.warn(index, error)
    return rows


def _rows_of_all(
    documents: Iterable[list[np.ndarray]], count: int, length: int, most: int
) -> Rows | None:
    """`count` documents, each in pieces, as rows; None as soon as they are too many tokens.

    That is, when the first ones have more than `most`, or are so long that all have twice that.
    """
    pieces: list[np.ndarray] = []
    tokens = 0
    for number, document in enumerate(documents, start=1):
        pieces += document
        tokens += sum(map(len, document))
        if tokens > most or (number >= TYPICAL and tokens / number * count > 2 * most):
            return None
    return tuple(full_rows(pieces, length))


def _padded(rows: Rows, count: int, length: int, filler: int) -> Batch:
    """`count` rows of `length` tokens: behind the given ones is what does not count."""
    padded = np.full((count, length), ~filler, np.int32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    ids, targets = np.maximum(padded, ~padded), np.maximum(padded, IGNORE)
    return Batch(ids[:, :-1].copy(), targets[:, 1:].copy())

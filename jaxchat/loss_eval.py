"""Bits per byte: how well a model compresses text, whatever its tokenizer; and on which text.

A split that is small enough is read whole, every token once; of a larger one the first rows are
taken that training would pack of it. Left out: conversations (finetune.py reads its own).
"""

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from jaxchat.backend import IGNORE, Backend
from jaxchat.dataloader import Batch, Encoder, PackedLoader
from jaxchat.dataset import Corpus
from jaxchat.progress import OnProgress


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


def evaluation_batches(
    corpus: Corpus,
    tokenizer: Encoder,
    on_progress: OnProgress,
    *,
    split: str,
    tokens: int,
    rows_per_batch: int,
    sequence_len: int,
) -> Iterator[TokenRows]:
    """Batches of about `tokens` tokens to judge a model on, at least one; all of one shape.

    A split that fits into them comes whole, each of its tokens once: packed as for training, a
    small one was read in part, and that several times (of 50 texts a quarter, the longest). Of a
    larger split come the first rows of training's packing. `on_progress` hears the share that is
    done after each batch. The same on every process: a backend scores rows of all of them.
    """
    batches = max(1, tokens // (rows_per_batch * sequence_len))
    most = batches * rows_per_batch * sequence_len
    if rows := _whole_split(corpus, tokenizer, split, sequence_len, most):
        for start in range(0, len(rows), rows_per_batch):
            end = start + rows_per_batch
            yield _padded(rows[start:end], rows_per_batch, sequence_len + 1, tokenizer.bos_id)
            on_progress(min(1.0, end / len(rows)))
        return
    with PackedLoader(
        corpus, tokenizer, split=split, rows_per_batch=rows_per_batch, sequence_len=sequence_len
    ) as loader:
        yield from one_pass(loader, batches, on_progress)


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


@lru_cache(maxsize=2)
def _whole_split(
    corpus: Corpus, tokenizer: Encoder, split: str, sequence_len: int, most: int
) -> tuple[np.ndarray, ...] | None:
    """Rows of a split's documents, a bos before each part; None of more than `most` tokens.

    Remembered, because to learn that a split is larger costs encoding `most` tokens of it, and a
    run validates again and again.
    """
    bos = np.array([tokenizer.bos_id], np.int32)
    pieces: list[np.ndarray] = []
    tokens = 0
    for shard, group, _ in corpus.groups(split):
        for ids in tokenizer.encode_batch(corpus.read_group(split, shard, group)):
            for start in range(0, max(1, len(ids)), sequence_len):
                part = ids[start : start + sequence_len].astype(np.int32)
                pieces.append(np.concatenate([bos, part]))
                tokens += len(pieces[-1])
        if tokens > most:
            return None
    return tuple(full_rows(pieces, sequence_len + 1))


def _padded(rows: Sequence[np.ndarray], count: int, length: int, filler: int) -> Batch:
    """`count` rows of `length` tokens: behind the given ones is what does not count."""
    ids = np.full((count, length), filler, np.int32)
    targets = np.full((count, length), IGNORE, np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = targets[number, : len(row)] = row
    return Batch(ids[:, :-1].copy(), targets[:, 1:].copy())

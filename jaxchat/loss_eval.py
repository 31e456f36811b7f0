"""Bits per byte: how well a model compresses text, whatever its tokenizer."""

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from jaxchat.backend import Backend
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

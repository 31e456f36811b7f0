"""A backend without a model: a finite-state implementation of `Backend`'s generation half.

The next token is a function of the ids that a row holds, given by the test. Everything else of the
contract is real and checked: rows hold what was put into them, a dispatch stops where it must, and
what the caller claims about a row is compared with what the row holds.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxchat.backend import DecodeBatch, DecodeResult, DeviceInfo
from jaxchat.config import GPTConfig


class ScriptedBackend:
    """Says after every text what `next_token` says; counts what it was asked to do."""

    name = "scripted"
    devices = DeviceInfo("cpu", 1, "none", None)

    def __init__(self, config: GPTConfig, next_token: Callable[[Sequence[int]], int]) -> None:
        self.config, self.next_token = config, next_token
        self.prefills: list[tuple[int, int, int]] = []
        """(row, start, tokens) of every prefill."""
        self.copies = 0
        self.dispatches: list[int] = []
        """How many rows each dispatch decoded."""

    def new_cache(self, rows: int, max_length: int) -> list[list[int]]:
        self.max_length = max_length
        return [[] for _ in range(rows)]

    def prefill(self, cache, row, ids, start):
        assert 0 <= start <= len(cache[row]), f"row {row} holds {len(cache[row])}, not {start}"
        assert len(ids) and start + len(ids) <= self.max_length
        self.prefills.append((row, start, len(ids)))
        cache[row][start:] = map(int, ids)
        return cache, self._logits(cache[row])

    def copy_row(self, cache, source, target, length):
        assert len(cache[source]) >= length
        self.copies += 1
        cache[target][:] = cache[source][:length]
        return cache

    def decode(self, cache, batch: DecodeBatch) -> DecodeResult:
        tokens, counts = np.zeros(batch.uniforms.shape, np.int32), np.zeros(len(cache), np.int32)
        self.dispatches.append(int((batch.budgets > 0).sum()))
        for row, held in enumerate(cache):
            newest = int(batch.tokens[row])
            if batch.budgets[row]:
                assert batch.lengths[row] <= len(held)
                del held[batch.lengths[row] :]
            for step in range(min(batch.budgets[row], tokens.shape[1])):
                held.append(newest)
                assert len(held) <= self.max_length
                newest = tokens[row, step] = self.next_token(held)
                counts[row] += 1
                if newest in batch.stop_ids:
                    break
        return DecodeResult(cache, tokens, np.full(tokens.shape, -1.0, np.float32), counts)

    def _logits(self, held):
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[self.next_token(held)] = 50
        return logits

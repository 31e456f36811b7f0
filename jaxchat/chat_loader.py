"""Batches of packed conversations, in an order that any number of processes keeps.

Rows come from a fixed number of logical streams in turn, as in dataloader.py: they depend on
conversations, tokenizer and seed alone, not on devices or processes, and the state, which holds
indices, resumes exactly. Left out: how a row is filled (chat_packing.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxchat.chat_packing import PackingStats, Place, Source, Stream
from jaxchat.dataloader import NUM_STREAMS, Batch, check_identity, merge_states
from jaxchat.prefetch import Prefetcher
from jaxchat.tasks.base import Task
from jaxchat.tokenizer import Tokenizer


class ChatLoader(Prefetcher[Batch]):
    """An endless iterator of batches; close it, or use it as a context manager."""

    def __init__(
        self,
        conversations: Task,
        tokenizer: Tokenizer,
        *,
        rows_per_batch: int,
        sequence_len: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        state: Mapping[str, Any] | None = None,
        gather: Callable[[Any], Sequence[Any]] = lambda own: [own],
    ) -> None:
        """`rows_per_batch` counts the rows of all processes; each hands out its share of them.

        `state` continues where another loader's `state()` was taken. ValueError when it belongs to
        other data, when sizes do not divide, or when a whole pass finds nothing to learn. `gather`
        brings the JSON values of all processes to each, for `state()`.
        """
        if process_count > 1 and (NUM_STREAMS % process_count or rows_per_batch % NUM_STREAMS):
            raise ValueError(
                f"{process_count} processes must divide the {NUM_STREAMS} data streams, and "
                f"these the {rows_per_batch} rows of a batch; choose sizes that do"
            )
        if rows_per_batch < 1 or sequence_len < 1 or not len(conversations):
            raise ValueError(
                f"{rows_per_batch=}, {sequence_len=} and the {len(conversations)} conversations "
                "must be at least 1"
            )
        self._identity = {
            "conversations": conversations.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "sequence_len": sequence_len,
            "seed": seed,
        }
        if state is not None:
            check_identity(self._identity, state["identity"])
        owned = [s for s in range(NUM_STREAMS) if s % process_count == process_index]
        source = Source(conversations, tokenizer, sequence_len + 1, seed)
        self._pass_size = max(len(conversations), NUM_STREAMS) * len(owned) / NUM_STREAMS
        saved = {} if state is None else state["streams"]
        self._streams = {s: Stream(source, s, saved.get(str(s))) for s in owned}
        self._gather, self._rows_per_batch = gather, rows_per_batch
        self._rows = 0 if state is None else state["rows"]
        self._start()

    @property
    def passes(self) -> float:
        """How often they have been handed out: conversations used over those there are."""
        _, streams = self.position
        used = (s.counts["conversations"] - len(s.waiting) for s in streams.values())
        return sum(used) / self._pass_size

    @property
    def stats(self) -> PackingStats:
        """Of this process's streams, for the batches handed out so far."""
        return PackingStats.total(
            stream["counts"] for stream in self._own_state()["streams"].values()
        )

    def state(self, position: Any = None) -> dict[str, Any]:
        """Where the batches handed out so far end, on all processes: small, ready for JSON.

        With `position`, where those ended that had been handed out when `self.position` was it.
        """
        return merge_states(self._gather(self._own_state(position)))

    def _own_state(self, position: Any = None) -> dict[str, Any]:
        rows, streams = self.position if position is None else position
        return {
            "identity": self._identity,
            "rows": rows,
            "streams": {str(s): place._asdict() for s, place in streams.items()},
        }

    def _position(self) -> tuple[int, dict[int, Place]]:
        return self._rows, {s: stream.place() for s, stream in self._streams.items()}

    def _make(self) -> Batch:
        numbers = range(self._rows, self._rows + self._rows_per_batch)
        mine = [r % NUM_STREAMS for r in numbers if r % NUM_STREAMS in self._streams]
        inputs, targets = zip(*(self._streams[s].next_row() for s in mine), strict=True)
        self._rows += self._rows_per_batch
        shares = PackingStats.total(
            stream.place().counts for stream in self._streams.values()
        ).shares()
        return Batch(np.stack(inputs), np.stack(targets), figures=shares)

"""Conversations to packed rows: whole conversations, best fit, padding that does not count.

A row starts with the conversation that has waited longest and is filled with the largest waiting
ones that fit; what is left is padding. So nothing waits forever (upstream's packer keeps what is
longer than a row until its buffer holds nothing else, and the loss becomes NaN):

- a conversation longer than a row is truncated to the row: its beginning is learnt from;
- one with nothing to learn (left), or that is malformed, is dropped;
- both are counted, and every row has at least one supervised token.

Targets are `IGNORE` on everything that is not supervised and on padding. Rows come from a fixed
number of logical streams in turn, as in dataloader.py: they depend on conversations, tokenizer and
seed alone, not on devices or processes, and the state, which holds indices, resumes exactly.
"""

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxchat.backend import IGNORE
from jaxchat.conversation import render
from jaxchat.dataloader import NUM_STREAMS, Batch, check_identity
from jaxchat.prefetch import Prefetcher
from jaxchat.runtime import print0
from jaxchat.tasks.base import Task
from jaxchat.tokenizer import Tokenizer

WAITING = 200
"""Conversations that a stream chooses from."""

WARNINGS = 5
"""Malformed conversations that are described; the others are only counted."""


@dataclass(frozen=True)
class PackingStats:
    """What became of the conversations read and the rows made so far."""

    conversations: int = 0
    """Read, waiting ones included."""
    truncated: int = 0
    """Longer than a row: their end is cut off."""
    dropped: int = 0
    """Nothing to learn from, or malformed."""
    malformed: int = 0
    """Of the dropped ones, those that are no conversation."""
    tokens: int = 0
    """Room in the rows: each holds one more than the sequence length."""
    padding: int = 0
    """Of that room, what stayed empty."""
    supervised: int = 0
    """Tokens that are learnt."""

    def shares(self) -> dict[str, float]:
        """The shares to log: of conversations, and of tokens."""
        read, tokens = max(1, self.conversations), max(1, self.tokens)
        return {
            "data/truncated": self.truncated / read,
            "data/dropped": self.dropped / read,
            "data/padding": self.padding / tokens,
            "data/supervised": self.supervised / tokens,
        }


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
    ) -> None:
        """`rows_per_batch` counts the rows of all processes; each hands out its share of them.

        `state` continues where another loader's `state()` was taken. ValueError when it belongs to
        other data, when sizes do not divide, or when a whole pass finds nothing to learn.
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
        source = _Source(conversations, tokenizer, sequence_len + 1, seed)
        saved = {} if state is None else state["streams"]
        self._streams = {s: _Stream(source, s, saved.get(str(s))) for s in owned}
        self._rows_per_batch = rows_per_batch
        self._rows = 0 if state is None else state["rows"]
        self._start()

    @property
    def epoch(self) -> int:
        """Passes over the conversations begun, counted from 0, by the stream least far."""
        return min(stream["epoch"] for stream in self.state()["streams"].values())

    @property
    def stats(self) -> PackingStats:
        """Of this process's streams, for the batches handed out so far."""
        return _total(stream["counts"] for stream in self.state()["streams"].values())

    def state(self) -> dict[str, Any]:
        """Where the batches handed out so far end: small, and ready for JSON."""
        rows, streams = self._snapshot
        return {
            "identity": self._identity,
            "rows": rows,
            "streams": {str(s): place._asdict() for s, place in streams.items()},
        }

    def _position(self) -> tuple[int, dict[int, "_Place"]]:
        return self._rows, {s: stream.place() for s, stream in self._streams.items()}

    def _make(self) -> Batch:
        numbers = range(self._rows, self._rows + self._rows_per_batch)
        mine = [r % NUM_STREAMS for r in numbers if r % NUM_STREAMS in self._streams]
        inputs, targets = zip(*(self._streams[s].next_row() for s in mine), strict=True)
        self._rows += self._rows_per_batch
        shares = _total(stream.place().counts for stream in self._streams.values()).shares()
        return Batch(np.stack(inputs), np.stack(targets), figures=shares)


def _total(counts: Iterable[Mapping[str, int]]) -> PackingStats:
    each = list(counts)
    names = PackingStats.__dataclass_fields__
    return PackingStats(**{name: sum(count[name] for count in each) for name in names})


def rows_per_epoch(
    conversations: Task, tokenizer: Tokenizer, *, sequence_len: int, sample: int = 2000
) -> float:
    """About how many rows one pass over `conversations` fills, from a sample of their lengths."""
    chosen = conversations.shuffled(0)[:sample]
    source = _Source(chosen, tokenizer, sequence_len + 1, 0)
    rendered = [source.read(index) for index in range(len(chosen))]
    tokens = sum(len(item.ids) for item in rendered if item is not None)
    packed = 0.97 * (sequence_len + 1)  # what best fit usually fills (tests/test_chat_loader.py)
    return tokens / packed * len(conversations) / len(chosen)


class _Rendered(NamedTuple):
    """A conversation as it goes into a row."""

    ids: np.ndarray
    mask: np.ndarray
    truncated: bool


class _Place(NamedTuple):
    """A stream's position: pass, conversations of the pass read, what waits, and the counts."""

    epoch: int
    read: int
    entered: int
    waiting: list[tuple[int, int]]
    """Age and index of each, oldest first."""
    counts: dict[str, int]


class _Source:
    """Conversations as tokens, and the order of one pass over them."""

    def __init__(self, task: Task, tokenizer: Tokenizer, capacity: int, seed: int) -> None:
        self.task, self.tokenizer, self.capacity, self.seed = task, tokenizer, capacity, seed
        self.warnings = WARNINGS
        self._parts = min(NUM_STREAMS, len(task))

    def order(self, stream: int, epoch: int) -> np.ndarray:
        """A stream's conversations in one pass.

        They are dealt in turn; of fewer conversations than streams, several streams read the same.
        """
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self.task))
        return shuffled[stream % self._parts :: self._parts]

    def read(self, index: int) -> _Rendered | None:
        """A conversation that fits a row and teaches something, or None; malformed: ValueError."""
        ids, mask = render(self.tokenizer, self.task[index])
        rendered = _Rendered(
            np.array(ids[: self.capacity], np.int32),
            np.array(mask[: self.capacity], bool),
            len(ids) > self.capacity,
        )
        return rendered if rendered.mask[1:].any() else None

    def warn(self, index: int, error: ValueError) -> None:
        if self.warnings:
            self.warnings -= 1
            print0(f"warning: {self.task.name}, conversation {index} is left out: {error}")


class _Stream:
    """One logical stream: a cursor over its conversations, and those that wait for a row."""

    def __init__(self, source: _Source, number: int, place: Mapping[str, Any] | None) -> None:
        self._source, self._number = source, number
        self._epoch = self._read = self._entered = 0
        self._counts = dict.fromkeys(PackingStats.__dataclass_fields__, 0)
        self._waiting: dict[int, tuple[int, _Rendered]] = {}
        self._by_length: list[tuple[int, int]] = []
        if place is not None:
            self._epoch, self._read, self._entered = (
                place[name] for name in ("epoch", "read", "entered")
            )
            self._counts = dict(place["counts"])
            for age, index in place["waiting"]:
                rendered = source.read(index)
                assert rendered is not None, "what waits has something to learn"
                self._enter(age, index, rendered)
        self._order = source.order(number, self._epoch)

    def place(self) -> _Place:
        waiting = [(age, index) for age, (index, _) in self._waiting.items()]
        return _Place(self._epoch, self._read, self._entered, waiting, dict(self._counts))

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the next row, (T,) int32 each."""
        capacity = self._source.capacity
        self._read_more()
        chosen = [self._take(next(iter(self._waiting)))]
        room = capacity - len(chosen[0].ids)
        while (age := self._largest_within(room)) is not None:
            chosen.append(self._take(age))
            room -= len(chosen[-1].ids)
        ids = np.full(capacity, self._source.tokenizer.bos_id, np.int32)
        mask = np.zeros(capacity, bool)
        ids[: capacity - room] = np.concatenate([item.ids for item in chosen])
        mask[: capacity - room] = np.concatenate([item.mask for item in chosen])
        targets = np.where(mask, ids, IGNORE)[1:].astype(np.int32)
        self._counts["tokens"] += capacity
        self._counts["padding"] += room
        self._counts["supervised"] += int((targets != IGNORE).sum())
        return ids[:-1], targets

    def _largest_within(self, room: int) -> int | None:
        """The age of the largest waiting conversation that fits, the oldest of equals."""
        index = bisect.bisect_right(self._by_length, (room, 1)) - 1
        return None if index < 0 else -self._by_length[index][1]

    def _take(self, age: int) -> _Rendered:
        _, rendered = self._waiting.pop(age)
        key = (len(rendered.ids), -age)
        self._by_length.pop(bisect.bisect_left(self._by_length, key))
        return rendered

    def _enter(self, age: int, index: int, rendered: _Rendered) -> None:
        self._waiting[age] = (index, rendered)
        bisect.insort(self._by_length, (len(rendered.ids), -age))

    def _read_more(self) -> None:
        """Read until `WAITING` conversations wait, or as many as one pass has."""
        wanted = min(WAITING, len(self._order))
        in_vain, patience = 0, 1000 + 2 * len(self._source.task)
        while len(self._waiting) < wanted:
            if self._read == len(self._order):
                self._epoch, self._read = self._epoch + 1, 0
                self._order = self._source.order(self._number, self._epoch)
            in_vain = 0 if self._read_one(int(self._order[self._read])) else in_vain + 1
            self._read += 1
            if in_vain > patience:
                raise ValueError(
                    f"{self._source.task.name}: {in_vain:,} conversations in a row have nothing "
                    f"to learn within {self._source.capacity} tokens; use a longer sequence_len, "
                    "or conversations with assistant messages"
                )

    def _read_one(self, index: int) -> bool:
        """Whether the conversation waits now; otherwise it is counted as dropped."""
        counts = self._counts
        counts["conversations"] += 1
        try:
            rendered = self._source.read(index)
        except ValueError as error:
            self._source.warn(index, error)
            counts["malformed"] += 1
            counts["dropped"] += 1
            return False
        if rendered is None:
            counts["dropped"] += 1
            return False
        counts["truncated"] += rendered.truncated
        self._enter(self._entered, index, rendered)
        self._entered += 1
        return True

"""Conversations to packed rows: whole conversations, best fit, padding that does not count.

A row starts with the conversation that has waited longest and is filled with the largest waiting
ones that fit; what is left is padding. So nothing waits forever (upstream's packer keeps what is
longer than a row until its buffer holds nothing else, and the loss becomes NaN):

- a conversation longer than a row is truncated to the row: its beginning is learnt from;
- one with nothing to learn (left), or that is malformed, is dropped;
- both are counted, and every row has at least one supervised token.

Targets are `IGNORE` on everything that is not supervised and on padding. Left out: batches,
processes and resuming (chat_loader.py).
"""

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from jaxchat.backend import IGNORE
from jaxchat.conversation import render
from jaxchat.dataloader import NUM_STREAMS
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

    @classmethod
    def total(cls, counts: Iterable[Mapping[str, int]]) -> Self:
        """The sums of what several streams have counted."""
        each = list(counts)
        return cls(**{name: sum(count[name] for count in each) for name in cls.names()})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(cls.__dataclass_fields__)

    def shares(self) -> dict[str, float]:
        """The shares to log: of conversations, and of tokens."""
        read, tokens = max(1, self.conversations), max(1, self.tokens)
        return {
            "data/truncated": self.truncated / read,
            "data/dropped": self.dropped / read,
            "data/padding": self.padding / tokens,
            "data/supervised": self.supervised / tokens,
        }


class Rendered(NamedTuple):
    """A conversation as it goes into a row."""

    ids: np.ndarray
    mask: np.ndarray
    truncated: bool


class Place(NamedTuple):
    """A stream's position: pass, conversations of the pass read, what waits, and the counts."""

    epoch: int
    read: int
    entered: int
    waiting: list[tuple[int, int]]
    """Age and index of each, oldest first."""
    counts: dict[str, int]


class Source:
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

    def read(self, index: int) -> Rendered | None:
        """A conversation that fits a row and teaches something, or None; malformed: ValueError."""
        ids, mask = render(self.tokenizer, self.task[index])
        rendered = Rendered(
            np.array(ids[: self.capacity], np.int32),
            np.array(mask[: self.capacity], bool),
            len(ids) > self.capacity,
        )
        return rendered if rendered.mask[1:].any() else None

    def warn(self, index: int, error: ValueError) -> None:
        if self.warnings:
            self.warnings -= 1
            more = "" if self.warnings else " (more of them are only counted, in data/dropped)"
            print0(f"warning: {self.task.locate(index)} is left out: {error}{more}")


class Stream:
    """One logical stream: a cursor over its conversations, and those that wait for a row."""

    def __init__(self, source: Source, number: int, place: Mapping[str, Any] | None) -> None:
        self._source, self._number = source, number
        self._epoch = self._read = self._entered = 0
        self._counts = dict.fromkeys(PackingStats.names(), 0)
        self._waiting: dict[int, tuple[int, Rendered]] = {}
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

    def place(self) -> Place:
        waiting = [(age, index) for age, (index, _) in self._waiting.items()]
        return Place(self._epoch, self._read, self._entered, waiting, dict(self._counts))

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

    def _take(self, age: int) -> Rendered:
        _, rendered = self._waiting.pop(age)
        key = (len(rendered.ids), -age)
        self._by_length.pop(bisect.bisect_left(self._by_length, key))
        return rendered

    def _enter(self, age: int, index: int, rendered: Rendered) -> None:
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


class Forecast(NamedTuple):
    """What one pass over conversations will come to, from a sample of them."""

    rows: float
    """About how many it fills."""
    conversations: int
    sampled: int
    """Looked at; all of them where there are few."""
    unanswered: int
    """Of those, without a reply within a row: left out."""
    truncated: int
    """Of those, longer than a row: their end is cut off."""
    sequence_len: int

    def misfits(self) -> str | None:
        """In one line what becomes of those that do not fit; None where all do."""
        about = "about " if self.sampled < self.conversations else ""
        fates = {"left out (no reply within it)": self.unanswered, "cut": self.truncated}
        told = [
            f"{about}{round(count * self.conversations / self.sampled):,} {fate}"
            for fate, count in fates.items()
            if count
        ]
        if not told:
            return None
        return (
            f"context of {self.sequence_len:,} tokens: of {self.conversations:,} conversations "
            f"{', '.join(told)}"
        )


def forecast(
    conversations: Task, tokenizer: Tokenizer, *, sequence_len: int, sample: int = 2000
) -> Forecast:
    """Read up to `sample` of the conversations; malformed ones are left to the loader to tell."""
    chosen = conversations.shuffled(0)[:sample]
    source = Source(chosen, tokenizer, sequence_len + 1, 0)
    tokens = unanswered = truncated = 0
    for index in range(len(chosen)):
        try:
            rendered = source.read(index)
        except ValueError:
            continue
        if rendered is None:
            unanswered += 1
            continue
        tokens += len(rendered.ids)
        truncated += rendered.truncated
    packed = 0.97 * (sequence_len + 1)  # what best fit usually fills (tests/test_chat_loader.py)
    rows = tokens / packed * len(conversations) / len(chosen)
    return Forecast(rows, len(conversations), len(chosen), unanswered, truncated, sequence_len)

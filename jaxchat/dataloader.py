"""Documents to packed rows: best fit, no padding, and a state that resumes exactly.

Every row starts with bos. It is filled with the largest document of a buffer that still fits;
when none does, the shortest is cropped to fill it, and what is cut off is counted. Rows come from a
fixed number of logical streams in turn: row r of a run is stream r mod `NUM_STREAMS`'s next, so the
order depends on seed, corpus and tokenizer alone, never on how many devices or processes read it. A
process owns whole streams and reads only those.

Where the corpus `keeps_all`, a document longer than a row is several parts, a row begins with the
part that has waited longest, what is cut off waits as a part of its own, and a stream's pass is
handed out to its end before the next begins: after it, every token has been in a row.

The state holds addresses, not tokens: each stream's place in the corpus and the documents waiting
in its buffer, which are read again on resume. Left out: supervision masks (conversation.py).
"""

import bisect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxchat.dataset import Corpus
from jaxchat.prefetch import Prefetcher

NUM_STREAMS = 8
"""Logical streams; a number of processes that divides it can share a run."""

BUFFER_DOCS = 1000
"""Documents a stream chooses from."""

REFILL_DOCS = 64
"""Documents read beyond that at a time."""


class Encoder(Protocol):
    """What the loader needs of a tokenizer."""

    @property
    def bos_id(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...


class Batch(NamedTuple):
    """Rows of token ids, and the same rows one token later."""

    inputs: np.ndarray
    """(B, T) int32."""
    targets: np.ndarray
    """(B, T) int32; negative where nothing is to be learned."""
    weights: np.ndarray | None = None
    """(B, T) float32, how much each target counts; None where all count alike."""
    figures: Mapping[str, float] = {}
    """What the loader measured on the way, by metric name."""


class Address(NamedTuple):
    """A document's place in its corpus, or that of a part of it."""

    shard: int
    group: int
    row: int
    start: int = 0
    """Tokens of the document before the part."""


class PackedLoader(Prefetcher[Batch]):
    """An endless iterator of batches; close it, or use it as a context manager."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Encoder,
        *,
        split: str,
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
        other data, or when sizes do not divide. `gather` brings the JSON values of all processes to
        each, for `state()`.
        """
        if process_count > 1 and (NUM_STREAMS % process_count or rows_per_batch % NUM_STREAMS):
            raise ValueError(
                f"{process_count} processes must divide the {NUM_STREAMS} data streams, and "
                f"these the {rows_per_batch} rows of a batch; choose sizes that do"
            )
        if rows_per_batch < 1 or sequence_len < 1:
            raise ValueError(f"{rows_per_batch=} and {sequence_len=} must be at least 1")
        self._identity = {
            "corpus": corpus.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "split": split,
            "sequence_len": sequence_len,
            "seed": seed,
        }
        if state is not None:
            check_identity(self._identity, state["identity"])
        owned = [s for s in range(NUM_STREAMS) if s % process_count == process_index]
        reader = _Reader(corpus, split, tokenizer)
        self._pass_size = max(reader.documents, NUM_STREAMS) * len(owned) / NUM_STREAMS
        saved = {} if state is None else state["streams"]
        length = sequence_len + 1
        self._streams = {s: _Stream(reader, s, seed, length, saved.get(str(s))) for s in owned}
        self._gather, self._rows_per_batch = gather, rows_per_batch
        self._rows = 0 if state is None else state["rows"]
        self._start()

    @property
    def passes(self) -> float:
        """How often the split has been handed out: documents begun in rows over those there are."""
        _, streams = self.position
        used = (s.entered - sum(not a.start for *_, a in s.buffer) for s in streams.values())
        return sum(used) / self._pass_size

    @property
    def cropped_share(self) -> float:
        """Share of the tokens read so far that was cut off to fill rows."""
        streams = self._own_state()["streams"].values()
        cut, kept = (sum(s[name] for s in streams) for name in ("cropped", "kept"))
        return cut / max(1, cut + kept)

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
            "streams": {str(s): _describe(place) for s, place in streams.items()},
        }

    def _position(self) -> tuple[int, dict[int, "_Place"]]:
        return self._rows, {s: stream.place() for s, stream in self._streams.items()}

    def _make(self) -> Batch:
        numbers = range(self._rows, self._rows + self._rows_per_batch)
        mine = [r % NUM_STREAMS for r in numbers if r % NUM_STREAMS in self._streams]
        rows = np.stack([self._streams[s].next_row() for s in mine])
        self._rows += self._rows_per_batch
        return Batch(rows[:, :-1].copy(), rows[:, 1:].copy())


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of the states that the processes of a run took at the same step."""
    merged = dict(states[0])
    merged["streams"] = {
        name: place for state in states for name, place in state["streams"].items()
    }
    return merged


def check_identity(here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise when a loader's state was taken on other data."""
    differing = [f"{n} {saved.get(n)}, now {here[n]}" for n in here if saved.get(n) != here[n]]
    if differing:
        raise ValueError(
            "the data of this run is not that of its checkpoint: "
            + "; ".join(differing)
            + "; restore it, or start over with --resume never"
        )


class _Place(NamedTuple):
    """A stream's position: pass, group of the pass, document of the group, buffer, and counts."""

    epoch: int
    group: int
    doc: int
    entered: int
    kept: int
    cropped: int
    buffer: tuple[tuple[int, int, Address], ...]


def _describe(place: _Place) -> dict[str, Any]:
    record = place._asdict()
    record["buffer"] = [[-order, *address] for _, order, address in place.buffer]
    return record


class _Reader:
    """Groups of documents, and the order of one pass over them."""

    def __init__(self, corpus: Corpus, split: str, tokenizer: Encoder) -> None:
        self.corpus, self.split, self.tokenizer = corpus, split, tokenizer
        self.groups = corpus.groups(split)
        self.documents = sum(count for _, _, count in self.groups)
        if not self.documents:
            raise ValueError(f"corpus {corpus.name} has no documents in split {split!r}")
        # few groups cannot be dealt to the streams evenly: then every group's documents are
        self._deals_groups = len(self.groups) >= 4 * NUM_STREAMS
        self._parts = min(NUM_STREAMS, self.documents)
        counts = [count for _, _, count in self.groups]
        self._offsets = {
            g[:2]: o for g, o in zip(self.groups, np.cumsum([0, *counts]), strict=False)
        }
        self.texts = lru_cache(maxsize=2 * NUM_STREAMS)(self._texts)

    def _texts(self, shard: int, group: int) -> list[str]:
        return self.corpus.read_group(self.split, shard, group)

    def order(self, stream: int, seed: int, epoch: int) -> list[tuple[int, int, int]]:
        """The groups of one pass for one stream."""
        shuffled = np.random.default_rng([seed, epoch]).permutation(len(self.groups))
        dealt = shuffled[stream::NUM_STREAMS] if self._deals_groups else shuffled
        return [self.groups[i] for i in dealt]

    def rows(self, stream: int, seed: int, epoch: int, group: tuple[int, int, int]) -> np.ndarray:
        """The documents of a group that are the stream's, in the order of this pass.

        Documents are dealt in turn across groups, so every stream has some; of fewer documents
        than streams, several streams read the same one.
        """
        shard, number, count = group
        shuffled = np.random.default_rng([seed, epoch, shard, number]).permutation(count)
        if self._deals_groups:
            return shuffled
        return shuffled[(stream - self._offsets[shard, number]) % self._parts :: self._parts]

    def tokens(self, addresses: Sequence[Address]) -> list[np.ndarray]:
        """Of each address's document, (n,) int32."""
        documents = sorted({address[:3] for address in addresses})  # every group once
        texts = [self.texts(shard, group)[row] for shard, group, row in documents]
        encoded = [ids.astype(np.int32) for ids in self.tokenizer.encode_batch(texts)]
        found = dict(zip(documents, encoded, strict=True))
        return [found[address[:3]] for address in addresses]


class _Stream:
    """One logical stream: a cursor over its documents and the buffer that rows are packed from."""

    def __init__(
        self,
        reader: _Reader,
        number: int,
        seed: int,
        length: int,
        place: Mapping[str, Any] | None,
    ) -> None:
        """Rows are `length` tokens long."""
        self._reader, self._number, self._seed, self._length = reader, number, seed, length
        self._bos = np.array([reader.tokenizer.bos_id], np.int32)
        self._keeps_all = reader.corpus.keeps_all
        self._part = length - 1 if self._keeps_all else sys.maxsize
        """Most tokens of a document that are taken together."""
        share = -(-reader.documents // NUM_STREAMS)
        self._capacity = min(BUFFER_DOCS, max(1, share // 2))
        self._epoch, self._group, self._doc = (
            (0, 0, 0) if place is None else (place["epoch"], place["group"], place["doc"])
        )
        self._order = reader.order(number, seed, self._epoch)
        self._entered = 0 if place is None else place["entered"]
        self._kept, self._cropped = (0, 0) if place is None else (place["kept"], place["cropped"])
        self._keys: list[tuple[int, int, Address]] = []
        self._ages: list[tuple[int, int]] = []
        self._tokens: dict[tuple[int, int], np.ndarray] = {}
        if place is not None:
            waiting = [(order, Address(*where)) for order, *where in place["buffer"]]
            documents = reader.tokens([address for _, address in waiting])
            for (order, address), ids in zip(waiting, documents, strict=True):
                self._enter(order, address, ids)

    def place(self) -> _Place:
        return _Place(
            self._epoch,
            self._group,
            self._doc,
            self._entered,
            self._kept,
            self._cropped,
            tuple(self._keys),
        )

    def next_row(self) -> np.ndarray:
        """The next row, (length,) int32."""
        length = self._length
        row, filled = np.empty(length, np.int32), 0
        while filled < length:
            if len(self._keys) < self._capacity:
                self._read_more()
            room = length - filled
            begins = self._keeps_all and not filled
            order, address, tokens = self._take(self._oldest() if begins else self._fitting(room))
            taken, rest = tokens[:room], tokens[room:]
            row[filled : filled + len(taken)] = taken
            filled += len(taken)
            self._kept += len(taken)
            if self._keeps_all and len(rest):
                behind = address._replace(start=address.start + len(taken) - 1)
                self._wait(order, behind, np.concatenate([self._bos, rest]))
            else:
                self._cropped += len(rest)
        return row

    def _oldest(self) -> int:
        """The index of what has waited longest."""
        order, start = self._ages[0]
        return bisect.bisect_left(self._keys, (len(self._tokens[order, start]), -order))

    def _fitting(self, room: int) -> int:
        """The index of the largest that fits, the oldest of equals; else of the shortest."""
        end = bisect.bisect_right(self._keys, (room, 1))
        return bisect.bisect_left(self._keys, self._keys[end - 1][:2]) if end else 0

    def _take(self, index: int) -> tuple[int, Address, np.ndarray]:
        """Its order, its address and its tokens, which no longer wait."""
        _, order, address = self._keys.pop(index)
        age = (-order, address.start)
        self._ages.pop(bisect.bisect_left(self._ages, age))
        return -order, address, self._tokens.pop(age)

    def _read_more(self) -> None:
        """Fill the buffer, and a little over, so that documents are encoded many at a time.

        Of texts of one's own no further than to the end of the pass, unless nothing waits.
        """
        arrivals: list[tuple[int, Address]] = []
        target = self._capacity + REFILL_DOCS
        while len(self._keys) + len(arrivals) < target:
            if self._group >= len(self._order):
                if self._keeps_all and (arrivals or self._keys):
                    break
                self._epoch, self._group, self._doc = self._epoch + 1, 0, 0
                self._order = self._reader.order(self._number, self._seed, self._epoch)
                continue
            where = self._order[self._group]
            rows = self._reader.rows(self._number, self._seed, self._epoch, where)
            wanted = target - len(self._keys) - len(arrivals)
            for row in rows[self._doc : self._doc + wanted]:
                arrivals.append((self._entered, Address(*where[:2], int(row))))
                self._entered += 1
            self._doc += wanted
            if self._doc >= len(rows):
                self._group, self._doc = self._group + 1, 0
        documents = self._reader.tokens([address for _, address in arrivals])
        for (order, address), ids in zip(arrivals, documents, strict=True):
            for start in range(0, max(1, len(ids)), self._part):
                self._enter(order, address._replace(start=start), ids)

    def _enter(self, order: int, address: Address, ids: np.ndarray) -> None:
        """Let bos and the tokens from `address` to the end of its part wait."""
        end = (address.start // self._part + 1) * self._part
        self._wait(order, address, np.concatenate([self._bos, ids[address.start : end]]))

    def _wait(self, order: int, address: Address, tokens: np.ndarray) -> None:
        bisect.insort(self._keys, (len(tokens), -order, address))
        bisect.insort(self._ages, (order, address.start))
        self._tokens[order, address.start] = tokens

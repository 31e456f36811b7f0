"""Batches made ahead of time, on a thread.

A loader says how to make the next item and where it then stands; this class makes a few of them
while the device is busy, hands each out together with its position, and raises in the reader what
went wrong in the thread. Left out: everything about data.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, Self, TypeVar

ItemT = TypeVar("ItemT")

AHEAD = 4
"""Items that wait ready."""


class Prefetcher(ABC, Generic[ItemT]):
    """An endless iterator; close it, or use it as a context manager.

    Subclasses implement `_make` and `_position`, which run on the thread alone once `_start` has
    been called.
    """

    position: Any
    """Where the items handed out so far end."""

    @abstractmethod
    def _make(self) -> ItemT: ...

    @abstractmethod
    def _position(self) -> Any: ...

    def _start(self) -> None:
        self.position = self._position()
        self._queue: queue.Queue = queue.Queue(maxsize=AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[ItemT]:
        return self

    def __next__(self) -> ItemT:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        made, self.position = item
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop.set()
        while self._thread.is_alive():
            _drain(self._queue)
            self._thread.join(timeout=0.01)

    def _produce(self) -> None:
        try:
            while not self._stop.is_set():
                made = self._make()
                self._put((made, self._position()))
        except BaseException as error:  # raised again by the reader of the queue
            self._put(error)

    def _put(self, item: object) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return


def _drain(waiting: queue.Queue) -> None:
    while True:
        try:
            waiting.get_nowait()
        except queue.Empty:
            return

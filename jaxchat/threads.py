"""Threads for work that waits on a network, and that an interrupt ends."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event


@contextmanager
def stoppable(pool: ThreadPoolExecutor) -> Iterator[tuple[ThreadPoolExecutor, Event]]:
    """A pool that an interrupt empties; its threads look at the event, which is then set."""
    stop = Event()
    with pool:
        try:
            yield pool, stop
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

"""Threads for work that waits on a network, and that an interrupt ends."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

PoolT = TypeVar("PoolT", bound=Executor)
"""A kind of pool."""


@contextmanager
def stoppable(pool: PoolT) -> Iterator[tuple[PoolT, Event]]:
    """A pool that an interrupt empties; its threads look at the event, which is then set."""
    stop = Event()
    with pool:
        try:
            yield pool, stop
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class AbandonedPool(Executor):
    """For requests that cannot be told to stop: nobody ever waits for its threads.

    The interpreter waits at its exit for those of ThreadPoolExecutor, even after
    `shutdown(wait=False)`, so that an interrupt would last as long as the slowest answer. What a
    thread does must therefore be of no worth unless its future is read.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._threads: list[Thread] = []
        self._jobs: SimpleQueue[tuple[Future, Callable[[], Any]] | None] = SimpleQueue()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Have it done by one of the threads, first come, first served."""
        future = Future()
        self._jobs.put((future, partial(fn, *args, **kwargs)))
        if len(self._threads) < self._workers:
            self._threads.append(Thread(target=self._work, daemon=True))
            self._threads[-1].start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end when nothing is left to do; returns at once, whatever `wait` is."""
        while cancel_futures:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                break
            if job:
                job[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            future, call = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # as ThreadPoolExecutor: it belongs to the future
                    future.set_exception(error)

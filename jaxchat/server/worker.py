"""An engine in a thread of its own, and streams of its events for an event loop.

The one idea: two queues. The loop puts commands into one and the thread takes them between two
steps, so a request joins, and one whose client has left goes, within one dispatch; the thread hands
the events of a step over in one call. Everything that touches the engine runs in the thread. A step
that fails ends what it took down, and the engine starts over; an engine that fails again and again
is given up. Left out: which of several workers, and what clients read (pool.py, chat.py).
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from jaxchat.backend import PromptScores
from jaxchat.engine import Engine
from jaxchat.request import Event, Request

log = logging.getLogger("jaxchat.server")

ATTEMPTS, PAUSE_S = 3, 0.5
"""To start a failed engine over before it is given up, and the growing pause between two."""


class EngineFailed(Exception):
    """The backend failed while it worked on this request."""


class Stream:
    """The events of one request; `close` frees its slots."""

    def __init__(self, worker: "Worker", request: Request) -> None:
        self.worker, self.request = worker, request
        self.number: int | None = None
        """The engine's name for it; only the thread looks at it."""
        self.left = request.n
        """Samples that the thread has not seen end."""
        self._under_way = request.n
        """Samples that count as load: their ends have not come, read or not."""
        self._batches: asyncio.Queue[Sequence[Event] | EngineFailed] = asyncio.Queue()

    async def batches(self) -> AsyncIterator[Sequence[Event]]:
        """Events as they come, those of one step together. EngineFailed when there are no more."""
        unread = self.request.n
        while unread:
            batch = await self._batches.get()
            if isinstance(batch, EngineFailed):
                raise batch
            ended = [event.finish_reason for event in batch if event.finish_reason]
            unread -= len(ended)
            if "error" in ended:
                self.close()
                raise EngineFailed("the engine failed while it wrote this reply")
            yield batch

    def close(self) -> None:
        """Give up what is still to come; the slots are free before the next dispatch."""
        if self._under_way:
            self._count_ends(self._under_way)
            self.worker.cancel(self)

    def put(self, batch: Sequence[Event] | EngineFailed) -> None:
        """Take in what the thread has to tell, which counts from now on, read or not."""
        self._batches.put_nowait(batch)
        failed = isinstance(batch, EngineFailed)
        ends = self.request.n if failed else sum(bool(event.finish_reason) for event in batch)
        self._count_ends(min(ends, self._under_way))  # none is left once it has been closed

    def _count_ends(self, samples: int) -> None:
        self._under_way -= samples
        self.worker.load -= samples


class Worker:
    """One engine, its thread, and how much it has to do."""

    def __init__(self, engine: Engine, *, name: str) -> None:
        self.engine, self.name = engine, name
        self.load = 0
        """Samples under way or waiting; the event loop's count."""
        self.warm, self.failed = False, False
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._scores: deque[Callable[[], None]] = deque()
        self._streams: dict[int, Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # --- called by the event loop --------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread after its present step."""
        self._commands.put(None)
        self._thread.join(timeout_s)

    @property
    def available(self) -> bool:
        return self.warm and not self.failed and self._thread.is_alive()

    def submit(self, request: Request) -> Stream:
        """Start a request that `engine.check` has accepted."""
        stream = Stream(self, request)
        self.load += request.n
        self._commands.put(lambda: self._submit(stream))
        return stream

    def cancel(self, stream: Stream) -> None:
        self._commands.put(lambda: self._cancel(stream))

    async def score_prompt(self, ids: Sequence[int]) -> PromptScores:
        """Scores of a text that `engine.check` has accepted; EngineFailed when it fails."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[PromptScores] = loop.create_future()

        def settle(result: PromptScores | EngineFailed) -> None:
            if answer.done():  # its client has left
                return
            if isinstance(result, EngineFailed):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        def score() -> None:
            if answer.cancelled():
                return
            try:
                scores = self.engine.score_prompt(ids)
            except Exception:  # whatever a backend raises; the client is told that it failed
                log.exception("%s failed to score a prompt", self.name)
                self._call(settle, EngineFailed("the engine failed to score this prompt"))
            else:
                self._call(settle, scores)

        self._commands.put(lambda: self._scores.append(score))
        self.load += 1
        try:
            return await answer
        finally:
            self.load -= 1

    # --- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.engine.warm_up()
        except Exception:  # the server stays up and says that it is not ready
            log.exception("%s failed to warm up", self.name)
            self.failed = True
        else:
            log.info("%s is ready", self.name)
        self.warm = True
        while self._take_commands():
            if self._scores:  # one between two steps: nobody's reply stalls for a list of prompts
                self._scores.popleft()()
            if self.engine.busy and not self.failed:
                self._step()

    def _take_commands(self) -> bool:
        """Carry out what has been asked for, waiting when there is nothing to do; False ends."""
        block = not self._scores and (self.failed or not self.engine.busy)
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _submit(self, stream: Stream) -> None:
        if self.failed:
            self._call(stream.put, EngineFailed("the engine has been given up"))
            return
        stream.number = self.engine.submit(stream.request)
        self._streams[stream.number] = stream

    def _cancel(self, stream: Stream) -> None:
        if stream.number is not None and self._streams.pop(stream.number, None):
            self.engine.cancel(stream.number)

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception:  # whatever a backend raises; requests are told, the server goes on
            log.exception("a step of %s failed", self.name)
            events = self._recover()
        self._deliver(events)

    def _recover(self) -> list[Event]:
        """The ends of what the failure took down; gives the engine up when it stays broken."""
        ends: list[Event] = []
        for attempt in range(ATTEMPTS):
            time.sleep(PAUSE_S * attempt)
            try:
                ends += self.engine.reset()
                self.engine.probe()
            except Exception:  # no memory for a new cache, a lost device
                log.exception("%s failed to start over", self.name)
            else:
                return ends
        log.error("%s is given up", self.name)
        self.failed = True
        for stream in self._streams.values():
            self._call(stream.put, EngineFailed("the engine has been given up"))
        self._streams.clear()
        return []

    def _deliver(self, events: Sequence[Event]) -> None:
        batches: dict[int, list[Event]] = {}
        for event in events:
            batches.setdefault(event.request, []).append(event)
        for number, batch in batches.items():
            stream = self._streams.get(number)
            if stream is None:  # cancelled
                continue
            self._call(stream.put, batch)
            ended = sum(event.finish_reason is not None for event in batch)
            stream.left -= ended
            if not stream.left:
                del self._streams[number]

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """Call a function in the event loop, if that still runs."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # it has been closed
            self._loop.call_soon_threadsafe(function, *args)

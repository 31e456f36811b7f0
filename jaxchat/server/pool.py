"""All replicas: which one takes a request, and when none does."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence

from jaxchat.backend import PromptScores
from jaxchat.request import Event, Request
from jaxchat.server.deadlines import Deadlines
from jaxchat.server.errors import ApiError, stopping
from jaxchat.server.metrics import Metrics
from jaxchat.server.worker import EngineFailed, Worker

STOP_S = 30.0
"""How long a worker may take for its last step."""


class Pool:
    """Workers with the same model."""

    def __init__(
        self,
        workers: Sequence[Worker],
        metrics: Metrics,
        *,
        max_waiting: int,
        timeout_s: float,
        replying: Deadlines,
    ) -> None:
        """`replying`: of the replies under way."""
        self.workers, self.metrics, self._replying = workers, metrics, replying
        self.draining = False
        """Whether the server has been told to stop: what is under way ends, nothing begins."""
        self.reserved = 0
        """Replies that have been let in and that no worker counts yet."""
        self._max_waiting, self._timeout_s = max_waiting, timeout_s

    def start(self) -> None:
        """Warm all replicas up, each in its thread."""
        for worker in self.workers:
            worker.start(asyncio.get_running_loop())

    async def stop(self) -> None:
        """End the workers; one that compiles has nobody's reply and is not waited for."""
        self.draining = True
        stops = [
            asyncio.to_thread(worker.stop, STOP_S if worker.warm else 0.0)
            for worker in self.workers
        ]
        await asyncio.gather(*stops)

    @property
    def ready(self) -> bool:
        """Whether a request would be taken, were the queue empty."""
        return not self.draining and any(worker.available for worker in self.workers)

    def check_ready(self) -> None:
        """ApiError 503 before warm-up, while stopping, and when every engine has failed.

        Only the first has the code `starting`: whoever waits will be served.
        """
        if self.draining:
            raise stopping()
        if not any(worker.available for worker in self.workers):
            if all(worker.failed for worker in self.workers):
                message = "The server has failed and must be started again."
                raise ApiError(503, message, retry_after_s=10)
            raise ApiError(503, "The server is starting.", code="starting", retry_after_s=5)

    @property
    def most(self) -> int:
        """Replies that an idle server takes at once: those in slots and those that may wait."""
        return self._max_waiting + sum(worker.engine.slots for worker in self.workers)

    def reserve(self, replies: int) -> "Place":
        """Room for replies that begin soon.

        ApiError 503 when they cannot be taken now: not ready, or too many would wait.
        """
        self.check_ready()
        slots = sum(worker.engine.slots for worker in self.workers if worker.available)
        load = self.reserved + sum(worker.load for worker in self.workers)
        if load + replies > self._max_waiting + slots:
            waiting = max(0, load - slots)
            raise ApiError(
                503, f"The server is busy: {waiting} replies wait for a slot.", retry_after_s=2
            )
        return Place(self, replies, deadline=self._clock() + self._timeout_s)

    def check(self, request: Request) -> None:
        """ValueError for a request that an engine would refuse."""
        self.workers[0].engine.check(request)

    async def run(self, request: Request, place: "Place") -> AsyncGenerator[Sequence[Event], None]:
        """The events of one request, those of one step together, from the least busy replica.

        ApiError 500 when the engine fails, 503 when the request takes too long or the server
        stops. Closing the iterator frees the slots.
        """
        watch = self.metrics.watch(len(request.ids))
        stream = self._least_busy().submit(request)
        place.give_up(request.n)  # the worker counts them from here on
        batches = stream.batches()
        try:
            while True:
                left = place.deadline - self._clock()
                if self._replying.over or left <= 0:  # it may have passed while a client read
                    raise TimeoutError
                async with self._replying.limit(left):
                    batch = await anext(batches, None)
                if batch is None:
                    break
                watch.saw(batch)
                yield batch
        except TimeoutError:
            self.metrics.ended("timeout")
            raise self._too_late() from None
        except EngineFailed as error:
            self.metrics.ended("error")
            raise ApiError(500, f"Generation failed: {error}.") from error
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.ended("abort")
            raise
        finally:
            stream.close()

    async def score_prompt(self, ids: Sequence[int], place: "Place") -> PromptScores:
        """Log-probabilities of a prompt; errors as in `run`. The place is kept for what follows."""
        try:
            async with self._replying.limit(place.deadline - self._clock()):
                with place.lent():
                    return await self._least_busy().score_prompt(ids)
        except TimeoutError:
            raise self._too_late() from None
        except EngineFailed as error:
            raise ApiError(500, f"Scoring failed: {error}.") from error

    def _least_busy(self) -> Worker:
        available = [worker for worker in self.workers if worker.available]
        if not available:
            raise ApiError(503, "No engine is running.", retry_after_s=10)
        return min(available, key=lambda worker: worker.load)

    def _too_late(self) -> ApiError:
        if self._replying.over:
            return stopping()
        return ApiError(503, f"The request took longer than {self._timeout_s:g} s.", final=True)

    def _clock(self) -> float:
        return asyncio.get_running_loop().time()


class Place:
    """Room for the replies of one request between its admission and its start; close it at last."""

    def __init__(self, pool: Pool, replies: int, *, deadline: float) -> None:
        """`deadline`: when the request must be done, by the event loop's clock."""
        self._pool, self._replies, self.deadline = pool, replies, deadline
        pool.reserved += replies

    def give_up(self, replies: int) -> None:
        """So many need no room any more."""
        self._replies -= replies
        self._pool.reserved -= replies

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """While a worker counts one of them, which needs room again afterwards."""
        self.give_up(1)
        try:
            yield
        finally:
            self.give_up(-1)

    def close(self) -> None:
        self.give_up(self._replies)

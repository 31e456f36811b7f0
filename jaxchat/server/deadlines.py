"""Time limits that can be called in: how a stopping server ends what is under way.

Nothing is cancelled from outside: the work itself sees its time run out and tells its client.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Deadlines:
    """The time limits of one kind of work, in one event loop."""

    def __init__(self) -> None:
        self.over = False
        """Whether `end` has been called: no time is left for anything."""
        self._limits: set[asyncio.Timeout] = set()

    @contextlib.asynccontextmanager
    async def limit(self, seconds: float) -> AsyncIterator[None]:
        """`asyncio.timeout`, which `end` cuts short; TimeoutError either way.

        Not around a `yield` to somebody who may wait elsewhere when the time is over.
        """
        async with asyncio.timeout(0 if self.over else seconds) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)

    def end(self) -> None:
        """Let all limits run out now, those of work that is still to come as well."""
        self.over = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(now)

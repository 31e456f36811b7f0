"""Processes of one run that leave together: when one is gone, the others say so and exit.

A collective fails when a process is lost, but a barrier just waits, and JAX aborts it after its
heartbeat's 30 seconds without a word of what to do. So every process keeps a socket to the first
one open. However a process ends, its socket closes: the first process hears of it and lets go of
the others. Left out: hosts that fall silent without closing anything; those the heartbeat finds.
"""

import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from jaxchat.memory import ran_out_of_memory
from jaxchat.runtime import is_first_process, launch, process_index

EXIT_LOST = 75
"""Exit status after losing another process (EX_TEMPFAIL): try again."""

LAST_TO_LEAVE_SECONDS = 5
"""How much longer the first process stays: it hosts the coordinator, without which JAX aborts."""

CONNECT_SECONDS = 10
"""How long a process tries to reach the first one; without it, it has the heartbeat alone."""

GREETING_SECONDS = 2
"""How long a socket may stay silent before it is somebody else's."""

LOOK_SECONDS = 0.2
"""How often a watch that hears nothing looks whether it is over."""

GRACE_SECONDS = 2
"""How long a process that hears of a loss goes on: it may be about to fail for the same reason, of
which it can say more."""

BYE = b"."
"""What a process sends that leaves in good order."""

Gather = Callable[[Any], list[Any]]
"""`Backend.gather`."""

_leaving = threading.Lock()


@contextmanager
def exit_when_one_is_lost(processes: int, gather: Gather | None = None) -> Iterator[None]:
    """Exit with `EXIT_LOST` and the remedy when what runs inside loses another process.

    A collective then fails with a RuntimeError; of a run of one process it passes through, and
    so does one about memory that ran out. With
    `gather`, a collective that all processes enter here, they also watch each other meanwhile; one
    that leaves by an exception is lost to the others.
    """
    try:
        if processes == 1 or gather is None:
            yield
        else:
            with _watch(gather):
                yield
    except RuntimeError as error:
        if processes == 1 or ran_out_of_memory(error):
            raise
        _leave("".join(str(error).strip().splitlines()[-1:]))


def _leave(why: str) -> None:
    """Say what happened, once, and end this process from whatever thread."""
    with _leaving:  # for good: the other thread that comes here has nothing to add
        print(
            f"a process of this run is gone ({why}); stopping. Run the same command again to "
            "continue from the last checkpoint",
            flush=True,
        )
        if is_first_process():
            time.sleep(LAST_TO_LEAVE_SECONDS)
        os._exit(EXIT_LOST)  # an orderly exit would wait for the lost one


@contextmanager
def _watch(gather: Gather) -> Iterator[None]:
    listener, mine = None, None
    if is_first_process():
        listener = socket.create_server(("", 0))
        mine = {"host": _own_host(), "port": listener.getsockname()[1], "key": secrets.token_hex()}
    first = gather(mine)[0]
    watch = _Watch(first["key"].encode())
    if listener is not None:
        watch.listen(listener)
    else:
        watch.connect((first["host"], first["port"]))
    good = False
    watch.start()
    try:
        yield
        good = True
    finally:
        watch.end(good)


def _own_host() -> str:
    """The name by which the other processes reach this one."""
    started = launch()
    if started is not None and started.coordinator is not None:
        return started.coordinator.rsplit(":", 1)[0]
    return socket.getfqdn()


class _Watch:
    """The open sockets of one process: to the first one, or from all the others."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        """What shows that a socket is one of ours."""
        self._selector = selectors.DefaultSelector()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def listen(self, listener: socket.socket) -> None:
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def connect(self, address: tuple[str, int]) -> None:
        try:
            peer = socket.create_connection(address, timeout=CONNECT_SECONDS)
            peer.sendall(self._key + process_index().to_bytes(4))
        except OSError as error:
            print(f"cannot watch the first process at {address[0]}: {error}", flush=True)
            return
        self._selector.register(peer, selectors.EVENT_READ, self._hear(0))

    def start(self) -> None:
        """Watch until `end`."""
        self._thread.start()

    def end(self, good: bool) -> None:
        """Stop watching; the others hear whether it was in good order."""
        self._over.set()
        self._thread.join()
        self._close(good)

    def _run(self) -> None:
        while not self._over.is_set():
            for key, _ in self._selector.select(LOOK_SECONDS):
                key.data(key.fileobj)

    def _close(self, good: bool) -> None:
        for key in list(self._selector.get_map().values()):
            peer = key.fileobj
            assert isinstance(peer, socket.socket)
            if good and key.data != self._accept:
                with suppress(OSError):  # it may have left before us
                    peer.sendall(BYE)
            peer.close()

    def _accept(self, listener: socket.socket) -> None:
        peer, _ = listener.accept()
        peer.settimeout(GREETING_SECONDS)
        try:
            greeting = peer.recv(len(self._key) + 4, socket.MSG_WAITALL)
        except OSError:
            greeting = b""
        if not secrets.compare_digest(greeting[:-4], self._key):
            peer.close()  # somebody else's
            return
        index = int.from_bytes(greeting[-4:])
        self._selector.register(peer, selectors.EVENT_READ, self._hear(index))

    def _hear(self, index: int) -> Callable[[socket.socket], None]:
        def hear(peer: socket.socket) -> None:
            try:
                word = peer.recv(1)
            except OSError:
                word = b""
            self._selector.unregister(peer)
            peer.close()
            if word != BYE and not self._over.wait(GRACE_SECONDS):
                self._close(good=False)
                _leave(f"process {index} has ended")

        return hear

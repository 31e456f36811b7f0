"""Processes of one run that leave together: when one is gone, the others say so and exit.

A collective fails when a process is lost, but a barrier just waits, and JAX aborts it after its
heartbeat's 30 seconds without a word of what to do. So every process keeps a socket to the first
one open. However a process ends, its socket closes: the first process hears of it and tells the
others. One that leaves by an error of its own says so before, so that nobody tries again what would
fail again. Left out: hosts that fall silent without closing anything; those the heartbeat finds.
"""

import os
import re
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from jaxchat.memory import ran_out_of_memory
from jaxchat.runtime import is_first_process, launch, process_index

EXIT_LOST = 75
"""Exit status after losing another process (EX_TEMPFAIL): try again."""

EXIT_FAILED = 2
"""Exit status after an error of another process, as cli.py's after one of our own: do not."""

LAST_TO_LEAVE_SECONDS = 5
"""How much longer the first process stays: it hosts the coordinator, without which JAX aborts."""

CONNECT_SECONDS = 10
"""How long a process tries to reach the first one; without it, it has the heartbeat alone."""

GREETING_SECONDS = 2
"""How long a socket may stay silent before it is somebody else's."""

LOOK_SECONDS = 0.2
"""How often a watch that hears nothing looks whether it is over."""

GRACE_SECONDS = 2
"""How long a process that hears of another's end goes on, as it may be about to fail for the same
reason, of which it can say more; and how long one that fails listens for another's end."""

BYE, FAILED, GONE = b".", b"!", b"?"
"""How a process ended: in good order, by an error of its own, without a word."""

TRANSPORT = re.compile(
    r"(?i:\b(?:gloo|nccl)|\bconnection\b|\bsocket\b|\bbroken pipe\b|\bheartbeat|"
    r"\bcoordination service\b|\bbarrier timed out\b)|"
    r"\b(?:UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)\b|"
    r"\bCUDA_ERROR_(?:ECC|NVLINK)_UNCORRECTABLE\b"
)
"""What the RuntimeErrors of collectives and barriers say when another process is lost, or a GPU:
on another node the same command goes on."""

Gather = Callable[[Any], list[Any]]
"""`Backend.gather`."""

Serve = Callable[[socket.socket], None]
"""What a watch does with a socket that has something to read."""

_leaving = threading.Lock()


class News(NamedTuple):
    """That another process has ended."""

    word: bytes
    """`BYE`, `FAILED` or `GONE`."""
    process: int

    def pack(self) -> bytes:
        return self.word + self.process.to_bytes(4)


@contextmanager
def exit_when_one_is_lost(processes: int, gather: Gather | None = None) -> Iterator[None]:
    """Exit with `EXIT_LOST` and the remedy when what runs inside loses another process.

    A collective then fails with a RuntimeError. One about something else passes through, and so
    does any of a run of one process. With `gather`, a collective that all processes enter here,
    they also watch each other meanwhile: where one leaves by an error of its own, the others exit
    with `EXIT_FAILED`.
    """
    if processes == 1:
        yield
        return
    watch, word, why, status = None, GONE, "", None
    try:
        watch = None if gather is None else _start_watch(gather)
        yield
        word = BYE
    except Exception as error:
        wait = GRACE_SECONDS if isinstance(error, RuntimeError) else 0
        news = None if watch is None else watch.news(wait)
        status = exit_status(error, news)
        if status is None:
            word = FAILED
            raise
        why = "".join(str(error).strip().splitlines()[-1:]) if news is None else _describe(news)
    finally:
        if watch is not None:
            watch.end(word)
    if status is not None:
        _leave(why, status)


def exit_status(error: Exception, news: News | None) -> int | None:
    """How to exit when `error` is due to another process; None when it is this one's own."""
    if not isinstance(error, RuntimeError) or ran_out_of_memory(error):
        return None
    if is_about_transport(error):
        return EXIT_LOST if news is None else _status_after(news)
    return EXIT_LOST if news is not None and news.word == GONE else None


def is_about_transport(error: RuntimeError) -> bool:
    """Whether a collective or a barrier failed, and not the program that called it."""
    bugs = (NotImplementedError, RecursionError)
    return not isinstance(error, bugs) and TRANSPORT.search(str(error)) is not None


def _status_after(news: News) -> int:
    return EXIT_FAILED if news.word == FAILED else EXIT_LOST


def _describe(news: News) -> str:
    return f"process {news.process} has {'failed' if news.word == FAILED else 'ended'}"


def _leave(why: str, status: int) -> None:
    """Say what happened, once, and end this process from whatever thread."""
    what, remedy = {
        EXIT_LOST: (
            "a process of this run is gone",
            "Run the same command again to continue from the last checkpoint",
        ),
        EXIT_FAILED: (
            "a process of this run has met an error",
            "It says which; the same command would meet it again",
        ),
    }[status]
    with _leaving:  # for good: the other thread that comes here has nothing to add
        print(f"{what} ({why}); stopping. {remedy}", flush=True)
        if is_first_process():
            time.sleep(LAST_TO_LEAVE_SECONDS)
        os._exit(status)  # an orderly exit would wait for the lost one


def _start_watch(gather: Gather) -> "_Watch":
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
    watch.start()
    return watch


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
        self._heard = threading.Event()
        self._news: News | None = None
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

    def news(self, wait_seconds: float) -> News | None:
        """Of the first process that has not ended in good order, should there be one by then."""
        self._heard.wait(wait_seconds)
        return self._news

    def end(self, word: bytes) -> None:
        """Stop watching; the others hear how this process ended."""
        self._over.set()
        self._thread.join()
        self._tell(News(word, process_index()))
        for peer, _ in self._sockets():
            self._forget(peer)

    def _run(self) -> None:
        while not self._over.is_set():
            for key, _ in self._selector.select(LOOK_SECONDS):
                key.data(key.fileobj)

    def _tell(self, news: News) -> None:
        for peer, serve in self._sockets():
            if serve != self._accept:
                with suppress(OSError):  # it may have left before us
                    peer.sendall(news.pack())

    def _sockets(self) -> list[tuple[socket.socket, Serve]]:
        keys = self._selector.get_map().values()
        return [(key.fileobj, key.data) for key in keys if isinstance(key.fileobj, socket.socket)]

    def _forget(self, peer: socket.socket) -> None:
        self._selector.unregister(peer)
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

    def _hear(self, index: int) -> Serve:
        def hear(peer: socket.socket) -> None:
            try:
                said = peer.recv(len(GONE) + 4, socket.MSG_WAITALL)
            except OSError:
                said = b""
            self._forget(peer)
            news = News(said[:1], int.from_bytes(said[1:])) if said else News(GONE, index)
            if news.word == BYE:
                return
            self._news = news
            self._heard.set()
            self._tell(news)
            if not self._over.wait(GRACE_SECONDS):
                _leave(_describe(news), _status_after(news))

        return hear

"""The command line: one frozen dataclass in, one call of `main` out.

Every script declares its options as a dataclass whose attribute docstrings become `--help`, and
ends in `cli.run(main, Config)`. What a user can get wrong (`ValueError`, `OSError`) is printed as
one message without a traceback and exits with status 2; everything else is our own bug and keeps
its traceback. This is the only module that knows tyro.
"""

import errno
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import tyro

from jaxchat.memory import LESS_MEMORY, ran_out_of_memory

ConfigT = TypeVar("ConfigT")

EXIT_BROKEN_PIPE = 128 + 13
"""As a program that SIGPIPE ends."""

EXIT_INTERRUPT = 128 + 2
"""As a program that SIGINT ends."""

AGAIN_S = 0.1
"""After which a Ctrl-C that was dropped comes again."""

NO_SPACE = ": make room, or let JAXCHAT_BASE_DIR name a larger disk; what is finished is kept"

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls but newline and tab, what turns the direction of writing, and what cannot be encoded.
`str.isprintable` denies more, of which text is made: what joins emoji, and the newest of them."""

arg = tyro.conf.arg
"""Annotate a field with a short flag: `Annotated[str, cli.arg(aliases=["-p"])]`."""

Positional = tyro.conf.Positional
"""Annotate a field that is given without a flag: `cli.Positional[Path]`."""

repeatable = tyro.conf.UseAppendAction
"""Annotate a tuple whose flag may be given several times: `-a ONE -a TWO`."""


def parse(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Build `config_class` from command-line words (`sys.argv` when None).

    Dashes and underscores are interchangeable in flag names. Exits with status 2 and the nearest
    flag on a word it does not know.
    """
    module = sys.modules[config_class.__module__]
    name = (module.__spec__.name if module.__spec__ else None) or config_class.__module__
    return tyro.cli(
        config_class,
        prog=f"python -m {name}",
        description=module.__doc__,
        args=argv,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def run(main: Callable[[ConfigT], None], config_class: type[ConfigT]) -> None:
    """Parse the command line, call `main`, and turn a user's mistake into one clear message."""
    config = parse(config_class)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see scripts/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _no_interrupt_is_lost():
            main(config)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(EXIT_BROKEN_PIPE)
        if os.environ.get("JAXCHAT_TRACEBACK"):
            raise
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        print(f"error: {printable(str(error))}{NO_SPACE if full else ''}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error) or os.environ.get("JAXCHAT_TRACEBACK"):
            raise
        print(f"error: memory ran out: {printable(str(error))}\n{LESS_MEMORY}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        # at once: what XLA still computes for an interpreter that ends as usual crashes it
        os._exit(EXIT_INTERRUPT)


def printable(text: str) -> str:
    """Somebody else's words, with nothing in them that drives a terminal."""
    return UNPRINTABLE.sub("\ufffd", text)


@contextmanager
def _no_interrupt_is_lost() -> Iterator[None]:
    """Python drops a Ctrl-C that comes in a callback, such as JAX's after a garbage collection."""
    before = sys.unraisablehook

    def again(dropped: "sys.UnraisableHookArgs") -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident
            assert main is not None
            threading.Timer(AGAIN_S, signal.pthread_kill, [main, signal.SIGINT]).start()
        else:
            before(dropped)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _nobody_reads() -> bool:
    """Whether the reader of stdout has gone, as in `... | head`; what is left is said to nobody."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)  # errors are told without being asked for
    gone = bool(watched.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone

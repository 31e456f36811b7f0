"""Code that a model wrote, run where it can do no harm.

Two sandboxes, one question: does this program run to its end? `monty` (default) is an interpreter
for a subset of Python, written in Rust, in a worker process: it has no file system, no network, no
processes, and limits time, memory and recursion itself. `bubblewrap` is CPython in empty Linux
namespaces: nothing writable, no network, no way to fork (seccomp), resource limits, and the whole
process tree dies with its first process. Where neither runs nothing is executed: this module has
no way to run code on the host. Left out: what a program means (tasks/humaneval.py).
"""

import contextlib
import os
import platform
import secrets
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import pydantic_monty

SANDBOXES = ("monty", "bubblewrap", "none")
"""What can be asked for; none runs nothing."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 3.0
    """Wall-clock time."""
    memory_bytes: int = 256 * 2**20
    output_bytes: int = 64 * 2**10
    """Printed text; more ends the program."""
    recursion: int = 1000
    """Depth of calls."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    finished: bool
    """Whether it ran to its last line without an exception."""
    output: str
    """What it printed, as far as the sandbox kept it."""
    problem: str = ""
    """Why it did not finish, in one line."""


class NoSandbox(Exception):
    """This machine cannot run code safely; says why."""


class Sandbox(Protocol):
    """Runs programs one at a time; a context manager."""

    name: str

    def run(self, source: str) -> Outcome:
        """Run a program. Nothing it does raises here, or lasts longer than the limits."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_sandbox(name: str = SANDBOXES[0], *, limits: Limits = Limits()) -> Sandbox:
    """The sandbox of that name, after a trial run. NoSandbox says why there is none."""
    if name not in SANDBOXES:
        raise ValueError(f"sandbox {name!r}: choose one of {', '.join(SANDBOXES)}")
    if name == "none":
        raise NoSandbox("no sandbox was asked for")
    sandbox = MontySandbox(limits) if name == "monty" else BubblewrapSandbox(limits)
    trial = sandbox.run("assert sum(range(10)) == 45")
    if not trial.finished:
        sandbox.__exit__()
        raise NoSandbox(f"{name} does not run here: {trial.problem or trial.output.strip()}")
    return sandbox


class MontySandbox:
    """A fresh interpreter for every program, in a pooled worker process."""

    name = "monty"

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        # the interpreter stops itself; the pool kills a worker that does not
        self._pool = pydantic_monty.Monty(request_timeout=limits.seconds + 2, max_processes=1)
        self._opened = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._opened:
            self._pool.__exit__(None, None, None)

    def run(self, source: str) -> Outcome:
        if not self._opened:
            self._pool.__enter__()
            self._opened = True
        limits = pydantic_monty.ResourceLimits(
            max_feed_duration_secs=self.limits.seconds,
            max_memory=self.limits.memory_bytes,
            max_recursion_depth=self.limits.recursion,
            max_total_sleep_secs=self.limits.seconds,
        )
        printed = pydantic_monty.CollectString(max_bytes=self.limits.output_bytes)
        try:
            with self._pool.checkout(limits=limits) as session:
                session.feed_run(source, print_callback=printed)
        except pydantic_monty.MontyError as error:
            return Outcome(False, printed.output, _one_line(str(error)))
        return Outcome(True, printed.output)


class BubblewrapSandbox:
    """CPython, the interpreter's own installation and nothing else in sight."""

    name = "bubblewrap"

    def __init__(self, limits: Limits) -> None:
        program = shutil.which("bwrap")
        if program is None:
            raise NoSandbox("bubblewrap is not installed (the command bwrap is missing)")
        self.limits = limits
        self._filter = tempfile.TemporaryFile()
        self._filter.write(no_new_processes(platform.machine()))
        self._command = [program, *_namespaces(self._filter.fileno())]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._filter.close()

    def run(self, source: str) -> Outcome:
        # the bootstrap prints this behind a program that runs to its end, whatever that exits with;
        # a program that is after the mark itself could find it
        done = secrets.token_hex(16)
        self._filter.seek(0)
        python = [getattr(sys, "_base_executable", sys.executable), "-I", "-S", "-B"]
        process = subprocess.Popen(
            [*self._command, *python, "-c", _bootstrap(self.limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[self._filter.fileno()],
            start_new_session=True,
            env={},
        )
        text = f"{done}\n{source}".encode("utf-8", "surrogatepass")
        output, problem = _converse(process, text, self.limits)
        head, found, _ = output.rpartition(f"\n{done}\n".encode())
        shown = (head if found else output).decode("utf-8", "replace")
        if found and not problem:
            return Outcome(True, shown)
        lines = shown.strip().splitlines()
        return Outcome(False, shown, problem or _one_line(lines[-1] if lines else "it exited"))


def _namespaces(filter_fd: int) -> list[str]:
    """Arguments of bwrap: an empty, read-only world with CPython in it."""
    words = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    words += ["--cap-drop", "ALL", "--hostname", "sandbox", "--seccomp", str(filter_fd)]
    needed = [Path("/usr"), Path(sys.base_prefix)]
    for path in needed:
        words += ["--ro-bind", str(path), str(path)]
    for name in ("lib", "lib64", "bin"):  # links into /usr on most systems
        path = Path("/", name)
        if path.is_symlink():
            words += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            words += ["--ro-bind", str(path), str(path)]
    return [*words, "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/"]


def _bootstrap(limits: Limits) -> str:
    """The first code in the sandbox: give up resources for good, then run standard input."""
    caps = {
        "AS": limits.memory_bytes,
        "CPU": int(limits.seconds) + 1,
        "FSIZE": 2**20,  # of files in memory: nothing else is writable
        "NOFILE": 32,
        "CORE": 0,
    }
    lines = [f"resource.setrlimit(resource.RLIMIT_{n}, ({v}, {v}))" for n, v in caps.items()]
    return "\n".join(
        [
            "import os, resource, sys",
            *lines,
            f"sys.setrecursionlimit({limits.recursion})",
            "def run():",
            "    done, _, source = sys.stdin.read().partition('\\n')",
            "    ours, out = sys.stdout, os.dup(1)  # a program may replace or close its own",
            "    exec(compile(source, 'program', 'exec'), {'__name__': '__main__'})",
            "    ours.closed or ours.flush()",
            "    os.write(out, f'\\n{done}\\n'.encode())",
            "run()",
        ]
    )


def _converse(process: subprocess.Popen, text: bytes, limits: Limits) -> tuple[bytes, str]:
    """Feed `text`, collect output, and end the process: its output, and what went wrong if so."""
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + limits.seconds
    output = b""
    try:
        # on a thread of its own the kernel would do this; a pipe holds 64 KiB, a program is less
        os.set_blocking(process.stdin.fileno(), False)
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            ready.register(process.stdin, selectors.EVENT_WRITE)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return output, f"it ran longer than {limits.seconds:g} s"
                for key, _ in ready.select(left):
                    if key.fileobj is process.stdin:
                        text = _write_some(process, text)
                        if not text:
                            ready.unregister(process.stdin)
                            process.stdin.close()
                        continue
                    chunk = os.read(process.stdout.fileno(), 65536)
                    if not chunk:
                        return output, ""
                    output += chunk
                    if len(output) > limits.output_bytes:
                        return output[: limits.output_bytes], "it printed too much"
    finally:
        _end(process)


def _write_some(process: subprocess.Popen, text: bytes) -> bytes:
    """What is left of `text` to write."""
    assert process.stdin is not None
    try:
        return text[os.write(process.stdin.fileno(), text) :]
    except BrokenPipeError:
        return b""


def _end(process: subprocess.Popen) -> None:
    """Kill bwrap, and with it the namespace's first process, and so everything in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


_ARCHITECTURES = {
    "x86_64": (0xC000003E, (56, 57, 58, 435)),  # clone, fork, vfork, clone3
    "aarch64": (0xC00000B7, (220, 435)),  # clone, clone3
}
"""Audit number of an architecture and its system calls that make processes or threads."""


def no_new_processes(machine: str) -> bytes:
    """A seccomp filter (classic BPF) under which every attempt to make a process fails with EPERM.

    A limit on processes would not do: it does not bind root, and counts what else a user runs.
    """
    if machine not in _ARCHITECTURES:
        raise NoSandbox(f"no system-call filter for machine {machine!r}")
    audit, forbidden = _ARCHITECTURES[machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    checks: Sequence[tuple[int, int]] = [(at_least, 0x40000000), *((equal, n) for n in forbidden)]
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    for number, (test, value) in enumerate(checks):
        program.append((test, len(checks) - number, 0, value))  # jump to the refusal
    program += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    return b"".join(struct.pack("=HBBI", *step) for step in program)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]

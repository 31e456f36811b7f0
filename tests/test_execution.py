"""The red team: what code that a model wrote might try, against every sandbox of this machine."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxchat import execution
from jaxchat.execution import (
    BubblewrapSandbox,
    Limits,
    NoSandbox,
    no_new_processes,
    open_sandbox,
)

LIMITS = Limits(seconds=1.0, memory_bytes=128 * 2**20, output_bytes=10_000)


def available(name):
    try:
        open_sandbox(name).__exit__()
    except NoSandbox as error:
        return str(error)
    return None


MISSING = {name: available(name) for name in ("monty", "bubblewrap")}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=f"skipped: {why}"))
        for name, why in MISSING.items()
    ],
)
def sandbox(request):
    with open_sandbox(request.param, limits=LIMITS) as sandbox:
        yield sandbox


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("the crown jewels")
    return path


def test_the_default_sandbox_is_there():
    """It is a dependency: on every machine that the project is installed on."""
    assert MISSING["monty"] is None


def test_a_program_that_runs_to_its_end_has_finished(sandbox):
    outcome = sandbox.run("def f(x):\n    return x + 1\nprint(f(1))\nassert f(1) == 2\n")
    assert (outcome.finished, outcome.output, outcome.problem) == (True, "2\n", "")


@pytest.mark.parametrize(
    "last", ["sys.stdout = io.StringIO()", "sys.stdout.close()", "os.close(1)"]
)
def test_what_a_program_does_to_its_output_does_not_unfinish_it(last):
    if MISSING["bubblewrap"]:
        pytest.skip(f"skipped: {MISSING['bubblewrap']}")
    with open_sandbox("bubblewrap", limits=LIMITS) as sandbox:
        outcome = sandbox.run(f"import io, os, sys\nprint('said', flush=True)\n{last}\n")
    assert (outcome.finished, outcome.output) == (True, "said\n")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise ValueError('no')", "no"),
        ("def f(:", "."),
        ("undefined", "NameError"),
        ("raise SystemExit(0)", "."),
        ("import sys\nsys.exit(0)", "."),
        ("import os\nos._exit(0)", "."),
        ("exit()", "."),
        ("\ud800", "surrogate"),
        ("x = 1\x00", "."),
    ],
)
def test_anything_else_has_not(sandbox, source, problem):
    """Leaving early with status 0 is not success: the tests after it have not run."""
    outcome = sandbox.run(source)
    assert not outcome.finished
    assert re.search(problem, outcome.problem, re.DOTALL)
    assert "\n" not in outcome.problem


def test_programs_share_nothing(sandbox):
    assert sandbox.run("import math\nleft_behind = 1\nmath.left_behind = 2").problem is not None
    assert not sandbox.run("left_behind").finished
    assert not sandbox.run("import math\nmath.left_behind").finished


@pytest.mark.parametrize(
    "attempt",
    [
        "print(open({path!r}).read())",
        "from pathlib import Path\nprint(Path({path!r}).read_text())",
        "import os\nprint(os.read(os.open({path!r}, os.O_RDONLY), 99))",
        "print(open('/proc/1/root' + {path!r}).read())",
        "import ctypes\nlibc = ctypes.CDLL(None)\nb = ctypes.create_string_buffer(99)\n"
        "print(libc.read(libc.open({path!r}.encode(), 0), b, 99), b.value)",
    ],
)
def test_files_of_the_host_cannot_be_read(sandbox, secret, attempt):
    assert "crown" not in sandbox.run(attempt.format(path=str(secret))).output
    assert "root:" not in sandbox.run(attempt.format(path="/etc/passwd")).output


@pytest.mark.parametrize("folder", ["{tmp}", "/tmp", "/dev/shm", "/var/tmp", "/usr", "/", "."])
def test_nothing_can_be_written(sandbox, tmp_path, folder):
    path = Path(folder.format(tmp=tmp_path)) / "jaxchat_red_team_was_here"
    outcome = sandbox.run(f"with open({str(path)!r}, 'w') as file:\n    file.write('x')\n")
    assert not outcome.finished
    assert not path.exists()


def test_files_cannot_be_removed(sandbox, secret):
    for attempt in ("os.remove({0!r})", "os.rename({0!r}, {0!r} + '2')", "os.truncate({0!r}, 0)"):
        sandbox.run("import os\n" + attempt.format(str(secret)))
    assert secret.read_text() == "the crown jewels"


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1).send(b'x')",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.sendto(b'x', ('8.8.8.8', 53))",
    ],
)
def test_there_is_no_network(sandbox, attempt):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        outcome = sandbox.run(attempt.format(port=server.getsockname()[1]))
        assert not outcome.finished
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "attempt",
    [
        "import os\nwhile True:\n    os.fork()",
        "import threading\nwhile True:\n    threading.Thread(target=__import__('time').sleep, "
        "args=(9,)).start()",
        "import subprocess\nsubprocess.run(['sleep', '60'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import os\nos.posix_spawn('/bin/sleep', ['sleep', '60'], {})",
        "import os\nos.system('sleep 60')",
        "import ctypes\nassert ctypes.CDLL(None).fork() == 0",
    ],
)
def test_no_process_can_be_made(sandbox, attempt):
    before = process_count()
    started = time.monotonic()
    outcome = sandbox.run(attempt)
    assert time.monotonic() - started < LIMITS.seconds + 2
    if "os.system" not in attempt:  # which says -1 instead of raising
        assert not outcome.finished
    assert process_count() <= before + 10  # other tests may run


def test_the_environment_is_empty(sandbox, monkeypatch):
    monkeypatch.setenv("JAXCHAT_SECRET", "hf_crown_jewels")
    outcome = sandbox.run(
        "import os\nprint(dict(os.environ))\nprint(open('/proc/self/environ').read())"
    )
    assert "crown" not in outcome.output


@pytest.mark.parametrize(
    "attempt",
    [
        "x = [0] * 10**9",
        "x = 'a' * 10**10",
        "x = bytearray(10**10)",
        "x = []\nwhile True:\n    x.append('a' * 10**6 + str(len(x)))",
        "x = 10 ** 10 ** 10",
        "import os\nfd = os.memfd_create('x')\nwhile True:\n    os.write(fd, b'0' * 2**20)",
    ],
)
def test_memory_is_bounded(sandbox, attempt):
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    started = time.monotonic()
    outcome = sandbox.run(attempt)
    assert not outcome.finished
    assert time.monotonic() - started < LIMITS.seconds + 2
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert after <= max(before, 4 * LIMITS.memory_bytes / 1024)


@pytest.mark.parametrize(
    "attempt",
    [
        "while True:\n    pass",
        "import time\ntime.sleep(1000)",
        "sum(range(10**12))",
        "'a' * 5 in 'b' * 10**7 * 10\nwhile True: pass",
        "try:\n    while True: pass\nexcept BaseException:\n    while True: pass",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "input()",
    ],
)
def test_time_is_bounded(sandbox, attempt):
    started = time.monotonic()
    assert not sandbox.run(attempt).finished
    assert time.monotonic() - started < LIMITS.seconds + 2


@pytest.mark.parametrize(
    "attempt",
    [
        "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')",
        "x = []\nfor _ in range(10**6):\n    x = [x]\nprint(repr(x))",
        "print(len(str(10**4000)))",
    ],
)
def test_what_only_one_sandbox_endures_is_bounded_too(sandbox, attempt):
    """monty's regular expressions are linear and its repr is elided; CPython gives up on both."""
    started = time.monotonic()
    sandbox.run(attempt)
    assert time.monotonic() - started < LIMITS.seconds + 2


@pytest.mark.parametrize(
    "attempt",
    [
        "print('x' * 10**8)",
        "while True:\n    print('x' * 1000)",
        "import sys\nwhile True:\n    sys.stderr.write('x' * 1000)",
        "import os\nwhile True:\n    os.write(1, b'x' * 10**6)",
    ],
)
def test_output_is_bounded(sandbox, attempt):
    outcome = sandbox.run(attempt)
    assert not outcome.finished
    assert len(outcome.output) <= LIMITS.output_bytes


@pytest.mark.parametrize(
    "attempt",
    [
        "def f(n):\n    return f(n + 1)\nf(0)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n    return f(n + 1)\nf(0)",
        "(" * 10_000 + ")" * 10_000,
        "eval('(' * 10_000 + ')' * 10_000)",
        "x = " + "-" * 50_000 + "1",
    ],
)
def test_deep_recursion_stays_inside(sandbox, attempt):
    started = time.monotonic()
    assert not sandbox.run(attempt).finished
    assert time.monotonic() - started < LIMITS.seconds + 2
    assert sandbox.run("assert True").finished  # and the next program runs


@pytest.mark.parametrize(
    "attempt",
    [
        "import os\nos.kill({pid}, 9)",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        "import os\nos.kill(-1, 9)",
        "import os\nos.killpg(0, 9)",
        "import ctypes\nctypes.CDLL(None).kill({pid}, 9)",
        "import os\nos.kill(1, 9)\nos.kill(os.getpid(), 9)",
    ],
)
def test_the_parent_cannot_be_signalled(sandbox, attempt):
    """In a process of its own that stands for ours: it must survive."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        sandbox.run(attempt.format(pid=bystander.pid))
        assert bystander.poll() is None
        bystander.kill()
    assert sandbox.run("assert True").finished


def test_works_off_the_main_thread():
    """Upstream's time-outs were signals."""
    outcomes = []

    def work():
        with open_sandbox("monty", limits=LIMITS) as sandbox:
            outcomes.extend(sandbox.run(p).finished for p in ("x = 1", "while True: pass"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcomes == [True, False]


def test_without_bubblewrap_nothing_runs(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(NoSandbox, match="bubblewrap is not installed"):
        open_sandbox("bubblewrap")


def test_a_sandbox_that_does_not_start_is_none(monkeypatch):
    """Unprivileged namespaces may be forbidden: the trial run notices."""
    monkeypatch.setattr(execution, "_namespaces", lambda _: ["--no-such-flag"])
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/false")
    with pytest.raises(NoSandbox, match="bubblewrap does not run here"):
        open_sandbox("bubblewrap")


def test_none_is_none_and_others_are_unknown():
    with pytest.raises(NoSandbox, match="no sandbox was asked for"):
        open_sandbox("none")
    with pytest.raises(ValueError, match="sandbox 'host': choose one of monty, bubblewrap, none"):
        open_sandbox("host")


def test_the_filter_is_known_for_few_machines():
    assert len(no_new_processes("x86_64")) % 8 == 0
    assert len(no_new_processes("aarch64")) % 8 == 0
    with pytest.raises(NoSandbox, match="no system-call filter for machine 'vax'"):
        no_new_processes("vax")


@pytest.mark.skipif(bool(MISSING["bubblewrap"]), reason=f"skipped: {MISSING['bubblewrap']}")
def test_the_whole_tree_dies_with_a_killed_sandbox():
    sandbox = BubblewrapSandbox(LIMITS)
    with sandbox:
        sandbox.run("while True: pass")
        assert not descendants_of(os.getpid(), "bwrap")


def process_count():
    return sum(path.name.isdigit() for path in Path("/proc").iterdir())


def descendants_of(pid, name):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        command, parent = text[text.index("(") + 1 : text.rindex(")")], text.rsplit(")")[1].split()
        if command == name and int(parent[1]) == pid:
            found.append(path.parent.name)
    return found

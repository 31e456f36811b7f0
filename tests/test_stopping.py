"""What is told to stop stops, whoever is told, and leaves nothing running."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SAVES = """
def stop(*_):
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit(143)
"""

HAS_FINISHED = """
def stop(*_):
    time.sleep(0.5)
    sys.exit(0)
"""

NEVER_ENDS = """
def stop(*_):
    pathlib.Path("told").touch()
"""


def stage(what_it_does):
    """Training, as far as signals go."""
    return f"""
import pathlib, signal, sys, time
{what_it_does}
signal.signal(signal.SIGTERM, stop)
pathlib.Path("begun").touch()
while True:
    time.sleep(60)
"""


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)


# A machine on which the told program has ended before the shell looks again.
BUSY = 'kill() { command kill "$@"; local was=$?; sleep 0.3; return $was; }'


@pytest.fixture(params=["", BUSY], ids=["idle", "busy"])
def speedrun(tmp_path, request):
    """Starts the script's loop over stages, with one that does as is said instead of training."""

    def start(what_it_does):
        python = tmp_path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        (tmp_path / "stage.py").write_text(stage(what_it_does))
        python.write_text(f"#!/bin/sh\nexec {sys.executable} stage.py\n")
        python.chmod(0o755)
        script = (ROOT / "speedrun_jax.sh").read_text()
        functions = script.split("# --- The stages")[1].split("\nstage data_download")[0]
        stages = "stage base_train --depth 2\nstage report"
        shell = subprocess.Popen(
            ["bash", "-c", f"set -euo pipefail\n{request.param}\n#{functions}\n{stages}"],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "JAXCHAT_BASE_DIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        wait_for(tmp_path / "begun", shell)
        return shell

    return start


def ends_there(shell, tmp_path):
    """With the status of a stop, and the stage to be done again."""
    said, _ = shell.communicate(timeout=30)
    assert shell.returncode == 143
    assert said == "--- base_train --depth 2\n"
    assert not list((tmp_path / "stages").iterdir()), "it is not done"


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_speedrun_that_is_told_to_stop_waits_until_its_stage_has_saved(
    speedrun, tmp_path, number
):
    """The shell alone is told, as by `docker stop`: a stage in the foreground hears nothing."""
    shell = speedrun(SAVES)
    shell.send_signal(number)
    ends_there(shell, tmp_path)
    assert (tmp_path / "saved").exists()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_stage_begins_after_the_stop_of_one_that_had_only_its_end_to_reach(
    speedrun, tmp_path, number
):
    """A training run in its last validation finishes, with status 0, whoever asks."""
    shell = speedrun(HAS_FINISHED)
    shell.send_signal(number)
    ends_there(shell, tmp_path)


@pytest.mark.usefixtures("interruptible")
def test_who_interrupts_twice_waits_for_nothing(speedrun, tmp_path):
    shell = speedrun(NEVER_ENDS)
    shell.send_signal(signal.SIGINT)
    wait_for(tmp_path / "told", shell)
    shell.send_signal(signal.SIGINT)
    shell.communicate(timeout=30)
    assert shell.returncode == 128 + signal.SIGKILL


HARVEST = """
import os, pathlib, sys, time
from jaxchat import embedded_corpus

def read(source):
    pathlib.Path(f"worker-{os.getpid()}").touch()
    time.sleep(0.001)
    return []

if __name__ == "__main__":
    embedded_corpus.sources = lambda: [("d", "m", "p")] * 100_000
    embedded_corpus._read = read
    embedded_corpus.harvest()
"""


def test_readers_of_the_corpus_end_with_who_asked_them(tmp_path):
    """Those of a stage that was killed waited for ever for more to read, one a core."""
    (tmp_path / "script.py").write_text(HARVEST)
    parent = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    while not (workers := list(tmp_path.glob("worker-*"))):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    pids = [int(path.name.split("-")[1]) for path in workers]
    deadline = time.monotonic() + 20
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "they are still there"
        time.sleep(0.05)


def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().split(")")[1].split()[0] == "Z")


LISTENER = """
import atexit, gc, os, pathlib, signal, time
from dataclasses import dataclass
from jaxchat import cli

@dataclass(frozen=True)
class Config:
    dropped: bool = False
    \"""Whether the interrupt comes in a callback, where Python drops it.\"""

def press(phase, info):
    gc.callbacks.remove(press)
    os.kill(os.getpid(), signal.SIGINT)

def main(config):
    atexit.register(pathlib.Path("torn-down").touch)
    print("begun")
    if config.dropped:
        gc.callbacks.append(press)
        gc.collect()
    else:
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

cli.run(main, Config)
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("words", [[], ["--dropped"]])
def test_an_interrupt_ends_a_program_at_once_wherever_it_comes(tmp_path, words):
    """While XLA computed, the interpreter's end crashed with a segmentation fault; and in JAX's
    callback behind a garbage collection the interrupt was lost: the program ran to its end."""
    (tmp_path / "listener.py").write_text(LISTENER)
    done = subprocess.run(
        [sys.executable, "listener.py", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "begun\n", "interrupted\n")
    assert not (tmp_path / "torn-down").exists(), "the interpreter must not be torn down"


IMPORTING = """
import pathlib, time
pathlib.Path("begun").touch()
time.sleep(60)
"""


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_stage_is_still_imported_shows_no_traceback(tmp_path):
    package = tmp_path / "scripts"
    package.mkdir()
    shutil.copy(ROOT / "scripts" / "__init__.py", package)
    (package / "slow.py").write_text(IMPORTING)
    program = subprocess.Popen(
        [sys.executable, "-m", "scripts.slow"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "begun", program)
    program.send_signal(signal.SIGINT)
    assert program.communicate(timeout=30) == (None, "")
    assert program.returncode == -signal.SIGINT

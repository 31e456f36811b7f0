"""What is told to stop stops, whoever is told, and leaves nothing running or done that is not.

And what is refused changes nothing.
"""

import contextlib
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
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


# A machine on which the told program has ended before the shell looks again, and a program begins
# before the shell listens.
BUSY = """
kill() { command kill "$@"; local was=$?; sleep 0.3; return $was; }
trap() { [[ -z "$(jobs -p)" ]] || sleep 1; builtin trap "$@"; }
"""

SPEEDRUN, SWEEP = "speedrun_jax.sh", "scripts/runs/miniseries.sh"

PYTHON = f"""#!/bin/sh
echo "${{2#scripts.}}" >>launched
[ "$2" = scripts.base_train ] || exit 0
exec {sys.executable} stage.py
"""
"""Training does what is said in stage.py, all other programs end at once."""


@pytest.fixture
def house(tmp_path):
    """The real shell scripts, where only PYTHON is installed and nothing has to be set up."""
    for script in (SPEEDRUN, *(path.relative_to(ROOT) for path in ROOT.glob("scripts/**/*.sh"))):
        (tmp_path / script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / script, tmp_path / script)
    (tmp_path / "scripts" / "setup.sh").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def start(house, script, *, before=(), **settings):
    """A script of the house has begun; `before` are words that start bash."""
    env = {"JAXCHAT_BASE_DIR": str(house), "JAXCHAT_TIER": "smoke", "DEPTHS": "8 10"}
    return subprocess.Popen(
        [*before, "bash", str(house / script)],
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", **env, **settings},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(house, script, **settings):
    """Exit status and what has been said by the script when it ends of itself."""
    shell = start(house, script, **settings)
    said, _ = shell.communicate(timeout=60)
    return shell.returncode, said


def finished(house):
    """The programs whose commands have finished, as the ledgers have it."""
    marks = [*house.glob("stages/*"), *house.glob("runs/*")]
    return {mark.read_text().split()[0] for mark in marks}


def everything_ends(shell):
    """Also what a script that fails its test leaves running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()
    shell.stdout.close()


@pytest.fixture(
    params=[(SPEEDRUN, ""), (SPEEDRUN, BUSY), (SWEEP, "")], ids=["idle", "busy", "sweep"]
)
def pipeline(house, request):
    """Starts the pipeline, or a sweep, up to a training run that does as is said."""
    script, prelude = request.param
    (house / "prelude").write_text(prelude)
    shells = []

    def begin(what_it_does):
        (house / "stage.py").write_text(stage(what_it_does))
        shells.append(start(house, script, BASH_ENV=str(house / "prelude")))
        wait_for(house / "begun", shells[0])
        return shells[0]

    yield begin
    everything_ends(shells[0])


def ends_there(shell, house):
    """With the status of a stop, and training to be done again."""
    said, _ = shell.communicate(timeout=30)
    launched = (house / "launched").read_text().split()
    assert shell.returncode == 143
    assert said.splitlines()[-1].startswith("--- base_train ")
    assert launched.index("base_train") == len(launched) - 1, "nothing begins"
    assert finished(house) == set(launched[:-1]), "training has not"


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_pipeline_that_is_told_to_stop_waits_until_its_training_has_saved(
    pipeline, house, number
):
    """The shell alone is told, as by `docker stop`: a program in the foreground hears nothing."""
    shell = pipeline(SAVES)
    shell.send_signal(number)
    ends_there(shell, house)
    assert (house / "saved").exists()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_begins_after_the_stop_of_a_program_that_had_only_its_end_to_reach(
    pipeline, house, number
):
    """A training run in its last validation finishes, with status 0, whoever asks."""
    shell = pipeline(HAS_FINISHED)
    shell.send_signal(number)
    ends_there(shell, house)


@pytest.mark.usefixtures("interruptible")
def test_who_interrupts_twice_waits_for_nothing(pipeline, house):
    shell = pipeline(NEVER_ENDS)
    shell.send_signal(signal.SIGINT)
    wait_for(house / "told", shell)
    shell.send_signal(signal.SIGINT)
    shell.communicate(timeout=30)
    assert shell.returncode == 128 + signal.SIGKILL


CONTAINER = ("unshare", "--map-root-user", "--pid", "--fork", "--kill-child")


@pytest.mark.parametrize("script", [SPEEDRUN, SWEEP])
def test_process_1_of_a_container_hears_a_stop_while_it_sets_up(house, script):
    """Such a process ignores what it has no handler for: training began, for the grace period."""
    if not shutil.which("unshare") or subprocess.run([*CONTAINER, "true"], check=False).returncode:
        pytest.skip("this machine gives no process the number 1")
    (house / "scripts" / "setup.sh").write_text(f"touch {house}/begun; sleep 1\n")
    (house / "stage.py").touch()
    outside = start(house, script, before=CONTAINER)
    wait_for(house / "begun", outside)
    [bash] = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
    os.kill(int(bash), signal.SIGTERM)
    outside.communicate(timeout=30)
    assert outside.returncode == 143
    assert not (house / "launched").exists()


def test_a_stage_that_is_refused_stays_done_as_it_was(house):
    """DEPTH=200 once, which no memory holds, made the next run repeat every stage from there on."""
    training = house / "stage.py"
    training.touch()
    assert run(house, SPEEDRUN, DEPTH="2")[0] == 0
    training.write_text("raise SystemExit(2)")
    assert run(house, SPEEDRUN, DEPTH="200")[0] == 2
    status, said = run(house, SPEEDRUN, DEPTH="2")
    stages = [line for line in said.splitlines() if line.startswith("---")]
    assert status == 0
    assert len(stages) == 12
    assert all(line.endswith(": done before") for line in stages)


@pytest.mark.parametrize("status", ["1", "2"])
def test_a_stage_is_not_done_where_one_before_it_has_run_anew(house, status):
    training = house / "stage.py"
    training.touch()
    assert run(house, SPEEDRUN)[0] == 0
    (house / "stages" / "tok_train").unlink()
    training.write_text(f"raise SystemExit({status})")
    assert run(house, SPEEDRUN)[0] == int(status)
    assert {"tok_train", "base_train"} & finished(house) == {"tok_train"}


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

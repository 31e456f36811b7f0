"""One run on several real processes over loopback: same numbers, one voice, a clean end."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxchat.checkpoint import CheckpointStore
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import read_metrics

ROOT = Path(__file__).parents[1]
STEPS = 16
WORDS = "the a model reads writes token step loss of and to learns from every"
OPTIONS = (
    "--depth 1 --aspect-ratio 32 --head-dim 16 --sequence-len 64 --device-batch-size 2 "
    f"--total-batch-size 512 --num-iterations {STEPS} --eval-every 4 --eval-tokens 512 "
    "--save-every 2 --sample-every 100 --model-tag tiny"
).split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    base = tmp_path_factory.mktemp("world")
    text = base / "text"
    text.mkdir()
    rng = np.random.default_rng(0)
    words = np.array(WORDS.split())
    for i in range(60):
        (text / f"{i:03d}.txt").write_text(" ".join(rng.choice(words, 80)))
    tokenizer = Tokenizer.train((p.read_text() for p in sorted(text.iterdir())), vocab_size=300)
    tokenizer.save(base / "tokenizer")
    return base


MODULE = ("-m", "scripts.base_train")
FAILING = """
from jaxchat import cli, runtime
from jaxchat.jax_backend import JaxBackend
from scripts import base_train

steps, train_step = [], JaxBackend.train_step

def fail_at_third(*arguments):
    steps.append(arguments)
    if runtime.process_index() == {process} and len(steps) == 3:
        raise NotImplementedError("no such kernel")
    return train_step(*arguments)

JaxBackend.train_step = fail_at_third
cli.run(base_train.main, base_train.Config)
"""


def start(world, base, count, *, devices, options=(), program=MODULE):
    """`count` processes with `devices` each, and a base directory of the run's own."""
    base.mkdir(exist_ok=True)
    for shared in ("tokenizer", "compilation_cache"):
        (world / shared).mkdir(exist_ok=True)
        if not (base / shared).exists():
            (base / shared).symlink_to(world / shared)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, *program, *OPTIONS, *options]
    processes = []
    for index in range(count):
        env = {
            **os.environ,
            "JAXCHAT_BASE_DIR": str(base),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        if count > 1:
            env |= {
                "https_proxy": "http://127.0.0.1:9",  # to the internet; no process is met there
                "JAXCHAT_COORDINATOR": f"127.0.0.1:{port}",
                "JAXCHAT_PROCESS_COUNT": str(count),
                "JAXCHAT_PROCESS_INDEX": str(index),
            }
        process = subprocess.Popen(
            [*words, "--corpus", str(world / "text")],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
    return processes


def finish(processes):
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def run_of(base):
    return base / "base_checkpoints" / "tiny"


def losses(base):
    rows = read_metrics(run_of(base) / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def alone(world):
    base = world / "alone"
    finish(start(world, base, 1, devices=4))
    return base


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"), [(2, 2, "auto"), (4, 1, "fsdp=4"), (2, 2, "fsdp=2,tensor=2")]
)
def test_processes_train_as_one(world, alone, tmp_path, count, devices, mesh):
    outputs = finish(start(world, tmp_path, count, devices=devices, options=["--mesh", mesh]))
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)
    assert len(losses(tmp_path)) == STEPS
    assert f"step {STEPS}/{STEPS}" in outputs[0]
    assert all("step" not in output for output in outputs[1:])
    ours, theirs = (
        [row["val/bpb"] for row in read_metrics(run_of(base) / "metrics.jsonl") if "val/bpb" in row]
        for base in (tmp_path, alone)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.slow
def test_processes_that_start_over_set_the_earlier_run_aside_once(world, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "copy", symlinks=True)
    options = ["--num-iterations", "4", "--resume", "never"]
    outputs = finish(start(world, tmp_path / "copy", 2, devices=2, options=options))
    assert "starting over" in outputs[0] and "starting over" not in outputs[1]
    store = CheckpointStore(run_of(tmp_path / "copy"))
    assert store.steps() == [2, 4]
    (aside,) = store.directory.glob("replaced-*")
    assert CheckpointStore(aside).steps()[-1] == STEPS


def wait_for(base, step):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if len(losses(base)) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "lost", "after"), [(2, 1, 1), (1, 0, 2), (4, 2, 4), (2, 0, 4)], ids=str
)
def test_a_lost_process_ends_the_run_and_any_number_continues_it(
    world, alone, tmp_path, before, lost, after
):
    """Killed after step 3, long before the end: the others end and say why; the data goes on."""
    processes = start(world, tmp_path, before, devices=4 // before)
    wait_for(tmp_path, 3)
    processes[lost].send_signal(signal.SIGKILL)
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes.pop(lost) == -signal.SIGKILL
    del outputs[lost]
    # the first process hosts the coordinator: without it JAX may abort the others before they see
    assert set(codes) <= {75} | ({-signal.SIGABRT} if lost == 0 else set()), outputs
    for code, output in zip(codes, outputs, strict=True):
        if code == 75:
            assert "a process of this run is gone" in output
            assert "Run the same command again" in output
        else:
            assert "unhealthy" in output or "coordination service" in output.lower()
    stopped_at = CheckpointStore(run_of(tmp_path)).steps()[-1]
    assert stopped_at < STEPS
    outputs = finish(start(world, tmp_path, after, devices=4 // after))
    assert f"continuing tiny at step {stopped_at}" in outputs[0]
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)
    ours, theirs = (CheckpointStore(run_of(base)).read_meta(STEPS) for base in (tmp_path, alone))
    assert ours["loader"] == theirs["loader"]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "failing"), [(2, 0), (2, 1), (4, 2)])
def test_an_error_on_one_process_asks_nobody_to_try_again(world, tmp_path, count, failing):
    """A launcher that sees 75 starts the run again, which would meet the same error."""
    program = ("-c", FAILING.format(process=failing))
    processes = start(world, tmp_path, count, devices=4 // count, program=program)
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    codes = [process.returncode for process in processes]
    # JAX may abort the failing one, whose orderly exit waits for the others
    assert codes.pop(failing) in (1, -signal.SIGABRT), outputs
    assert codes == [2] * (count - 1), outputs
    assert "NotImplementedError: no such kernel" in outputs.pop(failing)
    for output in outputs:
        assert f"(process {failing} has failed)" in output


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_the_same_step(world, alone, tmp_path):
    processes = start(world, tmp_path, 2, devices=2)
    wait_for(tmp_path, 2)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    stopped = re.search(r"stopped by another process; step (\d+) is saved", outputs[0])
    assert CheckpointStore(run_of(tmp_path)).steps()[-1] == int(stopped[1])
    finish(start(world, tmp_path, 2, devices=2))
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)

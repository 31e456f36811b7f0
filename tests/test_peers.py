"""Processes that watch each other: real ones, which wait in what no collective would interrupt."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxchat import peers
from jaxchat.peers import EXIT_FAILED, EXIT_LOST, FAILED, GONE, News, exit_status

MEMBER = """
import json, os, pathlib, sys, time
from jaxchat import peers
from jaxchat.runtime import process_index

folder, count, how = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def gather(value):
    mine = folder / f"{process_index()}"
    mine.with_suffix(".tmp").write_text(json.dumps(value))
    mine.with_suffix(".tmp").rename(mine)
    while len(found := [p for p in folder.iterdir() if p.suffix == ""]) < count:
        time.sleep(0.01)
    return [json.loads((folder / str(i)).read_text()) for i in range(count)]

try:
    with peers.exit_when_one_is_lost(count, gather):
        print("watching", flush=True)
        if how == "wait":
            time.sleep(60)
        if how == "fail":
            time.sleep(1)  # all are connected
            raise ValueError("bad rows")
        if how == "fill":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        if how == "lack":
            raise NotImplementedError("no such kernel")
        if how.startswith("hear"):  # what a collective says soon after a process has ended
            time.sleep(float(how.removeprefix("hear")))
            raise RuntimeError("Gloo all-reduce failed: Connection closed by peer")
        time.sleep(float(how))
except (ValueError, RuntimeError) as error:
    print(error)
    sys.exit(2)
print("done")
"""


def start(folder, *hows):
    """One process per word of what it does: waits, fails, or ends after some seconds."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(folder), str(len(hows)), how],
            env={**os.environ, "RANK": str(index), "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index, how in enumerate(hows)
    ]
    for process in processes:
        assert process.stdout.readline() == "watching\n"
    return processes


def finish(processes):
    """Exit statuses and what each process printed since."""
    texts = [process.communicate(timeout=30)[0] for process in processes]
    return [process.returncode for process in processes], texts


@pytest.mark.parametrize("killed", [0, 2])
def test_who_waits_in_a_barrier_leaves_when_another_is_killed(tmp_path, killed):
    processes = start(tmp_path, "wait", "wait", "wait")
    time.sleep(0.3)  # all are connected
    processes[killed].send_signal(signal.SIGKILL)
    codes, texts = finish(processes)
    assert codes.pop(killed) == -signal.SIGKILL
    assert codes == [EXIT_LOST] * 2
    del texts[killed]
    for text in texts:
        assert text.count("a process of this run is gone") == 1
        assert "Run the same command again" in text


def test_processes_that_end_at_different_times_end_well(tmp_path):
    codes, texts = finish(start(tmp_path, "1", "0", "2"))
    assert (codes, texts) == ([0, 0, 0], ["done\n"] * 3)


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_on_one_process_ends_the_others_for_good(tmp_path, failing):
    """Exit codes were [75, 2]: a launcher took the highest, and tried the same again, for ever."""
    hows = ["wait"] * 3
    hows[failing] = "fail"
    codes, texts = finish(start(tmp_path, *hows))
    assert codes == [EXIT_FAILED] * 3
    assert texts.pop(failing) == "bad rows\n"
    for text in texts:
        assert text.count(f"(process {failing} has failed)") == 1
        assert "Run the same command again" not in text


@pytest.mark.parametrize(("how", "says"), [("fill", "RESOURCE_EXHAUSTED"), ("lack", "no such")])
def test_an_error_that_is_not_about_others_is_not_a_lost_process(tmp_path, how, says):
    """NotImplementedError is a RuntimeError, and was taken for a collective's."""
    codes, texts = finish(start(tmp_path, "wait", how))
    assert codes == [EXIT_FAILED, 2]
    assert texts[1].startswith(says)


def test_a_collective_that_fails_asks_why(tmp_path):
    """The third process learns from its collective before the first one has told it."""
    codes, texts = finish(start(tmp_path, "wait", "fail", "hear0.5"))
    assert codes == [EXIT_FAILED] * 3
    assert "(process 1 has failed)" in texts[2]


def test_a_collective_that_fails_without_news_is_a_lost_process(tmp_path):
    codes, texts = finish(start(tmp_path, "wait", "wait", "hear0.5"))
    assert codes == [EXIT_LOST] * 3
    assert "Connection closed by peer" in texts[2]
    assert "(process 2 has ended)" in texts[1]


LOST = [  # as gloo, NCCL, XLA's coordination service and torch word it
    "FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: Connection closed by "
    "peer [127.0.0.1]:61374",
    "[external/gloo/gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:5: Connection reset",
    "INTERNAL: NCCL operation ncclGroupEnd() failed: unhandled system error",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting",
    "DEADLINE_EXCEEDED: Barrier timed out. Id: sync_global_devices:0",
    "UNAVAILABLE: failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.4:7733",
    "ABORTED: /job:jax_worker/replica:0/task:1 unexpectedly tried to connect",
    "The following tasks are unhealthy (stopped sending heartbeats): task:1",
    "CANCELLED: Coordination service has stopped. RecordHeartbeat() from task: 0",
    "Socket Timeout",
    "INTERNAL: CUDA error: Failed to synchronize: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC "
    "error encountered",
]
OWN = [
    RuntimeError("INTERNAL: CUDA error: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access"),
    RuntimeError("INVALID_ARGUMENT: Mosaic failed to compile the kernel"),
    RuntimeError("INTERNAL: ptxas exited with non-zero error code 65280"),
    RuntimeError("Array has been deleted with shape=float32[4]"),
    NotImplementedError("ProcessGroupNCCL does not support allgather of bool"),
    RecursionError("maximum recursion depth exceeded"),
]


@pytest.mark.parametrize("words", LOST)
def test_errors_of_collectives_are_told_from_what_others_said(words):
    error = RuntimeError(words)
    assert exit_status(error, None) == EXIT_LOST
    assert exit_status(error, News(GONE, 1)) == EXIT_LOST
    assert exit_status(error, News(FAILED, 1)) == EXIT_FAILED
    assert exit_status(ValueError(words), News(GONE, 1)) is None


@pytest.mark.parametrize("error", OWN, ids=lambda error: str(error)[:20])
def test_other_errors_are_our_own_unless_a_process_is_gone(error):
    assert exit_status(error, None) is None
    assert exit_status(error, News(FAILED, 1)) is None
    assert exit_status(error, News(GONE, 1)) == EXIT_LOST


def test_memory_that_runs_out_is_our_own_even_then():
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while running NCCL operation")
    assert exit_status(error, News(GONE, 1)) is None


def test_errors_without_a_watch_are_told_apart_too():
    with pytest.raises(NotImplementedError), peers.exit_when_one_is_lost(2):
        raise NotImplementedError("no such kernel")


def test_an_error_on_all_processes_is_said_by_each(tmp_path):
    """Not that the others are gone, which they are by then."""
    codes, texts = finish(start(tmp_path, "fail", "fail", "fail"))
    assert (codes, texts) == ([2, 2, 2], ["bad rows\n"] * 3)


def test_strangers_are_turned_away(tmp_path):
    first, second = start(tmp_path, "2", "2")
    port = next(p for p in open_ports(first.pid))
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 200):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(words)
    assert finish([first, second])[0] == [0, 0]


def open_ports(pid):
    """TCP ports that a process listens on, from /proc."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(link)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and words[9] in inodes:
            yield int(words[1].split(":")[1], 16)

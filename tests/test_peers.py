"""Processes that watch each other: real ones, which wait in what no collective would interrupt."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxchat.peers import EXIT_LOST

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


def test_an_error_on_one_process_ends_the_others(tmp_path):
    codes, texts = finish(start(tmp_path, "wait", "fail"))
    assert codes == [EXIT_LOST, 2]
    assert "process 1 has ended" in texts[0]
    assert texts[1] == "bad rows\n"


def test_memory_that_runs_out_is_not_a_lost_process(tmp_path):
    """A launcher would start the same run again, for ever."""
    codes, texts = finish(start(tmp_path, "wait", "fill"))
    assert codes == [EXIT_LOST, 2]
    assert texts[1].startswith("RESOURCE_EXHAUSTED")


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

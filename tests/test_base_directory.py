"""The base directory: what is written there appears whole, and a folder has one owner."""

import errno
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxchat import artifacts
from jaxchat.artifacts import atomic_write, base_dir, check_writable


def test_what_is_written_others_may_read(tmp_path):
    with atomic_write(tmp_path / "ours") as file:
        file.write("x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_cannot_be_written_to_is_known_before_and_nothing_is_left(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "folder", Path("/proc/folder")):
        with pytest.raises(OSError, match=r"cannot write to .*folder: .*; set JAXCHAT_BASE_DIR"):
            check_writable(place)


def test_a_claim_on_what_stays_empty_leaves_no_folder(tmp_path):
    empty, full = tmp_path / "empty", tmp_path / "full"
    with pytest.raises(ValueError, match="refused"), artifacts.claim(empty):
        raise ValueError("refused")
    assert not empty.exists()
    with artifacts.claim(full):
        (full / "file").touch()
    assert sorted(path.name for path in full.iterdir()) == [".claim", "file"]


@pytest.mark.parametrize("another", [True, False])
def test_a_claim_that_its_owner_removed_is_nobodys(tmp_path, monkeypatch, another):
    """Two who come as a third goes: one has opened the file that the third removes."""
    lock = artifacts.fcntl.flock

    def late(file, how):
        (tmp_path / ".claim").unlink()
        if another:
            (tmp_path / ".claim").touch()
        lock(file, how)

    monkeypatch.setattr(artifacts.fcntl, "flock", late)
    with pytest.raises(OSError, match="is in use by another process"), artifacts.claim(tmp_path):
        pytest.fail("it owns a file that is not there")


LOCKER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
file.write(sys.argv[2])
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by(owner, path):
    """Another process holds the claim, and has written who it is."""
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(path), owner],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.stdin.close()


def while_waiting(monkeypatch, act, *, attempts=3):
    """What happens at the one pause or the other, of a wait that lasts as long as some of them."""
    now, pauses = [0.0], []

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += artifacts.CLAIM_WAIT_SECONDS / attempts
        act()

    monkeypatch.setattr(artifacts.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(artifacts.time, "sleep", sleep)
    return pauses


FAR = "process 7 on node3 (boot 00000000)"


def test_a_claim_of_another_machine_is_waited_for(tmp_path, monkeypatch, capsys):
    """Its server keeps that of a node that has vanished: the run that went on was refused."""
    with held_by(FAR, tmp_path / ".claim") as process:

        def let_go():
            process.stdin.close()
            process.wait()

        pauses = while_waiting(monkeypatch, let_go)
        with artifacts.claim(tmp_path):
            assert artifacts._here() in (tmp_path / ".claim").read_text()
    assert len(pauses) == 1
    said = capsys.readouterr().out
    assert said.count("waiting") == 1
    assert said.startswith(f"{tmp_path} is in use by {FAR}: waiting")


def test_deleting_the_file_frees_the_claim_of_a_machine_that_has_died(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / ".claim"
    with held_by(FAR, path):
        pauses = while_waiting(monkeypatch, lambda: None)
        refused = rf"in use by process 7 on node3.*, or name this.*has died, delete {path}: that"
        with pytest.raises(OSError, match=refused), artifacts.claim(tmp_path):
            pytest.fail("two own it")
        assert len(pauses) == 3
        assert capsys.readouterr().out.count("waiting") == 1
        while_waiting(monkeypatch, path.unlink)
        with artifacts.claim(tmp_path):
            assert path.read_text() == f"process {os.getpid()} on {artifacts._here()}"


def test_a_claim_of_this_machine_is_not_waited_for(tmp_path, monkeypatch):
    pauses = while_waiting(monkeypatch, lambda: None)
    with (
        held_by(f"process 7 on {artifacts._here()}", tmp_path / ".claim"),
        pytest.raises(OSError, match=r"in use by process 7 .*--model-tag\)$"),
        artifacts.claim(tmp_path),
    ):
        pytest.fail("two own it")
    assert not pauses


@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_where_nothing_can_be_locked_a_warning_says_so_once(tmp_path, monkeypatch, capsys, code):
    """Lustre mounted without `-o flock` ended a run with "[Errno 38]"."""

    def flock(*_):
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(artifacts.fcntl, "flock", flock)
    for _ in range(2):
        with artifacts.claim(tmp_path), artifacts.lock(tmp_path / "file"):
            (tmp_path / "file").touch()
    said = capsys.readouterr().out
    assert said.count("warning") == 1
    assert f"files in {tmp_path} cannot be locked ({os.strerror(getattr(errno, code))})" in said


def test_a_base_directory_that_cannot_be_made_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    with pytest.raises(OSError, match=r"cannot write to .*base: .*; set JAXCHAT_BASE_DIR"):
        base_dir()


def test_an_atomic_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "sub" / "file"
    with atomic_write(path) as file:
        file.write("old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.write("half of the n" + str(file.write(b"ew")))
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_the_base_directory_is_ours_before_upstreams(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "theirs"))
    monkeypatch.delenv("JAXCHAT_BASE_DIR", raising=False)
    assert base_dir() == tmp_path / "theirs"
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path / "ours"))
    assert base_dir() == tmp_path / "ours"

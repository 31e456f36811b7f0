"""Checkpoints appear whole or not at all, and say what is wrong with them."""

import json
import os
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxchat import checkpoint
from jaxchat.checkpoint import CheckpointStore
from jaxchat.config import GPTConfig


class FileBackend:
    """A backend whose weights are one file; `wait` may fail, as a writer on a dying disk does."""

    name = "file"
    config = GPTConfig()
    devices = SimpleNamespace(processes=1)

    def __init__(self, *, fails=False):
        self.fails, self.loaded = fails, None

    def gather(self, value):
        return [value]

    def agree(self, asked):
        return asked

    def save(self, directory):
        (directory / "weights").write_text("weights" * 100)

    def wait(self):
        if self.fails:
            raise OSError("the disk is gone")

    def load(self, directory):
        text = (directory / "weights").read_text()
        if text != "weights" * 100:
            raise ValueError("truncated")
        self.loaded = directory


def saved(directory, steps=(10, 20, 30), keep=5):
    store = CheckpointStore(directory, keep=keep)
    for step in steps:
        store.save(step, FileBackend(), {"tokenizer": "t", "plan": {"lr": 0.02}})
    store.finish()
    return store


def test_the_newest_are_kept_in_order_of_number(tmp_path):
    store = saved(tmp_path, steps=(5, 10, 20, 100), keep=3)
    assert store.steps() == [10, 20, 100]
    assert store.read_meta(100)["plan"] == {"lr": 0.02}


def test_a_save_that_fails_leaves_no_checkpoint_and_is_reported(tmp_path):
    store = saved(tmp_path, steps=(10,))
    store.save(20, FileBackend(fails=True), {})
    with pytest.raises(OSError, match="the disk is gone"):
        store.finish()
    assert store.steps() == [10]
    assert not [p for p in tmp_path.glob("step_*") if p.suffix == "" and p.name != "step_000010"]


def test_what_a_killed_save_left_is_not_a_checkpoint_and_goes_away(tmp_path):
    store = saved(tmp_path, steps=(10,))
    leftover = tmp_path / "step_000020.tmp"
    leftover.mkdir()
    (leftover / "meta.json").write_text("{}")
    assert store.steps() == [10]
    store.save(20, FileBackend(), {})
    store.finish()
    assert store.steps() == [10, 20]
    assert not leftover.exists()


def test_a_full_disk_names_the_numbers_and_writes_nothing(tmp_path, monkeypatch):
    store = saved(tmp_path, steps=(10,))
    usage = namedtuple("usage", "free")(100)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"no room .* and 100 are free.*JAXCHAT_BASE_DIR"):
        store.save(20, FileBackend(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_000010"]


def test_restore_takes_the_newest_that_can_be_read(tmp_path, capsys):
    store = saved(tmp_path)
    (store.path(30) / "weights").write_text("weig")
    backend = FileBackend()
    meta = store.restore(backend, {"tokenizer": "t"})
    assert meta["step"] == 20
    assert backend.loaded == store.path(20)
    assert "skipping" in capsys.readouterr().out


def test_what_could_not_be_read_hides_nothing_that_is_saved_later(tmp_path, capsys):
    store = saved(tmp_path, keep=1, steps=(150,))
    saved(tmp_path, steps=(200,))
    (store.path(200) / "weights").write_text("damaged")
    assert store.restore(FileBackend(), {"tokenizer": "t"})["step"] == 150
    assert "step_000200.damaged: delete it" in capsys.readouterr().out
    assert (tmp_path / "step_000200.damaged" / "weights").read_text() == "damaged"
    store.save(160, FileBackend(), {})
    store.finish()
    assert store.steps() == [160]


def test_a_lower_step_is_not_deleted_as_soon_as_it_is_saved(tmp_path):
    saved(tmp_path, steps=(200,))
    store = saved(tmp_path, steps=(150, 160), keep=1)
    assert store.steps() == [160, 200]


def test_restore_refuses_another_run_and_says_what_differs(tmp_path):
    store = saved(tmp_path)
    with pytest.raises(ValueError, match=r"plan: lr 0.02, now 0.04"):
        store.restore(FileBackend(), {"plan": {"lr": 0.04}})
    with pytest.raises(ValueError, match=r"corpus: None, now f \(files of it were added, removed"):
        store.restore(FileBackend(), {"corpus": "f"})


def test_none_readable_ends_the_run_instead_of_beginning_anew(tmp_path, capsys):
    store = saved(tmp_path, steps=(10, 20))
    for step in store.steps():
        (store.path(step) / "weights").write_text("weig")
    with pytest.raises(OSError, match=r"\(steps 10, 20\).*--resume never"):
        store.restore(FileBackend(), {"tokenizer": "t"})
    assert capsys.readouterr().out.count("skipping") == 2
    assert store.steps() == [10, 20]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "one call late"])
def test_what_another_process_cannot_read_is_skipped_by_all(tmp_path, late, capsys):
    """The other process fails at step 30, and lists no step that this one does not see yet."""

    class OneOfTwo(FileBackend):
        def __init__(self):
            super().__init__()
            self.votes = [False]

        def gather(self, value):
            return [[10, 20, 30], value]

        def agree(self, asked):
            asks_first = len(self.votes) % 2
            elsewhere = bool(asks_first) and self.loaded == store.path(30)
            self.votes.append(asked or elsewhere)
            return self.votes[-2 if late else -1]

    store = saved(tmp_path, steps=(10, 20, 30, 40))
    backend = OneOfTwo()
    assert store.restore(backend, {"tokenizer": "t"})["step"] == 20
    assert backend.loaded == store.path(20)
    assert f"skipping {store.path(30)}, another process" in capsys.readouterr().out


def test_a_run_that_starts_over_sets_the_earlier_one_aside(tmp_path, capsys):
    """Its higher numbers outlived the new checkpoints, and were loaded in their place."""
    earlier = saved(tmp_path, steps=(10, 20, 30))
    earlier.note_validation(20, 1.0)
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "step_000040.tmp").mkdir()
    store = CheckpointStore(tmp_path, keep=2)
    with store.claim():
        store.set_aside(FileBackend())
        for step in (5, 15, 25):
            store.save(step, FileBackend(), {})
        store.finish()
    assert (store.steps(), store.best()) == ([15, 25], None)
    (aside,) = tmp_path.glob("replaced-*")
    assert not (aside / "step_000040.tmp").exists()
    assert (aside / "metrics.jsonl").exists() and not (tmp_path / "metrics.jsonl").exists()
    kept = CheckpointStore(aside)
    assert (kept.steps(), kept.best()) == ([10, 20, 30], 20)
    assert f"--model-tag {tmp_path.name}/{aside.name}" in capsys.readouterr().out


def test_where_no_run_was_nothing_is_set_aside(tmp_path, capsys):
    CheckpointStore(tmp_path / "run").set_aside(FileBackend())
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("rank", "seen"), [(0, [[10], [10], [], []]), (1, [[10]] * 4)])
def test_the_first_process_sets_aside_between_two_meetings(tmp_path, monkeypatch, rank, seen):
    monkeypatch.setenv("RANK", str(rank))
    steps_at_votes = []

    class Voting(FileBackend):
        def agree(self, asked):
            steps_at_votes.append(store.steps())
            return asked

    store = saved(tmp_path / "run", steps=(10,)) if rank == 0 else CheckpointStore(tmp_path / "run")
    if rank:
        store.path(10).mkdir(parents=True)
        (store.path(10) / "meta.json").write_text("{}")
    store.set_aside(Voting())
    assert steps_at_votes == seen


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_no_checkpoint_is_refused(tmp_path, keep):
    """0 kept all of them, and -1 deleted each as soon as it was written."""
    with pytest.raises(ValueError, match=f"--keep-checkpoints {keep}: give at least 1"):
        CheckpointStore(tmp_path, keep=keep)


def test_nothing_to_restore_is_none(tmp_path):
    assert CheckpointStore(tmp_path).restore(FileBackend(), {}) is None


def test_the_best_by_validation_outlives_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step, figure in ((10, 1.3), (20, 1.1), (30, 1.2), (40, 1.25), (50, 1.3)):
        store.save(step, FileBackend(), {})
        store.note_validation(step, figure)
    store.finish()
    assert store.best() == 20
    assert store.steps() == [20, 40, 50]
    store.note_validation(60, 0.5)  # was not saved, cannot be kept
    assert store.best() == 20


def test_a_run_that_went_back_forgets_a_best_it_has_not_reached_again(tmp_path):
    """The newest checkpoints were damaged: what comes after them may differ from what was."""
    store = saved(tmp_path, steps=(10, 20))
    store.note_validation(20, 1.0)
    store.save(20, FileBackend(), {})
    store.note_validation(20, 1.4)
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 20, "figure": 1.4}


@pytest.mark.parametrize("damage", ["", "{", "null"])
def test_a_half_written_meta_is_skipped_for_the_checkpoint_before(tmp_path, damage, capsys):
    store = saved(tmp_path)
    (store.path(30) / "meta.json").write_text(damage)
    assert store.restore(FileBackend(), {"tokenizer": "t"})["step"] == 20
    assert f"warning: skipping {store.path(30)}" in capsys.readouterr().out


def test_a_disk_that_fills_up_while_writing_costs_only_that_checkpoint(tmp_path):
    """The system itself refuses to write more than 500 bytes into a file."""
    store = saved(tmp_path, steps=(10,))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.save(20, FileBackend(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.restore(FileBackend(), {})["step"] == 10
    store.save(20, FileBackend(), {})
    store.finish()
    assert store.steps() == [10, 20]


def test_two_runs_cannot_own_one_folder(tmp_path):
    busy = pytest.raises(OSError, match=rf"in use by process {os.getpid()} on .*--model-tag")
    with CheckpointStore(tmp_path).claim(), busy, CheckpointStore(tmp_path).claim():
        pass
    with CheckpointStore(tmp_path).claim():
        pass


def test_the_claim_of_a_killed_process_is_free_again(tmp_path):
    words = "import sys, pathlib, time; from jaxchat.artifacts import claim\n"
    words += "with claim(pathlib.Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", words, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "mine\n"
        busy = pytest.raises(OSError, match=f"process {process.pid}")
        with busy, CheckpointStore(tmp_path).claim():
            pass
        process.kill()
    with CheckpointStore(tmp_path).claim():
        pass


def test_a_folder_that_cannot_be_written_is_named_before_anything_starts():
    """/proc refuses everybody, root included."""
    refused = pytest.raises(OSError, match=r"cannot write to /proc/run: .*; set JAXCHAT_BASE_DIR")
    with refused, CheckpointStore(Path("/proc/run")).claim():
        pass

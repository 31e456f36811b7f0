"""Checkpoints appear whole or not at all, and say what is wrong with them."""

import json
from collections import namedtuple

import pytest

from jaxchat import checkpoint
from jaxchat.checkpoint import CheckpointStore, check_tokenizer, find_model_tag, stage_directory
from jaxchat.config import GPTConfig
from jaxchat.tokenizer import Tokenizer


class FileBackend:
    """A backend whose weights are one file; `wait` may fail, as a writer on a dying disk does."""

    name = "file"
    config = GPTConfig()

    def __init__(self, *, fails=False):
        self.fails, self.loaded = fails, None

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
    store = saved(tmp_path, steps=(5, 10, 100, 20), keep=3)
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


def test_restore_refuses_another_run_and_says_what_differs(tmp_path):
    store = saved(tmp_path)
    with pytest.raises(ValueError, match=r"plan: lr 0.02, now 0.04"):
        store.restore(FileBackend(), {"plan": {"lr": 0.04}})


def test_nothing_to_restore_is_none(tmp_path):
    assert CheckpointStore(tmp_path).restore(FileBackend(), {}) is None


def test_the_deepest_model_is_found_or_the_missing_one_explained(base_dir):
    with pytest.raises(FileNotFoundError, match=r"python -m scripts\.base_train"):
        find_model_tag("base")
    with pytest.raises(FileNotFoundError, match=r"python -m scripts\.chat_sft"):
        find_model_tag("sft")
    for tag in ("d4", "d12", "wide"):
        saved(stage_directory("base", tag), steps=(1,))
    assert find_model_tag("base") == "d12"
    with pytest.raises(ValueError, match="source 'bass': choose one of base, mid"):
        stage_directory("bass", "d4")


def test_another_tokenizer_is_refused_by_name(tmp_path):
    tokenizer = Tokenizer.train(iter(["some text and some more text"]), vocab_size=270)
    check_tokenizer({"tokenizer": tokenizer.fingerprint}, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="was trained with tokenizer other"):
        check_tokenizer({"tokenizer": "other"}, tokenizer, tmp_path)


def test_a_step_that_is_not_there_lists_those_that_are(base_dir):
    saved(stage_directory("base", "d4"))
    with pytest.raises(FileNotFoundError, match="steps there: 10, 20, 30"):
        checkpoint.load_model("base", backend="jax", model_tag="d4", step=11)
    meta = json.loads((stage_directory("base", "d4") / "step_000010/meta.json").read_text())
    assert meta["backend"] == "file"

"""Metrics: a file that reads as if nothing had happened, and guests that cannot do harm."""

import json
import sys
from types import SimpleNamespace

import pytest

from jaxchat.tracker import Tracker, open_guests, read_metrics


def test_a_resumed_file_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    first = Tracker(path)
    for step in range(1, 6):
        first.log(step, {"train/loss": float(step)})
    first.log(3, {"val/bpb": 1.0})
    first.close()
    second = Tracker(path, resume_step=3)
    second.log(3, {"val/bpb": 1.0})
    second.log(4, {"train/loss": 4.5})
    second.close()
    rows = read_metrics(path)
    assert [(r["step"], r.get("train/loss")) for r in rows] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (3, None),
        (4, 4.5),
    ]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "train/loss": 2.0}) + '\n{"step": 2, "train/l')
    assert read_metrics(path) == [{"step": 1, "train/loss": 2.0}]


def test_a_guest_that_fails_is_dropped_and_the_file_goes_on(tmp_path, capsys):
    class Guest:
        calls = 0

        def log(self, step, scalars):
            self.calls += 1
            raise ConnectionError("the service is down")

        def close(self):
            raise AssertionError("a dropped guest is not closed")

    guest = Guest()
    tracker = Tracker(tmp_path / "metrics.jsonl", [guest])
    for step in range(3):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close()
    assert guest.calls == 1
    assert "Guest failed and is dropped: the service is down" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_guest_that_cannot_start_is_no_reason_not_to_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert open_guests(wandb_run="x", run_id="f00d", tensorboard=None, config={}) == []
    said = capsys.readouterr().out
    assert "training goes on without it" in said
    assert "`uv sync --extra track` installs it" in said


@pytest.mark.parametrize(
    ("login", "mode"),
    [(None, "offline"), ("WANDB_API_KEY", None), ("netrc", None), ("WANDB_MODE", None)],
)
def test_wandb_is_offline_only_without_a_login_and_says_so(
    tmp_path, monkeypatch, capsys, login, mode
):
    asked = {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kw: asked.update(kw)))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if login == "netrc":
        (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password key\n")
    elif login:
        monkeypatch.setenv(login, "online")
    assert len(open_guests(wandb_run="x", run_id="f00d", tensorboard=None, config={})) == 1
    assert asked["mode"] == mode
    assert (asked["id"], asked["resume"]) == ("f00d", "allow"), "one run, however often it resumes"
    assert ("wandb has no key" in capsys.readouterr().out) == (mode == "offline")


def test_nobody_asked_means_no_guest():
    assert open_guests(wandb_run=None, run_id="f00d", tensorboard=None, config={}) == []
    assert open_guests(wandb_run="dummy", run_id="f00d", tensorboard=None, config={}) == []


def test_what_is_not_finite_is_null_in_the_file_and_nan_again_when_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = Tracker(path)
    tracker.log(1, {"train/loss": float("nan"), "train/mfu": 0.5})
    tracker.close()
    assert path.read_text() == '{"step": 1, "train/loss": null, "train/mfu": 0.5}\n'
    Tracker(path, resume_step=1).close()
    [row] = read_metrics(path)
    assert row["train/loss"] != row["train/loss"]

"""The order in which the loop saves, evaluates and samples, and how it ends.

The backend only keeps a diary: that real ones resume exactly is tests/test_resume.py's subject.
"""

import json
import math
import os
import signal
import time
from contextlib import closing, nullcontext
from dataclasses import replace

import numpy as np
import pytest

from jaxchat.backend import DeviceInfo
from jaxchat.dataloader import Batch
from jaxchat.schedule import StepSchedule
from jaxchat.spikes import SpikeRule
from jaxchat.tracker import METRICS, Tracker, read_metrics
from jaxchat.train_loop import run_loop
from jaxchat.training_stage import LoopConfig, Stage


class OnItsWay:
    """A scalar still on the device; says so when the host waits for it."""

    def __init__(self, value, on_read):
        self.value, self.on_read = value, on_read

    def __float__(self):
        self.on_read()
        return float(self.value)


class Diary:
    """Backend, loader and checkpoint store at once: writes down what it is asked to do."""

    devices = DeviceInfo("cpu", 1, "a diary", 1e9)

    def __init__(self):
        self.entries, self.weights, self.on_step, self.on_share = [], [], None, None
        self.losses, self.handed_out = {}, 0
        self.saved, self.limits, self.schedules, self.validated = [], [], [], []
        self.reads = []
        """(step, steps that had been dispatched when its loss was read)."""

    def __next__(self):
        self.handed_out += 1
        rows = np.zeros((4, 8), np.int32)
        return Batch(rows, rows, np.ones((4, 8), np.float32), {"train/reward": 0.25})

    @property
    def position(self):
        return self.handed_out

    @property
    def passes(self):
        return self.handed_out / 4

    def state(self, position=None):
        return {"read": self.position if position is None else position}

    def gather(self, value):
        return [value]

    def train_step(self, inputs, targets, schedule, weights, limits):
        assert inputs.shape == targets.shape == weights.shape == (2, 2, 8)
        self.entries.append("train")
        self.limits.append(limits)
        if self.on_step is not None:
            self.on_step(self.entries.count("train"))
        loss = self.losses.get(self.entries.count("train"), 2.0)
        skipped = not (math.isfinite(loss) and loss <= limits.loss)
        step = self.entries.count("train")
        return {
            "loss": OnItsWay(loss, lambda: self.reads.append((step, self.entries.count("train")))),
            "grad_norm": np.float32(1),
            "skipped": np.float32(skipped),
        }

    def save(self, step, backend, meta):
        self.entries.append(f"save {step} after {meta['loader']['read']}")
        self.saved.append(meta)

    def note_validation(self, step, figure):
        self.validated.append((step, figure))

    def finish(self):
        self.entries.append("finish")


@pytest.fixture
def diary(tmp_path):
    diary = Diary()
    diary.directory = tmp_path

    def run(*, start=None, stage=None, **config):
        def evaluate(on_progress):
            diary.entries.append("evaluate")
            for share in (0.5, 1.0):
                if diary.on_share is not None:
                    diary.on_share(share)
                on_progress(share)
            return {"val/bpb": 1.5}

        def sample():
            diary.entries.append("sample")
            return [("Once", f"upon {diary.entries.count('sample')}")]

        def schedule(step):
            diary.schedules.append(step)
            return StepSchedule(1.0, 0.9, 0.0)

        tracker = Tracker(tmp_path / METRICS)
        default = Stage(
            backend=diary,
            loader=diary,
            schedule=schedule,
            store=diary,
            tracker=tracker,
            meta={},
            evaluate=evaluate,
            sample=sample,
            wall_seconds=lambda: 100.0 + diary.position,
        )
        loop = LoopConfig(micro_batches=2, flops_per_token=1000.0, **config)
        with closing(tracker):
            result = run_loop(replace(default, **(stage or {})), loop, **(start or {}))
        return result, read_metrics(tmp_path / METRICS)

    diary.run = run
    return diary


def test_a_checkpoint_comes_before_anything_else_of_its_step(diary):
    result, _ = diary.run(num_iterations=4, eval_every=2, save_every=2, sample_every=2)
    assert diary.entries == [
        *("evaluate", "train", "train"),
        *("save 2 after 2", "evaluate", "sample", "train", "train"),
        *("save 4 after 4", "evaluate", "sample", "finish"),
    ]
    assert (result.step, result.interrupted) == (4, False)
    assert result.samples == [("Once", "upon 2")], "those of the final weights, for the report"
    assert result.wall_seconds == diary.saved[-1]["wall_seconds"] == 104
    assert diary.schedules == [0, 1, 2, 3]


def test_every_step_is_logged_once_with_what_the_loader_measured(diary, capsys):
    _, rows = diary.run(num_iterations=3)
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["train/epoch"] for row in steps] == [0.25, 0.5, 0.75]
    for row in steps:
        assert row["train/reward"] == 0.25
        assert row["train/batch_tokens"] == 32
        speed = row["train/tokens_per_second"]
        assert row["train/mfu"] == pytest.approx(speed * 1000.0 / 1e9)
    assert [row["step"] for row in rows if "val/bpb" in row] == [0, 3]
    shown = capsys.readouterr().out
    assert "reward 0.2500" in shown
    assert "epoch 0.75" in shown


def test_what_is_being_saved_arrives_whatever_ends_the_run(diary):
    def fail(step):
        if step == 3:
            raise ValueError("bad data")

    diary.on_step = fail
    with pytest.raises(ValueError, match="bad data"):
        diary.run(num_iterations=4, save_every=2)
    assert diary.entries == ["evaluate", "train", "train", "save 2 after 2", "train", "finish"]


def test_the_speed_of_the_last_step_before_a_pause_is_no_fancy(diary):
    """A backend that has computed when a step returns is asked for its last figures at once."""
    diary.on_step = lambda _: time.sleep(0.02)
    _, rows = diary.run(num_iterations=6, eval_every=3)
    speeds = [row["train/tokens_per_second"] for row in rows if "train/loss" in row]
    assert len(speeds) == 6
    assert max(speeds) < 1.2 * 32 / 0.02


def test_a_step_is_read_after_the_next_has_been_dispatched(diary):
    """Else the device would wait for the host; only what has to know the weights may ask before."""
    diary.run(num_iterations=6, save_every=4)
    assert diary.reads == [(1, 2), (2, 3), (3, 4), (4, 4), (5, 6), (6, 6)]


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["num_iterations", "eval_every", "save_every", "sample_every"])
def test_a_loop_that_cannot_be_is_refused_by_its_flag(name, value):
    """-1 was every step, and 0 divided by zero."""
    given = {"num_iterations": 4, "micro_batches": 1, "flops_per_token": 1.0, name: value}
    with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} {value}: "):
        LoopConfig(**given)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_loop_after_its_step_is_saved(diary, name, capsys):
    before = signal.getsignal(signal.SIGTERM)
    diary.on_step = lambda count: count == 2 and os.kill(os.getpid(), getattr(signal, name))
    result, rows = diary.run(num_iterations=100)
    assert (result.step, result.interrupted) == (2, True)
    assert diary.entries[-2:] == ["save 2 after 2", "finish"]
    assert rows[-1]["step"] == 2
    said = capsys.readouterr().out
    assert f"stopped by {name}; step 2 is saved; the same command continues from there" in said
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_spike_is_skipped_kept_and_counted(diary, tmp_path, capsys):
    """Step 40 is far above a steady loss, step 45 is not a number: both leave their batch."""
    diary.losses = {40: 7.0, 45: float("nan")}
    result, rows = diary.run(num_iterations=50)
    assert result.step == 50
    assert [row["step"] for row in rows if "train/skipped" in row] == [40, 45]
    evidence = json.loads((tmp_path / "skipped" / "step_000040.0.json").read_text())
    assert evidence["loss"] == 7.0
    assert evidence["limits"]["loss"] == pytest.approx(2 * 1.12)
    assert evidence["loader"] == {"read": 39}  # before its batch, whatever has been read since
    with np.load(tmp_path / "skipped" / "step_000045.0.npz") as batch:
        assert sorted(batch) == ["inputs", "targets", "weights"]
        assert batch["inputs"].shape == (4, 8)
    assert "step 45 skipped: loss nan" in capsys.readouterr().out
    assert math.isnan(next(r for r in rows if r["step"] == 45 and "train/loss" in r)["train/loss"])


def steady(steps):
    """The guard's state after so many steps of loss 2."""
    return {"seen": [[step, 2.0, 1.0, False] for step in range(steps)]}


def test_a_continued_run_knows_what_a_spike_is(diary):
    start = {"start_step": 40, "guard_state": steady(40), "train_seconds": 1000.0}
    diary.losses = {2: 7.0}
    result, rows = diary.run(num_iterations=43, start=start)
    assert [row["step"] for row in rows if "train/skipped" in row] == [42]
    assert result.train_seconds > 1000
    (saved,) = diary.saved
    assert saved["train_seconds"] == result.train_seconds
    assert saved["guard"]["seen"][:40] == steady(40)["seen"]
    assert [row[0] for row in saved["guard"]["seen"][40:]] == [40, 41, 42], "the newest included"


def test_limits_know_the_steps_that_every_run_knows_then(diary):
    """Those before the last: the last is still on its way, unless a save has just waited for it."""
    diary.run(num_iterations=40, save_every=32)
    first = next(i for i, limits in enumerate(diary.limits) if math.isfinite(limits.loss))
    assert first == SpikeRule().min_history + 1


def test_the_figure_that_decides_is_told_with_its_step(diary):
    diary.run(num_iterations=4, eval_every=2, stage={"best_by": "val/bpb"})
    assert diary.validated == [(0, 1.5), (2, 1.5), (4, 1.5)]


def test_all_processes_stop_when_one_is_asked_to(diary, capsys):
    result, _ = diary.run(num_iterations=9, stage={"agree": lambda asked: diary.position == 3})
    assert (result.step, result.interrupted) == (3, True)
    assert "stopped by another process; step 3 is saved" in capsys.readouterr().out


def test_a_run_that_is_asked_to_stop_at_its_end_has_finished(diary):
    diary.on_step = lambda count: count == 3 and os.kill(os.getpid(), signal.SIGTERM)
    result, _ = diary.run(num_iterations=3)
    assert (result.step, result.interrupted) == (3, False)
    assert diary.entries[-3:] == ["evaluate", "sample", "finish"]


@pytest.mark.parametrize("save_every", [2, 3])
def test_an_evaluation_does_not_keep_a_signal_waiting(diary, save_every, capsys):
    """One of a large split takes longer than a job has between its warning and its end."""

    def interrupt(share):
        if share == 0.5 and diary.handed_out == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    diary.on_share = interrupt
    result, rows = diary.run(num_iterations=9, eval_every=2, save_every=save_every)
    assert (result.step, result.interrupted) == (2, True)
    saved = "save 2 after 2"
    both = [saved, "evaluate"] if save_every == 2 else ["evaluate", saved]
    assert diary.entries == ["evaluate", "train", "train", *both, "finish"]
    assert [row["step"] for row in rows if "val/bpb" in row] == [0]
    assert "step 2 is saved" in capsys.readouterr().out


def test_a_signal_before_the_first_step_leaves_nothing(diary, capsys):
    diary.on_share = lambda share: os.kill(os.getpid(), signal.SIGTERM)
    result, _ = diary.run(num_iterations=9)
    assert (result.step, result.interrupted) == (0, True)
    assert diary.entries == ["evaluate", "finish"]
    assert "stopped by SIGTERM; no step was done" in capsys.readouterr().out


def test_the_last_evaluation_is_finished_whoever_asks(diary):
    diary.on_share = lambda _: diary.handed_out == 3 and os.kill(os.getpid(), signal.SIGTERM)
    result, rows = diary.run(num_iterations=3)
    assert (result.step, result.interrupted) == (3, False)
    assert rows[-1] == {**rows[-1], "step": 3, "val/bpb": 1.5}


def test_a_second_interrupt_does_not_wait_for_the_step(diary):
    def twice(count):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    diary.on_step = twice
    with pytest.raises(KeyboardInterrupt):
        diary.run(num_iterations=3)


def test_the_tokens_of_all_processes_count(diary, monkeypatch):
    monkeypatch.setattr(diary, "devices", DeviceInfo("cpu", 2, "two diaries", None, processes=2))
    monkeypatch.setattr("jaxchat.peers.exit_when_one_is_lost", lambda *_: nullcontext())
    _, rows = diary.run(num_iterations=1)
    assert [row["train/batch_tokens"] for row in rows if "train/loss" in row] == [64]


def test_too_many_spikes_end_the_run_and_say_where_to_look(diary):
    diary.losses = dict.fromkeys(range(3, 50), float("inf"))
    with pytest.raises(ValueError, match=r"step 7: 5 of the last 7 .* loss inf .*skipped; look at"):
        diary.run(num_iterations=50, spikes=SpikeRule(max_skipped=5))

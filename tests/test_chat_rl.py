"""The script of reinforcement learning: what it pays for, writes down, and continues exactly."""

import shutil

import numpy as np
import pytest

from jaxchat import cli
from jaxchat.backend import backend_class
from jaxchat.checkpoint import CheckpointStore
from jaxchat.report import Report
from jaxchat.stages import stage_directory
from jaxchat.tasks.arithmetic import Arithmetic
from jaxchat.tracker import read_metrics
from scripts import chat_rl
from tests.models import assert_same_arrays
from tests.test_finetune import make_base

STEPS = 4


class Lucky(Arithmetic):
    """Pays for replies that begin with an even byte: half of what an untrained model says."""

    def evaluate(self, problem, reply):
        return bool(reply) and ord(reply[0]) % 2 == 0


@pytest.fixture(params=[pytest.param("jax", marks=pytest.mark.slow), "torch"])
def backend(request, tmp_path, monkeypatch):
    """The name of a backend; the base directory has a model of its making."""
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(chat_rl, "rl_tasks", lambda source: (Lucky("train", 40), Lucky("test", 20)))
    make_base(tmp_path, request.param)
    return request.param


def run(backend, *words):
    fixed = (
        f"-i base -g tiny --num-iterations {STEPS} --questions 4 --samples 4 --max-tokens 4 "
        f"--slots 8 --device-batch-size {1 if backend == 'jax' else 8} --lr-frac 1 --eval-every 2 "
        f"--eval-questions 4 --eval-samples 4 --save-every 2 --backend {backend}"
    ).split()
    chat_rl.main(cli.parse(chat_rl.Config, [*fixed, *words]))
    return CheckpointStore(stage_directory("rl", "tiny"), keep=9)


def metrics(store, name):
    rows = read_metrics(store.directory / "metrics.jsonl")
    return {row["step"]: row[name] for row in rows if name in row}


def params(store, backend):
    return backend_class(backend).read(store.path(STEPS), optimizer=False).params


def test_a_stopped_run_continues_exactly_and_reports(backend, tmp_path, capsys):
    """The second half again, from the checkpoint before it: the same rollouts and weights."""
    store = run(backend)
    rewards, weights = metrics(store, "train/reward"), params(store, backend)
    assert sorted(rewards) == [1, 2, 3, 4]
    assert 0 < np.mean(list(rewards.values())) < 1
    assert sorted(metrics(store, "val/pass@4")) == [0, 2, 4]
    before = (
        backend_class(backend)
        .read(CheckpointStore(stage_directory("base", "tiny")).path(3), optimizer=False)
        .params
    )
    assert any(not np.array_equal(value, before[name]) for name, value in weights.items())
    assert store.read_meta(STEPS)["config"]["remat"] == "none"  # a later stage inherits savings
    sections = {section.stage: section for section in Report(tmp_path).sections()}
    assert {"pass@1", "pass@2", "pass@4"} == set(sections["chat_rl"].figures)

    shutil.rmtree(store.path(STEPS))
    run(backend)
    assert metrics(store, "train/reward") == rewards
    assert_same_arrays(params(store, backend), weights)
    with pytest.raises(ValueError, match=r"belongs to another run:\n.*temperature 1.0, now 0.5"):
        run(backend, "--temperature", "0.5")


def test_rates_fall_towards_nothing_and_held_out_questions_judge(backend, monkeypatch):
    judged, measure = [], chat_rl.pass_at_k
    monkeypatch.setattr(
        chat_rl,
        "pass_at_k",
        lambda task, *rest, **options: judged.append(task) or measure(task, *rest, **options),
    )
    rates = metrics(run(backend), "train/lr_multiplier")
    assert list(rates.values()) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert {task.fingerprint for task in judged} == {Lucky("test", 20).fingerprint}


def test_a_run_that_starts_over_is_what_is_loaded_later(backend):
    run(backend, "--num-iterations", "2")
    store = run(backend, "--num-iterations", "1", "--resume", "never")
    assert store.steps() == [1]
    (aside,) = store.directory.glob("replaced-*")
    assert CheckpointStore(aside).steps() == [2]


def test_the_result_may_have_another_name(backend):
    run(backend, "--num-iterations", "1", "--output-tag", "other")
    assert CheckpointStore(stage_directory("rl", "other")).steps() == [1]
    assert CheckpointStore(stage_directory("rl", "tiny")).steps() == []
    again = ["-i", "rl", "-g", "other", "--num-iterations", "1"]
    with pytest.raises(ValueError, match="the place of rl model 'other'"):
        run(backend, *again)
    run(backend, *again, "--output-tag", "third")
    assert CheckpointStore(stage_directory("rl", "third")).steps() == [1]


def test_a_mesh_changes_nothing(backend):
    if backend == "torch":
        with pytest.raises(ValueError, match="--mesh fsdp=8: torch divides rows alone"):
            run(backend, "--mesh", "fsdp=8")
        return
    losses = [
        metrics(run(backend, "--mesh", mesh, "--resume", "never"), "train/loss")
        for mesh in ("auto", "data=2,fsdp=4")
    ]
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-5)


@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_run_of_no_steps_is_refused(value, capsys):
    """0 was one pass over the questions."""
    with pytest.raises(SystemExit):
        cli.parse(chat_rl.Config, ["--num-iterations", value])
    assert f"--num-iterations {value}: must be above 0" in capsys.readouterr().err


def test_rollouts_must_divide_into_micro_batches(backend):
    with pytest.raises(ValueError, match="are not a multiple of device_batch_size=3"):
        run(backend, "--device-batch-size", "3")

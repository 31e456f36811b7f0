"""The script of reinforcement learning: what it pays for, writes down, and continues exactly."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from jaxchat import cli
from jaxchat.backend import backend_class
from jaxchat.checkpoint import META, CheckpointStore
from jaxchat.config import OptimizerConfig
from jaxchat.finetune_options import Inherited
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


def config_of(backend, *words):
    fixed = (
        f"-i base -g tiny --num-iterations {STEPS} --questions 4 --samples 4 --max-tokens 4 "
        f"--slots 8 --device-batch-size {1 if backend == 'jax' else 8} --lr-frac 1 --eval-every 2 "
        f"--eval-questions 4 --eval-samples 4 --save-every 2 --backend {backend}"
    ).split()
    return cli.parse(chat_rl.Config, [*fixed, *words])


def run(backend, *words):
    chat_rl.main(config_of(backend, *words))
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
    run(backend, "--slots", "4")  # what to do when memory runs out: it changes no reply
    assert metrics(store, "train/reward") == rewards
    assert_same_arrays(params(store, backend), weights)
    with pytest.raises(ValueError, match=r"belongs to another run:\n.*temperature 1.0, now 0.5"):
        run(backend, "--temperature", "0.5")
    path = store.path(STEPS) / META
    meta = json.loads(path.read_text())
    assert "slots" not in meta["rollouts"]
    meta["rollouts"]["slots"] = 64  # as checkpoints had it that are older than this test
    path.write_text(json.dumps(meta))
    run(backend)
    assert metrics(store, "train/reward") == rewards


def test_rates_fall_towards_nothing_and_held_out_questions_judge(backend, monkeypatch):
    judged, measure = [], chat_rl.pass_at_k
    monkeypatch.setattr(
        chat_rl,
        "pass_at_k",
        lambda task, *rest, **options: judged.append(task) or measure(task, *rest, **options),
    )
    store = run(backend, "--eval-samples", "1")  # refused as a group of one once
    assert set(metrics(store, "val/pass@1")) == {0, 2, 4}
    assert not metrics(store, "val/pass@2")
    rates = metrics(store, "train/lr_multiplier")
    assert list(rates.values()) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert {task.fingerprint for task in judged} == {Lucky("test", 20).fingerprint}


def test_memory_is_saved_as_asked(backend):
    """The same steps but for rounding, and the checkpoint says how."""
    rewards = metrics(run(backend, "--num-iterations", "1"), "train/reward")
    run(backend, "--num-iterations", "1", "--remat", "block", "--output-tag", "saved")
    store = CheckpointStore(stage_directory("rl", "saved"))
    assert store.read_meta(1)["config"]["remat"] == "block"
    assert metrics(store, "train/reward") == rewards


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
    config = config_of(backend, "-i", "rl", "--num-iterations", "1", "--output-tag", "third")
    for _ in range(2):  # once more, as after a kill: the newest model is its own result now
        chat_rl.main(replace(config, model_tag=None))
    third = CheckpointStore(stage_directory("rl", "third"))
    other = CheckpointStore(stage_directory("rl", "other")).read_meta(1)
    assert third.read_meta(1)["source"]["run"] == other["run"]


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max-tokens 0", "--max-tokens 0: must be above 0"),
        ("--questions 0", "--questions 0: must be above 0"),
        ("--slots 0", "--slots 0: must be above 0"),
        ("--lr-frac 0", "--lr-frac 0.0: must be above 0"),
        ("--lr-frac inf", "--lr-frac inf: must be at least 0, and finite"),
        ("--lr-frac nan", "--lr-frac nan: must be above 0"),
        ("--keep-checkpoints 0", "--keep-checkpoints 0: must be above 0"),
        ("--temperature 0", "16 samples at temperature 0 are one reply 16 times"),
        ("--top-k 1", "16 samples at top_k 1 are one reply 16 times: set --top-k 50"),
        ("--eval-questions 0", "--eval-questions 0: must be above 0"),
        ("--eval-samples 0", "--eval-samples 0: must be above 0"),
        ("--temperature -1", "--temperature -1.0: must be at least 0"),
        ("--temperature nan", "--temperature nan: must be at least 0"),
        ("--eval-every 0", "--eval-every 0: must be above 0"),
        ("--save-every -1", "--save-every -1: must be above 0"),
        ("--seed -1", "--seed -1: give a number from 0"),
        ("--samples 1", "samples=1 at least 2"),
        ("--top-k -1", "top_k=-1"),
    ],
)
def test_a_value_out_of_range_is_refused_at_once(words, message, capsys):
    """Some ended a run at its first reply, one after its first step of measuring nothing."""
    with pytest.raises(SystemExit):
        cli.parse(chat_rl.Config, words.split())
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_rates_are_the_base_runs_whatever_finetuning_made_of_its_batch():
    """After little data they were 0.088 of what they are called."""
    base = {"plan": {"total_batch_size": 2**19}}
    finetuned = {"plan": {"total_batch_size": 4096}, **Inherited.of(base).meta}
    config = chat_rl.Config(lr_frac=0.05)
    for meta in (base, finetuned):
        plan, optimizer = chat_rl.plan_of(config, SimpleNamespace(meta=meta), Lucky("train", 40))
        assert (plan.total_batch_size, plan.lr_scale) == (2**19, 1)
        assert optimizer == OptimizerConfig().scaled(0.05)


@pytest.mark.parametrize(
    ("questions", "samples", "devices", "rows"),
    [(16, 16, 1, 8), (2, 2, 1, 4), (3, 3, 1, 3), (7, 2, 1, 7), (5, 2, 2, 5), (11, 11, 1, 1)],
)
def test_few_rollouts_shrink_the_micro_batch_by_themselves(questions, samples, devices, rows):
    """`--questions 2 --samples 2` was refused for a default."""
    config = chat_rl.Config(questions=questions, samples=samples)
    assert chat_rl.settled_rows(config, devices) == rows


def test_rollouts_of_a_micro_batch_are_those_asked_for_where_they_divide_a_devices_share():
    config = chat_rl.Config(questions=4, samples=6)  # 12 for each of two devices
    for rows in (12, 6):
        assert chat_rl.settled_rows(replace(config, device_batch_size=rows), 2) == rows
    with pytest.raises(ValueError, match=r"=8 x 2 device\(s\); use --device-batch-size 4$"):
        chat_rl.settled_rows(replace(config, device_batch_size=8), 2)


@pytest.mark.parametrize(("problems", "steps"), [(3, 1), (16, 1), (47, 2)])
def test_one_pass_takes_at_least_one_step(problems, steps):
    model = SimpleNamespace(meta={"plan": {"total_batch_size": 4096}})
    config = chat_rl.Config(questions=16)
    plan, _ = chat_rl.plan_of(config, model, Lucky("train", problems))
    assert plan.num_iterations == steps


def test_rollouts_that_do_not_divide_over_devices_name_the_questions():
    with pytest.raises(ValueError, match=r"not a multiple of 8 devices; use --questions 8$"):
        chat_rl.settled_rows(chat_rl.Config(questions=3, samples=3), 8)


def test_rollouts_must_divide_into_micro_batches(backend):
    with pytest.raises(ValueError, match="are not a multiple of device_batch_size=3"):
        run(backend, "--device-batch-size", "3")
    assert not stage_directory("rl", "tiny").exists()

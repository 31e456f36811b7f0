"""Every script on `--backend torch`: a toy is trained, scored, evaluated and talked to."""

import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from jaxchat import cli, embedded_corpus
from jaxchat.backend import backend_class
from jaxchat.checkpoint import CheckpointStore
from jaxchat.dataloader import PackedLoader
from jaxchat.dataset import open_corpus
from jaxchat.report import Report, Subject, subject_of
from jaxchat.report_page import render
from jaxchat.scaling import read_runs
from jaxchat.server import serve
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import read_metrics
from scripts import (
    base_eval,
    base_loss,
    base_train,
    chat_cli,
    chat_eval,
    chat_rl,
    chat_sft,
    chat_web,
    infer_bench,
    mid_train,
)

ROOT = Path(__file__).parents[1]
WORDS = "the a model reads writes token step loss of and learns from every"
STEPS = 4
OPTIONS = (
    "--depth 2 --aspect-ratio 16 --head-dim 16 --sequence-len 256 --device-batch-size 1 "
    f"--total-batch-size 2048 --num-iterations {STEPS} --eval-every 4 --eval-tokens 512 "
    "--save-every 2 --sample-every 100 --keep-checkpoints 5 --model-tag tiny"
)

TORCH = "--backend torch -g tiny"

LESSON = "--data offline --num-iterations 2 --eval-tokens 512"

ROLLOUTS = "--questions 2 --samples 2 --max-tokens 8 --device-batch-size 2 --slots 2"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A toy gains nothing from a second one, and beside other work the two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base directory with a tokenizer, and a folder of text."""
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


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(world))
    monkeypatch.setattr(embedded_corpus, "DISTRIBUTIONS", ("networkx",))
    monkeypatch.setattr(embedded_corpus.sysconfig, "get_path", lambda _: str(world / "nothing"))
    return world


def run(script, command):
    script.main(cli.parse(script.Config, command.split()))


def train(base, backend):
    run(base_train, f"{OPTIONS} --corpus {base / 'text'} --backend {backend}")


def losses(base):
    rows = read_metrics(base / "base_checkpoints/tiny/metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture
def trained(here):
    """The base directory after `base_train --backend torch`, which runs once."""
    if not (here / "base_checkpoints/tiny").exists():
        train(here, "torch")
    return here


@pytest.fixture
def finetuned(trained):
    """After `mid_train` and `chat_sft` too."""
    if not (trained / "chatsft_checkpoints/tiny").exists():
        run(mid_train, f"{LESSON} {TORCH}")
        run(chat_sft, f"{LESSON} {TORCH}")
    return trained


def stages(base):
    return {section.stage for section in Report(base).sections()}


def test_pretraining_and_its_evaluations_run(trained, capsys):
    store = CheckpointStore(trained / "base_checkpoints/tiny")
    assert store.steps() == [2, STEPS]
    assert store.read_meta(STEPS)["backend"] == "torch"
    assert sorted(losses(trained)) == list(range(1, STEPS + 1))
    run(base_loss, f"--corpus {trained / 'text'} --split-tokens 1024 {TORCH}")
    assert "val: " in capsys.readouterr().out
    run(base_eval, f"--max-per-task 4 {TORCH}")
    assert "embedded tasks, not CORE" in capsys.readouterr().out
    scores = (store.path(STEPS) / "base_eval.csv").read_text().splitlines()
    assert scores[-1].startswith('"embedded tasks, not CORE"')
    [tiny] = read_runs("tiny")
    assert (tiny.tokens, tiny.core) == (STEPS * 2048, None)
    run(chat_cli, f"-i base -p model --max-tokens 8 {TORCH}")
    assert capsys.readouterr().out.strip()
    subject = Subject("base", "tiny", store.read_meta(STEPS)["run"], STEPS)
    told = {s.stage: subject_of(s) for s in Report(trained).sections()}
    assert told["base_train"] == told["base_loss"] == told["base_eval"] == subject


def test_the_chat_stages_run(finetuned, capsys):
    """Both finetunings, reinforcement learning, tasks of both kinds, and a reply."""
    for folder in ("mid", "chatsft"):
        store = CheckpointStore(finetuned / f"{folder}_checkpoints/tiny")
        assert store.read_meta(2)["backend"] == "torch"
    judged = "--eval-questions 2 --eval-samples 2"
    run(chat_rl, f"--data offline --num-iterations 2 {ROLLOUTS} {judged} {TORCH}")
    assert "pass@1" in capsys.readouterr().out
    run(chat_eval, f"-i rl -a Arithmetic|Documentation -x 2 {TORCH}")
    assert "Documentation" in capsys.readouterr().out
    run(chat_cli, f"-p Hello --max-tokens 8 {TORCH}")
    assert stages(finetuned) >= {"mid_train", "chat_sft", "chat_rl", "chat_eval_rl"}


def test_the_server_answers_and_stops(finetuned, monkeypatch):
    """In this process: a client in a thread waits for it, asks, and sends SIGTERM."""
    # where a test before has left a thread behind, it would end pytest too, and with status 0
    monkeypatch.setattr(serve, "leave", lambda: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = []
    client = threading.Thread(target=ask_then_stop, args=(port, answers))
    client.start()
    run(chat_web, f"--port {port} --slots 2 {TORCH}")
    client.join()
    (usage,) = answers
    assert usage["completion_tokens"] > 0


def ask_then_stop(port, answers):
    """One chat completion, then SIGTERM to this process, whatever the answer was."""
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while not is_ready(url) and time.monotonic() < deadline:
            time.sleep(0.1)
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        reply = httpx.post(url + "/v1/chat/completions", json=body, timeout=60)
        answers.append(reply.raise_for_status().json()["usage"])
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def is_ready(url):
    try:
        return httpx.get(url + "/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_the_benchmark_measures_one_backend_alone(finetuned, capsys):
    sizes = "--batch-sizes 1 --prompt-tokens 8 --new-tokens 4 --rounds 1"
    run(infer_bench, f"{sizes} --backend torch --model-tag tiny")
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["backend"] for row in document["results"]] == ["torch"]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("torch", "jax"), ("jax", "torch")])
def test_resume_auto_continues_the_other_backends_run(
    here, tmp_path, monkeypatch, capsys, first, second
):
    """The second half on the other backend gives the losses of a run that stayed."""
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path))
    for shared in ("tokenizer", "text"):
        (tmp_path / shared).symlink_to(here / shared)
    train(tmp_path, first)
    whole = losses(tmp_path)
    shutil.rmtree(CheckpointStore(tmp_path / "base_checkpoints/tiny").path(STEPS))
    capsys.readouterr()
    train(tmp_path, second)
    assert "continuing tiny at step 2" in capsys.readouterr().out
    mixed = losses(tmp_path)
    assert sorted(mixed) == sorted(whole)
    assert [mixed[step] for step in (1, 2)] == [whole[step] for step in (1, 2)]
    np.testing.assert_allclose(list(mixed.values()), list(whole.values()), atol=1e-4)
    assert CheckpointStore(tmp_path / "base_checkpoints/tiny").read_meta(STEPS)["backend"] == second


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_skipped_steps_are_reported_and_their_batches_can_be_read_again(
    here, tmp_path, monkeypatch, backend
):
    """The second and third loss are made not a number; the batches were sound."""
    for shared in ("tokenizer", "text"):
        (tmp_path / shared).symlink_to(here / shared)
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path))
    cls, calls = backend_class(backend), itertools.count(1)
    step = cls.train_step

    def poisoned(self, inputs, targets, schedule, weights, limits):
        weight = math.nan if next(calls) in (2, 3) else 1.0
        weights = np.full(targets.shape, weight, np.float32)
        return step(self, inputs, targets, schedule, weights, limits)

    monkeypatch.setattr(cls, "train_step", poisoned)
    train(tmp_path, backend)
    assert "| steps skipped | 2 |" in render(Report(tmp_path)).read_text()
    skipped = tmp_path / "base_checkpoints/tiny/skipped"
    assert {path.stem for path in skipped.iterdir()} == {"step_000002.0", "step_000003.0"}
    for path in skipped.glob("*.npz"):
        loader = PackedLoader(
            open_corpus(str(tmp_path / "text")),
            Tokenizer.load(tmp_path / "tokenizer"),
            split="train",
            rows_per_batch=2048 // 256,
            sequence_len=256,
            seed=base_train.Config.seed,
            state=json.loads(path.with_suffix(".json").read_text())["loader"],
        )
        with loader, np.load(path) as batch:
            np.testing.assert_array_equal(next(loader).inputs, batch["inputs"])


@pytest.mark.slow
def test_of_two_processes_only_the_first_writes(trained, tmp_path):
    """Under torchrun: every line, row and section once, and the run of one process."""
    for shared in ("tokenizer", "text"):
        (tmp_path / shared).symlink_to(trained / shared)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = f"-m scripts.base_train {OPTIONS} --corpus {tmp_path / 'text'} --backend torch"
    done = subprocess.run(
        [sys.executable, *launcher, *command.split()],
        env={**os.environ, "JAXCHAT_BASE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x CPU process") == 1
    assert done.stdout.count(f"step {STEPS}/{STEPS} | val/bpb") == 1
    assert done.stdout.count(f"tiny: {STEPS} steps in") == 1
    alone, together = losses(trained), losses(tmp_path)
    assert sorted(together) == sorted(alone)
    np.testing.assert_allclose(list(together.values()), list(alone.values()), atol=1e-4)
    rows = (tmp_path / "base_checkpoints/tiny/metrics.jsonl").read_text().splitlines()
    assert len(rows) == STEPS + 2  # two evaluations
    store = CheckpointStore(tmp_path / "base_checkpoints/tiny")
    assert store.steps() == [2, STEPS]
    assert not list(store.directory.glob("*.tmp"))

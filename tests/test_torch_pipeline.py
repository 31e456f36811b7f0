"""Every script on `--backend torch`: a toy is trained, scored, evaluated and talked to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxchat import cli, embedded_corpus
from jaxchat.checkpoint import CheckpointStore
from jaxchat.report import Report
from jaxchat.scaling import read_runs
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import read_metrics
from scripts import base_eval, base_loss, base_train, chat_cli

ROOT = Path(__file__).parents[1]
WORDS = "the a model reads writes token step loss of and learns from every"
STEPS = 4
OPTIONS = (
    "--depth 2 --aspect-ratio 16 --head-dim 16 --sequence-len 64 --device-batch-size 2 "
    f"--total-batch-size 1024 --num-iterations {STEPS} --eval-every 4 --eval-tokens 256 "
    "--save-every 2 --sample-every 100 --keep-checkpoints 5 --model-tag tiny"
).split()


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


def run(script, *words):
    script.main(cli.parse(script.Config, list(words)))


def train(base, backend, *words):
    run(base_train, *OPTIONS, "--corpus", str(base / "text"), "--backend", backend, *words)


def losses(base):
    rows = read_metrics(base / "base_checkpoints/tiny/metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture
def trained(here):
    """The base directory after `base_train --backend torch`, which runs once."""
    if not (here / "base_checkpoints/tiny").exists():
        train(here, "torch")
    return here


def test_the_pipeline_runs(trained, capsys):
    store = CheckpointStore(trained / "base_checkpoints/tiny")
    assert store.steps() == [2, STEPS]
    assert store.read_meta(STEPS)["backend"] == "torch"
    assert sorted(losses(trained)) == list(range(1, STEPS + 1))
    options = ("--backend", "torch", "-g", "tiny")
    run(base_loss, "--corpus", str(trained / "text"), "--split-tokens", "1024", *options)
    assert "val: " in capsys.readouterr().out
    run(base_eval, "--max-per-task", "4", *options)
    assert "embedded tasks, not CORE" in capsys.readouterr().out
    scores = (store.path(STEPS) / "base_eval.csv").read_text().splitlines()
    assert scores[-1].startswith('"embedded tasks, not CORE"')
    [tiny] = read_runs("tiny")
    assert (tiny.tokens, tiny.core) == (STEPS * 1024, None)
    run(chat_cli, "-i", "base", "-p", "the model", "--max-tokens", "8", *options)
    assert capsys.readouterr().out.strip()
    assert {section.stage for section in Report(trained).sections()} == {
        "base_train",
        "base_loss",
        "base_eval",
    }


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


@pytest.mark.slow
def test_of_two_processes_only_the_first_writes(trained, tmp_path):
    """Under torchrun: every line, row and section once, and the run of one process."""
    for shared in ("tokenizer", "text"):
        (tmp_path / shared).symlink_to(trained / shared)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = [
        "-m",
        "scripts.base_train",
        *OPTIONS,
        "--corpus",
        str(tmp_path / "text"),
        "--backend",
        "torch",
    ]
    done = subprocess.run(
        [sys.executable, *launcher, *words],
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

"""A killed run continues exactly: same losses, same data, same weights, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxchat.checkpoint import CheckpointStore
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import read_metrics
from tests.models import assert_same_arrays

ROOT = Path(__file__).parents[1]
STEPS = 12
WORDS = "the a model reads writes token step loss of and to learns from every"
OPTIONS = (
    "--depth 1 --aspect-ratio 32 --head-dim 32 --sequence-len 64 --device-batch-size 2 "
    f"--total-batch-size 256 --num-iterations {STEPS} --eval-every 4 --eval-tokens 256 "
    "--save-every 2 --sample-every 100 --model-tag tiny"
).split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of text, a tokenizer trained on it, and a shared compilation cache."""
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


def command(world, base, options=OPTIONS):
    """A training process with a base directory of its own."""
    base.mkdir(exist_ok=True)
    for shared in ("tokenizer", "compilation_cache"):
        (world / shared).mkdir(exist_ok=True)
        if not (base / shared).exists():
            (base / shared).symlink_to(world / shared)
    words = [sys.executable, "-m", "scripts.base_train", *options, "--corpus", str(world / "text")]
    env = {**os.environ, "JAXCHAT_BASE_DIR": str(base), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return {"args": words, "env": env, "cwd": ROOT}


def finish(world, base, options=OPTIONS):
    done = subprocess.run(
        **command(world, base, options), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_of(base):
    return base / "base_checkpoints" / "tiny"


def losses(base):
    rows = read_metrics(run_of(base) / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def weights(base):
    from jaxchat.config import GPTConfig
    from jaxchat.jax_backend import JaxBackend

    store = CheckpointStore(run_of(base))
    backend = JaxBackend(GPTConfig(**store.read_meta(STEPS)["model"]))
    backend.load(store.path(STEPS))
    return backend.get_params()


@pytest.fixture(scope="module")
def uninterrupted(world):
    base = world / "uninterrupted"
    finish(world, base)
    return base


def test_a_run_killed_twice_equals_one_that_was_not(world, uninterrupted, tmp_path):
    """SIGKILL right after some step shows up in the metrics, at moments nobody chose."""
    compiled = compiled_steps(world)
    rng = np.random.default_rng()
    for _ in range(2):
        _kill_after(world, tmp_path, step=int(rng.integers(1, STEPS)))
    finish(world, tmp_path)
    assert compiled_steps(world) == compiled, "found again through another path to the same folder"
    assert losses(tmp_path) == losses(uninterrupted)
    assert_same_arrays(weights(tmp_path), weights(uninterrupted))
    assert sorted(losses(tmp_path)) == list(range(1, STEPS + 1))


def compiled_steps(world):
    found = {path.name for path in (world / "compilation_cache").glob("jit_step-*-cache")}
    assert found
    return found


def _kill_after(world, base, *, step):
    metrics = run_of(base) / "metrics.jsonl"
    with subprocess.Popen(**command(world, base), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and f'"step": {step}' in metrics.read_text():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()


def test_a_run_keeps_the_micro_batch_that_it_began_with(world, uninterrupted, tmp_path):
    """Where nobody says how many rows, memory decides, but not in the middle of a run."""
    where = OPTIONS.index("--device-batch-size")
    open_choice = [*OPTIONS[:where], *OPTIONS[where + 2 :]]
    _kill_after(world, tmp_path, step=5)
    assert "with --device-batch-size 2 needs" in finish(world, tmp_path, open_choice)
    assert losses(tmp_path) == losses(uninterrupted)
    fresh = tmp_path / "fresh"
    assert "with --device-batch-size 4 needs" in finish(world, fresh, open_choice)
    metas = [CheckpointStore(run_of(base)).read_meta(STEPS) for base in (tmp_path, fresh)]
    assert [meta["config"]["device_batch_size"] for meta in metas] == [2, 4]


def test_sigterm_saves_and_says_so(world, uninterrupted, tmp_path):
    with subprocess.Popen(**command(world, tmp_path), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 143
    assert "stopped by SIGTERM" in rest
    saved = CheckpointStore(run_of(tmp_path)).steps()[-1]
    assert f"step {saved} is saved" in rest
    finish(world, tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)


def test_a_finished_run_is_not_trained_again(world, uninterrupted):
    before = losses(uninterrupted)
    assert f"continuing tiny at step {STEPS}" in finish(world, uninterrupted)
    assert losses(uninterrupted) == before


def test_a_run_that_starts_over_keeps_its_own_checkpoints(world, uninterrupted, tmp_path):
    """It is shorter than the earlier one, whose weights were loaded in place of its own."""
    base = tmp_path / "copy"
    shutil.copytree(uninterrupted, base, symlinks=True)
    earlier = CheckpointStore(run_of(base)).steps()
    output = finish(world, base, [*OPTIONS, "--num-iterations", "4", "--resume", "never"])
    assert "starting over" in output
    assert CheckpointStore(run_of(base)).steps() == [2, 4]
    assert sorted(losses(base)) == [1, 2, 3, 4]
    (aside,) = run_of(base).glob("replaced-*")
    assert CheckpointStore(aside).steps() == earlier
    assert (aside / "metrics.jsonl").exists()


def test_another_run_under_the_same_name_is_refused(world, uninterrupted):
    words = command(world, uninterrupted)
    words["args"] = [*words["args"], "--matrix-lr", "0.5"]
    done = subprocess.run(**words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "matrix_lr 0.02, now 0.5" in done.stderr
    assert "--model-tag" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(world, uninterrupted, tmp_path):
    base = tmp_path / "copy"
    finish(world, base)
    store = CheckpointStore(run_of(base))
    newest, before = store.steps()[-1], store.steps()[-2]
    for path in (store.path(newest) / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    output = finish(world, base)
    assert f"skipping {store.path(newest)}" in output
    assert f"continuing tiny at step {before}" in output
    assert losses(base) == losses(uninterrupted)

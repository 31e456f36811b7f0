"""The one command, end to end, on the smoke tier: killed, continued, and run once more."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def start(base: Path) -> subprocess.Popen:
    env = {**os.environ, "JAXCHAT_TIER": "smoke", "JAXCHAT_BASE_DIR": str(base)}
    env.pop("XLA_FLAGS", None)  # as a user has it: one CPU device
    return subprocess.Popen(
        ["bash", "speedrun_jax.sh"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the pipeline is a bash script")
def test_a_killed_speedrun_continues_and_a_finished_one_does_nothing(tmp_path):
    """Killed with everything it started as soon as a checkpoint of pretraining is on disk."""
    first = start(tmp_path)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("base_checkpoints/d2/step_*/meta.json")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()

    second, _ = start(tmp_path).communicate(timeout=900)
    assert "--- tok_train: done before" in second
    assert re.search(r"continuing d2 at step \d+", second)
    assert "Done. The report is report.md" in second

    third, _ = start(tmp_path).communicate(timeout=300)
    stages = re.findall(r"^--- (\w+)", second, flags=re.MULTILINE)
    assert re.findall(r"^--- (\w+).*: done before$", third, flags=re.MULTILINE) == stages

    report = (ROOT / "report.md").read_text()
    for heading in ("Tokenizer", "Pretraining", "bits per byte"):
        assert heading in report
    for picture in re.findall(r"\]\((\S+\.png)\)", report):
        assert (ROOT / picture).stat().st_size > 1000

"""What a log file holds of a long run."""

import io
import re

import pytest
from rich.console import Console

from jaxchat.progress import LOG_LINES, TrainingProgress, format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (187, "3m07s"), (3599.6, "1h00m"), (7380, "2h03m")],
)
def test_durations_are_short(seconds, text):
    assert format_duration(seconds) == text


def test_a_log_gets_about_a_hundred_lines_whatever_the_length(capsys):
    with TrainingProgress(1000, 0) as progress:
        for step in range(1, 1001):
            progress.update(step, {"loss": f"{1 / step:.4f}"})
    lines = capsys.readouterr().out.splitlines()
    assert LOG_LINES <= len(lines) <= LOG_LINES + 2
    assert lines[0].startswith("step 1/1000 | loss 1.0000 | left ")
    assert lines[-1].startswith("step 1000/1000 | loss 0.0010 | left 0s")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_keeps_the_step_and_the_time_left(monkeypatch, width):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr("jaxchat.progress.make_console", lambda: console)
    figures = {"loss": "8.1543", "tok/s": "15,868", "val bpb": "3.6283", "lr x": "1.00"}
    with TrainingProgress(900, 0) as progress:
        progress.update(450, figures)
    line = [line for line in screen.getvalue().splitlines() if "step" in line][-1]
    assert "step 450/900" in line
    assert "loss 8.1543" in line
    assert re.search(r"left \d+s", line)
    assert ("lr x 1.00" in line) == (width == 120)
    assert "…" not in line


def test_long_lines_stay_whole(capsys):
    with TrainingProgress(10, 0) as progress:
        progress.say("word " * 60)
    assert capsys.readouterr().out == "word " * 60 + "\n"

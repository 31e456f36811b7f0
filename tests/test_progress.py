"""What a log file holds of a long run."""

import pytest

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


def test_long_lines_stay_whole(capsys):
    with TrainingProgress(10, 0) as progress:
        progress.say("word " * 60)
    assert capsys.readouterr().out == "word " * 60 + "\n"

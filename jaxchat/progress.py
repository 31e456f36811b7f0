"""What a person sees of a long training run: a live bar in a terminal, sparse lines in a log."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxchat import runtime

LOG_LINES = 100
"""Lines a whole run prints when its output is not a terminal."""

BAR_WIDTH = 16

LOG_WIDTH = 140
"""Columns of a table when the output is not a terminal."""


OnProgress: TypeAlias = Callable[[float], None]
"""Hears which share of some work is done; what it raises ends the work."""


def unheard(share: float) -> None:
    """For work that nobody waits for."""


def make_console() -> Console:
    """Where a script shows results: plain text as it is, silent on all but the first process."""
    console = Console(highlight=False, markup=False, quiet=not runtime.is_first_process())
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


@contextmanager
def progress_bar(description: str) -> Iterator[OnProgress]:
    """A bar for work that says how far it is."""
    with Progress(console=make_console()) as progress:
        bar = progress.add_task(description, total=1.0)
        yield lambda share: progress.update(bar, completed=share)


class TrainingProgress:
    """Shows each step's figures, the share done and the time left."""

    def __init__(self, num_steps: int, start_step: int) -> None:
        self.num_steps, self.start_step = num_steps, start_step
        self._console = make_console()
        self._every = max(1, num_steps // LOG_LINES)
        self._started = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=BAR_WIDTH),
            TextColumn("{task.description}"),
            TextColumn("left {task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=start_step, left="?")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, figures: Mapping[str, str]) -> None:
        """Show the figures of `step` (steps done so far), the most important ones first.

        A narrow terminal shows as many of them as there is room for.
        """
        shown, left = [f"{name} {value}" for name, value in figures.items()], self._remaining(step)
        taken = len(f"step {self.num_steps}/{self.num_steps}  left {left} ") + BAR_WIDTH
        fitting = list(shown)
        while len(" | ".join(fitting)) > self._console.width - taken and len(fitting) > 1:
            fitting.pop()
        self._bar.update(self._task, completed=step, description=" | ".join(fitting), left=left)
        due = step % self._every == 0 or step in (self.start_step + 1, self.num_steps)
        if due and not self._console.is_terminal:
            line = [f"step {step}/{self.num_steps}", *shown, f"left {left}"]
            runtime.print0(" | ".join(line))

    def doing(self, what: str) -> None:
        """What keeps the next step waiting; a log is not told."""
        self._bar.update(self._task, description=what)

    def say(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(message, soft_wrap=True)

    def _remaining(self, step: int) -> str:
        done = step - self.start_step
        if done <= 1:
            return "?"
        seconds = (time.monotonic() - self._started) / done * (self.num_steps - step)
        return format_duration(seconds)


def format_duration(seconds: float) -> str:
    """`1h02m`, `3m07s` or `12s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"

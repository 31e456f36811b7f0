"""From the start of a process to its first training step, with cold and warm compilation caches.

    python -m benchmarks.startup
    python -m benchmarks.startup --rounds 5 --depth 6

Every trial is a fresh process. A cold one has an empty cache, a warm one the cache that the cold
one of the same round filled; rounds go through all sides in turn. `compile` is what the first step
takes more than the second. The roofline is what no cache can save: importing the bare framework
and one compiled step, as a share of the time to the first step.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.figures import Figure, print_table, share
from benchmarks.train_side import Side, Task
from jaxchat import cli

SIDES = ("jax cold", "jax warm", "torch", "torch.compile cold", "torch.compile warm")

CACHES = ("JAXCHAT_BASE_DIR", "JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
"""Where the frameworks keep compiled programs."""


@dataclass(frozen=True)
class Config:
    """The model whose training starts."""

    depth: int = 4
    """Layers."""
    sequence_len: int = 512
    """Tokens of a row."""
    vocab_size: int = 8192
    rows: int = 8
    """Rows of a step."""
    aspect_ratio: int = 64
    """Width per layer."""
    head_dim: int = 128
    """Width of an attention head."""
    sides: tuple[str, ...] = SIDES
    """What is started; a warm side wants its cold one before it."""
    rounds: int = 3
    """Starts of every side."""

    def __post_init__(self) -> None:
        if not set(self.sides) <= set(SIDES) or self.rounds < 1:
            raise ValueError(
                f"sides {self.sides} and rounds={self.rounds}: choose among {', '.join(SIDES)}, "
                "and at least one round"
            )
        for place, side in enumerate(self.sides):
            cold = side.replace("warm", "cold")
            if side.endswith("warm") and cold not in self.sides[:place]:
                raise ValueError(
                    f"--sides: {side!r} wants {cold!r} before it, which fills its cache"
                )


@dataclass(frozen=True)
class Start:
    """Seconds of one start."""

    bare_import: float
    """The framework alone, in another process."""
    imported: float
    """Until everything was imported and the device known."""
    ready: float
    """Until weights and optimizer state were there."""
    first_step: float
    """Until the first step was done."""
    step: float
    """The second step."""

    @property
    def compile(self) -> float:
        return self.first_step - self.ready - self.step


def main(config: Config) -> None:
    """Start everything in turn and print the table."""
    trials: dict[str, list[Start]] = {side: [] for side in config.sides}
    for _ in range(config.rounds):
        with tempfile.TemporaryDirectory() as caches:
            for side in config.sides:
                trials[side].append(start(config, side, caches))
    title = f"From process start to the first step, d{config.depth}, seconds"
    print_table(title, COLUMNS, cells(trials))


def start(config: Config, side: str, caches: str) -> Start:
    """One process, up to its second step."""
    backend = side.partition(" ")[0]
    framework = backend.partition(".")[0]
    task = Task(
        name=side,
        backend=framework,
        depth=config.depth,
        sequence_len=config.sequence_len,
        vocab_size=config.vocab_size,
        rows=config.rows,
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        compiled=backend != "torch",
    )
    task = replace(task, environment=dict.fromkeys(CACHES, f"{caches}/{framework}"))
    before = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {framework}"], check=True)
    bare_import = time.perf_counter() - before
    with Side(task) as process:
        at = process.start
    return Start(
        bare_import,
        at["imported"],
        at["ready"],
        at["first_step"],
        at["second_step"] - at["first_step"],
    )


COLUMNS = ("side", "imports", "weights", "compile", "a step", "to first step", "x", "roofline")


def cells(trials: dict[str, list[Start]]) -> Iterator[tuple[str, ...]]:
    """A line per side; `x` is its time over that of the first side."""
    totals = {side: Figure(trial.first_step for trial in own) for side, own in trials.items()}
    first = next(iter(totals.values()))
    for side, own in trials.items():
        least = Figure(trial.bare_import + trial.step for trial in own)
        yield (
            side,
            f"{Figure(trial.imported for trial in own):.1f}",
            f"{Figure(trial.ready - trial.imported for trial in own):.1f}",
            f"{Figure(trial.compile for trial in own):.1f}",
            f"{Figure(trial.step for trial in own):.2f}",
            f"{totals[side]:.1f}",
            f"{totals[side].over(first):.2f}",
            share(least.over(totals[side])),
        )


if __name__ == "__main__":
    cli.run(main, Config)

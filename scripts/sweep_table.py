"""A table of finished pretraining runs: size, tokens, FLOPs, bits per byte, CORE, time.

    python -m scripts.sweep_table --tags "mini_d*" -o mini.csv
    python -m scripts.sweep_table --tags gpt2_d24 --goal 0.256525

CORE is there for the runs that `scripts.base_eval` has judged on all examples. What is still
training is left out.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich import box
from rich.table import Table

from jaxchat import cli
from jaxchat.artifacts import atomic_write
from jaxchat.progress import format_duration, make_console
from jaxchat.scaling import Run, read_runs

COLUMNS = (
    "tag",
    "depth",
    "width",
    "params",
    "scaling_params",
    "tokens",
    "tokens_per_param",
    "flops",
    "target_flops",
    "val_bpb",
    "core",
    "train_seconds",
)
"""What the table says of a run, in this order; attributes of `Run`."""


@dataclass(frozen=True)
class Config:
    """Which runs, and where to write them."""

    tags: str = "*"
    """Wildcard of the model tags."""
    output: Annotated[Path | None, cli.arg(aliases=["-o"])] = None
    """Write the table to this file too."""
    goal: float | None = None
    """Say after how much training each run has passed this CORE; exit with 1 unless all have."""


def main(config: Config) -> None:
    """Print the table, write it, and judge it where there is a goal."""
    runs = read_runs(config.tags)
    if not runs:
        raise FileNotFoundError(
            f"no finished run has a tag like {config.tags!r}: see python -m scripts.base_train"
        )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, no_wrap=True, justify="left" if name == "tag" else "right")
    for run in runs:
        table.add_row(*map(shown, row(run)))
    console = make_console()
    # whole numbers or none: what is wider than the screen wraps there
    endless = console.options.update_width(1000)
    console.width = console.measure(table, options=endless).maximum
    console.print(table)
    if config.output is not None:
        with atomic_write(config.output) as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(map(row, runs))
    if config.goal is not None:
        passed = [judge(run, config.goal) for run in runs]
        sys.exit(0 if all(passed) else 1)


def row(run: Run) -> list[str | float | None]:
    return [getattr(run, name) for name in COLUMNS]


def shown(value: str | float | None) -> str:
    """A cell on the screen."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3e}" if value >= 1e6 else f"{value:.4f}"
    return value or ""


def judge(run: Run, goal: float) -> bool:
    """Say whether a run has passed the goal."""
    spent = f"{format_duration(run.train_seconds)} of training ({run.train_seconds:.0f} s)"
    if run.core is None:
        print(f"{run.tag}: CORE not measured on all examples; run scripts.base_eval -g {run.tag}")
        return False
    verdict = "passes" if run.core > goal else "does not pass"
    print(f"{run.tag}: CORE {run.core:.6f} {verdict} {goal} after {spent}")
    return run.core > goal


if __name__ == "__main__":
    cli.run(main, Config)

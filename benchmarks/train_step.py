"""One training step: JAX against torch_ref, eager and under torch.compile.

    python -m benchmarks.train_step                        # d4 on a CPU; d12, d20, d24 on a GPU
    python -m benchmarks.train_step --depths 12 --sides jax torch.compile
    python -c "from benchmarks.train_step import *; main(Config(depths=(12,)))"     # without tyro

Every side trains in a process of its own, on random tokens and one device. On a CPU the sides take
turns, so that what else the machine does falls on all of them; on a GPU one follows the other,
because each needs the memory. Speed is the median over all steps with half the interquartile range;
`x` is JAX's median over the side's. The roofline is the fastest matrix product that either
framework reaches on this CPU, or the GPU's bf16 peak by its data sheet (so the share is the MFU);
attention within windows counts, the optimizer does not.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.figures import Figure, print_table, share
from benchmarks.train_side import Side, Task, one_device

SideName = Literal["jax", "torch", "torch.compile"]

GPU_ROWS = {12: 64, 20: 16, 24: 16}
"""Rows of a micro-batch by depth, for 80 GB without rematerialisation."""


@dataclass(frozen=True)
class Config:
    """What is measured; sizes that are not set depend on the platform."""

    platform: Literal["cpu", "gpu"] | None = None
    """Whose sizes to take; what the machine has when not set."""
    depths: tuple[int, ...] | None = None
    """Layers of the models: 4 on a CPU, 12, 20 and 24 on a GPU."""
    sides: tuple[SideName, ...] | None = None
    """Who trains: all three on a CPU, jax and torch.compile on a GPU."""
    sequence_len: int | None = None
    """Tokens of a row: 512 or 2048."""
    vocab_size: int | None = None
    """8192 or 32768."""
    rows: int | None = None
    """Rows of a micro-batch: 8 on a CPU, by depth on a GPU."""
    batch_tokens: int | None = None
    """Tokens of a step: one micro-batch on a CPU, 524,288 on a GPU."""
    aspect_ratio: int = 64
    """Width per layer."""
    head_dim: int = 128
    """Width of an attention head."""
    rounds: int = 5
    """Turns that every side takes."""
    steps: int = 3
    """Steps of a turn; on a GPU they follow each other and their mean counts."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.steps < 1:
            raise ValueError(f"rounds={self.rounds} and steps={self.steps} must be at least 1")

    @property
    def on_gpu(self) -> bool:
        if self.platform is None:
            return shutil.which("nvidia-smi") is not None
        return self.platform == "gpu"


@dataclass(frozen=True)
class Row:
    """A side when it has been measured."""

    task: Task
    tokens_per_s: Figure
    cpu_seconds: Figure
    """Per step, of all threads."""
    figures: dict[str, Any]


def main(config: Config) -> None:
    """Measure every depth and print its table."""
    for depth in config.depths or ((12, 20, 24) if config.on_gpu else (4,)):
        rows = measure(config, tasks(config, depth))
        title = f"d{depth}, {rows[0].task.tokens:,} tokens a step, {rows[0].figures['device']}"
        print_table(title, COLUMNS, cells(rows))


def tasks(config: Config, depth: int) -> list[Task]:
    """A task for every side of one depth."""
    gpu = config.on_gpu
    length = config.sequence_len or (2048 if gpu else 512)
    rows = config.rows or (GPU_ROWS.get(depth, 8) if gpu else 8)
    batch_tokens = config.batch_tokens or (2**19 if gpu else rows * length)
    if batch_tokens % (rows * length):
        raise ValueError(
            f"batch_tokens={batch_tokens} is no multiple of {rows} rows of {length} tokens: use "
            f"{max(1, batch_tokens // (rows * length)) * rows * length}"
        )
    sides = config.sides or (("jax", "torch.compile") if gpu else ("jax", "torch", "torch.compile"))
    return [
        Task(
            name=side,
            backend=side.partition(".")[0],
            depth=depth,
            sequence_len=length,
            vocab_size=config.vocab_size or (32768 if gpu else 8192),
            rows=rows,
            micro_batches=batch_tokens // (rows * length),
            aspect_ratio=config.aspect_ratio,
            head_dim=config.head_dim,
            compiled=side != "torch",
            environment=one_device(gpu=gpu),
        )
        for side in sides
    ]


def measure(config: Config, tasks: Sequence[Task]) -> list[Row]:
    """All sides: in turn on a CPU, one after the other on a GPU."""
    if config.on_gpu:
        return [row for task in tasks for row in _take_turns(config, [task])]
    return list(_take_turns(config, tasks))


def _take_turns(config: Config, tasks: Sequence[Task]) -> Iterator[Row]:
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(task)) for task in tasks]
        wanted = "gpu" if config.on_gpu else "cpu"
        for side in sides:
            if side.platform != wanted:
                raise ValueError(
                    f"{side.task.name} runs on {side.platform}, not on {wanted}: see whether its "
                    "framework finds the device (for JAX: uv sync --extra gpu), or set --platform"
                )
        for _ in range(config.rounds):
            for side in sides:
                side.steps(config.steps)
        for side in sides:
            figures = side.figures()
            assert math.isfinite(figures["loss"]), f"{side.task.name}: loss {figures['loss']}"
            yield Row(side.task, side.tokens_per_s, Figure(side.cpu_seconds), figures)


COLUMNS = ("side", "tokens/s", "x", "CPU s a step", "CPU x", "peak GB", "peak x", "roofline")


def cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """A line of the table per side; ratios say how much better the first side is."""
    fastest = max(row.figures["matmul_flops"] for row in rows)
    for row in rows:
        figures, first = row.figures, rows[0]
        ceiling = figures["peak_flops"] or fastest
        speed = row.tokens_per_s.median * figures["flops_per_token"]
        yield (
            row.task.name,
            f"{row.tokens_per_s:,.0f}",
            f"{first.tokens_per_s.over(row.tokens_per_s):.2f}",
            f"{row.cpu_seconds:.2f}",
            f"{row.cpu_seconds.over(first.cpu_seconds):.2f}",
            f"{figures['peak_bytes'] / 2**30:.2f}",
            f"{figures['peak_bytes'] / first.figures['peak_bytes']:.2f}",
            f"{share(speed / ceiling)} of {ceiling / 1e9:,.0f} GFLOP/s",
        )


if __name__ == "__main__":
    from jaxchat import cli  # here: `main` also runs where the command line's library is missing

    cli.run(main, Config)

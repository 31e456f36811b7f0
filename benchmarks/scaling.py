"""What a token costs as depth, sequence length, devices and the number of steps grow.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --depths 2 4 --lengths 256 512 --device-counts 1

A sweep keeps the tokens of a step. Its variants train in processes of their own and take turns.
`x per FLOP` compares what a model FLOP costs with the first variant of the sweep: 1 is cost in
proportion to the work. On a CPU several devices share the same cores, so a flat cost is the ideal;
GPUs count each as one. The roofline share is against the fastest matrix product of all variants on
a CPU, and against the data sheet on GPUs.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.figures import Figure, print_table, share
from benchmarks.train_side import Side, Task, one_device
from jaxchat import cli


@dataclass(frozen=True)
class Config:
    """The model that is varied, and how far."""

    backend: str = "jax"
    """jax or torch (compiled)."""
    depth: int = 4
    """Layers where something else varies."""
    sequence_len: int = 512
    """Tokens of a row where something else varies."""
    vocab_size: int = 8192
    batch_tokens: int = 4096
    """Tokens of a step."""
    aspect_ratio: int = 64
    """Width per layer; a sweep over depth keeps the width of `depth`."""
    head_dim: int = 128
    """Width of an attention head."""
    depths: tuple[int, ...] = (2, 4, 8)
    """Layers to try, at the same width."""
    lengths: tuple[int, ...] = (128, 512, 2048)
    """Sequence lengths to try."""
    device_counts: tuple[int, ...] = (1, 2)
    """Numbers of devices to try (JAX)."""
    platform: str = "cpu"
    """gpu makes as many of the machine's GPUs visible; cpu splits its cores."""
    late_steps: int = 60
    """Steps in a row whose first and last thirds are compared."""
    rounds: int = 3
    """Turns of every variant."""
    steps: int = 2
    """Steps of a turn."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.steps) < 1 or self.late_steps < 3:
            raise ValueError(
                f"rounds={self.rounds} and steps={self.steps} must be at least 1, "
                f"late_steps={self.late_steps} at least 3"
            )
        uneven = [n for n in (*self.lengths, self.sequence_len) if self.batch_tokens % n]
        if uneven:
            raise ValueError(f"batch_tokens={self.batch_tokens} is no multiple of {uneven[0]}")


def main(config: Config) -> None:
    """A table per sweep."""
    base = make_task(config, "", config.sequence_len)
    width = config.depth * config.aspect_ratio
    depths = [
        replace(base, name=f"{depth} layers", depth=depth, aspect_ratio=width // depth)
        for depth in config.depths
    ]
    lengths = [make_task(config, f"T {length:,}", length) for length in config.lengths]
    devices = [
        replace(base, name=f"{count} device(s)", environment=environment(config, count))
        for count in (config.device_counts if config.backend == "jax" else ())
    ]
    for title, sweep in (("Depth", depths), ("Sequence length", lengths), ("Devices", devices)):
        if sweep:
            print_table(title, COLUMNS, cells(measure(config, sweep)))
    print_table("Number of steps", COLUMNS, cells(over_time(config, base)))


def make_task(config: Config, name: str, length: int) -> Task:
    return Task(
        name=name,
        backend=config.backend,
        depth=config.depth,
        sequence_len=length,
        vocab_size=config.vocab_size,
        rows=config.batch_tokens // length,
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        environment=one_device(gpu=config.platform == "gpu"),
    )


def environment(config: Config, devices: int) -> dict[str, str]:
    """Variables that give JAX so many devices."""
    if config.platform == "gpu":
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices)))}
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**one_device(gpu=False), "XLA_FLAGS": flags}


@dataclass(frozen=True)
class Row:
    """One variant: seconds per token, and what the process says of itself."""

    name: str
    seconds_per_token: Figure
    figures: dict[str, Any]


def measure(config: Config, tasks: Sequence[Task]) -> list[Row]:
    """All variants of a sweep, in turn."""
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(task)) for task in tasks]
        for _ in range(config.rounds):
            for side in sides:
                side.steps(config.steps)
        return [
            Row(
                side.task.name,
                Figure(seconds / side.task.tokens for seconds in side.seconds),
                side.figures(),
            )
            for side in sides
        ]


def over_time(config: Config, task: Task) -> list[Row]:
    """The first, middle and last third of a run."""
    third = config.late_steps // 3
    with Side(task) as side:
        parts = [Figure(s / task.tokens for s in side.steps(third)) for _ in range(3)]
        figures = side.figures()
    return [
        Row(f"steps {2 + third * n + 1}-{2 + third * (n + 1)}", part, figures)
        for n, part in enumerate(parts)
    ]


COLUMNS = ("variant", "us per token", "MFLOP per token", "x", "x per FLOP", "peak GB", "roofline")


def cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """A line per variant; ratios are against the first."""
    matmul = max(row.figures["matmul_flops"] for row in rows)
    first, flops = rows[0], rows[0].figures["flops_per_token"]
    for row in rows:
        figures, own = row.figures, row.figures["flops_per_token"]
        ratio = row.seconds_per_token.over(first.seconds_per_token)
        ceiling = figures["peak_flops"] or matmul
        yield (
            row.name,
            f"{row.seconds_per_token.map(1e6):,.1f}",
            f"{own / 1e6:.1f}",
            f"{ratio:.2f}",
            f"{ratio * flops / own:.2f}",
            f"{figures['peak_bytes'] / 2**30:.2f}",
            share(own / row.seconds_per_token.median / ceiling),
        )


if __name__ == "__main__":
    cli.run(main, Config)

"""What a training step needs of a card's memory: by what it saves, and how many rows fit.

    python -m benchmarks.memory --depth 12
    python -m benchmarks.memory --depth 24 --remat none block

For every way to save memory the step is compiled, not run, and says what it needs with one row at a
time and with two; the rest is a straight line. `+ moments` is the last of them with
`--offload-optimizer` besides. The figures are of the device that this runs on: a CPU computes in
float32, without flash attention, and keeps what remat should spare.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.figures import print_table
from jaxchat import cli
from jaxchat.config import ASPECT_RATIO, HEAD_DIM, GPTConfig, OptimizerConfig
from jaxchat.jax_backend import JaxBackend
from jaxchat.memory import CARDS, GB, REMAT, USABLE, Savings
from jaxchat.plan import plan_training


@dataclass(frozen=True)
class Config:
    """The model, and what to try."""

    depth: int = 12
    """Transformer layers."""
    sequence_len: int = GPTConfig.sequence_len
    """Tokens of a row."""
    vocab_size: int = GPTConfig.vocab_size
    aspect_ratio: int = ASPECT_RATIO
    """Width per layer, rounded up to whole heads."""
    head_dim: int = HEAD_DIM
    """Width of an attention head."""
    remat: tuple[str, ...] = REMAT
    """Policies to try."""
    mesh: str = "auto"
    """How devices share the work, as for base_train."""


def main(config: Config) -> None:
    """One table."""
    shape = GPTConfig.from_depth(
        config.depth,
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        sequence_len=config.sequence_len,
    )
    backend = JaxBackend(shape, mesh=config.mesh)
    backend.init(0)
    cards = [f"{size} GB" for size in CARDS]
    print_table(
        f"GB that a step of depth {config.depth} needs on rows of {config.sequence_len:,} tokens, "
        f"and rows that fit a card; {backend.devices.description}",
        ("saved by", "weights", "moments", "1 row", "next", *cards),
        lines(config, backend),
    )


def lines(config: Config, backend: JaxBackend) -> Iterator[tuple[str, ...]]:
    """A line per way to save memory."""
    savings = [Savings(remat) for remat in config.remat]
    savings.append(Savings(config.remat[-1], offload_optimizer=True))
    devices, rules = backend.devices.count, OptimizerConfig()
    tokens = 4 * devices * config.sequence_len  # micro-batches of one row and of two accumulate
    plan = plan_training(backend.config, rules, num_iterations=1, total_batch_size=tokens)
    for saved in savings:
        flags = f"--remat {saved.remat}{' --offload-optimizer' * saved.offload_optimizer}"
        print(f"compiling a step with {flags}", file=sys.stderr, flush=True)
        backend.start_training(rules, plan, saved)
        one, two = (
            backend.step_memory((4 // rows, rows * devices, config.sequence_len)) for rows in (1, 2)
        )
        further = two.total - one.total
        fitting = [
            max(0, int(1 + (card.memory_bytes * USABLE - one.total) // further))
            for card in CARDS.values()
        ]
        yield (
            "+ moments" if saved.offload_optimizer else saved.remat,
            *(f"{x / GB:.2f}" for x in (one.weights, one.optimizer, one.total, further)),
            *map(str, fitting),
        )


if __name__ == "__main__":
    cli.run(main, Config)

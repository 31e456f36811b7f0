"""What training needs of a card's memory, what saves some, and the largest micro-batch that fits.

Pure arithmetic on figures that a backend reports: a compiled step says what it needs before it
runs (`Backend.step_memory`). What is spared costs time: remat computes activations a second time,
and an optimizer state in host memory travels once in each direction per step.
"""

import math
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

GB = 10**9

USABLE = 0.92
"""Share of a device's memory that a step may fill; evaluation, samples and loose ends take more."""

REMAT = ("none", "products", "block", "offload")
"""Which activations of a block wait for its backward pass: all of them; the results of its matrix
products; only its input; only its input, in the host's memory."""

LESS_MEMORY = (
    "Training: lower --device-batch-size, or save memory with --remat block or "
    "--offload-optimizer. Generation: fewer --slots or --max-tokens."
)
"""What helps when memory has run out."""


@dataclass(frozen=True)
class Savings:
    """What training does to need less memory."""

    remat: str = "none"
    """One of `REMAT`."""
    offload_optimizer: bool = False
    """Whether the optimizer state lies in host memory between its updates."""

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ValueError(f"--remat {self.remat}: choose one of {', '.join(REMAT)}")


NO_SAVINGS = Savings()


@dataclass(frozen=True)
class Card:
    """How to train on a card of some size."""

    memory_bytes: int
    savings: Savings = NO_SAVINGS


CARDS = {
    8: Card(8 * GB, Savings("block", offload_optimizer=True)),
    16: Card(16 * GB, Savings(offload_optimizer=True)),
    24: Card(24 * GB),
    80: Card(80 * GB),
}
"""Presets by gigabytes, for depth 12 on one card. Its 0.29 G float32 parameters, their gradients
and moments are 4.2 GB before the first token, and 2 GB of these can wait in host memory: on small
cards a step takes far longer than the way there and back."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one device that a training step needs at its fullest."""

    weights: int
    """Float32 masters: this device's share of them."""
    optimizer: int
    """Moments, likewise; 0 when they lie in host memory."""
    working: int
    """Everything that comes and goes: activations, gradients, copies in the compute dtype, ids."""

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.working

    def __str__(self) -> str:
        return (
            f"{readable(self.total)} (weights {readable(self.weights)}, optimizer "
            f"{readable(self.optimizer)}, the step itself {readable(self.working)})"
        )


def readable(count: float) -> str:
    """Bytes for people: `3.04 GB`, `42 MB`."""
    return f"{count / GB:.3g} GB" if count >= GB / 10 else f"{1000 * count / GB:.3g} MB"


def savings_of(
    card: int | None, remat: str | None, offload_optimizer: bool, *, before: Savings = NO_SAVINGS
) -> Savings:
    """The card's preset, or else those of `before`, with what is asked for by name in their place.

    ValueError, naming the flag, for what there is not.
    """
    preset = before if card is None else card_of(card).savings
    return replace(
        preset,
        remat=remat or preset.remat,
        offload_optimizer=offload_optimizer or preset.offload_optimizer,
    )


def card_of(gigabytes: int) -> Card:
    """ValueError where there is no preset of that size."""
    if gigabytes not in CARDS:
        raise ValueError(f"--card {gigabytes}: choose one of {', '.join(map(str, CARDS))}")
    return CARDS[gigabytes]


def ran_out_of_memory(error: Exception) -> bool:
    """Python has an exception for that; of XLA and torch it is a RuntimeError that says so."""
    words = str(error)
    return (
        isinstance(error, MemoryError)
        or "RESOURCE_EXHAUSTED" in words
        or "out of memory" in words.lower()
    )


def largest_that_fits(
    choices: Sequence[int], need: Callable[[int], float], limit: float
) -> int | None:
    """The last of the ascending `choices` that needs at most `limit`; None when none does.

    `need` grows with its argument and is dear: it is asked for the last choice, then where the line
    through the nearest two answers crosses the limit.
    """
    fits, too_much = -1, len(choices)
    answers = [(0, 0.0)]
    while too_much - fits > 1:
        guess = bisect_right(choices, _crossing(answers, limit)) - 1
        probe = min(max(guess, fits + 1), too_much - 1)
        size = need(choices[probe])
        insort(answers, (choices[probe], size))
        fits, too_much = (probe, too_much) if size <= limit else (fits, probe)
    return None if fits < 0 else choices[fits]


def _crossing(answers: Sequence[tuple[int, float]], limit: float) -> float:
    """The choice that needs the limit, by the two answers nearest to it.

    The first answer is the origin, of which little is known: two others are better.
    """
    fitting = sum(size <= limit for _, size in answers)
    if fitting == len(answers):
        return math.inf
    first = 1 if fitting == 1 and len(answers) > 2 else fitting - 1
    (x1, y1), (x2, y2) = answers[first : first + 2]
    if math.isinf(y2):  # it did not even compile
        return math.sqrt(max(1, x1) * x2)
    return x1 + (limit - y1) * (x2 - x1) / (y2 - y1) if y2 > y1 else x1

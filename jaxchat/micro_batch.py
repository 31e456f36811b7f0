"""How many rows a device takes at a time: what memory allows; the rest of a batch accumulates.

The choice is made before the first step, from what the compiled step says it needs, and it is
printed. A run that continues keeps the choice it began with, and so the order of its sums.
"""

import math

from jaxchat import runtime
from jaxchat.backend import Backend
from jaxchat.memory import (
    USABLE,
    StepMemory,
    card_of,
    largest_that_fits,
    ran_out_of_memory,
    readable,
)
from jaxchat.plan import TrainingPlan

UNKNOWN_MEMORY_TOKENS = 2**16
"""Tokens a device takes at a time where nobody says what fits."""

MAC_TOKENS = 2**13
"""The same of a Mac, whose GPU keeps the scores of attention: by an estimate, none was at hand."""


def settle_rows(
    backend: Backend,
    plan: TrainingPlan,
    *,
    sequence_len: int,
    asked: int | None = None,
    before: int | None = None,
    card: int | None = None,
    new_model: bool = True,
) -> int:
    """Rows per device and micro-batch: those asked for, those of `before`, or what fits.

    `before` is what the run has used until now; it counts where it still divides the batch. `card`
    names a preset of memory.py, which may lower what the device allows. Call it after
    `start_training`. Every compilation is told, because they may take minutes. ValueError where not
    even one row fits, with the remedies: a smaller model is one where it is a `new_model`.
    """
    devices = backend.devices.count
    rows, rest = divmod(plan.total_batch_size, sequence_len * devices)
    choices = [n for n in range(1, rows + 1) if rows % n == 0] if not rest else []
    if not choices:  # nothing divides: plan.micro_batches says what would
        return 1 if asked is None else asked
    chosen = before if asked is None and before in choices else asked
    limit = _limit(backend, card)
    if limit is None:
        tokens = MAC_TOKENS if backend.devices.platform == "mps" else UNKNOWN_MEMORY_TOKENS
        most = max(1, tokens // sequence_len)
        return max(n for n in choices if n <= most) if chosen is None else chosen
    needs: dict[int, StepMemory] = {}

    def need(rows: int) -> float:
        runtime.print0(
            f"fitting rows into {readable(limit)} per device: compiling a step with "
            f"--device-batch-size {rows}"
        )
        count = plan.total_batch_size // (rows * devices * sequence_len)
        try:
            needed = backend.step_memory((count, rows * devices, sequence_len))
        except Exception as error:  # of several types; a TPU's compiler refuses what does not fit
            if not ran_out_of_memory(error):
                raise
            return math.inf
        assert needed is not None, "a backend knows what steps need or does not"
        needs[rows] = needed
        return needed.total

    if chosen is None:
        chosen = largest_that_fits(choices, need, limit)
    elif chosen in choices:
        need(chosen)
    if chosen is None:
        raise ValueError(_nothing_fits(needs.get(1), limit, new_model))
    if chosen in needs:
        runtime.print0(_budget(chosen, needs, limit))
    return chosen


def _limit(backend: Backend, card: int | None) -> float | None:
    """Bytes that a step may need on the smallest device; None where they cannot be known."""
    everywhere = backend.gather(backend.devices.memory_bytes)
    if None in everywhere:
        return None
    return USABLE * min(*everywhere, math.inf if card is None else card_of(card).memory_bytes)


def _budget(rows: int, needs: dict[int, StepMemory], limit: float) -> str:
    needed = needs[rows]
    text = (
        f"memory per device: a step with --device-batch-size {rows} needs {needed} of "
        f"{readable(limit)}"
    )
    larger = min((n for n in needs if n > rows), default=None)
    if larger is not None:
        text += f"; {larger} would need {readable(needs[larger].total)}"
    if needed.total > limit:
        text += (
            "\nwarning: that may be more than there is; lower --device-batch-size, or save memory "
            "with --remat block or --offload-optimizer"
        )
    return text


def _nothing_fits(needed: StepMemory | None, limit: float, new_model: bool) -> str:
    remedies = [
        "save memory with --remat block and --offload-optimizer",
        "divide the weights over devices with --mesh fsdp=N",
        *(["lower --sequence-len or --depth"] if new_model else []),
    ]
    return (
        f"a step of one row at a time needs {needed or 'more'} per device, and "
        f"{readable(limit)} may be used: {', or '.join(remedies)}"
    )

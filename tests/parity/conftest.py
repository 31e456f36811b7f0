"""The parity suite: both backends, the same weights, the same numbers.

Every comparison goes through the `parity` fixture, which asserts the bound of its row of `BOUNDS`
and remembers the largest difference; the session ends with the table of measured maxima, which is
the README's (test_table.py holds the two together).
"""

import pytest
import torch

torch.set_num_threads(1)  # a second gains nothing here, and the two wait for each other

BOUNDS = {
    "logits": 1e-5,
    "logits through the caches": 1e-5,
    "loss, relative": 1e-5,
    "any gradient leaf, relative": 1e-5,
    "nats per token": 1e-5,
    "10 optimizer steps from the same gradients: weights, relative": 1e-4,
    "10 optimizer steps from the same gradients: moments, relative": 1e-4,
    "10 training steps: loss": 1e-5,
    "10 training steps: gradient norm, relative": 1e-4,
    "10 training steps: weights, relative": 1e-4,
    "10 training steps: moments, relative": 1e-4,
    "100 training steps on the embedded corpus: loss": 1e-3,
    "12 training steps, 6 on each backend, against 12 on one: loss": 1e-5,
    "bits per byte": 1e-6,
    "CORE: decisions that differ, of 48": 0,
    "Engines, greedy with tool use: tokens that differ, of 200": 0,
    "Engines, sampled: tokens that differ, of 200": 0,
    "greedy: tokens that differ, of 200": 0,
    "top-k and temperature: tokens that differ, of 200": 0,
    "top-p and min-p: tokens that differ, of 200": 0,
    "log-probabilities of sampled tokens": 1e-5,
    "transformers: logits": 1e-5,
    "transformers: logits through its cache": 1e-5,
    "transformers: logits of a padded row": 1e-5,
    "two torch processes: loss and gradient norm": 1e-5,
    "two torch processes: nats per token": 1e-4,
    "two torch processes: log-probabilities of replies": 1e-5,
    "two torch processes: checkpoint, relative": 1e-4,
    "bfloat16: logits": 0.1,
    "bfloat16: loss, relative": 5e-3,
    "bfloat16: all gradients, relative": 0.05,
    "float16: logits": 0.02,
    "float16: loss, relative": 1e-3,
    "float16: all gradients, relative": 0.01,
}
"""Row of the table to the largest difference allowed. Logits reach about 4, where float32 resolves
5e-7; those of half precision have a standard deviation of 0.8, and each backend rounds at its own
places."""

MEASURED: dict[str, float] = {}


@pytest.fixture
def parity():
    """`parity(row, difference)`: assert the bound and keep the maximum for the table.

    `where` tells in the error which of many it was.
    """

    def check(row: str, difference: float, where: str = "") -> None:
        difference = float(difference)
        MEASURED[row] = max(MEASURED.get(row, 0.0), difference)
        assert difference <= BOUNDS[row], f"{row}: {difference:.2e} > {BOUNDS[row]:.0e} {where}"

    return check


def pytest_terminal_summary(terminalreporter):
    """The table for the README."""
    if not MEASURED:
        return
    terminalreporter.section("parity of the backends: measured maxima")
    for row, bound in BOUNDS.items():
        if row in MEASURED:
            terminalreporter.write_line(f"| {row} | {MEASURED[row]:.1e} | {bound:.0e} |")

"""The parity suite: both backends, the same weights, the same numbers.

Every comparison goes through the `parity` fixture, which asserts its bound and remembers the
largest difference; the session ends with the table of measured maxima.
"""

from typing import NamedTuple

import pytest
import torch

torch.set_num_threads(2)


class Measured(NamedTuple):
    """The largest difference of one kind seen in this session, and what it may be."""

    value: float
    bound: float


MEASURED: dict[str, Measured] = {}


@pytest.fixture
def parity():
    """`parity(what, difference, bound)`: assert the bound and keep the maximum for the table.

    `where` names the tensor in the error.
    """

    def check(what: str, difference: float, bound: float, where: str = "") -> None:
        difference = float(difference)
        before = MEASURED.get(what, Measured(0.0, bound)).value
        MEASURED[what] = Measured(max(before, difference), bound)
        assert difference <= bound, f"{what}: {difference:.2e} is above {bound:.0e} {where}"

    return check


def pytest_terminal_summary(terminalreporter):
    """The table for the README."""
    if not MEASURED:
        return
    terminalreporter.section("parity of the backends: measured maxima")
    width = max(map(len, MEASURED))
    for what, (value, bound) in sorted(MEASURED.items()):
        terminalreporter.write_line(f"{what:<{width}}  {value:8.1e}  (bound {bound:.0e})")

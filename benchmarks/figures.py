"""Medians, spreads, ratios and the table that every benchmark prints.

A figure is a series of measurements of one thing; its spread is half the distance of its quartiles
as a share of the median, which one disturbed round does not move. Ratios are of medians.
"""

import statistics
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


class Figure:
    """Repeated measurements of one thing."""

    def __init__(self, values: Iterable[float]) -> None:
        self.values = list(values)
        assert self.values, "a figure needs a measurement"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the interquartile range over the median; 0 of a single measurement."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / 2 / self.median if self.median else 0.0

    def map(self, scale: float, power: int = 1) -> "Figure":
        """`scale` times every value to a power: -1 turns seconds into rates."""
        return Figure(scale * value**power for value in self.values)

    def over(self, other: "Figure") -> float:
        """The ratio of the medians."""
        return self.median / other.median

    def __format__(self, spec: str) -> str:
        """The median in this format, and the spread in percent."""
        return f"{self.median:{spec}} ±{100 * self.spread:.0f}%"


def share(value: float | None) -> str:
    """A share in percent; a dash where there is nothing to take a share of."""
    return "-" if value is None else f"{100 * value:.3g}%"


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """On the screen; the first column names, the others are numbers."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def console() -> Console:
    """The screen; a file or a pipe has no width that a row would have to fit."""
    return Console(width=None if sys.stdout.isatty() else 160)

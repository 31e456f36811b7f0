"""The README's table is the suite's: the same rows in the same order, the same bounds."""

import re
from pathlib import Path

from tests.parity.conftest import BOUNDS

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_shows_the_rows_and_bounds_of_this_suite():
    table = README.read_text().split("| largest difference | measured | bound |")[1]
    rows = re.findall(r"^\| (.+) \| (\S+) \| (\S+) \|$", table.split("\n\n")[0], re.MULTILINE)
    shown = {name: float(bound) for name, _, bound in rows if name != "---"}
    assert list(shown.items()) == list(BOUNDS.items())
    assert all(float(measured) <= BOUNDS[name] for name, measured, _ in rows if name in BOUNDS)

"""Chat evaluations in the report: a section a stage, and one that lays the stages side by side.

The sections are the data: a stage's table is kept with its report, a later run for some tasks
replaces these rows only, and the comparison is drawn from all tables that are there.
"""

from collections.abc import Mapping, Sequence

from jaxchat.report import MODELS, KeyValues, Section, Table, Value
from jaxchat.task_eval import ChatResult

COLUMNS = (
    "task",
    "kind",
    "problems",
    "accuracy",
    "low",
    "high",
    "guessing",
    "centred",
    "ended",
    "called",
    "note",
)

CAPTION = (
    "low and high bound the accuracy with 95% confidence (Wilson); centred is the accuracy above "
    "guessing, 1 for perfect; ended and called are the shares of generated replies that ended by "
    "themselves and that got an answer from the calculator"
)


def section_name(source: str) -> str:
    """The report's name for the chat evaluation of a stage's model."""
    return f"chat_eval_{source}"


def result_table(results: Sequence[ChatResult]) -> Table:
    """One row a task."""
    return Table(COLUMNS, [_row(result) for result in results], CAPTION)


def compact(table: Table) -> Table:
    """A result table for a terminal: percent, the interval in one cell, fewer columns."""
    rows = []
    for row in table.rows:
        facts = dict(zip(COLUMNS, row, strict=True))
        shares = (_percent(facts[name]) for name in ("guessing", "ended", "called"))
        rows.append([facts["task"], _cell(row), *shares, facts["note"]])
    columns = ["task", "% [95%] of problems", "guessing", "ended", "called", "note"]
    return Table(columns, rows, "* is above guessing")


def with_earlier_rows(
    table: Table, facts: Mapping[str, Value], sections: Sequence[Section], source: str
) -> Table:
    """`table`, and the rows of other tasks that the same model was given before.

    The same model: the section's `facts` are the same.
    """
    earlier = next((s for s in sections if s.stage == section_name(source)), None)
    if earlier is None or not any(
        isinstance(part, KeyValues) and dict(part.values) == dict(facts) for part in earlier.parts
    ):
        return table
    fresh = {row[0] for row in table.rows}
    kept = [row for row in _result_rows(earlier) if row[0] not in fresh]
    return Table(COLUMNS, [*kept, *table.rows], CAPTION)


def side_by_side(sections: Sequence[Section]) -> Table:
    """Accuracy with its interval by task (rows) and stage (columns)."""
    found = _by_stage(sections)
    rows = [[task, *(_cell(rows.get(task)) for rows in found.values())] for task in _tasks(found)]
    caption = "accuracy in percent [95% confidence interval] of problems; * is above guessing"
    return Table(["task", *found], rows, caption)


def manners(sections: Sequence[Section]) -> Table:
    """By stage, how often generated replies ended and got an answer from the calculator."""
    found = _by_stage(sections)
    rows: list[Sequence[Value]] = []
    for task in _tasks(found):
        for share in ("ended", "called"):
            cells = [_percent(_fact(stage.get(task), share)) for stage in found.values()]
            if any(cell is not None for cell in cells):
                rows.append([f"{task}: {share}", *cells])
    caption = (
        "shares of generated replies that ended by themselves within the room they had, and that "
        "called the calculator and got an answer"
    )
    return Table(["replies", *found], rows, caption)


def _row(result: ChatResult) -> list[Value]:
    if result.skipped is not None:
        empty: list[Value] = [None] * (len(COLUMNS) - 4)
        return [result.name, result.kind, 0, *empty, f"skipped: {result.skipped}"]
    low, high = result.interval
    shares = (
        None if count is None else count / result.problems
        for count in (result.ended, result.called)
    )
    note = f"{result.cropped} prompts cropped" if result.cropped else ""
    numbers = (result.accuracy, low, high, result.baseline, result.centered)
    return [result.name, result.kind, result.problems, *numbers, *shares, note]


def _percent(value: Value) -> str | None:
    return f"{100 * value:.0f}%" if isinstance(value, int | float) else None


def _by_stage(sections: Sequence[Section]) -> dict[str, dict[str, Sequence[Value]]]:
    """Result rows by stage and task, for the stages that have any."""
    found = {source: _rows_of(sections, source) for source in MODELS}
    return {source: rows for source, rows in found.items() if rows}


def _tasks(found: Mapping[str, Mapping[str, Sequence[Value]]]) -> list[str]:
    return list(dict.fromkeys(name for rows in found.values() for name in rows))


def _fact(row: Sequence[Value] | None, name: str) -> Value:
    return None if row is None else row[COLUMNS.index(name)]


def _rows_of(sections: Sequence[Section], source: str) -> dict[str, Sequence[Value]]:
    rows = {}
    for section in sections:
        if section.stage == section_name(source):
            rows = {str(row[0]): row for row in _result_rows(section)}
    return rows


def _result_rows(section: Section) -> list[Sequence[Value]]:
    tables = [part for part in section.parts if isinstance(part, Table)]
    return [row for table in tables if tuple(table.columns) == COLUMNS for row in table.rows]


def _cell(row: Sequence[Value] | None) -> str | None:
    if row is None:
        return None
    facts = dict(zip(COLUMNS, row, strict=True))
    accuracy, low, high, guessing = (facts[n] for n in ("accuracy", "low", "high", "guessing"))
    if not all(isinstance(x, int | float) for x in (accuracy, low, high, guessing)):
        return str(facts["note"])
    assert isinstance(accuracy, int | float) and isinstance(low, int | float)
    assert isinstance(high, int | float) and isinstance(guessing, int | float)
    mark = " *" if low > guessing else ""
    return f"{100 * accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}] of {facts['problems']}{mark}"

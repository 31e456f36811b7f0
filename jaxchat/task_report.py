"""Chat evaluations in the report: a section a stage, and one that lays the stages side by side.

The sections are the data: a stage's table is kept with its report, a later run for some tasks
replaces these rows only, and the comparison is drawn from all tables that are there. A row is about
a task's problems and not its name alone, which another file may have, or the same one once mended.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from jaxchat.report import MODELS, KeyValues, Section, Table, Value, model_names
from jaxchat.task_eval import ChatResult
from jaxchat.tasks.mixtures import CHATCORE

Row: TypeAlias = Mapping[str, Value]
"""A row of a result table by column."""

COLUMNS = (
    "task",
    "kind",
    "problems",
    "limit",
    "accuracy",
    "low",
    "high",
    "guessing",
    "centred",
    "ended",
    "called",
    "data",
    "note",
)

LATER_COLUMNS = {"limit", "data"}
"""Those that a section of an earlier version may lack."""

CAPTION = (
    "limit is how many problems were asked for, none for all of them; low and high bound the "
    "accuracy with 95% confidence (Wilson); centred is the accuracy above guessing, 1 for perfect; "
    "ended and called are the shares of generated replies that ended by themselves and that got an "
    "answer from the calculator; data names the task's problems"
)


def section_name(source: str) -> str:
    """The report's name for the chat evaluation of a stage's model."""
    return f"chat_eval_{source}"


def result_table(results: Sequence[ChatResult], limit: int | None = None) -> Table:
    """One row a task, each with the limit of problems that it was asked under."""
    rows = [_row(result, limit) for result in results]
    return Table(COLUMNS, [[row[name] for name in COLUMNS] for row in rows], CAPTION)


def compact(table: Table) -> Table:
    """A result table for a terminal: percent, the interval in one cell, fewer columns."""
    rows = []
    for row in _rows(table):
        shares = (_percent(row[name]) for name in ("guessing", "ended", "called"))
        rows.append([row["task"], _cell(row), *shares, row["note"]])
    columns = ["task", "% [95%] of problems", "guessing", "ended", "called", "note"]
    return Table(columns, rows, "* is above guessing")


def with_earlier_rows(
    table: Table, facts: Mapping[str, Value], sections: Sequence[Section], source: str
) -> Table:
    """`table`, and the rows of other tasks that the same model was given before.

    Of a task that it was given before on more of the same problems, that row stays in place of the
    new one; one of other problems, or that does not say of which, gives way. The same model: the
    section's `facts` are the same. A row that does not say its limit is left.
    """
    stage = section_name(source)
    earlier = next((s for s in sections if s.stage == stage and _states(s, facts)), None)
    if earlier is None:
        return table
    fresh = _by_problems(_rows(table))
    asked = {task for task, _ in fresh}
    before = _by_problems(row for row in _result_rows(earlier) if "limit" in row)
    kept = {
        key: row
        for key, row in before.items()
        if key[0] not in asked or (key in fresh and _size(row) > _size(fresh[key]))
    }
    rows = [*kept.values(), *(row for key, row in fresh.items() if key not in kept)]
    return Table(COLUMNS, [[row.get(name) for name in COLUMNS] for row in rows], CAPTION)


def outweighed(table: Table, merged: Table) -> list[str]:
    """A line for each result of `table` that had to give way to a larger sample in `merged`."""
    kept = _by_problems(_rows(merged))
    return [
        f"{key[0]}: {_cell(row)} now; the result of {kept[key]['problems']} problems stays"
        for key, row in _by_problems(_rows(table)).items()
        if _size(kept[key]) > _size(row)
    ]


def summarize(table: Table) -> dict[str, float]:
    """The means of a result table's centred accuracies, by the names of what they are means of.

    ChatCORE is the mean of all of its tasks. Tasks that were asked under another limit of problems
    are another measurement: each limit has a mean of its own, which names it.
    """
    by_limit: dict[Value, dict[str, float]] = {}
    for row in _rows(table):
        if isinstance(row["centred"], int | float):
            by_limit.setdefault(row["limit"], {})[str(row["task"])] = row["centred"]
    return dict(_mean(centred, limit) for limit, centred in by_limit.items())


def figures(table: Table) -> dict[str, float]:
    """The accuracies of a result table by task; the name of one under a limit says so."""
    return {
        str(row["task"]) + ("" if row["limit"] is None else f" of {row['limit']}"): row["accuracy"]
        for row in _rows(table)
        if isinstance(row["accuracy"], int | float)
    }


def side_by_side(sections: Sequence[Section]) -> Table:
    """Accuracy with its interval by task (rows) and model (columns)."""
    found = _by_model(sections)
    rows = [[task, *(_cell(rows.get(task)) for rows in found.values())] for task in _tasks(found)]
    caption = "accuracy in percent [95% confidence interval] of problems; * is above guessing"
    return Table(["task", *found], rows, caption)


def manners(sections: Sequence[Section]) -> Table:
    """By model, how often generated replies ended and got an answer from the calculator."""
    found = _by_model(sections)
    rows: list[Sequence[Value]] = []
    for task in _tasks(found):
        for share in ("ended", "called"):
            cells = [_percent(results.get(task, {}).get(share)) for results in found.values()]
            if any(cell is not None for cell in cells):
                rows.append([f"{task}: {share}", *cells])
    caption = (
        "shares of generated replies that ended by themselves within the room they had, and that "
        "called the calculator and got an answer"
    )
    return Table(["replies", *found], rows, caption)


def _row(result: ChatResult, limit: int | None) -> Row:
    facts: dict[str, Value] = dict.fromkeys(COLUMNS)
    facts |= {
        "task": result.name,
        "kind": result.kind,
        "problems": result.problems,
        "limit": limit,
        "data": result.data,
    }
    if result.skipped is not None:
        return facts | {"note": f"skipped: {result.skipped}"}
    low, high = result.interval
    ended, called = (
        None if count is None else count / (result.problems * result.samples)
        for count in (result.ended, result.called)
    )
    return facts | {
        "accuracy": result.accuracy,
        "low": low,
        "high": high,
        "guessing": result.baseline,
        "centred": result.centered,
        "ended": ended,
        "called": called,
        "note": _cropped(result.cropped),
    }


def _cropped(prompts: int) -> str:
    return f"{prompts} prompt{'s' if prompts > 1 else ''} cropped" if prompts else ""


def _mean(centred: Mapping[str, float], limit: Value) -> tuple[str, float]:
    """A name and the mean of centred accuracies, by task, that were measured under one limit."""
    core = [centred[task] for task in CHATCORE if task in centred]
    if len(core) == len(CHATCORE):  # whatever else was asked is no part of it
        name = "ChatCORE" if limit is None else f"ChatCORE of {limit} a task"
        return name, sum(core) / len(core)
    name = "mean centred accuracy (not ChatCORE)"
    if len(core) == len(centred):
        name = f"mean of {len(core)} of ChatCORE's {len(CHATCORE)} tasks"
    name += "" if limit is None else f", {limit} a task"
    return name, sum(centred.values()) / len(centred)


def _percent(value: Value) -> str | None:
    return f"{100 * value:.0f}%" if isinstance(value, int | float) else None


def _by_model(sections: Sequence[Section]) -> dict[str, dict[str, Row]]:
    """Result rows by model and task, for the models that have any."""
    judged = {section_name(source) for source in MODELS}
    found = {section.key: section for section in sections if section.stage in judged}
    rows = {key: _result_rows(section) for key, section in found.items()}
    names = model_names(section for key, section in found.items() if rows[key])
    return {name: {str(row["task"]): row for row in rows[key]} for key, name in names.items()}


def _states(section: Section, facts: Mapping[str, Value]) -> bool:
    values = (part.values for part in section.parts if isinstance(part, KeyValues))
    return any(dict(stated) == dict(facts) for stated in values)


def _tasks(found: Mapping[str, Mapping[str, Row]]) -> list[str]:
    return list(dict.fromkeys(name for rows in found.values() for name in rows))


def _by_problems(rows: Iterable[Row]) -> dict[tuple[Value, Value], Row]:
    """By task and fingerprint, which rows of an earlier version lack."""
    return {(row["task"], row.get("data")): row for row in rows}


def _size(row: Row) -> float:
    """Problems that a row is about: a skipped one has 0."""
    problems = row["problems"]
    assert isinstance(problems, int | float), f"{problems!r} problems"
    return problems


def _rows(table: Table) -> list[Row]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def _result_rows(section: Section) -> list[Row]:
    """The rows of a stored section; those of earlier versions lack `LATER_COLUMNS`."""
    needed = set(COLUMNS) - LATER_COLUMNS
    tables = [part for part in section.parts if isinstance(part, Table)]
    return [row for table in tables if needed <= set(table.columns) for row in _rows(table)]


def _cell(row: Row | None) -> str | None:
    if row is None:
        return None
    accuracy, low, high, guessing = (row[n] for n in ("accuracy", "low", "high", "guessing"))
    if not all(isinstance(x, int | float) for x in (accuracy, low, high, guessing)):
        return str(row["note"])
    assert isinstance(accuracy, int | float) and isinstance(low, int | float)
    assert isinstance(high, int | float) and isinstance(guessing, int | float)
    mark = " *" if low > guessing else ""
    return f"{100 * accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}] of {row['problems']}{mark}"

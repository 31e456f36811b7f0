"""The report as a document: report.md and its pictures, from the sections that stages stored.

Text is escaped: nothing a model writes can change the layout. Pictures have no background and ink
of middle tones, so that they can be read on light and on dark pages.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from jaxchat.artifacts import atomic_write
from jaxchat.report import (
    Curve,
    KeyValues,
    Part,
    Report,
    Samples,
    Section,
    Table,
    Text,
    Value,
    model_names,
    model_word,
    tags_to_tell_apart,
)

_GRAY = "#808080"
_INKS = ("#3b8bdb", "#e0871c", "#2fa35a", "#d95656", "#9a6fd0", "#13a3a3")


def render(report: Report) -> Path:
    """Write report.md and its pictures, and return the path of report.md."""
    sections = report.sections()
    files = report.directory / "report_files"
    files.mkdir(parents=True, exist_ok=True)
    lines, drawn, tags = _header(sections), set(), tags_to_tell_apart(sections)
    for section in sections:
        of_which = f": {tags[section.key]}" if section.key in tags else ""
        lines += [f"## {escape(section.title + of_which)}", ""]
        for number, part in enumerate(section.parts):
            picture = files / f"{section.key}_{number}.png"
            if isinstance(part, Curve):
                with atomic_write(picture, "wb") as file:
                    file.write(draw(part))
                drawn.add(picture)
            lines += [*_markdown(part, f"{files.name}/{quote(picture.name)}"), ""]
    for stale in set(files.glob("*.png")) - drawn:
        stale.unlink()
    path = report.directory / "report.md"
    with atomic_write(path, "wb") as file:
        file.write("\n".join(lines).encode())
    return path


def escape(text: str) -> str:
    """`text` as one line of markdown that shows exactly these characters."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    escaped = re.sub(r"([\\`*_{}\[\]<>~|$&])", r"\\\1", printable)
    return _MARKER.sub(_escape_marker, escaped)


def duration(seconds: float) -> str:
    """`3725` as "1h 02m 05s", less than a minute as "5.0 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m {seconds:02}s" if hours else f"{minutes}m {seconds:02}s"


def draw(curve: Curve) -> bytes:
    """The picture of `curve` as PNG: no background and mid-tone ink, for light and dark pages."""
    # Here because it takes half a second to import, and only rendering needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=144, layout="constrained")
    axes = figure.subplots()
    for number, (name, (x, y)) in enumerate(curve.lines.items()):
        marker = "o" if len(x) < 3 else None  # one or two points make no visible line
        axes.plot(x, y, label=name, color=_INKS[number % len(_INKS)], lw=1.6, marker=marker)
    axes.set_xlabel(curve.x_label, color=_GRAY)
    axes.set_ylabel(curve.y_label, color=_GRAY)
    axes.tick_params(colors=_GRAY)
    axes.grid(color=_GRAY, alpha=0.25, linewidth=0.6)
    axes.spines[:].set_color(_GRAY)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curve.lines) > 1:
        axes.legend(frameon=False, labelcolor=_GRAY)
    picture = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(picture, format="png", transparent=True)
    return picture.getvalue()


def _header(sections: Sequence[Section]) -> list[str]:
    lines = ["# jaxchat report", ""]
    if not sections:
        return [*lines, "No stage has run yet."]
    figures = [section for section in sections if section.figures and model_word(section.stage)]
    if figures:
        lines += ["## Summary", "", *_markdown(_summary(figures)), ""]
    latest = max(sections, key=lambda section: section.finished)
    lines += ["## Time", "", *_markdown(_times(sections)), "", "## Environment", ""]
    return [*lines, *_markdown(KeyValues(latest.environment, f"Of stage {latest.stage}")), ""]


def _summary(sections: Sequence[Section]) -> Table:
    """Figures by model; a figure that several stages state is taken from the last of them."""
    names = model_names(sections)
    columns = list(dict.fromkeys(names.values()))
    found: dict[str, dict[str, float]] = {}
    for section in sections:
        for figure, value in section.figures.items():
            found.setdefault(figure, {})[names[section.key]] = value
    rows = [[figure, *map(values.get, columns)] for figure, values in found.items()]
    return Table(["figure", *columns], rows)


def _times(sections: Sequence[Section]) -> Table:
    rows: list[list[Value]] = []
    tags = tags_to_tell_apart(sections)
    for section in sections:
        where = section.environment
        machine = where.get("cpu", "") if where.get("gpu") == "none" else where.get("gpu", "")
        wall = None if section.wall_seconds is None else duration(section.wall_seconds)
        stage = f"{section.stage} {tags.get(section.key, '')}".strip()
        rows.append([stage, wall, section.finished, machine, where.get("commit", "")])
    total = sum(section.wall_seconds or 0 for section in sections)
    rows.append(["total", duration(total), None, None, None])
    return Table(["stage", "wall time", "finished", "machine", "commit"], rows)


def _markdown(part: Part, picture: str = "") -> list[str]:
    """The lines of `part`; `picture` is the relative path of a curve's PNG."""
    match part:
        case Text(body):
            paragraphs = [escape(paragraph.strip()) for paragraph in body.split("\n\n")]
            return "\n\n".join(paragraphs).split("\n")
        case Table(columns, rows, caption):
            header = [_row([escape(column) for column in columns]), "|---" * len(columns) + "|"]
            return _captioned(caption, header + [_row([_cell(v) for v in row]) for row in rows])
        case KeyValues(values, caption):
            rows = [_row([escape(name), escape(str(value))]) for name, value in values.items()]
            return _captioned(caption, ["| name | value |", "|---|---|", *rows])
        case Curve(caption):
            return [f"![{escape(caption)}]({picture})", "", f"*{escape(caption)}*"]
        case Samples(samples, caption):
            shown = [_fenced(prompt + "\u25b8" + completion) for prompt, completion in samples]
            return _captioned(caption, [line for block in shown for line in block])


def _captioned(caption: str, lines: list[str]) -> list[str]:
    return [f"*{escape(caption)}*", "", *lines] if caption else lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Value) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return "" if value is None else escape(str(value))


def _fenced(text: str) -> list[str]:
    """`text` as a code block whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    printable = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return [f"{fence}text", *printable.split("\n"), fence, ""]


_MARKER = re.compile(r"^(\s*)([-+#=](?=[-+#=\s]|$)|\d+(?=[.)](?:\s|$)))")
"""What starts a list, a heading or a rule."""


def _escape_marker(match: re.Match[str]) -> str:
    """`- x` to `\\- x`, `1. x` to `1\\. x`."""
    space, marker = match.groups()
    return f"{space}{marker}\\" if marker.isdigit() else f"{space}\\{marker}"

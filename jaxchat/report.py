"""Report cards: every stage adds a section, `render` makes report.md and its pictures.

The one idea: a section is data (frozen dataclasses stored as JSON, one file per stage), so a stage
that runs again replaces its own section, stages may run on different machines, and the document
can be drawn at any time from what is there. Text is escaped: nothing a model writes can change the
layout. Left out: live dashboards, which are the tracker's subject.

    BASE/report/sections/base_train.json ...   what `Report.add` writes
    BASE/report/report.md, report_files/*.png  what `Report.render` makes of them
"""

import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

from jaxchat import artifacts, runtime

STAGES = (
    "data_download",
    "tok_train",
    "tok_eval",
    "base_train",
    "base_loss",
    "base_eval",
    "chat_eval_base",
    "mid_train",
    "chat_eval_mid",
    "chat_sft",
    "chat_eval_sft",
    "chat_rl",
    "chat_eval_rl",
    "chat_eval",
)
"""The order of sections. A stage that is not named here comes last, in order of its name."""

MODELS = ("base", "mid", "sft", "rl")
"""Columns of the summary: a stage belongs to the one that is a word of its name, if any."""

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "torch",
    "numpy",
    "tiktoken",
    "rustbpe",
)
"""Whose versions the report states (read from their metadata, nothing is imported)."""

Value: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text, separated by blank lines."""

    body: str
    """Shown as it is: no markdown in it takes effect."""


@dataclass(frozen=True)
class Table:
    """Rows under a header line."""

    columns: Sequence[str]
    """Names, with units."""
    rows: Sequence[Sequence[Value]]
    """Floats are shown with four significant digits; None as an empty cell."""
    caption: str = ""
    """What the table shows."""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table row {number} has {len(row)} cells, the header {len(self.columns)}"
                )


@dataclass(frozen=True)
class KeyValues:
    """A list of names and values, such as a configuration."""

    values: Mapping[str, Value]
    """In the order of insertion."""
    caption: str = ""
    """What the values are."""


@dataclass(frozen=True)
class Curve:
    """One picture of one or more lines over the same axis."""

    caption: str
    """What the picture shows."""
    x_label: str
    """With the unit, such as "step" or "training tokens"."""
    y_label: str
    """With the unit, such as "loss (nats per token)"."""
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """By name: x values and y values of one length. NaN makes a gap."""

    def __post_init__(self) -> None:
        for name, (x, y) in self.lines.items():
            if len(x) != len(y):
                raise ValueError(f"curve {name!r}: {len(x)} x values, {len(y)} y values")


@dataclass(frozen=True)
class Samples:
    """What a model wrote."""

    samples: Sequence[tuple[str, str]]
    """Prompt and continuation."""
    caption: str = ""
    """Which model, which temperature."""


Part: TypeAlias = Text | Table | KeyValues | Curve | Samples

_PARTS: dict[str, type[Part]] = {c.__name__: c for c in (Text, Table, KeyValues, Curve, Samples)}


@dataclass(frozen=True)
class Section:
    """What one stage reported."""

    stage: str
    title: str
    parts: Sequence[Part]
    finished: str
    """Local time, ISO 8601."""
    wall_seconds: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


class Report:
    """The report of one base directory."""

    def __init__(self, base_dir: str | Path) -> None:
        self.directory = Path(base_dir) / "report"

    def add(
        self,
        stage: str,
        title: str,
        parts: Sequence[Part],
        *,
        wall_seconds: float | None = None,
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Store the section of `stage`, replacing an earlier one, with the machine it ran on.

        `wall_seconds` is the stage's duration; `figures` are its main results by name, such as
        {"CORE": 0.21}, for the summary. Of several processes only the first writes. Raises
        ValueError for a stage name that is not lower-case letters, digits and underscores (it
        becomes a file name).
        """
        if not re.fullmatch(r"[a-z0-9_]+", stage):
            raise ValueError(f"stage {stage!r} must be lower-case letters, digits and underscores")
        if not runtime.is_first_process():
            return
        section = Section(
            stage=stage,
            title=title,
            parts=parts,
            finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            wall_seconds=wall_seconds,
            figures=dict(figures or {}),
            environment=environment(),
        )
        stored = {
            **asdict(section),
            "parts": [{"kind": type(part).__name__, **asdict(part)} for part in parts],
        }
        _write(self._path(stage), json.dumps(stored, default=_plain, indent=1).encode())

    def sections(self) -> list[Section]:
        """The stored sections in pipeline order. Raises ValueError naming a damaged file."""
        found = [_read(path) for path in (self.directory / "sections").glob("*.json")]
        return sorted(found, key=_order)

    def render(self) -> Path:
        """Write report.md and its pictures, and return the path of report.md."""
        sections = self.sections()
        files = self.directory / "report_files"
        files.mkdir(parents=True, exist_ok=True)
        lines, drawn = _header(sections), set()
        for section in sections:
            lines += [f"## {escape(section.title)}", ""]
            for number, part in enumerate(section.parts):
                picture = files / f"{section.stage}_{number}.png"
                if isinstance(part, Curve):
                    _write(picture, draw(part))
                    drawn.add(picture)
                lines += [*_markdown(part, f"{files.name}/{picture.name}"), ""]
        for stale in set(files.glob("*.png")) - drawn:
            stale.unlink()
        path = self.directory / "report.md"
        _write(path, "\n".join(lines).encode())
        return path

    def _path(self, stage: str) -> Path:
        return self.directory / "sections" / f"{stage}.json"


def environment() -> dict[str, str]:
    """Where this process runs: versions, hardware, and the commit of the source."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"cpu": _cpu(), "memory": _memory(), "gpu": _gpus(), "commit": _commit()}


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


_GRAY = "#808080"
_INKS = ("#3b8bdb", "#e0871c", "#2fa35a", "#d95656", "#9a6fd0", "#13a3a3")


def _header(sections: Sequence[Section]) -> list[str]:
    lines = ["# jaxchat report", ""]
    if not sections:
        return [*lines, "No stage has run yet."]
    figures = [section for section in sections if section.figures and _model(section.stage)]
    if figures:
        lines += ["## Summary", "", *_markdown(_summary(figures)), ""]
    latest = max(sections, key=lambda section: section.finished)
    lines += ["## Time", "", *_markdown(_times(sections)), "", "## Environment", ""]
    return [*lines, *_markdown(KeyValues(latest.environment, f"Of stage {latest.stage}")), ""]


def _summary(sections: Sequence[Section]) -> Table:
    """Figures by model; a figure that several stages state is taken from the last of them."""
    models = [m for m in MODELS if any(_model(section.stage) == m for section in sections)]
    found: dict[str, dict[str, float]] = {}
    for section in sections:
        for name, value in section.figures.items():
            found.setdefault(name, {})[_model(section.stage)] = value
    rows = [[name, *(values.get(model) for model in models)] for name, values in found.items()]
    return Table(["figure", *models], rows)


def _times(sections: Sequence[Section]) -> Table:
    rows: list[list[Value]] = []
    for section in sections:
        where = section.environment
        machine = where.get("cpu", "") if where.get("gpu") == "none" else where.get("gpu", "")
        wall = None if section.wall_seconds is None else duration(section.wall_seconds)
        rows.append([section.stage, wall, section.finished, machine, where.get("commit", "")])
    total = sum(section.wall_seconds or 0 for section in sections)
    rows.append(["total", duration(total), None, None, None])
    return Table(["stage", "wall time", "finished", "machine", "commit"], rows)


def _model(stage: str) -> str:
    return next((model for model in MODELS if model in stage.split("_")), "")


def _order(section: Section) -> tuple[int, str]:
    known = section.stage in STAGES
    return (STAGES.index(section.stage) if known else len(STAGES), section.stage)


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


def _read(path: Path) -> Section:
    try:
        stored = json.loads(path.read_bytes())
        parts = [_PARTS[part.pop("kind")](**part) for part in stored.pop("parts")]
        return Section(**stored, parts=parts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"report section {path} is damaged ({error}): run stage {path.stem} again, or delete it"
        ) from error


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with artifacts.atomic_write(path, "wb") as file:
        file.write(content)


def _plain(value: object) -> object:
    """NumPy scalars and arrays, paths and the like as JSON."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = match.group(1) if match else name
    on_linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count()
    return f"{name}, {cores} cores"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows
        return "unknown"


def _gpus() -> str:
    query = "--query-gpu=name,memory.total"
    names = _output("nvidia-smi", query, "--format=csv,noheader").splitlines()
    return "; ".join(f"{n} x {name}" for name, n in Counter(names).items()) or "none"


def _commit() -> str:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # an installed wheel
        return "unknown"
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    dirty = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit or 'unknown'}{' (dirty)' if dirty else ''}"


def _output(*command: str) -> str:
    """What `command` prints, or "" when it is missing, fails or takes over 10 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()

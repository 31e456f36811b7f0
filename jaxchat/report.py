"""Report cards: every stage adds a section, and `report_page.render` makes a document of them.

The one idea: a section is data (frozen dataclasses stored as JSON, a file per stage and model), so
a stage that runs again replaces its own section, models of several tags stand side by side, stages
may run on different machines, and the document can be drawn at any time from what is there. Left
out: live dashboards, the tracker's subject.

    BASE/report/sections/base_train.d12.json ...   what `Report.add` writes
    BASE/report/report.md, report_files/*.png      what `report_page.render` makes of them
"""

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import quote

from jaxchat import environment, runtime
from jaxchat.artifacts import atomic_write, check_writable

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

OF_THE_MODEL = "Of the model"
"""Caption of the values that say which model a section is about."""

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

    @property
    def key(self) -> str:
        """What no other section of a report has: the stage, and the tag of its model if it has one.

        It is the name of a file.
        """
        subject = subject_of(self)
        return self.stage if subject is None else f"{self.stage}.{quote(subject.tag, safe=' ')}"


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
        """Store the section of `stage` and its model, replacing an earlier one, with the machine.

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
            environment=environment.describe(),
        )
        stored = {
            **asdict(section),
            "parts": [{"kind": type(part).__name__, **asdict(part)} for part in parts],
        }
        with atomic_write(self.directory / "sections" / f"{section.key}.json") as file:
            json.dump(stored, file, default=_plain, indent=1)

    def check_writable(self) -> None:
        """OSError, with the remedy, where `add` could not write: to be asked before slow work."""
        if runtime.is_first_process():
            check_writable(self.directory / "sections")

    def sections(self) -> list[Section]:
        """The stored sections in pipeline order. Raises ValueError naming a damaged file."""
        found = [_read(path) for path in (self.directory / "sections").glob("*.json")]
        found.sort(key=lambda section: section.finished)
        latest = {section.key: section for section in found}  # earlier versions left out the tag
        return sorted(latest.values(), key=_order)


class Subject(NamedTuple):
    """The model that a section is about; None for what the section does not say."""

    source: str
    """Its stage: base, mid, sft or rl."""
    tag: str
    """Which model of the stage."""
    run: str | None = None
    """Id of the run that made it."""
    step: int | None = None


def model_facts(source: str, tag: str, meta: Mapping[str, Any]) -> KeyValues:
    """What a section about a model stores, so that `subject_of` knows whose figures it has.

    `meta` is that of the checkpoint.
    """
    facts = {
        "source": source,
        "model_tag": tag,
        "run": meta.get("run"),
        "step": meta["step"],
        "tokenizer": meta.get("tokenizer"),
    }
    return KeyValues(facts, OF_THE_MODEL)


def subject_of(section: Section) -> Subject | None:
    """The model that a section is about, or None where it states no `model_facts`."""
    stated = (part for part in section.parts if isinstance(part, KeyValues))
    facts = next((part.values for part in stated if part.caption == OF_THE_MODEL), {})
    source, tag = facts.get("source"), facts.get("model_tag")
    if not source or tag is None:
        return None
    run, step = facts.get("run"), facts.get("step")
    return Subject(
        str(source),
        str(tag),
        None if run is None else str(run),
        None if step is None else int(step),
    )


def model_word(stage: str) -> str:
    """The one of `MODELS` that a stage's name has among its words; empty where it has none."""
    return next((model for model in MODELS if model in stage.split("_")), "")


def model_names(sections: Iterable[Section]) -> dict[str, str]:
    """The column that each section's figures belong to, by key and in the order of `MODELS`.

    It is "base", or "base d12" where the sections tell of several tags; then a section that does
    not say its model has the bare name for itself.
    """
    stages = sorted(
        (section for section in sections if model_word(section.stage)),
        key=lambda section: MODELS.index(model_word(section.stage)),
    )
    tags = tags_to_tell_apart(stages)
    return {s.key: f"{model_word(s.stage)} {tags.get(s.key, '')}".strip() for s in stages}


def tags_to_tell_apart(sections: Iterable[Section]) -> dict[str, str]:
    """The tags of the sections' models by key; empty where all that say theirs have the same."""
    subjects = ((section.key, subject_of(section)) for section in sections)
    tags = {key: subject.tag for key, subject in subjects if subject is not None}
    return tags if len(set(tags.values())) > 1 else {}


def _order(section: Section) -> tuple[int, list[str | int]]:
    """By stage, then by tag, d4 before d12."""
    known = section.stage in STAGES
    parts = re.split(r"(\d+)", section.key)
    numbered = [int(part) if at % 2 else part for at, part in enumerate(parts)]
    return (STAGES.index(section.stage) if known else len(STAGES), numbered)


def _read(path: Path) -> Section:
    try:
        stored = json.loads(path.read_bytes())
        parts = [_PARTS[part.pop("kind")](**part) for part in stored.pop("parts")]
        return Section(**stored, parts=parts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"report section {path} is damaged ({error}): run stage {path.stem} again, or delete it"
        ) from error


def _plain(value: object) -> object:
    """NumPy scalars and arrays, paths and the like as JSON."""
    return value.tolist() if hasattr(value, "tolist") else str(value)

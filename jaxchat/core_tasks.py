"""The tasks of CORE: what a bundle holds, and how its three kinds become prompts.

CORE is DCLM's average over 22 in-context tasks (arXiv 2406.11794). A bundle is a folder with
`core.yaml` (the list), `eval_meta_data.csv` (random baselines) and `eval_data/*.jsonl`. Each
example turns into one or more token sequences and the span of each that is scored:

- multiple choice: one context, several continuations; the likeliest continuation wins;
- schema: several contexts, one continuation; the context that makes it likeliest wins;
- language modelling: the continuation must be, token by token, what the model would say.

Left out: the model (core_eval.py).
"""

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from jaxchat.tokenizer import Tokenizer

FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
"""What an example of each kind has."""

OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}
"""The field whose list `gold` is a place in."""

KINDS = tuple(FIELDS)

ENTRY = ("label", "dataset_uri", "icl_task_type", "num_fewshot")
"""What core.yaml says of each task."""

SHUFFLE_SEED = 1337
"""Order in which a task's examples are taken, so that a limit takes a fair sample."""

FEWSHOT_SEED = 1234
"""Added to an example's number, it draws that example's demonstrations."""

ENCODED_QUESTIONS = 256
"""Questions whose texts are encoded at a time: enough for every processor, and a few MB of text."""


@dataclass(frozen=True)
class Task:
    """A task and its examples, shuffled."""

    label: str
    kind: str
    num_fewshot: int
    """Demonstrations before each question."""
    delimiter: str
    """What stands between a context and its continuation."""
    baseline: float
    """Accuracy of guessing, in percent."""
    examples: tuple[Mapping[str, Any], ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"task {self.label}: kind {self.kind!r} is not one of {KINDS}")
        if len(self.examples) <= self.num_fewshot:
            raise ValueError(
                f"task {self.label} has {len(self.examples)} examples, its {self.num_fewshot} "
                "demonstrations need more than that"
            )


class Scored(NamedTuple):
    """Tokens, and the span [start, end) of them that is scored."""

    ids: np.ndarray
    """uint32 (T,): four bytes a token, where the list of an int each took 25 to 38."""
    start: int
    end: int


def load_bundle(directory: Path) -> list[Task]:
    """Every task of a bundle, in its order. Errors name the file and line that is wrong."""
    listed, baselines = directory / "core.yaml", directory / "eval_meta_data.csv"
    try:
        entries, rows = _read_list(listed), _read_baselines(baselines)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{directory} is no evaluation bundle: {error.filename} is missing; fetch it with "
            "python -m scripts.data_download --all"
        ) from error
    tasks = []
    for number, entry in enumerate(entries, start=1):
        try:
            label, data, kind = (str(entry[name]) for name in ENTRY[:3])
            shots = int(entry[ENTRY[3]][0])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{listed}: entry {number} of icl_tasks, {entry!r}, must have {', '.join(ENTRY)}; "
                "the last is a list of a number"
            ) from error
        if label not in rows:
            raise ValueError(
                f"{baselines} has no row for task {label!r} of {listed}: add its random baseline"
            )
        tasks.append(
            make_task(
                label=label,
                kind=kind,
                num_fewshot=shots,
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=rows[label],
                examples=_read_examples(directory / "eval_data" / data, kind),
            )
        )
    return tasks


def _read_list(path: Path) -> list[Any]:
    """The entries of core.yaml."""
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"{path}:{mark.line + 1 if mark else 1}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    entries = listed.get("icl_tasks") if isinstance(listed, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no list of tasks under icl_tasks")
    return entries


def _read_baselines(path: Path) -> dict[str, float]:
    """The accuracy of guessing by task, in percent."""
    baselines = {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in reader:
            try:
                baselines[row["Eval Task"]] = float(row["Random baseline"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}:{reader.line_num}: the columns Eval Task and Random baseline must "
                    "hold a name and a number"
                ) from error
    return baselines


def _read_examples(path: Path, kind: str) -> list[Mapping[str, Any]]:
    """The examples of a task, each with what its kind needs."""
    examples: list[Mapping[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        fields = FIELDS.get(kind, ())
        if not isinstance(example, dict) or not all(name in example for name in fields):
            raise ValueError(f"{path}:{number}: a {kind} example must have {', '.join(fields)}")
        if "gold" in fields and not _is_index(example["gold"], example[OPTIONS[kind]]):
            raise ValueError(
                f"{path}:{number}: gold={example['gold']!r} must be the place, from 0 on, of one "
                f"of the {OPTIONS[kind]}"
            )
        examples.append(example)
    return examples


def _is_index(place: Any, options: Any) -> bool:
    return isinstance(options, list) and isinstance(place, int) and place in range(len(options))


def make_task(*, examples: Sequence[Mapping[str, Any]], **facts: Any) -> Task:
    """A task whose examples are shuffled as CORE shuffles them."""
    shuffled = list(examples)
    random.Random(SHUFFLE_SEED).shuffle(shuffled)
    return Task(examples=tuple(shuffled), **facts)


def demonstrations(task: Task, index: int) -> list[Mapping[str, Any]]:
    """The few-shot examples of question `index`: drawn from all others, whatever the limit.

    Places among the others are drawn and the question is then stepped over. A list of the others,
    made for every question, took half of 3 minutes before the 22 tasks had their first batch.
    """
    others = range(len(task.examples) - 1)
    drawn = random.Random(FEWSHOT_SEED + index).sample(others, task.num_fewshot)
    return [task.examples[place + (place >= index)] for place in drawn]


def prompts(task: Task, index: int) -> list[str]:
    """The texts of a question; a language-modelling one is (without, with) its continuation."""
    example, shots = task.examples[index], demonstrations(task, index)
    if task.kind == "multiple_choice":
        pairs = [(shot["query"], shot["choices"][shot["gold"]]) for shot in shots]
        asked = [(example["query"], choice) for choice in example["choices"]]
    elif task.kind == "schema":
        pairs = [(shot["context_options"][shot["gold"]], shot["continuation"]) for shot in shots]
        asked = [(context, example["continuation"]) for context in example["context_options"]]
    else:
        pairs = [(shot["context"].strip(), shot["continuation"]) for shot in shots]
        asked = [(example["context"].strip(), example["continuation"])]
    shown = "".join(f"{context}{task.delimiter}{answer}\n\n" for context, answer in pairs)
    texts = [f"{shown}{context}{task.delimiter}{answer}" for context, answer in asked]
    if task.kind == "language_modeling":
        # a trailing space would be glued to the next word by the tokenizer
        return [f"{shown}{asked[0][0]}{task.delimiter}".strip(), *texts]
    return texts


def sequences(
    task: Task, indices: Sequence[int], tokenizer: Tokenizer, max_length: int
) -> Iterator[list[Scored]]:
    """The token sequences of each question, cut on the left to `max_length`, with their spans."""
    bos = np.array([tokenizer.bos_id], np.uint32)
    for first in range(0, len(indices), ENCODED_QUESTIONS):
        asked = [prompts(task, i) for i in indices[first : first + ENCODED_QUESTIONS]]
        encoded = iter(tokenizer.encode_batch([text for texts in asked for text in texts]))
        for texts in asked:
            ids = [np.concatenate((bos, next(encoded))) for _ in texts]
            yield [_crop(span, max_length) for span in _spans(task.kind, ids)]


def _spans(kind: str, encoded: Sequence[np.ndarray]) -> list[Scored]:
    """What is scored of the encoded texts of a question."""
    if kind == "multiple_choice":
        # a choice that is the beginning of all others is scored on its last token
        start = min(_common(encoded), min(map(len, encoded)) - 1)
        return [Scored(ids, start, len(ids)) for ids in encoded]
    if kind == "schema":
        shared = _common([ids[::-1] for ids in encoded])
        return [Scored(ids, len(ids) - shared, len(ids)) for ids in encoded]
    _, whole = encoded
    start = _common(encoded)  # where the tokenizer merged across the border, a little earlier
    return [Scored(whole, start, len(whole))]


def _common(sequences: Sequence[np.ndarray]) -> int:
    """How many tokens all sequences share from the start."""
    shortest = min(map(len, sequences))
    differs = np.zeros(shortest, bool)
    for ids in sequences[1:]:
        differs |= ids[:shortest] != sequences[0][:shortest]
    return int(differs.argmax()) if differs.any() else shortest


def _crop(sequence: Scored, max_length: int) -> Scored:
    """Keep the last `max_length` tokens; the span keeps at least one token of context."""
    surplus = max(0, len(sequence.ids) - max_length)
    start = max(1, sequence.start - surplus)
    return Scored(sequence.ids[surplus:], start, sequence.end - surplus)

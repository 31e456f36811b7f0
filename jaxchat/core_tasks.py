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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxchat.tokenizer import Tokenizer

KINDS = ("multiple_choice", "schema", "language_modeling")

SHUFFLE_SEED = 1337
"""Order in which a task's examples are taken, so that a limit takes a fair sample."""

FEWSHOT_SEED = 1234
"""Added to an example's number, it draws that example's demonstrations."""


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
    examples: tuple[dict[str, Any], ...]

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

    ids: list[int]
    start: int
    end: int


def load_bundle(directory: Path) -> list[Task]:
    """Every task of a bundle, in its order. Errors name the file and line that is wrong."""
    try:
        listed = yaml.safe_load((directory / "core.yaml").read_text())["icl_tasks"]
        with open(directory / "eval_meta_data.csv", newline="") as file:
            rows = {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(file)}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{directory} is no evaluation bundle: {error.filename} is missing; fetch it with "
            "python -m scripts.data_download --all"
        ) from error
    return [_load_task(directory, entry, rows) for entry in listed]


def _load_task(directory: Path, entry: dict[str, Any], baselines: dict[str, str]) -> Task:
    path = directory / "eval_data" / entry["dataset_uri"]
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            examples.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return make_task(
        label=entry["label"],
        kind=entry["icl_task_type"],
        num_fewshot=entry["num_fewshot"][0],
        delimiter=entry.get("continuation_delimiter", " "),
        baseline=float(baselines[entry["label"]]),
        examples=examples,
    )


def make_task(*, examples: Sequence[dict[str, Any]], **facts: Any) -> Task:
    """A task whose examples are shuffled as CORE shuffles them."""
    shuffled = list(examples)
    random.Random(SHUFFLE_SEED).shuffle(shuffled)
    return Task(examples=tuple(shuffled), **facts)


def demonstrations(task: Task, index: int) -> list[dict[str, Any]]:
    """The few-shot examples of question `index`: drawn from all others, whatever the limit."""
    others = [i for i in range(len(task.examples)) if i != index]
    drawn = random.Random(FEWSHOT_SEED + index).sample(others, task.num_fewshot)
    return [task.examples[i] for i in drawn]


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


def sequences(task: Task, index: int, tokenizer: Tokenizer, max_length: int) -> list[Scored]:
    """The token sequences of a question, cut on the left to `max_length`, with their spans."""
    encoded = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in prompts(task, index)]
    if task.kind == "multiple_choice":
        # a choice that is the beginning of all others is scored on its last token
        start = min(_common(encoded), min(map(len, encoded)) - 1)
        spans = [Scored(ids, start, len(ids)) for ids in encoded]
    elif task.kind == "schema":
        shared = _common([ids[::-1] for ids in encoded])
        spans = [Scored(ids, len(ids) - shared, len(ids)) for ids in encoded]
    else:
        without, whole = encoded
        start = _common(encoded)  # where the tokenizer merged across the border, a little earlier
        spans = [Scored(whole, min(start, len(without)), len(whole))]
    return [_crop(span, max_length) for span in spans]


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences share from the start."""
    shared = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared


def _crop(sequence: Scored, max_length: int) -> Scored:
    """Keep the last `max_length` tokens; the span keeps at least one token of context."""
    surplus = max(0, len(sequence.ids) - max_length)
    start = max(1, sequence.start - surplus)
    return Scored(sequence.ids[surplus:], start, sequence.end - surplus)

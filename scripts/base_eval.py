"""The CORE metric of a base model: 22 in-context tasks, accuracy above guessing.

    python -m scripts.base_eval                              # the bundle of the base directory
    python -m scripts.base_eval --bundle DIR --max-per-task 500    # an estimate, called so

Without a bundle it runs three small tasks over the embedded documentation instead, and says that
those are not CORE. `python -m scripts.data_download --all` fetches the bundle.
"""

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.progress import Progress
from rich.table import Table as ScreenTable

from jaxchat import cli, runtime
from jaxchat.artifacts import atomic_write, base_dir
from jaxchat.backend import DEFAULT_BACKEND, BackendName
from jaxchat.core_eval import TaskResult, core_metric, evaluate_task
from jaxchat.core_tasks import Task, load_bundle
from jaxchat.dataset import open_corpus
from jaxchat.embedded_tasks import NOTE, embedded_tasks
from jaxchat.plan import check_positive
from jaxchat.progress import make_console
from jaxchat.report import Report, Table, Text, model_facts
from jaxchat.scaling import CORE
from jaxchat.stages import LoadedModel, StageName, find_checkpoint, load_model

PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
"""Models whose results a bundle may hold, as openai-community-NAME.csv."""


@dataclass(frozen=True)
class Config:
    """Which model, on which tasks."""

    source: Annotated[StageName, cli.arg(aliases=["-i"])] = "base"
    """Stage of the model: base, mid, sft or rl."""
    model_tag: Annotated[str | None, cli.arg(aliases=["-g"])] = None
    """Which model of the stage; the deepest when not set."""
    step: Annotated[int | None, cli.arg(aliases=["-s"])] = None
    """Which checkpoint; the newest when not set."""
    bundle: Path | None = None
    """Folder of an evaluation bundle; the base directory's when not set."""
    max_per_task: int | None = None
    """Examples of each task; all when not set."""
    batch_tokens: int = 16384
    """Padded tokens that a device scores at a time: lower it when memory runs out."""
    backend: BackendName = DEFAULT_BACKEND
    """jax or torch."""

    def __post_init__(self) -> None:
        check_positive(max_per_task=self.max_per_task, batch_tokens=self.batch_tokens)


def main(config: Config) -> None:
    """Evaluate, print the table, write the CSV, and add a section to the report."""
    started = time.monotonic()
    report = Report(base_dir())
    report.check_writable()
    find_checkpoint(config.source, config.model_tag, config.step)  # before slow work
    bundle = config.bundle or base_dir() / "eval_bundle"
    is_core = config.bundle is not None or bundle.is_dir()
    tasks = load_bundle(bundle) if is_core else embedded_tasks(open_corpus("embedded"))
    model = load_model(
        config.source, backend=config.backend, model_tag=config.model_tag, step=config.step
    )
    results = evaluate(config, model, tasks)
    metric = core_metric(results)
    label = metric_label(config, is_core=is_core)
    name = label if is_core else f"mean centred accuracy ({label})"
    published = load_published(bundle) if is_core else {}
    table = tabulate(results, published)
    console = make_console()
    console.print(on_screen(table))
    console.print(f"{name}: {metric:.4f}")
    csv_name = f"{config.source}_eval.csv"
    if label != CORE and holds_core(model.path / csv_name):
        console.print("Not in the report, which has this checkpoint's CORE of all examples.")
        return
    for folder in (model.path, base_dir() / "report"):  # beside what was judged, and the newest
        write_csv(folder / csv_name, results, label, metric)
    report.add(
        f"{config.source}_eval",
        f"{label[0].upper()}{label[1:]} ({config.source})",
        [
            Text(f"{name}: {metric:.4f}, {config.source} step {model.meta['step']}"),
            table,
            model_facts(config.source, model.tag, model.meta),
        ],
        wall_seconds=time.monotonic() - started,
        figures={label: metric},
    )


def metric_label(config: Config, *, is_core: bool) -> str:
    """What the mean is called: CORE only where it is of all examples."""
    if not is_core:
        return NOTE
    return CORE if config.max_per_task is None else f"{CORE} of {config.max_per_task} a task"


def evaluate(config: Config, model: LoadedModel, tasks: Sequence[Task]) -> list[TaskResult]:
    """Every task in turn, with a bar for each."""
    results = []
    with Progress(console=make_console()) as progress:
        for task in tasks:
            bar = progress.add_task(task.label, total=1.0)
            result = evaluate_task(
                model.backend,
                model.tokenizer,
                task,
                max_examples=config.max_per_task,
                batch_tokens=config.batch_tokens,
                on_progress=lambda share, bar=bar: progress.update(bar, completed=share),
            )
            results.append(result)
    return results


def tabulate(results: Sequence[TaskResult], published: dict[str, dict[str, float]]) -> Table:
    """One row a task; published accuracies beside ours."""
    columns = ["task", "kind", "examples", "accuracy", "+-", "centred", *published]
    rows = [
        [
            *(r.label, r.kind, r.examples, r.accuracy, r.stderr, r.centered),
            *(scores.get(r.label) for scores in published.values()),
        ]
        for r in results
    ]
    caption = "+- is the standard error of the accuracy"
    return Table(columns, rows, caption)


def on_screen(table: Table) -> ScreenTable:
    shown = ScreenTable(*table.columns)
    for row in table.rows:
        shown.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row))
    return shown


def load_published(bundle: Path) -> dict[str, dict[str, float]]:
    """Accuracy by task of the models whose results the bundle holds."""
    found = {}
    for name in PUBLISHED:
        path = bundle / f"openai-community-{name}.csv"
        if path.is_file():
            with open(path, newline="") as file:
                rows = [[cell.strip() for cell in row] for row in csv.reader(file)][1:]
            found[name] = {row[0]: float(row[1]) for row in rows if row[1]}
    return found


def holds_core(path: Path) -> bool:
    """Whether what `write_csv` has left there is of all examples."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return bool(lines) and lines[-1].startswith(f"{CORE},")


def write_csv(path: Path, results: Sequence[TaskResult], label: str, metric: float) -> None:
    """Task, accuracy, centred accuracy, and the mean as the last row, under its label."""
    if not runtime.is_first_process():
        return
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["Task", "Accuracy", "Centered"])
        writer.writerows([r.label, f"{r.accuracy:.6f}", f"{r.centered:.6f}"] for r in results)
        writer.writerow([label, "", f"{metric:.6f}"])


if __name__ == "__main__":
    cli.run(main, Config)

"""How well a chat model answers: multiple choice, arithmetic, code, spelling, and ChatCORE.

    python -m scripts.chat_eval -i sft                      # every task of the data at hand
    python -m scripts.chat_eval -i mid -a GSM8K -a HumanEval -x 100
    python -m scripts.chat_eval -i sft -a "ARC-Easy|MMLU" --backend torch
    python -m scripts.chat_eval -i sft -a mine.jsonl
    python -m scripts.chat_eval -i rl -a GSM8K -n 8 -t 1        # pass@8

ChatCORE needs the hub's task sets, which `python -m scripts.data_download --all` fetches. Without
them it asks what needs no network, about the embedded documentation above all, and says that this
is not ChatCORE. A file of your own has a question a line, as chat_rl reads them. The stages of a
model's tag are shown side by side, in the report all models, and what the same one has been asked
before stays: of a task that it was asked twice, the larger sample, unless its problems are others
now. Replies that are not drawn as by default are another measurement, which is shown and not
reported.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from rich.progress import Progress
from rich.table import Table as ScreenTable

from jaxchat import cli
from jaxchat.artifacts import base_dir
from jaxchat.backend import DEFAULT_BACKEND, BackendName
from jaxchat.execution import SANDBOXES
from jaxchat.plan import check_positive
from jaxchat.progress import make_console
from jaxchat.report import Report, Table, Text, model_facts, subject_of
from jaxchat.stages import LoadedModel, StageName, find_checkpoint, load_model
from jaxchat.task_eval import GREEDY, ChatResult, Drawing, evaluate_chat
from jaxchat.task_report import (
    compact,
    figures,
    manners,
    outweighed,
    result_table,
    section_name,
    side_by_side,
    summarize,
    with_earlier_rows,
)
from jaxchat.tasks.base import Task
from jaxchat.tasks.mixtures import check_source, default_source, eval_names, eval_task, is_own


@dataclass(frozen=True)
class Config:
    """Which model, on which tasks."""

    source: Annotated[StageName, cli.arg(aliases=["-i"])] = "sft"
    """Stage of the model: base, mid, sft or rl."""
    model_tag: Annotated[str | None, cli.arg(aliases=["-g"])] = None
    """Which model of the stage; the deepest when not set."""
    step: Annotated[int | None, cli.arg(aliases=["-s"])] = None
    """Which checkpoint; the newest when not set."""
    task: Annotated[cli.repeatable[tuple[str, ...]], cli.arg(aliases=["-a"])] = ()
    """A task's name or a jsonl file; several with | between or one by one. All when not set."""
    data: str | None = None
    """hub, offline or a jsonl file: which tasks are all. The hub's if downloaded."""
    max_problems: Annotated[int | None, cli.arg(aliases=["-x"])] = None
    """Problems of each task, drawn fairly; all when not set."""
    samples: Annotated[int, cli.arg(aliases=["-n"])] = Drawing.samples
    """Replies to a problem of text, which is solved if one is right (pass@n)."""
    temperature: Annotated[float, cli.arg(aliases=["-t"])] = Drawing.temperature
    """How freely replies are chosen: 0 takes the likeliest token."""
    top_k: Annotated[int, cli.arg(aliases=["-k"])] = Drawing.top_k
    """Choose among so many of the likeliest tokens; 0 for all."""
    max_tokens: Annotated[int | None, cli.arg(aliases=["-m"])] = None
    """Longest reply; what each task gives it when not set."""
    batch_tokens: int = 16384
    """Padded tokens that a device reads at a time: lower it when memory runs out."""
    slots: int | None = None
    """Replies that a device writes at a time; 8 on a CPU and 64 elsewhere when not set."""
    sandbox: str = SANDBOXES[0]
    """Where code that the model writes runs: monty, bubblewrap or none."""
    backend: BackendName = DEFAULT_BACKEND
    """jax or torch."""

    def __post_init__(self) -> None:
        check_positive(
            max_problems=self.max_problems,
            samples=self.samples,
            max_tokens=self.max_tokens,
            batch_tokens=self.batch_tokens,
            slots=self.slots,
        )
        self.drawing()

    def drawing(self) -> Drawing:
        """ValueError, naming it, for what no reply can be drawn by."""
        return Drawing(self.samples, self.temperature, self.top_k, self.max_tokens)


def main(config: Config) -> None:
    """Evaluate, print the table, and add the stage and the comparison to the report."""
    started = time.monotonic()
    report = Report(base_dir())
    report.check_writable()
    report.sections()  # a damaged one is named
    find_checkpoint(config.source, config.model_tag, config.step)  # all this before slow work
    tasks = choose_tasks(config)
    model = load_model(
        config.source, backend=config.backend, model_tag=config.model_tag, step=config.step
    )
    results = evaluate(config, model, tasks)
    facts = model_facts(config.source, model.tag, model.meta)
    fresh = result_table(results, config.max_problems)
    console = make_console()
    if config.drawing() != GREEDY:
        console.print(on_screen(compact(fresh)))
        console.print("Not in the report, whose replies are drawn as by default.")
        return
    table = with_earlier_rows(fresh, facts.values, report.sections(), config.source)
    console.print(on_screen(compact(table)))
    for line in outweighed(fresh, table):
        console.print(line)
    summary = summarize(table)
    for name, value in summary.items():
        console.print(f"{name}: {value:.4f}")
    report.add(
        section_name(config.source),
        f"Chat evaluation ({config.source})",
        [*(Text(f"{name}: {value:.4f}") for name, value in summary.items()), table, facts],
        wall_seconds=time.monotonic() - started,
        figures=summary | figures(table),
    )
    sections = report.sections()
    report.add("chat_eval", "Chat tasks by stage", [side_by_side(sections), manners(sections)])
    tagged = [(section, subject_of(section)) for section in sections]
    console.print(on_screen(side_by_side([s for s, of in tagged if of and of.tag == model.tag])))


def choose_tasks(config: Config) -> list[Task]:
    """The tasks that were asked for, or all of the data at hand; each is opened before any runs."""
    source = config.data or default_source()
    words = [name.strip() for words in config.task for name in words.split("|") if name.strip()]
    asked = {name if is_own(name) else name.lower(): name for name in words}  # each once
    if not asked:
        check_source(source)
    names = asked.values() or eval_names(source)
    return [eval_task(name, sandbox=config.sandbox) for name in names]


def evaluate(config: Config, model: LoadedModel, tasks: Sequence[Task]) -> list[ChatResult]:
    """Every task in turn, with a bar for each."""
    slots = config.slots or (8 if model.backend.devices.platform == "cpu" else 64)
    results = []
    with Progress(console=make_console()) as progress:
        for task in tasks:
            bar = progress.add_task(task.name, total=1.0)
            result = evaluate_chat(
                model.backend,
                model.tokenizer,
                task,
                max_problems=config.max_problems,
                batch_tokens=config.batch_tokens,
                slots=slots,
                drawing=config.drawing(),
                on_progress=lambda share, bar=bar: progress.update(bar, completed=share),
            )
            progress.update(bar, completed=1.0)
            results.append(result)
    return results


def on_screen(table: Table) -> ScreenTable:
    shown = ScreenTable(*table.columns, caption=table.caption or None)
    for row in table.rows:
        shown.add_row(*("" if cell is None else str(cell) for cell in row))
    return shown


if __name__ == "__main__":
    cli.run(main, Config)

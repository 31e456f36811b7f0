"""Train the tokenizer on the corpus.

    python -m scripts.tok_train
    python -m scripts.tok_train --vocab-size 8192 --corpus embedded

Reads documents until `--max-chars`, learns the merges, and writes BASE/tokenizer (see
jaxchat/tokenizer.py for the files) and a section of the report. The models in BASE are trained
with it: another tokenizer is for other models, best in a folder of their own (JAXCHAT_BASE_DIR).
One that is replaced all the same is kept beside the new one, where its models find it.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxchat import artifacts, cli, dataset, report
from jaxchat.tokenizer import MIN_VOCAB_SIZE, TOKENIZER_FILE, Tokenizer

MAX_ROWS = 20
"""Lengths shown in the report's table; longer tokens are rules of dashes and the like."""


@dataclass(frozen=True)
class Config:
    """What to learn from what."""

    vocab_size: int = 32768
    """Tokens, special ones included."""
    max_chars: int = 2_000_000_000
    """Characters to read at most."""
    doc_cap: int = 10_000
    """Characters to read at most from one document, so that no long one dominates."""
    corpus: str | None = None
    """climbmix, fineweb-edu, embedded, or the path of texts; what has been downloaded if unset."""

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"vocab_size {self.vocab_size} must be at least {MIN_VOCAB_SIZE}")
        if self.max_chars < 1 or self.doc_cap < 1:
            raise ValueError(
                f"max_chars {self.max_chars} and doc_cap {self.doc_cap} must be positive"
            )


class Reading:
    """Documents on their way to the trainer: cropped, counted, and shown by a bar."""

    def __init__(self, texts: Iterable[str], *, max_chars: int, doc_cap: int) -> None:
        self.texts = texts
        self.max_chars = max_chars
        self.doc_cap = doc_cap
        self.documents = 0
        self.chars = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            room = self.max_chars - self.chars
            if room <= 0:
                break
            text = text[: min(self.doc_cap, room)]
            self.documents += 1
            self.chars += len(text)
            yield text


def main(config: Config) -> None:
    """Train, save, and add the section `tok_train` to the report, alone in the base directory."""
    base = artifacts.base_dir()
    card = report.Report(base)
    card.check_writable()
    own = artifacts.claim(
        base, name=".tokenizer.claim", remedy="set JAXCHAT_BASE_DIR to another folder"
    )
    with own:
        learn(config, base, card)


def learn(config: Config, base: Path, card: report.Report) -> None:
    """What `main` says, in a base directory where no other process makes a tokenizer."""
    start, console = time.monotonic(), Console(highlight=False, markup=False)
    corpus = dataset.open_corpus(config.corpus or dataset.default_corpus())
    reading = Reading(
        corpus.iter_texts("train"), max_chars=config.max_chars, doc_cap=config.doc_cap
    )
    tokenizer = train(reading, config.vocab_size, console)
    directory = base / "tokenizer"
    earlier = set_aside(directory, tokenizer)
    tokenizer.save(directory)
    seconds = time.monotonic() - start
    console.print(
        f"{tokenizer.vocab_size:,} tokens from {reading.documents:,} documents, "
        f"{reading.chars:,} characters of {corpus.name} in {seconds:.1f} s, reading included: "
        f"{directory}",
        soft_wrap=True,
    )
    if earlier is not None:
        console.print(
            f"The tokenizer that was there is another, now in {earlier}: models trained with it "
            "go on using that one. To continue their pretraining, name that folder "
            f"{directory.name} again; set JAXCHAT_BASE_DIR to keep such models apart.",
            soft_wrap=True,
        )
    parts: list[report.Part] = [
        report.KeyValues(asdict(config), "Configuration"),
        report.KeyValues(
            {
                "corpus": corpus.name,
                "corpus fingerprint": corpus.fingerprint,
                "documents": reading.documents,
                "characters": reading.chars,
                "vocabulary": tokenizer.vocab_size,
                "tokenizer fingerprint": tokenizer.fingerprint,
            },
            "Corpus and result",
        ),
        token_lengths(tokenizer),
    ]
    if tokenizer.vocab_size < config.vocab_size:
        notice = (
            f"The corpus is too small for {config.vocab_size:,} tokens: no pair is left to merge "
            f"after {tokenizer.vocab_size:,}. The tokenizer has that many, and so will the models."
        )
        console.print(notice)
        parts.append(report.Text(notice))
    card.add("tok_train", "Tokenizer: training", parts, wall_seconds=seconds)


def set_aside(directory: Path, tokenizer: Tokenizer) -> Path | None:
    """Where another tokenizer that was in `directory` is now; None if it held this one or none."""
    if not (directory / TOKENIZER_FILE).is_file():
        return None
    try:
        if Tokenizer.load(directory).fingerprint == tokenizer.fingerprint:
            return None
    except ValueError:  # damaged: no model can use it
        return None
    target = directory.with_name(f"{directory.name}-replaced-{time.strftime('%Y%m%d-%H%M%S')}")
    return directory.rename(target)


def train(reading: Reading, vocab_size: int, console: Console) -> Tokenizer:
    """`Tokenizer.train` behind a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("reading", total=None)

        def progress(stage: str, done: int, total: int | None) -> None:
            read = f"{reading.documents:,} documents, {reading.chars / 1e6:,.1f} M characters"
            words = f"reading: {read}" if stage == "counting" else f"merging: {done:,} of {total:,}"
            bar.update(task, description=words, completed=done, total=total)

        return Tokenizer.train(reading, vocab_size=vocab_size, progress=progress)


def token_lengths(tokenizer: Tokenizer) -> report.Table:
    """How many tokens have 1, 2, 3 ... bytes, with an example of each."""
    lengths = tokenizer.token_bytes[: -len(tokenizer.special_names)]
    rows = []
    for length in range(1, int(lengths.max()) + 1):
        ids = (lengths == length).nonzero()[0]
        if len(ids):
            rows.append([length, len(ids), repr(tokenizer.decode([int(ids[-1])]))])
    return report.Table(["bytes", "tokens", "example"], rows[:MAX_ROWS], "Tokens by length")


if __name__ == "__main__":
    cli.run(main, Config)

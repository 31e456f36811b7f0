"""rustbpe against its peers: training and encoding, each trial in a process of its own.

    python -m benchmarks.tokenizer
    python -m benchmarks.tokenizer --quick

The text is made from what the machine has: the embedded corpus and the sources of the installed
Python packages, documents in turn. The peers are installed into an environment of their own by uv.
Trials of all subjects take turns; the tables show medians, and how many times ours every other
takes. Trainers that follow the same rule must learn the same ranks and encoders give the same ids,
or there is no table.
"""

import base64
import json
import statistics
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

from rich.progress import track
from rich.table import Table

import rustbpe
from benchmarks.figures import console
from benchmarks.tokenizer_trial import GPT4, documents, measured
from jaxchat import cli
from jaxchat.artifacts import atomic_write, base_dir
from jaxchat.dataset import open_corpus

PEERS = (
    "rustbpe==0.1.0",
    "tokenizers==0.23.3",
    "gigabpe==0.1.0",
    "tiktoken==0.14.0",
    "gigatoken==0.10.0",
    "numpy",
)

TRIAL = Path(__file__).with_name("tokenizer_trial.py")

OURS = "ours"

TRAINERS = (
    (OURS, "rustbpe", "gpt4"),
    ("PyPI rustbpe", "rustbpe", "gpt4"),
    ("HF tokenizers", "tokenizers", "gpt4"),
    (OURS, "rustbpe", "gpt2"),
    ("gigabpe", "gigabpe", "gpt2"),
)
"""Name in the table, subject of the trial, pattern."""

ENCODERS = (
    (OURS, "rustbpe", "gpt4"),
    ("tiktoken", "tiktoken", "gpt4"),
    ("gigatoken", "gigatoken", "gpt4"),
)

Trial = dict[str, float]


@dataclass(frozen=True)
class Config:
    """How much text and how often."""

    megabytes: int = 100
    """Text to train on."""
    encode_megabytes: int = 25
    """Text to encode."""
    vocab_size: int = 32768
    repeats: int = 3
    """Trials of every subject."""
    quick: bool = False
    """A tenth of the text, once: to see that everything runs."""


def main(config: Config) -> None:
    """Prepare, run the trials in turn, print the tables."""
    if config.quick:
        config = replace(config, megabytes=10, encode_megabytes=3, repeats=1)
    folder = base_dir() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    python = peers(folder / "peers")
    text = write_text(folder / f"text_{config.megabytes}.txt", config.megabytes)
    sample = write_text(folder / f"text_{config.encode_megabytes}.txt", config.encode_megabytes)
    ranks = write_ranks(folder / "ranks.tiktoken", sample, config.vocab_size)
    vocab = str(config.vocab_size)
    training = run_trials(
        config, python, TRAINERS, lambda subject, pattern: ("train", subject, text, vocab, pattern)
    )
    console().print(training_table(config, training))
    encoding = run_trials(
        config,
        python,
        ENCODERS,
        lambda subject, pattern: ("encode", subject, sample, vocab, pattern, ranks),
    )
    console().print(encoding_table(sample.stat().st_size / 1e6, encoding))
    console().print(one_letter_table(config.repeats))


def peers(directory: Path) -> Path:
    """The interpreter of an environment that holds the peers."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "--quiet", str(directory)], check=True)
    install = ["uv", "pip", "install", "--quiet", "--python", str(python), *PEERS]
    subprocess.run(install, check=True)
    return python


def write_text(path: Path, megabytes: int) -> Path:
    """Documents of prose and of code in turn, up to a size."""
    if path.exists():
        return path
    prose = open_corpus("embedded").iter_texts("train")
    with atomic_write(path, "w") as file:
        written = 0
        for text in chain.from_iterable(zip_longest(prose, sources(), fillvalue="")):
            text = text.replace("\x1d", "")
            if text:
                file.write(text + "\x1d")
                written += len(text.encode())
            if written >= megabytes * 1e6:
                return path
    raise ValueError(f"only {written / 1e6:.0f} MB of text on this machine: ask for fewer")


def sources() -> Iterator[str]:
    """Every Python file of the installed packages."""
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def write_ranks(path: Path, text: Path, vocab_size: int) -> Path:
    """A vocabulary for the encoders, in tiktoken's format."""
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(documents(str(text)), vocab_size, pattern=GPT4)
    with atomic_write(path, "wb") as file:
        for token, rank in tokenizer.get_mergeable_ranks():
            file.write(base64.b64encode(token) + f" {rank}\n".encode())
    return path


def run_trials(config, python, subjects, arguments) -> dict[tuple[str, str], Trial]:  # noqa: ANN001
    """Medians by name and pattern; the subjects take turns."""
    trials: dict[tuple[str, str], list[Trial]] = {}
    digests: dict[str, str] = {}
    rounds = [subject for _ in range(config.repeats) for subject in subjects]
    for name, subject, pattern in track(rounds, "trials"):
        interpreter = sys.executable if name == OURS else str(python)
        command = [interpreter, str(TRIAL), *map(str, arguments(subject, pattern))]
        command += [""] * (8 - len(command))
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        trial = json.loads(done.stdout)
        digest = trial.pop("digest", None)
        if digest is not None and digests.setdefault(pattern, digest) != digest:
            raise ValueError(f"the result of {name} on the {pattern} pattern differs from ours")
        trials.setdefault((name, pattern), []).append(trial)
    return {key: medians(rows) for key, rows in trials.items()}


def medians(trials: Sequence[Trial]) -> Trial:
    return {name: statistics.median(trial[name] for trial in trials) for name in trials[0]}


def training_table(config: Config, results: dict[tuple[str, str], Trial]) -> Table:
    table = Table(title=f"Training, {config.megabytes} MB, vocabulary {config.vocab_size}")
    columns = ("wall s", "CPU s", "peak MB", "wall x", "CPU x", "peak x")
    fill(table, ("trainer", "pattern", *columns), results, ("wall", "cpu", "peak_mb"))
    return table


def encoding_table(megabytes: float, results: dict[tuple[str, str], Trial]) -> Table:
    table = Table(title=f"Encoding, {megabytes:.0f} MB, one thread")
    names = ("first_wall", "first", "again_wall", "again", "peak_mb")
    figures = ("first wall s", "CPU s", "repeated wall s", "CPU s", "peak MB")
    ratios = ("wall x", "CPU x", "repeated wall x", "CPU x", "peak x")
    fill(table, ("encoder", "pattern", *figures, *ratios), results, names)
    return table


def one_letter_table(repeats: int) -> Table:
    """A megabyte of one character: a piece of a megabyte, or a million pieces."""
    table = Table(title="A megabyte of one character, vocabulary 32768: wall seconds")
    for column in ("character", "training", "encoding"):
        table.add_column(column, justify="right")
    for letter in "a -7":
        text, rows = letter * 2**20, []
        for _ in range(repeats):
            tokenizer = rustbpe.Tokenizer()
            with warnings.catch_warnings(action="ignore"):
                train = measured(lambda: tokenizer.train_from_iterator([text], 32768))  # noqa: B023
            encode = measured(lambda: tokenizer.encode_array(text))  # noqa: B023
            rows.append({"train": train["wall"], "encode": encode["wall"]})
        middle = medians(rows)
        table.add_row(repr(letter), f"{middle['train']:.3f}", f"{middle['encode']:.3f}")
    return table


def fill(
    table: Table,
    columns: Iterable[str],
    results: dict[tuple[str, str], Trial],
    names: Sequence[str],
) -> None:
    """A row a subject: its figures, and their ratios to ours on the same pattern."""
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    for (subject, pattern), trial in results.items():
        ours = results[OURS, pattern]
        figures = [f"{trial[name]:.2f}" for name in names]
        ratios = [f"{trial[name] / ours[name]:.2f}" for name in names]
        table.add_row(subject, pattern, *figures, *ratios)


if __name__ == "__main__":
    cli.run(main, Config)

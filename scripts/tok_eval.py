"""How well the tokenizer compresses, against GPT-2's, GPT-4's and raw bytes, per kind of text.

    python -m scripts.tok_eval
    python -m scripts.tok_eval --ranks-dir DIR    # with r50k_base.tiktoken, cl100k_base.tiktoken

A table on the screen and in the report. The other encodings are read from `--ranks-dir`, or from
tiktoken's cache if it holds them; nothing is downloaded. Left out: speed, which
`benchmarks/tokenizer.py` measures.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tiktoken
from rich.console import Console
from rich.table import Table as ScreenTable
from rich.text import Text as ScreenText

from jaxchat import artifacts, cli, dataset, report
from jaxchat.bpe_file import parse_ranks
from jaxchat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """What to compare on."""

    ranks_dir: Path | None = None
    """Folder with r50k_base.tiktoken and cl100k_base.tiktoken; tiktoken's cache when not set."""
    corpus: str | None = None
    """Corpus whose documents are compressed; when not set what the tokenizer was trained on."""
    max_chars: int = 500_000
    """Characters taken from each split of the corpus."""

    def __post_init__(self) -> None:
        if self.max_chars < 1:
            raise ValueError(f"max_chars must be positive, is {self.max_chars}")


class Published(NamedTuple):
    """An encoding that the world knows, as tiktoken defines it."""

    name: str
    stem: str
    sha256: str
    pattern: str


PUBLISHED = (
    Published(
        "GPT-2",
        "r50k_base",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    ),
    Published(
        "GPT-4",
        "cl100k_base",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    ),
)

_CACHE_URL = "https://openaipublic.blob.core.windows.net/encodings/{stem}.tiktoken"
"""tiktoken names its cached files by the SHA-1 of where they come from."""

TEXTS = {
    "English prose": (
        "The harbour woke slowly. Before the first ferry there was only the creak of ropes, a "
        "gull arguing with nobody, and the old man who swept the quay whether it needed sweeping "
        "or not. He'd done it for thirty years, he said, because a clean stone is a kind of "
        "promise: somebody was here, and somebody will be here tomorrow. By eight o'clock the "
        "fish market had opened, and his promise was covered in scales, ice and the footprints "
        "of people who couldn't wait. He never seemed to mind. The next morning we heard the "
        "broom again.\n"
    ),
    "Python code": (
        "def shortest_paths(graph: dict[str, dict[str, float]], start: str) -> dict[str, float]:\n"
        '    """Distance from `start` to every node that can be reached (Dijkstra)."""\n'
        "    distances = {start: 0.0}\n"
        "    queue = [(0.0, start)]\n"
        "    while queue:\n"
        "        distance, node = heapq.heappop(queue)\n"
        "        if distance > distances[node]:\n"
        "            continue  # an older, longer way\n"
        "        for neighbour, length in graph.get(node, {}).items():\n"
        "            candidate = distance + length\n"
        '            if candidate < distances.get(neighbour, float("inf")):\n'
        "                distances[neighbour] = candidate\n"
        "                heapq.heappush(queue, (candidate, neighbour))\n"
        "    return distances\n"
    ),
    "numbers and maths": (
        "In 2024 the 1,284 members paid 37.50 each, which makes 48,150.00 in total; 3.2% more "
        "than the 46,657 of 2023. Let $f(x) = 3x^2 - 12x + 7$. Then $f'(x) = 6x - 12$, so the "
        "minimum is at $x = 2$ with $f(2) = -5$, and the roots are $x = 2 \\pm \\sqrt{5/3} "
        "\\approx 0.709, 3.291$. Check: 17 * 23 = 391, 391 / 17 = 23, 2^16 = 65536, "
        "1/7 = 0.142857142857...\n"
    ),
    "German": (
        "Am Donnerstag verspätete sich der Zug wie üblich um zwanzig Minuten, und auf dem "
        "Bahnsteig bildete sich eine Gemeinschaft, die nur aus Ungeduld bestand. Eine Frau "
        "verteilte Äpfel, zwei Schüler übten französische Vokabeln, und ein Herr mit Regenschirm "
        "erklärte allen, die es hören wollten, warum früher selbstverständlich alles pünktlicher "
        "gewesen sei.\n"
    ),
    "Chinese": (
        "清晨的市场总是最先醒来。卖豆腐的大叔已经摆好了摊子。热气从木桶里慢慢升起。"
        "旁边的老奶奶挑着青菜。她说孙子在学校里学会了写自己的名字。"
        "雨下得不大。没有人打伞。大家都说这样的雨对田里的庄稼正好。\n"
    ),
    "emoji and symbols": (
        "Moving day 🚚📦📦📦! Cat hid in box no. 7 😹, wouldn't come out 🙅🏽‍♀️ until pizza 🍕… "
        "Thanks to the whole crew 👨‍👩‍👧‍👦❤️, 10/10 ⭐⭐⭐⭐⭐ → next time we hire 🤖s. "
        "½ of it ≠ broken ✓\n"
    ),
}
"""Short samples of what users write, made for this table."""

Encode = Callable[[str], Sequence[int]]


class Compression(NamedTuple):
    """One row: a kind of text, its UTF-8 bytes, and the tokens that each encoding needs."""

    kind: str
    bytes: int
    tokens: Mapping[str, int]

    def bytes_per_token(self, name: str) -> float:
        return self.bytes / max(1, self.tokens[name])


def main(config: Config) -> None:
    """Print the table and add it to the report."""
    start, console = time.monotonic(), Console(highlight=False, markup=False)
    tokenizer = Tokenizer.load(artifacts.base_dir() / "tokenizer")
    others = load_published(config.ranks_dir)
    encoders = {"ours": tokenizer.encode, **{n: e.encode_ordinary for n, e in others.items()}}
    kinds = {kind: [text] for kind, text in TEXTS.items()}
    source = open_source(config.corpus, tokenizer)
    kinds |= corpus_texts(source, max_chars=config.max_chars)
    rows = [compress(kind, texts, encoders) for kind, texts in kinds.items()]
    sizes = {"ours": tokenizer.vocab_size, **{n: e.n_vocab for n, e in others.items()}}
    notes = f"Vocabularies: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}."
    missing = [p.name for p in PUBLISHED if p.name not in others]
    if missing:
        notes += f" Not compared with {' and '.join(missing)}: not on this machine (--ranks-dir)."
    table = tabulate(rows, list(others))
    console.print(on_screen(table))
    console.print(notes)
    report.Report(artifacts.base_dir()).add(
        "tok_eval",
        "Tokenizer: compression",
        [table, report.Text(notes)],
        wall_seconds=time.monotonic() - start,
    )


def load_published(ranks_dir: Path | None) -> dict[str, tiktoken.Encoding]:
    """The published encodings that this machine has, by name.

    Raises ValueError when `ranks_dir` is given and holds none, or a file with the wrong content.
    """
    found = {}
    for published in PUBLISHED:
        path = (ranks_dir or _cache_dir()) / _file_name(published, ranks_dir)
        if not path.is_file():
            continue
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != published.sha256:
            raise ValueError(f"{path} is not {published.stem} (wrong checksum): fetch it again")
        ranks = {token: rank for rank, token in enumerate(parse_ranks(content, source=path))}
        found[published.name] = tiktoken.Encoding(
            published.stem, pat_str=published.pattern, mergeable_ranks=ranks, special_tokens={}
        )
    if ranks_dir and not found:
        names = " or ".join(f"{published.stem}.tiktoken" for published in PUBLISHED)
        raise ValueError(f"ranks_dir {ranks_dir} has no {names}")
    return found


def open_source(corpus: str | None, tokenizer: Tokenizer) -> dataset.Corpus:
    """The corpus asked for, else the one that the report says of this tokenizer, else the default.

    ValueError where the corpus is gone.
    """
    trained_on = None if corpus else _trained_on(tokenizer)
    try:
        return dataset.open_corpus(corpus or trained_on or dataset.default_corpus())
    except ValueError as error:
        if trained_on is None:
            raise
        raise ValueError(
            f"{error} (the tokenizer was trained on it; name another with --corpus)"
        ) from error


def _trained_on(tokenizer: Tokenizer) -> str | None:
    """The corpus in tok_train's section, if that section is about this very tokenizer."""
    for section in report.Report(artifacts.base_dir()).sections():
        for part in section.parts if section.stage == "tok_train" else ():
            values = part.values if isinstance(part, report.KeyValues) else {}
            if values.get("tokenizer fingerprint") == tokenizer.fingerprint:
                return str(values["corpus"])
    return None


def corpus_texts(source: dataset.Corpus, *, max_chars: int) -> dict[str, list[str]]:
    """Documents of each split, about `max_chars` characters in all."""
    return {
        f"{source.name} ({split})": list(source.iter_texts(split, max_chars=max_chars))
        for split in ("train", "val")
    }


def compress(kind: str, texts: Sequence[str], encoders: Mapping[str, Encode]) -> Compression:
    """Encode `texts` with every encoder."""
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    tokens = {name: sum(len(encode(t)) for t in texts) for name, encode in encoders.items()}
    return Compression(kind, size, tokens)


def tabulate(rows: Sequence[Compression], others: Sequence[str]) -> report.Table:
    """Bytes per token, and how many more or fewer tokens ours needs than each other encoding."""
    columns = ["text", "bytes", "tokens", "bytes/token"]
    for name in others:
        columns += [name, f"vs {name}"]
    cells = []
    for row in rows:
        line: list[report.Value] = [row.kind, row.bytes, row.tokens["ours"]]
        line.append(f"{row.bytes_per_token('ours'):.2f}")
        for name in others:
            more = row.tokens["ours"] / max(1, row.tokens[name]) - 1
            line += [f"{row.bytes_per_token(name):.2f}", f"{more:+.1%}"]
        cells.append(line)
    caption = "Bytes per token, more is better (raw bytes: 1.00)"
    if others:
        caption += "; vs: tokens more or less than theirs"
    return report.Table(columns, cells, caption)


def on_screen(table: report.Table) -> ScreenTable:
    """The same table for a terminal: negative differences (fewer tokens) in green."""
    screen = ScreenTable(*table.columns, title=table.caption)
    for column in screen.columns[1:]:
        column.justify = "right"
    for row in table.rows:
        screen.add_row(*(_styled(cell) for cell in row))
    return screen


def _styled(cell: report.Value) -> ScreenText:
    text = f"{cell:,}" if isinstance(cell, int) else str(cell)
    style = {"-": "green", "+": "red"}.get(text[0], "") if text.endswith("%") else ""
    return ScreenText(text, style)


def _file_name(published: Published, ranks_dir: Path | None) -> str:
    if ranks_dir:
        return f"{published.stem}.tiktoken"
    return hashlib.sha1(_CACHE_URL.format(stem=published.stem).encode()).hexdigest()


def _cache_dir() -> Path:
    """Where tiktoken keeps what it downloaded."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            return Path(os.environ[variable])
    return Path(tempfile.gettempdir()) / "data-gym-cache"


if __name__ == "__main__":
    cli.run(main, Config)

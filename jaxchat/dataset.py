"""Where documents come from: hub shards, the embedded corpus, or a folder of your own.

One interface over all of them: documents live in groups, groups in shards, and a document is found
again by (split, shard, group, row), which is what makes a loader's state small. The fingerprint
names the content, so a run refuses to continue on other data. Left out: downloading
(`scripts.data_download`), harvesting (embedded_corpus.py), packing (dataloader.py).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.artifacts import base_dir
from jaxchat.embedded_corpus import ensure_embedded_corpus
from jaxchat.runtime import print0

SPLITS = ("train", "val")

TEXT_SUFFIXES = (".jsonl", ".txt", ".md", ".markdown")

CARD_SUFFIXES = (".md", ".markdown")
"""Beside parquet files these describe a set, as on the hub, and are not read."""

SHOWN_KINDS = 5
"""Suffixes that are named when files of a folder are not read, the most frequent."""

FOLDER_GROUP = 256
"""Documents of a folder of texts that make one group."""

FOLDER_VAL_SHARE = 0.05
"""Share of a folder's documents that validate, chosen by a hash of their text."""

SECTION_CHARS = 10_000
"""Longer texts of a folder are several documents: a book can be both learnt and validated on."""


@dataclass(frozen=True)
class HubDataset:
    """A pretraining set on the Hugging Face hub: parquet shards with a `text` column."""

    name: str
    repo: str
    last_shard: int
    """Number of the last shard of the whole set: it validates, whatever has been downloaded."""

    @property
    def directory(self) -> Path:
        return base_dir() / "data" / self.name

    def filename(self, shard: int) -> str:
        return f"shard_{shard:05d}.parquet"


HUB_DATASETS = {
    "climbmix": HubDataset("climbmix", "karpathy/climbmix-400b-shuffle", 6542),
    "fineweb-edu": HubDataset("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", 1822),
}


class Corpus(ABC):
    """Documents in groups, in two splits."""

    keeps_all: bool
    """Whether documents longer than a row are read to their end: hub sets have more than enough."""
    shards: tuple[str, ...] | None = None
    """Files of a set that may grow, by their paths in its folder; None of any other corpus."""

    def __init__(self, name: str, fingerprint: str, *, keeps_all: bool = False) -> None:
        self.name, self.fingerprint, self.keeps_all = name, fingerprint, keeps_all

    @abstractmethod
    def groups(self, split: str) -> list[tuple[int, int, int]]:
        """(shard, group, number of documents) of every group of a split, in a fixed order."""

    @abstractmethod
    def read_group(self, split: str, shard: int, group: int) -> list[str]:
        """The documents of one group."""

    def iter_texts(self, split: str, max_chars: int | None = None) -> Iterator[str]:
        """Documents in order, until about `max_chars` characters have come."""
        seen = 0
        for shard, group, _ in self.groups(split):
            for text in self.read_group(split, shard, group):
                yield text
                seen += len(text)
                if max_chars is not None and seen >= max_chars:
                    return


class ParquetCorpus(Corpus):
    """Parquet files with a `text` column; a group is a row group."""

    def __init__(
        self,
        name: str,
        fingerprint: str,
        files: Mapping[str, tuple[Path, ...]],
        *,
        keeps_all: bool = False,
        shards: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(name, fingerprint, keeps_all=keeps_all)
        self._files, self.shards = files, shards

    def groups(self, split: str) -> list[tuple[int, int, int]]:
        found = []
        for shard, path in enumerate(self._files[split]):
            meta = pq.read_metadata(path)
            counts = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
            found += [(shard, group, count) for group, count in enumerate(counts)]
        return found

    def read_group(self, split: str, shard: int, group: int) -> list[str]:
        path = self._files[split][shard]
        return _read_row_group(pq.ParquetFile(path), path, group)


class TextCorpus(Corpus):
    """jsonl (field `text`), txt and Markdown files, or one parquet file, held in memory.

    Long texts are several documents, and a document's own text decides on its split.
    """

    def __init__(self, where: Path) -> None:
        """`where` is a file, or a folder of them."""
        whole = (text for path in _text_files(where) for text in _read_texts(path) if text)
        texts = [section for text in whole for section in sections(text)]
        digests = {text: hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in texts}
        ordered = sorted(digests, key=lambda text: digests[text])
        if len(ordered) < 2:
            raise ValueError(
                f"{where} holds {len(ordered)} distinct document(s) in .parquet, .jsonl, .txt or "
                ".md files; training needs one to learn from and one to validate on"
            )
        held_out = max(1, round(FOLDER_VAL_SHARE * len(ordered)))
        self._texts = {"train": ordered[held_out:], "val": ordered[:held_out]}
        content = hashlib.sha256(b"".join(digests[text] for text in ordered))
        super().__init__(str(where), content.hexdigest()[:16], keeps_all=True)

    def groups(self, split: str) -> list[tuple[int, int, int]]:
        total = len(self._texts[split])
        starts = range(0, total, FOLDER_GROUP)
        return [(0, i, min(FOLDER_GROUP, total - start)) for i, start in enumerate(starts)]

    def read_group(self, split: str, shard: int, group: int) -> list[str]:
        return self._texts[split][group * FOLDER_GROUP :][:FOLDER_GROUP]


def default_corpus() -> str:
    """What to read when nobody says: a hub set that has been downloaded, else the embedded one."""
    found = [name for name, hub in HUB_DATASETS.items() if any(hub.directory.glob("*.parquet"))]
    return found[0] if found else "embedded"


def open_corpus(name: str, *, shards: Sequence[str] | None = None) -> Corpus:
    """A corpus by name (climbmix, fineweb-edu, embedded) or by the path of a folder or a file.

    A folder is read with all folders in it, and holds either parquet files or texts. With the
    `shards` of a corpus opened earlier it is that one again, whatever files have come since; where
    one of them is gone, all that are there are read, and the fingerprint is another. Errors name
    what is missing and the command that fetches it.
    """
    if name == "embedded":
        return _open_embedded()
    if name in HUB_DATASETS:
        return _open_hub(HUB_DATASETS[name], shards)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in (".parquet", *TEXT_SUFFIXES):
        return TextCorpus(path)
    if not path.is_dir():
        known = ", ".join([*HUB_DATASETS, "embedded"])
        kinds = ", ".join((".parquet", *TEXT_SUFFIXES))
        raise ValueError(
            f"corpus {name!r} is neither one of {known}, a folder nor a file of {kinds}"
        )
    files = tuple(_files_below(path, (".parquet",)))
    if files:
        return _open_parquet_folder(path, _as_before(path, files, shards))
    _say_unread(path, TEXT_SUFFIXES)
    return TextCorpus(path)


def _open_embedded() -> Corpus:
    directory = ensure_embedded_corpus()
    manifest = json.loads((directory / "manifest.json").read_text())
    files = {split: (directory / f"{split}.parquet",) for split in SPLITS}
    return ParquetCorpus("embedded", manifest["sha256"][:16], files)


def _open_hub(dataset: HubDataset, shards: Sequence[str] | None) -> Corpus:
    present = tuple(
        path
        for path in sorted(dataset.directory.glob("shard_*.parquet"))
        if path.name != dataset.filename(dataset.last_shard)
    )
    train = _as_before(dataset.directory, present, shards)
    val = dataset.directory / dataset.filename(dataset.last_shard)
    if not train or not val.exists():
        raise ValueError(
            f"{dataset.directory} holds {len(train)} training shard(s) and "
            f"{'the' if val.exists() else 'no'} validation shard; fetch them with "
            f"python -m scripts.data_download --dataset {dataset.name} -n 8"
        )
    names = tuple(path.name for path in train)
    fingerprint = hashlib.sha256(f"{dataset.repo} {' '.join(names)}".encode()).hexdigest()[:16]
    split = {"train": train, "val": (val,)}
    return ParquetCorpus(dataset.name, fingerprint, split, shards=names)


def _open_parquet_folder(directory: Path, files: tuple[Path, ...]) -> Corpus:
    """The last file validates, as in the hub's sets; one alone is split by its documents."""
    kinds = tuple(suffix for suffix in TEXT_SUFFIXES if suffix not in CARD_SUFFIXES)
    if others := _files_below(directory, kinds):
        raise ValueError(
            f"{directory} holds parquet files and {others[0].relative_to(directory)}, of which one "
            "would be left out: keep one kind of file in a folder and those below it"
        )
    _say_unread(directory, (".parquet",))
    if len(files) == 1:
        return TextCorpus(files[0])
    for path in files:
        _check_parquet(path)
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    facts = " ".join(f"{name}:{size}" for name, size in sizes.items())
    fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]
    split = {"train": files[:-1], "val": files[-1:]}
    return ParquetCorpus(str(directory), fingerprint, split, keeps_all=True, shards=tuple(sizes))


def _as_before(
    directory: Path, files: tuple[Path, ...], shards: Sequence[str] | None
) -> tuple[Path, ...]:
    """Those files of a folder that `shards` names, in their order; all, unless all these are there.

    What is left out is told, and what is gone.
    """
    if shards is None:
        return files
    there, wanted = {path.relative_to(directory).as_posix(): path for path in files}, set(shards)
    if gone := sorted(wanted - there.keys()):
        print0(f"gone from {directory}: {len(gone):,} files, of which {gone[0]} is the first")
        return files
    kept = tuple(path for name, path in there.items() if name in wanted)
    if added := len(files) - len(kept):
        print0(f"not read in {directory}: {added:,} of {len(files):,} files, which have come since")
    return kept


def _check_parquet(path: Path) -> None:
    """ValueError, naming the file, for one without a column of strings called `text`."""
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file, or damaged: {error}") from error
    kind = schema.field("text").type if "text" in schema.names else None
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"{path} has no column `text` of strings, but {found}")


def _read_parquet(path: Path) -> Iterator[str]:
    _check_parquet(path)
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        yield from _read_row_group(file, path, group)


def _read_row_group(file: pq.ParquetFile, path: Path, group: int) -> list[str]:
    column = file.read_row_group(group, columns=["text"])["text"]
    if column.null_count:
        raise ValueError(
            f"{path}: {column.null_count} rows of row group {group} have no text (null); write "
            "the file again without them"
        )
    return column.to_pylist()


def _text_files(where: Path) -> list[Path]:
    return [where] if where.is_file() else _files_below(where, TEXT_SUFFIXES)


def _files_below(directory: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """In order of path, those of all folders in it too."""
    return sorted(p for p in directory.rglob("*") if p.suffix in suffixes and p.is_file())


def _say_unread(directory: Path, suffixes: tuple[str, ...]) -> None:
    """One line on what a folder holds besides files of these kinds, hidden ones aside."""
    kinds = Counter(
        path.suffix or "no suffix"
        for path in directory.rglob("*")
        if path.suffix not in suffixes
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
        and path.is_file()
    )
    if kinds:
        ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{kind} {count:,}" for kind, count in ordered[:SHOWN_KINDS])
        more = ", ..." if len(kinds) > SHOWN_KINDS else ""
        total = f"{kinds.total():,} file{'s' * (kinds.total() > 1)}"
        print0(f"not read in {directory}: {total} of other kinds ({shown}{more})")


def sections(text: str) -> Iterator[str]:
    """A text in pieces of at most `SECTION_CHARS` characters.

    Each ends with a paragraph, a line or a word, where one ends in its second half.
    """
    start = 0
    while len(text) - start > SECTION_CHARS:
        end = start + SECTION_CHARS
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + SECTION_CHARS // 2, end)
            if found >= 0:
                end = found + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _read_texts(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error}; if it is Latin-1, convert it with "
            "iconv -f latin1 -t utf-8"
        ) from error
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number}: not a JSON object with a "text"') from error
        if not isinstance(text, str):
            raise ValueError(f'{path}:{number}: "text" is {type(text).__name__}, not a string')
        yield text

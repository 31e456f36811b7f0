"""Task sets of the Hugging Face hub: where they are kept, and how they are read.

`python -m scripts.data_download --all` puts a set's parquet files below the base directory, under
the names they have on the hub (`train-00000-of-00004.parquet`): the name says how many belong to a
split, so an incomplete split is noticed without a network. Nothing here downloads, so a training
run on a machine without internet fails at its start and not on a time-out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.artifacts import base_dir

_SHARD = re.compile(r"(?P<split>\w+)-(?P<number>\d+)-of-(?P<count>\d+)\.parquet")


@dataclass(frozen=True)
class HubSet:
    """A folder of parquet files in a data set's repository."""

    name: str
    repo: str
    folder: str
    splits: tuple[str, ...]
    """The splits that the project uses."""
    columns: tuple[str, ...]
    """What its rows must have."""

    @property
    def directory(self) -> Path:
        return base_dir() / "data" / "tasks" / self.name

    def wants(self, filename: str) -> bool:
        """Whether a file of the folder belongs to a split that the project uses."""
        match = _SHARD.fullmatch(filename)
        return match is not None and match["split"] in self.splits


HUB_SETS = {
    hub_set.name: hub_set
    for hub_set in (
        HubSet(
            "arc-easy",
            "allenai/ai2_arc",
            "ARC-Easy",
            ("train", "test"),
            ("question", "choices", "answerKey"),
        ),
        HubSet(
            "arc-challenge",
            "allenai/ai2_arc",
            "ARC-Challenge",
            ("train", "test"),
            ("question", "choices", "answerKey"),
        ),
        HubSet(
            "mmlu",
            "cais/mmlu",
            "all",
            ("auxiliary_train", "test"),
            ("question", "choices", "answer"),
        ),
        HubSet("gsm8k", "openai/gsm8k", "main", ("train", "test"), ("question", "answer")),
        HubSet("smoltalk", "HuggingFaceTB/smol-smoltalk", "data", ("train", "test"), ("messages",)),
    )
}
"""What DESIGN's mixtures and the chat evaluation read from the hub."""


def missing_sets() -> list[str]:
    """Names of the sets that are not complete on this machine."""
    return [
        hub_set.name
        for hub_set in HUB_SETS.values()
        if not all(_shards(hub_set, split) for split in hub_set.splits)
    ]


class HubRows:
    """The rows of one split, as dictionaries, by index."""

    def __init__(self, name: str, split: str) -> None:
        """FileNotFoundError, with the command that fetches it, when the split is not here."""
        hub_set = HUB_SETS[name]
        if split not in hub_set.splits:
            raise ValueError(f"{name} split {split!r}: choose one of {', '.join(hub_set.splits)}")
        files = _shards(hub_set, split)
        if not files:
            raise FileNotFoundError(
                f"{hub_set.directory} does not hold the whole split {split!r} of {hub_set.repo}; "
                "fetch it with python -m scripts.data_download --all"
            )
        facts = (f"{path.name}:{path.stat().st_size}" for path in files)
        self.identity = f"{hub_set.repo}/{hub_set.folder} {' '.join(facts)}"
        self._table = _read(tuple(files), hub_set.columns)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: self._table[name][index].as_py() for name in self._table.column_names}


@lru_cache(maxsize=16)
def _read(files: tuple[Path, ...], columns: tuple[str, ...]) -> pa.Table:
    """One table of all files, read once however many tasks share it."""
    for path in files:
        lacking = set(columns) - set(pq.read_schema(path).names)
        if lacking:
            raise ValueError(f"{path} lacks the column(s) {', '.join(sorted(lacking))}")
    tables = [pq.read_table(path, columns=list(columns)) for path in files]
    for path, table in zip(files, tables, strict=True):
        for name in columns:
            if table[name].null_count:
                row = table[name].is_null().index(True).as_py()
                raise ValueError(f"{path} has nothing in column {name} of row {row}")
    return pa.concat_tables(tables, promote_options="permissive")


def _shards(hub_set: HubSet, split: str) -> Sequence[Path]:
    """The files of a split in order; none unless all that their names speak of are here."""
    found = []
    for path in sorted(hub_set.directory.glob(f"{split}-*.parquet")):
        match = _SHARD.fullmatch(path.name)
        if match and match["split"] == split:
            found.append((path, int(match["count"])))
    complete = bool(found) and {count for _, count in found} == {len(found)}
    return [path for path, _ in found] if complete else []

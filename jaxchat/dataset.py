"""Document sources behind one interface."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from jaxchat.embedded_corpus import ensure_embedded_corpus


@dataclass(frozen=True)
class Corpus:
    name: str
    fingerprint: str
    shards: dict[str, tuple[Path, ...]]

    def groups(self, split: str) -> list[tuple[int, int, int]]:
        found = []
        for shard, path in enumerate(self.shards[split]):
            meta = pq.ParquetFile(path).metadata
            found += [(shard, g, meta.row_group(g).num_rows) for g in range(meta.num_row_groups)]
        return found

    def read_group(self, split: str, shard: int, group: int) -> list[str]:
        return pq.ParquetFile(self.shards[split][shard]).read_row_group(group, ["text"])["text"].to_pylist()

    def iter_texts(self, split: str, max_chars: int | None = None) -> Iterator[str]:
        seen = 0
        for shard, group, _ in self.groups(split):
            for text in self.read_group(split, shard, group):
                yield text
                seen += len(text)
                if max_chars is not None and seen >= max_chars:
                    return


def default_corpus(platform: str) -> str:
    return "embedded" if platform == "cpu" else "climbmix"


def open_corpus(name: str | None = None) -> Corpus:
    directory = ensure_embedded_corpus()
    manifest = json.loads((directory / "manifest.json").read_text())
    return Corpus("embedded", manifest["sha256"][:16], {s: (directory / f"{s}.parquet",) for s in ("train", "val")})

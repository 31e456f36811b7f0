"""Fetch the data: hub shards, the sets of the chat tasks, or the embedded corpus.

    python -m scripts.data_download -n 8                    # ClimbMix: 8 shards and validation
    python -m scripts.data_download --dataset embedded      # no network
    python -m scripts.data_download --all --verify -n 150   # what a cluster without internet needs

Downloads run in parallel, continue after interruptions, and are checked against the hub's sizes
and hashes. HF_ENDPOINT, HF_TOKEN and the usual proxy variables are honoured.
"""

import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxchat import cli
from jaxchat.artifacts import Remote, base_dir, download, file_sha256, hub_file, hub_folder
from jaxchat.dataset import HUB_DATASETS, HubDataset, open_corpus
from jaxchat.report import KeyValues, Report
from jaxchat.tasks.hub import HUB_SETS, missing_sets
from jaxchat.tasks.words import WORDS_URL, words_path
from jaxchat.threads import stoppable

EVAL_BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""The CORE tasks as upstream packs them."""


@dataclass(frozen=True)
class Config:
    """What to fetch."""

    dataset: str = "climbmix"
    """climbmix, fineweb-edu or embedded."""
    num_shards: Annotated[int, cli.arg(aliases=["-n"])] = 8
    """Training shards; the validation shard always comes too. -1 is all of them."""
    workers: int = 4
    """Downloads at the same time."""
    verify: bool = False
    """Read everything back and compare it with the hub's sizes and hashes."""
    all: bool = False
    """Fetch the evaluation bundle and the sets of the chat tasks too."""

    def __post_init__(self) -> None:
        if self.dataset not in (*HUB_DATASETS, "embedded"):
            known = ", ".join((*HUB_DATASETS, "embedded"))
            raise ValueError(f"dataset {self.dataset!r}: choose one of {known}")
        if self.workers < 1 or self.num_shards < -1 or self.num_shards == 0:
            raise ValueError(
                f"workers={self.workers} must be at least 1, and num_shards={self.num_shards} "
                "at least 1, or -1 for all"
            )


@dataclass(frozen=True)
class Item:
    """A file to fetch."""

    name: str
    path: Path
    repo: str | None = None
    """The hub's repository; None for a plain URL."""
    url: str = ""
    remote: Remote | None = None
    """What the hub has said of it, when it has been asked already."""


def main(config: Config) -> None:
    """Fetch, say what is there now, and add a section to the report."""
    started, console = time.monotonic(), Console(highlight=False)
    items = [] if config.dataset == "embedded" else shards(config)
    if config.all:
        items.append(Item("eval_bundle.zip", base_dir() / "eval_bundle.zip", url=EVAL_BUNDLE_URL))
        items += task_sets(verify=config.verify)
    if items:
        fetch(items, config, console)
    if config.all:
        unpack(base_dir() / "eval_bundle.zip", base_dir())
    corpus = open_corpus(config.dataset)
    documents = {
        split: sum(count for _, _, count in corpus.groups(split)) for split in ("train", "val")
    }
    console.print(f"{corpus.name}: {documents['train']:,} documents, {documents['val']:,} held out")
    facts = {"corpus": corpus.name, "fingerprint": corpus.fingerprint, **documents}
    Report(base_dir()).add(
        "data_download",
        "Data",
        [KeyValues(facts, "Documents by split")],
        wall_seconds=time.monotonic() - started,
    )


def shards(config: Config) -> list[Item]:
    """The first training shards of the set and its last one, which validates."""
    dataset: HubDataset = HUB_DATASETS[config.dataset]
    wanted = dataset.last_shard if config.num_shards == -1 else config.num_shards
    numbers = [*range(min(wanted, dataset.last_shard)), dataset.last_shard]
    names = [dataset.filename(number) for number in numbers]
    return [Item(name, dataset.directory / name, repo=dataset.repo) for name in names]


def task_sets(*, verify: bool) -> list[Item]:
    """The word list, and the files of the chat tasks' sets.

    Unless they are to be verified, sets that are complete here are left out: only the hub can say
    what files they have, and it may be out of reach.
    """
    items = [Item(words_path().name, words_path(), url=WORDS_URL)]
    for hub_set in (HUB_SETS[name] for name in (HUB_SETS if verify else missing_sets())):
        listed = hub_folder(hub_set.repo, hub_set.folder)
        wanted = [name for name in sorted(listed) if hub_set.wants(name)]
        if not wanted:
            raise FileNotFoundError(
                f"{hub_set.repo}/{hub_set.folder} lists no parquet file of "
                f"{' or '.join(hub_set.splits)}; the data set may have been moved"
            )
        items += [Item(name, hub_set.directory / name, remote=listed[name]) for name in wanted]
    return items


def fetch(items: Sequence[Item], config: Config, console: Console) -> None:
    """Download in parallel; OSError lists what failed, what arrived is kept."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    failures, unproved = [], []
    with bar, stoppable(ThreadPoolExecutor(config.workers)) as (pool, stop):
        whole = bar.add_task(f"0/{len(items)} files", total=0)

        def on_bytes(count: int) -> None:
            if stop.is_set():
                raise KeyboardInterrupt  # in a thread: ends its transfer, of which the part is kept
            bar.advance(whole, count)

        def on_size(count: int) -> None:
            bar.update(whole, total=(bar.tasks[whole].total or 0) + count)

        jobs = [pool.submit(fetch_one, item, config.verify, on_size, on_bytes) for item in items]
        for done, (item, job) in enumerate(zip(items, jobs, strict=True), start=1):
            try:
                if not job.result():
                    unproved.append(item.name)
            except OSError as error:
                failures.append(f"{item.name}: {error}")
            bar.update(whole, description=f"{done}/{len(items)} files")
    if unproved:
        console.print(f"not verified, as nobody states size or hash: {', '.join(unproved)}")
    if failures:
        shown = "\n  ".join(failures[:10])
        raise OSError(
            f"{len(failures)} of {len(items)} downloads failed:\n  {shown}\n"
            "The same command continues; HF_ENDPOINT names a mirror, and --dataset embedded needs "
            "no network."
        )


def fetch_one(
    item: Item, verify: bool, on_size: Callable[[int], None], on_bytes: Callable[[int], None]
) -> bool:
    """One file; False when it should have been verified and was not.

    `on_size` hears how many bytes there will be, where that is known, and `on_bytes` of each that
    has come.
    """
    if item.path.exists() and not verify:
        return True
    remote = item.remote or (hub_file(item.repo, item.name) if item.repo else Remote(item.url))
    if item.path.exists() and not sound(item.path, remote):
        item.path.unlink()
    if not item.path.exists():
        if remote.size:
            on_size(remote.size)
        download(remote, item.path, on_bytes=on_bytes)
    return not verify or remote.size is not None or remote.sha256 is not None


def sound(path: Path, remote: Remote) -> bool:
    """Whether a file has the size and hash that it should."""
    size_fits = remote.size is None or path.stat().st_size == remote.size
    return size_fits and (remote.sha256 is None or file_sha256(path) == remote.sha256)


def unpack(archive: Path, directory: Path) -> None:
    """Extract a zip file: its folders appear whole, in place of those of the same name.

    ValueError when a member would land outside of `directory`, or the archive is damaged.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=f".{archive.name}.") as name:
        staging, replaced = Path(name, "new"), Path(name, "old")
        try:
            with zipfile.ZipFile(archive) as bundle:
                for member in bundle.namelist():
                    if not (staging / member).resolve().is_relative_to(staging.resolve()):
                        raise ValueError(
                            f"{archive} holds {member!r}, which points outside: not unpacked"
                        )
                bundle.extractall(staging)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{archive} is damaged ({error}): delete it and try again") from error
        replaced.mkdir()
        for fresh in sorted(staging.iterdir()):
            place = directory / fresh.name
            if place.exists():
                place.rename(replaced / fresh.name)
            fresh.rename(place)


if __name__ == "__main__":
    cli.run(main, Config)

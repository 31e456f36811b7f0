"""Checkpoints on disk: `base_checkpoints/d12/step_002520/{params,optimizer,meta.json}`.

The backend writes the arrays, this module decides names and makes a checkpoint appear whole or not
at all: everything goes to a `.tmp` folder, which is renamed when the last byte is down. A folder
under its final name is therefore complete. `meta.json` holds what the arrays do not: configuration,
loader state, metrics, the tokenizer's fingerprint, and which backend wrote the arrays: another one
continues from them through numpy. Of several processes the first makes and renames folders.
"""

import json
import re
import shutil
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxchat import peers, runtime
from jaxchat.artifacts import atomic_write, claim
from jaxchat.backend import Backend, backend_class
from jaxchat.memory import readable

META = "meta.json"

BEST = "best.json"
"""Which checkpoint has validated best."""

DAMAGED = ".damaged"
"""How the folder of a checkpoint ends that could not be read."""

REPLACED = "replaced-"
"""How the folders begin that hold earlier runs of the same name, inside the run's own."""

WHY = {"corpus": " (files of it were added, removed or changed)"}
"""What a fact that differs means, where its value is only a fingerprint."""


def fresh_start() -> dict[str, Any]:
    """The meta of a run that has not begun; `run` tells it from every other run."""
    return {
        "step": 0,
        "train_seconds": 0.0,
        "wall_seconds": 0.0,
        "loader": None,
        "run": uuid.uuid4().hex,
    }


class CheckpointStore:
    """The checkpoints of one run; keeps the newest `keep` of them, and the best by validation."""

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(
                f"--keep-checkpoints {keep}: give at least 1; a large number keeps them all"
            )
        self.directory, self.keep = directory, keep
        self._commit: threading.Thread | None = None
        self._error: BaseException | None = None

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        found = self.directory.glob(f"step_*/{META}")
        matches = [re.fullmatch(r"step_(\d+)", path.parent.name) for path in found]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:06d}"

    def read_meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of `step`."""
        return json.loads((self.path(step) / META).read_text())

    def restore(self, backend: Backend, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """Load the newest readable checkpoint and return its meta; None when there is none.

        `facts` are what the run is made of; ValueError when the checkpoint was made of something
        else. A checkpoint that does not load on every process is skipped with a warning for the one
        before. OSError when none loads: a run never begins anew over an old one.
        """
        with peers.exit_when_one_is_lost(backend.devices.processes):
            steps = backend.gather(self.steps())[0]
        skipped: list[Path] = []
        for step in reversed(steps):
            meta, why = None, "another process cannot read it"
            try:
                meta = self.read_meta(step)
                self._check_same_run(meta, {"model": asdict(backend.config), **facts}, step)
                load_arrays(backend, self.path(step), meta, training=True)
            except (_Mismatch, ImportError):
                raise
            except Exception as error:  # whatever a damaged file makes the readers raise
                meta, why = None, f"it cannot be read: {error}"
            if not _on_any_process(backend, meta is None):
                self._rename_damaged(skipped)
                return meta
            print(f"warning: skipping {self.path(step)}, {why}", flush=True)
            skipped.append(self.path(step))
        if steps:
            raise OSError(
                f"none of the checkpoints in {self.directory} can be read (steps "
                f"{', '.join(map(str, steps))}); restore them, move the folder away, or start over "
                "with --resume never"
            )
        return None

    def _rename_damaged(self, paths: Sequence[Path]) -> None:
        """Their numbers are higher than those of what will be saved next, which they would hide."""
        for path in paths if runtime.is_first_process() else ():
            target = path.with_suffix(DAMAGED)
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            print(f"it is now {target}: delete it unless you can mend it", flush=True)

    def set_aside(self, backend: Backend) -> None:
        """Move what an earlier run left into `replaced-<time>`, for a run that starts anew.

        Its higher numbers would outlive the new checkpoints, and be loaded in their place. All
        processes must call it, in a claimed folder.
        """
        _meet(backend)  # another process may still be reading the weights it starts from here
        if runtime.is_first_process():
            self._move_aside()
        _meet(backend)

    def _move_aside(self) -> None:
        steps = self.steps()
        if not steps:
            return
        target = self.directory / f"{REPLACED}{time.strftime('%Y%m%d-%H%M%S')}"
        ours = (".", REPLACED)  # the claim, and what has been set aside before
        old = [path for path in self.directory.iterdir() if not path.name.startswith(ours)]
        target.mkdir()
        for path in old:
            if path.suffix != ".tmp":  # what a killed save left: the next one removes it
                path.rename(target / path.name)
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        print(
            f"starting over: the earlier run of this name (steps {', '.join(map(str, steps))}; "
            f"{readable(size)}) is now in {target}; load it with --model-tag "
            f"{self.directory.name}/{target.name}, or delete it to make room",
            flush=True,
        )

    def _check_same_run(self, meta: Mapping, facts: Mapping[str, Any], step: int) -> None:
        # through JSON, because that is how the checkpoint's own facts have travelled
        wanted = json.loads(json.dumps(facts))
        differing = [
            f"{name}: {_difference(meta.get(name), value)}{WHY.get(name, '')}"
            for name, value in wanted.items()
            if meta.get(name) != value
        ]
        if differing:
            raise _Mismatch(
                f"{self.path(step)} belongs to another run:\n  "
                + "\n  ".join(differing)
                + "\ncontinue it with its own options, name this run with --output-tag "
                "(base_train: --model-tag), or start over with --resume never"
            )

    def save(self, step: int, backend: Backend, meta: Mapping[str, Any]) -> None:
        """Start writing a checkpoint; `finish`, or the next save, waits until it is on disk."""
        self.finish()
        staging = self.path(step).with_suffix(".tmp")
        if runtime.is_first_process():
            self._make_room(staging)
            record = {"step": step, "backend": backend.name, "model": asdict(backend.config)}
            (staging / META).write_text(json.dumps(record | dict(meta), indent=1))
        try:
            backend.save(staging)
        except BaseException:
            _remove(staging)
            raise
        self._commit = threading.Thread(target=self._publish, args=(backend, staging, step))
        self._commit.start()

    def finish(self) -> None:
        """Wait for the save under way and raise what went wrong in it."""
        if self._commit is not None:
            self._commit.join()
            self._commit = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def note_validation(self, step: int, figure: float) -> None:
        """Keep the checkpoint of `step` when its figure is the lowest so far.

        A step without a checkpoint, or one whose better has been deleted, does not count.
        """
        self.finish()
        if not runtime.is_first_process() or step not in self.steps():
            return
        best = self._read_best()
        if best is None or best["step"] >= step or figure < best["figure"]:
            with atomic_write(self.directory / BEST) as file:
                json.dump({"step": step, "figure": figure}, file)

    def best(self) -> int | None:
        """The step of the checkpoint that validated best, where that is known."""
        best = self._read_best()
        return None if best is None else best["step"]

    def _read_best(self) -> dict[str, Any] | None:
        try:
            best = json.loads((self.directory / BEST).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return best if best["step"] in self.steps() else None

    def claim(self) -> AbstractContextManager[None]:
        """Own the run's folder while the block lasts; OSError when another process does.

        Of several processes the first one does it for all.
        """
        return claim(self.directory) if runtime.is_first_process() else nullcontext()

    def _publish(self, backend: Backend, staging: Path, step: int) -> None:
        try:
            backend.wait()
            if not runtime.is_first_process():
                return
            target = self.path(step)
            if target.exists():
                shutil.rmtree(target)
            staging.rename(target)
            until_now = [other for other in self.steps() if other <= step]
            for old in until_now[: -self.keep]:
                if old != self.best():
                    shutil.rmtree(self.path(old))
        except BaseException as error:  # handed to the caller by finish()
            _remove(staging)
            self._error = error

    def _make_room(self, staging: Path) -> None:
        """An empty staging folder, after checking that another checkpoint fits on the disk."""
        for leftover in self.directory.glob("step_*.tmp"):
            shutil.rmtree(leftover)
        staging.mkdir(parents=True)
        previous = self.steps()
        if previous:
            files = [p for p in self.path(previous[-1]).rglob("*") if p.is_file()]
            needed = sum(p.stat().st_size for p in files)
            free = shutil.disk_usage(self.directory).free
            if free < needed:
                staging.rmdir()
                raise OSError(
                    f"no room for a checkpoint in {self.directory}: it needs {needed:,} bytes and "
                    f"{free:,} are free; make room, or set JAXCHAT_BASE_DIR to another disk, and "
                    "run the same command again"
                )


def load_arrays(backend: Backend, path: Path, meta: Mapping[str, Any], *, training: bool) -> None:
    """Load a checkpoint's weights, and its optimizer state when training, whoever wrote it."""
    if meta["backend"] == backend.name:
        backend.load(path)
        return
    snapshot = backend_class(meta["backend"]).read(path, optimizer=training)
    backend.set_params(snapshot.params)
    if snapshot.optimizer is not None:
        backend.set_optimizer_state(snapshot.optimizer)


def _on_any_process(backend: Backend, it_is_so: bool) -> bool:
    """Whether it is so on any process; the second vote brings an answer that comes one late."""
    with peers.exit_when_one_is_lost(backend.devices.processes):
        return backend.agree(it_is_so) | backend.agree(False)


def _meet(backend: Backend) -> None:
    """Wait for every other process to come here."""
    _on_any_process(backend, False)


def _remove(staging: Path) -> None:
    """What a failed save leaves is no use to anyone."""
    if runtime.is_first_process():
        shutil.rmtree(staging, ignore_errors=True)


class _Mismatch(ValueError):
    """A readable checkpoint of another run."""


def _difference(saved: Any, wanted: Any) -> str:
    """`lr 0.02, now 0.01` for the entries of two dicts that differ, or the two values."""
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        names = sorted(saved.keys() | wanted.keys())
        pairs = [(n, saved.get(n), wanted.get(n)) for n in names if saved.get(n) != wanted.get(n)]
        return ", ".join(f"{name} {_difference(a, b)}" for name, a, b in pairs)
    return f"{saved}, now {wanted}"

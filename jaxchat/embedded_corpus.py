"""The embedded corpus: the documentation of the libraries that this project runs on.

About 25 MB of real English that arrives with `uv sync` itself: docstrings of 200 characters or
more, read from the installed sources without importing them, plus the language reference in
`pydoc_data.topics`. No network, nothing vendored, all permissively licensed. Documents of one
module stay on one side of the train/validation split.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import shutil
import sysconfig
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.artifacts import base_dir, lock
from jaxchat.progress import progress_bar

DISTRIBUTIONS = (
    "numpy",
    "scipy",
    "sympy",
    "networkx",
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "torch",
    "matplotlib",
    "pyarrow",
    "requests",
    "rich",
    "jaxtyping",
    "tiktoken",
    "tyro",
)
"""Dependencies of the project, so that everyone has them."""

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

MIN_CHARS = 200
VALIDATION_SHARE = 0.05
ROW_GROUP = 512
FORMAT = 2


def ensure_embedded_corpus() -> Path:
    """The folder of the corpus, harvested when there is none of these versions of the libraries.

    Each set of versions has a folder of its own: somebody may be training on another. Of several
    processes one harvests and the others wait for it. RuntimeError in a script that does everything
    it does whenever it is imported.
    """
    versions = installed_versions()
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:8]
    directory = base_dir() / "data" / f"embedded-{digest}"
    if directory.exists():
        return directory
    if getattr(current_process(), "_inheriting", False):  # it would wait for us, and we for it
        raise RuntimeError(
            "the embedded corpus is read by several processes, which import the script that asks "
            'for it: put what it does below `if __name__ == "__main__":`'
        )
    with lock(directory):
        if directory.exists():  # by the one that we waited for
            return directory
        staging = directory.with_suffix(".tmp")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_corpus(staging, harvest(), versions)
        staging.rename(directory)
    return directory


def installed_versions() -> dict[str, str]:
    """What the corpus is made of; of Python the patch too, for its docstrings change with it."""
    found = {"format": str(FORMAT), "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sources() -> list[tuple[str, str, Path]]:
    """(distribution, module, path) of every Python source to read, tests left out."""
    found = []
    for name in DISTRIBUTIONS:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found += [(name, _module(str(f)), Path(str(f.locate()))) for f in files if _wanted(str(f))]
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        relative = str(path.relative_to(library))
        if _wanted(relative) and not relative.startswith(("site-packages", "idlelib", "lib2to3")):
            found.append(("python", _module(relative), path))
    return sorted(found)


def _wanted(path: str) -> bool:
    parts = path.lower().split("/")
    hidden = {"tests", "test", "testing", "_vendor", "vendor"}
    return path.endswith(".py") and not path.startswith("..") and not hidden & set(parts)


def _module(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def harvest() -> list[dict[str, str]]:
    """Every distinct document, in an order that mixes the libraries."""
    files = sources()
    seen: dict[str, dict[str, str]] = {}
    # spawned, because a forked child of a process with threads (JAX has many) may hang
    with (
        progress_bar("reading the documentation of the installed libraries, once") as on_progress,
        ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_end_with_parent) as pool,
    ):
        for done, documents in enumerate(pool.map(_read, files, chunksize=64), start=1):
            for document in documents:
                seen.setdefault(document["doc"], document)
            on_progress(done / len(files))
    for document in _topics():
        seen.setdefault(document["doc"], document)
    return sorted(seen.values(), key=lambda d: _hash(d["name"] + d["doc"]))


def _end_with_parent() -> None:
    """In a worker: it would wait for ever for the next task of a parent that has been killed."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _read(source: tuple[str, str, Path]) -> list[dict[str, str]]:
    distribution, module, path = source
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []
    return list(_documents(tree, distribution, module, module, "module"))


def _documents(
    node: _Documented, dist: str, module: str, name: str, kind: str
) -> Iterator[dict[str, str]]:
    doc = ast.get_docstring(node, clean=True)
    if doc and len(doc) >= MIN_CHARS:
        doc = inspect.cleandoc(doc)
        yield {
            "text": f"{name}\n\n{doc}",
            "doc": doc,
            "name": name,
            "module": module,
            "distribution": dist,
            "kind": kind,
        }
    in_class = isinstance(node, ast.ClassDef)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _documents(child, dist, module, f"{name}.{child.name}", "class")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = "method" if in_class else "function"
            yield from _documents(child, dist, module, f"{name}.{child.name}", inner)


def _topics() -> Iterator[dict[str, str]]:
    from pydoc_data.topics import topics

    for title, body in topics.items():
        name = f"python.{title}"
        yield {
            "text": f"{name}\n\n{body}",
            "doc": body,
            "name": name,
            "module": name,
            "distribution": "python",
            "kind": "topic",
        }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def write_corpus(directory: Path, documents: list[dict[str, str]], versions: dict) -> None:
    columns = ("text", "name", "module", "distribution", "kind")
    split: dict[str, list[dict[str, str]]] = {"train": [], "val": []}
    for document in documents:
        share = int(_hash(document["module"])[:8], 16) / 2**32
        split["val" if share < VALIDATION_SHARE else "train"].append(document)
    digest = hashlib.sha256()
    for name, rows in split.items():
        for row in rows:
            digest.update(row["text"].encode("utf-8", "replace"))
        table = pa.table(
            {c: [r[c].encode("utf-8", "replace").decode() for r in rows] for c in columns}
        )
        pq.write_table(table, directory / f"{name}.parquet", row_group_size=ROW_GROUP)
    record = {
        "versions": versions,
        "documents": {name: len(rows) for name, rows in split.items()},
        "bytes": {
            n: sum(len(r["text"].encode("utf-8", "replace")) for r in rows)
            for n, rows in split.items()
        },
        "sha256": digest.hexdigest(),
    }
    (directory / "manifest.json").write_text(json.dumps(record, indent=1))

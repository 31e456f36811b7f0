"""Files that outlive a process: the base directory and atomic writes."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def base_dir() -> Path:
    """Where everything is kept: JAXCHAT_BASE_DIR, NANOCHAT_BASE_DIR, or ~/.cache/jaxchat."""
    for variable in ("JAXCHAT_BASE_DIR", "NANOCHAT_BASE_DIR"):
        if os.environ.get(variable):
            directory = Path(os.environ[variable]).expanduser()
            break
    else:
        directory = Path.home() / ".cache" / "jaxchat"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` whole, when the block ends well, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise

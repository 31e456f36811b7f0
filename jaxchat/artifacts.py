"""Files that outlive a process: the base directory, atomic writes, and downloads.

The one idea: a path either holds the whole file or nothing. Writes go to a temporary neighbour and
are renamed; downloads go to `.part`, are continued with HTTP Range after any failure, and are
renamed when size and hash are right. Left out: what to download (`scripts.data_download`).
"""

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import random
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import MaxRetryError

CHUNK_BYTES = 1 << 20

RETRIES = 6
"""Attempts after the first; a transfer that gains ground does not use them up."""

UNREACHED_RETRIES = 2
"""Those of a question to the hub where no connection comes about: who is offline, or is refused, is
told after three to six seconds of pauses."""

CLAIM_WAIT_SECONDS = 120.0
"""How long another machine's claim is waited for: an NFS server keeps the locks of a node that has
vanished until its lease ends, which is 90 seconds on Linux."""

CLAIM_PAUSE_SECONDS = 2.0
"""Between two attempts to take such a claim."""

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What `flock` says where a file system has none, as Lustre mounted without `-o flock`."""

FINAL_STATUS = {
    401: "it needs a login: set HF_TOKEN",
    403: "access is refused: set HF_TOKEN, or accept the data set's terms on its page",
    404: "it does not exist there: check the name, or HF_ENDPOINT",
}
"""Answers that no retry changes, and what to do."""


def base_dir() -> Path:
    """Where everything is kept: JAXCHAT_BASE_DIR, NANOCHAT_BASE_DIR, or ~/.cache/jaxchat.

    OSError, with the remedy, where there is none and none can be made.
    """
    named = os.environ.get("JAXCHAT_BASE_DIR") or os.environ.get("NANOCHAT_BASE_DIR")
    directory = Path(named).expanduser() if named else Path.home() / ".cache" / "jaxchat"
    with _writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def check_writable(directory: Path) -> None:
    """OSError, with the remedy, where no file can be put; asked before slow work, it leaves none.

    Of a folder that is not there yet, the nearest one above it is asked.
    """
    with _writing_to(directory):
        there = next(path for path in (directory, *directory.parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass


@contextmanager
def _writing_to(directory: Path) -> Iterator[None]:
    """What goes wrong in the block is said with the remedy."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write to {directory}: {error.strerror}; set JAXCHAT_BASE_DIR to a folder that "
            "you may write to"
        ) from error


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` whole, when the block ends well, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    # not by tempfile, whose files nobody else may read
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def json_numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers as JSON can hold them: None for NaN and infinity."""
    return {name: float(x) if math.isfinite(x) else None for name, x in values.items()}


@contextmanager
def claim(
    directory: Path,
    *,
    name: str = ".claim",
    remedy: str = "name this run with --output-tag (base_train: --model-tag)",
) -> Iterator[None]:
    """Own a directory against every other process until the block, or this process, ends.

    One that holds nothing else then is removed: who was refused leaves no trace.
    OSError, with a `remedy`, when another process owns it under the same `name`, or when it cannot
    be written to. The system frees a killed owner's claim at once, and that of a machine that has
    died later or never: another machine's is waited for, `CLAIM_WAIT_SECONDS` at most. Where the
    file system has no locks, a warning says that nothing is claimed.
    """
    path = directory / name
    with _take(path, remedy) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {_here()}")
        file.flush()
        os.fsync(file.fileno())  # so that other machines can read it
        try:
            yield
        finally:
            if [each.name for each in directory.iterdir()] == [name]:
                with contextlib.suppress(OSError):  # somebody may put a file there meanwhile
                    path.unlink()
                    directory.rmdir()


def _take(path: Path, remedy: str) -> IO[str]:
    """A claim's file, which is this process's own until it is closed; errors as in `claim`."""
    deadline = None
    while isinstance(taken := _try_to_take(path), str):
        busy = f"{path.parent} is in use by {taken or 'another process'}"
        remedies = f"wait for it, stop it, or {remedy}"
        if not taken or taken.endswith(f" on {_here()}"):
            raise OSError(f"{busy}: {remedies}")
        if deadline is None:
            deadline = time.monotonic() + CLAIM_WAIT_SECONDS
            print(f"{busy}: waiting, should that machine be gone, for its claim to end", flush=True)
        if time.monotonic() >= deadline:
            raise OSError(
                f"{busy}: {remedies}; if that machine has died, delete {path}: that frees its claim"
            )
        time.sleep(CLAIM_PAUSE_SECONDS)
    return taken


def _try_to_take(path: Path) -> IO[str] | str:
    """A claim's file, locked; or what its owner, where another process is it, has written there.

    Opened anew each time, as its owner or a person may have removed the file meanwhile.
    """
    with _writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    with contextlib.ExitStack() as closing:
        closing.enter_context(file)
        try:
            _flock(file, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError  # removed by its owner since it was opened
        except BlockingIOError:
            file.seek(0)
            return file.read()
        closing.pop_all()
        return file


def _here() -> str:
    """This machine until its next start, by which name another may go then."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{socket.gethostname()} (boot {boot[:8]})"
    return socket.gethostname()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path`.lock against other processes of this machine; waits for them.

    Where the file system has no locks, a warning says that nothing is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        _flock(file, path, fcntl.LOCK_EX)
        yield


def _flock(file: IO[str], path: Path, how: int) -> None:
    """Lock a file in the folder of `path`, unless nothing can be locked there."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_without_locks(path.parent, error.strerror)


@cache
def _warn_without_locks(directory: Path, why: str) -> None:
    """Once a folder."""
    print(
        f"warning: files in {directory} cannot be locked ({why}): see to it that no two processes "
        "write there at once, or have the file system mounted with locks (Lustre: -o flock)",
        flush=True,
    )


@dataclass(frozen=True)
class Remote:
    """A file somewhere else, and what is known of it."""

    url: str
    size: int | None = None
    """Bytes; checked when known."""
    sha256: str | None = None
    """Hex digest; checked when known."""


def hub_url(repo: str, filename: str, *, revision: str = "main") -> str:
    """A data set's file on the Hugging Face hub, or on the mirror that HF_ENDPOINT names."""
    return f"{_hub_endpoint()}/datasets/{repo}/resolve/{revision}/{filename}"


def hub_file(repo: str, filename: str, *, timeout: float = 30.0) -> Remote:
    """A hub file with the size and hash that the hub states (its `X-Linked-*` headers).

    FileNotFoundError, with the remedy, when the hub says no; OSError when it does not answer.
    """
    url = hub_url(repo, filename)
    answer = _ask_hub("HEAD", url, timeout)
    size = answer.headers.get("X-Linked-Size")
    etag = answer.headers.get("X-Linked-Etag", "").strip('"')
    return Remote(url, int(size) if size else None, etag if len(etag) == 64 else None)


def hub_folder(repo: str, folder: str, *, timeout: float = 30.0) -> dict[str, Remote]:
    """The files of a folder of a data set by name, with the sizes and hashes that the hub states.

    Errors as in `hub_file`.
    """
    url = f"{_hub_endpoint()}/api/datasets/{repo}/tree/main/{folder}"
    try:
        listed = _ask_hub("GET", url, timeout).json()
    except requests.JSONDecodeError as error:
        raise OSError(f"{url} answers with something else than a list: {error}") from error
    return {
        entry["path"].rpartition("/")[2]: Remote(
            hub_url(repo, entry["path"]), entry["size"], entry.get("lfs", {}).get("oid")
        )
        for entry in listed
        if entry["type"] == "file"
    }


def _ask_hub(method: str, url: str, timeout: float) -> requests.Response:
    """A good answer, waited for as long as a busy hub wants; errors as in `hub_file`.

    What is lost on the way is asked for again as in `download`, a hub that cannot be reached only
    `UNREACHED_RETRIES` times.
    """
    attempt = 1
    while True:
        try:
            answer = requests.request(
                method, url, headers=_auth(url), timeout=timeout, allow_redirects=method == "GET"
            )
            _check_status(answer, url)
            return answer
        except _Final as error:
            raise FileNotFoundError(str(error)) from error
        except ValueError as error:
            raise OSError(f"{url} cannot be asked: {error}; check HF_ENDPOINT") from error
        except (requests.RequestException, _Retry) as error:
            unreached = _why_unreached(error)
            if unreached is not None and attempt > UNREACHED_RETRIES:
                raise OSError(
                    f"{url} cannot be reached: {unreached}; check the network and HF_ENDPOINT"
                ) from error
            if attempt > RETRIES:
                raise OSError(f"{url} failed {attempt} times, last with: {error}") from error
            _pause(error, attempt)
            attempt += 1


def _why_unreached(error: Exception) -> Exception | None:
    """Why there was no connection; None where there was one.

    urllib3 has a MaxRetryError for that alone, as requests lets it try nothing twice.
    """
    return next((each.reason for each in error.args if isinstance(each, MaxRetryError)), None)


def download(
    remote: Remote,
    path: Path,
    *,
    on_bytes: Callable[[int], None] = lambda _: None,
    timeout: float = 30.0,
    backoff: float = 1.0,
) -> Path:
    """Fetch a file to `path`, or return at once when it is there.

    Continues a `.part` of an earlier call, whose bytes `on_bytes` hears of first, and then of those
    that come (negative when some are thrown away). `timeout` is the longest silence in seconds;
    attempt k waits up to backoff x 2^k seconds, as long as the server asks with Retry-After at
    least. OSError when the server says no for good or all attempts fail; the part is kept.
    """
    with lock(path):
        if path.exists():
            return path
        part = path.with_name(f"{path.name}.part")
        on_bytes(part.stat().st_size if part.exists() else 0)
        attempt = 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                _transfer(remote, part, on_bytes, timeout)
                _verify(remote, part, on_bytes)
                os.replace(part, path)
                return path
            except _Final as error:
                raise OSError(str(error)) from error
            except (requests.RequestException, _Retry) as error:
                if isinstance(error, _Corrupt):
                    part.unlink()
                gained = part.exists() and part.stat().st_size > before
                attempt = 0 if gained else attempt + 1
                if attempt > RETRIES:
                    raise OSError(
                        f"{remote.url} failed {attempt} times, last with: {error}; "
                        "run the same command again to continue"
                    ) from error
                _pause(error, attempt, backoff)


class _Final(Exception):
    """No retry helps."""


class _Retry(Exception):
    """Try again, not before `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def _pause(error: Exception, attempt: int, backoff: float = 1.0) -> None:
    """Wait before another attempt: longer each time, and as long as the server asks at least."""
    asked = getattr(error, "retry_after", 0.0)
    time.sleep(max(asked, backoff * 2**attempt * random.uniform(0.5, 1)))


def _transfer(remote: Remote, part: Path, on_bytes: Callable[[int], None], timeout: float) -> None:
    """Append what is missing to `part`; raises when the connection ends early."""
    start = part.stat().st_size if part.exists() else 0
    if remote.size is not None and start == remote.size:
        return
    headers = {**_auth(remote.url), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        with contextlib.suppress(FileNotFoundError):
            headers["If-Range"] = _validator(part).read_text()
    with requests.get(remote.url, headers=headers, stream=True, timeout=timeout) as answer:
        _check_status(answer, remote.url)
        resumed = answer.status_code == 206
        if not resumed:
            on_bytes(-start)
            if etag := answer.headers.get("ETag"):
                _validator(part).write_text(etag)
        declared = int(answer.headers.get("Content-Length", 0))
        answer.raw.enforce_content_length = False  # it would throw the last, short chunk away
        _check_space(part, declared)
        received = 0
        with open(part, "ab" if resumed else "wb") as file:
            for chunk in answer.iter_content(CHUNK_BYTES):
                file.write(chunk)
                received += len(chunk)
                on_bytes(len(chunk))
    if received < declared:
        raise _Retry(f"the connection closed after {received:,} of {declared:,} bytes")


def _check_status(answer: requests.Response, url: str) -> None:
    code = answer.status_code
    if code in FINAL_STATUS:
        raise _Final(f"{url}: HTTP {code}, {FINAL_STATUS[code]}")
    if code == 416:  # the part is longer than the file: it is of another version
        raise _Corrupt(f"{url} has changed")
    if code >= 400:
        after = answer.headers.get("Retry-After", "")
        raise _Retry(f"HTTP {code}", float(after) if after.isdigit() else 0.0)


class _Corrupt(_Retry):
    """The part is not a beginning of the file: start over."""


def _verify(remote: Remote, part: Path, on_bytes: Callable[[int], None]) -> None:
    size = part.stat().st_size
    problem = None
    if remote.size is not None and size != remote.size:
        problem = f"it has {size:,} bytes instead of {remote.size:,}"
    elif remote.sha256 is not None and file_sha256(part) != remote.sha256:
        problem = "its hash is wrong"
    if problem:
        on_bytes(-size)
        part.unlink()
        raise _Retry(f"{remote.url} arrived damaged: {problem}")
    _validator(part).unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _validator(part: Path) -> Path:
    """Where the ETag of a part is kept, so that it is not continued from another version."""
    return part.with_name(f"{part.name}.etag")


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise _Final(
            f"{part.parent} has {free:,} bytes free, the download needs {needed:,}: make room or "
            "set JAXCHAT_BASE_DIR to another disk"
        )


def _hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _auth(url: str) -> Mapping[str, str]:
    """The hub's token, for the hub alone; requests drops it on redirects to other hosts."""
    token = os.environ.get("HF_TOKEN")
    same_host = urlsplit(url).netloc == urlsplit(_hub_endpoint()).netloc
    return {"Authorization": f"Bearer {token}"} if token and same_host else {}

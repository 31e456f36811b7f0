"""Downloads against a real server that misbehaves in every way we could think of."""

import hashlib
import itertools
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxchat import artifacts
from jaxchat.artifacts import (
    Remote,
    atomic_write,
    download,
    hub_file,
    hub_url,
)
from jaxchat.tasks.hub import HUB_SETS
from jaxchat.tasks.words import words_path
from scripts import data_download

BODY = bytes(itertools.islice(itertools.cycle(range(251)), 300_000))
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves BODY; `script` holds one behaviour per request, then it behaves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.body, self.etag = [], [], BODY, '"v1"'
        self.slowly = 0.0
        self.refusals, self.silent = [], False
        """What HEAD answers at first (None: nothing), and whether it keeps size and hash back."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.server.requests.append(dict(self.headers))
        status = self.server.refusals.pop(0) if self.server.refusals else 200
        if status is None:
            self.close_connection = True
            return
        self.send_response(status)
        if not self.server.silent:
            self.send_header("X-Linked-Size", str(len(self.server.body)))
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(self.server.body).hexdigest()}"')
        self.end_headers()

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        act = server.script.pop(0) if server.script else "behave"
        if isinstance(act, int):
            self.send_response(act)
            if act == 429:
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        time.sleep(server.slowly)
        body, start = server.body, self._start(act)
        self.send_response(206 if start else 200)
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body) - start + 100 * (act == "lie")))
        self.end_headers()
        rest = body[start:]
        if act == "corrupt":
            rest = bytes(len(rest))
        if act in ("truncate", "stall"):
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)
        if act == "stall":
            self.wfile.flush()
            time.sleep(1.5)
        if act in ("truncate", "stall", "lie"):
            self.close_connection = True

    def _start(self, act):
        wanted = self.headers.get("Range")
        fresh = self.headers.get("If-Range", self.server.etag) == self.server.etag
        if not wanted or not fresh or act == "ignore range":
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server, path, *, known=True, **options):
    remote = Remote(f"{server.url}/file", len(BODY) if known else None, SHA256 if known else None)
    return download(remote, path, timeout=0.5, backoff=0.001, **options)


@pytest.mark.parametrize(
    "script",
    [
        [],
        ["truncate"],
        ["truncate", "truncate", "truncate"],
        ["stall"],
        [500, 503, 429],
        ["lie"],
        ["truncate", "ignore range"],
        ["corrupt"],
        ["truncate", "corrupt"],
        [500, "truncate", "stall", 429, "lie"],
    ],
    ids=str,
)
def test_the_file_arrives_whole_whatever_happens(server, tmp_path, script):
    server.script = list(script)
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert sorted(p.name for p in tmp_path.iterdir()) == [".file.lock", "file"]


def test_a_resumed_download_asks_only_for_the_rest(server, tmp_path):
    server.script = ["truncate"]
    fetch(server, tmp_path / "file")
    assert "Range" not in server.requests[0]
    assert server.requests[1]["Range"] == f"bytes={len(BODY) // 2}-"
    assert server.requests[1]["If-Range"] == '"v1"'


def test_a_file_that_changes_on_the_way_is_not_mixed(server, tmp_path):
    server.script = ["truncate"] + [500] * 7
    with pytest.raises(OSError, match="failed 7 times"):
        fetch(server, tmp_path / "file", known=False)
    server.body, server.etag = BODY[::-1], '"v2"'
    fetch(server, tmp_path / "file", known=False)
    assert (tmp_path / "file").read_bytes() == BODY[::-1]


def test_progress_adds_up_to_the_file(server, tmp_path):
    server.script = ["truncate", "ignore range", "corrupt"]
    seen = []
    fetch(server, tmp_path / "file", on_bytes=seen.append)
    assert sum(seen) == len(BODY)


def test_what_an_earlier_call_has_left_counts_as_progress(server, tmp_path):
    server.script = ["truncate"] + [500] * 7
    with pytest.raises(OSError, match="failed 7 times"):
        fetch(server, tmp_path / "file")
    seen = []
    fetch(server, tmp_path / "file", on_bytes=seen.append)
    assert seen[0] == len(BODY) // 2
    assert sum(seen) == len(BODY)


@pytest.mark.parametrize(("status", "remedy"), [(401, "HF_TOKEN"), (403, "terms"), (404, "name")])
def test_a_final_answer_is_not_retried(server, tmp_path, status, remedy):
    server.script = [status]
    with pytest.raises(OSError, match=f"HTTP {status}, .*{remedy}"):
        fetch(server, tmp_path / "file")
    assert len(server.requests) == 1
    assert not (tmp_path / "file").exists()


def test_giving_up_keeps_what_has_come(server, tmp_path):
    server.script = ["truncate"] + [500] * 20
    with pytest.raises(OSError, match="run the same command again to continue"):
        fetch(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    server.script = []
    fetch(server, tmp_path / "file")
    assert server.requests[-1]["Range"] == f"bytes={len(BODY) // 2}-"


def test_two_at_once_fetch_it_once(server, tmp_path):
    threads = [threading.Thread(target=fetch, args=(server, tmp_path / "file")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1


def test_a_full_disk_is_said_before_anything_is_written(server, tmp_path, monkeypatch):
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(
        artifacts.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})()
    )
    assert usage.f_bavail > 0
    with pytest.raises(OSError, match=r"1,000 bytes free, the download needs 300,000"):
        fetch(server, tmp_path / "file")


def test_the_hub_states_size_and_hash_and_alone_gets_the_token(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert hub_url("me/set", "a.parquet") == f"{server.url}/datasets/me/set/resolve/main/a.parquet"
    assert hub_file("me/set", "a.parquet") == Remote(
        hub_url("me/set", "a.parquet"), len(BODY), SHA256
    )
    assert server.requests[-1]["Authorization"] == "Bearer secret"
    assert artifacts._auth("http://elsewhere.example/a") == {}


def test_a_busy_hub_is_asked_again_and_a_silent_one_is_no_proof(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(artifacts.time, "sleep", lambda _: None)
    server.refusals = [429, 500, 503]
    assert hub_file("me/set", "a.parquet").sha256 == SHA256
    server.refusals = [429] * 20
    with pytest.raises(OSError, match="failed 7 times, last with: HTTP 429"):
        hub_file("me/set", "a.parquet")
    server.refusals = [404]
    with pytest.raises(FileNotFoundError, match=r"HTTP 404, .*check the name"):
        hub_file("me/set", "a.parquet")


@pytest.fixture
def pauses(monkeypatch):
    """Nobody really waits; how often and how long somebody would have."""
    waited = []
    monkeypatch.setattr(artifacts.time, "sleep", waited.append)
    return waited


def test_a_connection_that_breaks_or_falls_silent_is_tried_again(server, monkeypatch, pauses):
    """One of 150 questions to the hub ended a night's sweep."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.refusals = [None, 503, None, None]
    assert hub_file("me/set", "a.parquet").sha256 == SHA256
    assert len(pauses) == 4
    request, silences = artifacts.requests.request, [True, True]

    def silent(*args, **options):
        if silences and silences.pop():
            raise artifacts.requests.ReadTimeout("read timed out")
        return request(*args, **options)

    monkeypatch.setattr(artifacts.requests, "request", silent)
    assert hub_file("me/set", "a.parquet").sha256 == SHA256
    server.refusals = [None] * 20
    with pytest.raises(OSError, match=r"failed 7 times, last with: .*without response"):
        hub_file("me/set", "a.parquet")


def test_who_is_offline_is_told_soon(monkeypatch, pauses):
    """No such host, nobody who listens, and what is no address."""

    def unknown(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    resolve = {"hub.invalid": unknown, "127.0.0.1": socket.getaddrinfo}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: resolve[host](host, *rest))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        for host in (f"127.0.0.1:{nobody.getsockname()[1]}", "hub.invalid"):
            monkeypatch.setenv("HF_ENDPOINT", f"http://{host}")
            pauses.clear()
            unreached = (
                rf"http://{host}/\S+ cannot be reached: .*; check the network and HF_ENDPOINT"
            )
            with pytest.raises(OSError, match=unreached):
                hub_file("me/set", "a.parquet")
            assert len(pauses) == 2
            assert sum(pauses) <= 6
    monkeypatch.setenv("HF_ENDPOINT", "hub.invalid")
    pauses.clear()
    with pytest.raises(OSError, match=r"cannot be asked: .*; check HF_ENDPOINT"):
        hub_file("me/set", "a.parquet")
    assert not pauses


@contextmanager
def small_dataset(monkeypatch, last_shard=9):
    dataset = data_download.HubDataset("climbmix", "me/set", last_shard)
    monkeypatch.setitem(data_download.HUB_DATASETS, "climbmix", dataset)
    yield dataset


def test_the_script_fetches_shards_and_the_validation_shard(server, base_dir, monkeypatch, capsys):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"]}), sink)
    server.body = sink.getvalue()
    server.script = ["truncate", 500, 429]
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(artifacts.time, "sleep", lambda _: None)
    with small_dataset(monkeypatch) as dataset:
        data_download.main(data_download.Config(num_shards=2, workers=2))
        names = sorted(p.name for p in dataset.directory.glob("*.parquet"))
        assert names == ["shard_00000.parquet", "shard_00001.parquet", "shard_00009.parquet"]
        assert "4 documents, 2 held out" in capsys.readouterr().out
        (dataset.directory / names[0]).write_bytes(b"damaged")
        data_download.main(data_download.Config(num_shards=2, verify=True))
        assert (dataset.directory / names[0]).read_bytes() == server.body
        assert "not verified" not in capsys.readouterr().out
        server.silent = True
        data_download.main(data_download.Config(num_shards=1, verify=True))
        assert "not verified, as nobody states size or hash: shard_00000.parq" in (
            capsys.readouterr().out
        )


def test_what_is_there_is_asked_for_only_to_be_verified(base_dir, monkeypatch):
    """A sweep on a node without internet stopped at its first stage, whose files were all there."""
    import io
    import zipfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    asked = []

    def no_hub(repo, folder):
        asked.append(folder)
        return {f"{split}-00000-of-00001.parquet": None for split in ("train", "test")}

    def no_network(*_, **__):
        pytest.fail("it asked the network")

    monkeypatch.setattr(artifacts.requests, "request", no_network)
    monkeypatch.setattr(artifacts.requests, "get", no_network)
    monkeypatch.setattr(data_download, "hub_folder", no_hub)
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"]}), sink)
    for hub_set in HUB_SETS.values():
        for split in hub_set.splits:
            atomic_bytes(hub_set.directory / f"{split}-00000-of-00001.parquet", b"rows")
    atomic_bytes(words_path(), b"word")
    with zipfile.ZipFile(base_dir / "eval_bundle.zip", "w") as bundle:
        bundle.writestr("eval_bundle/core.yaml", "tasks")
    with small_dataset(monkeypatch) as dataset:
        for shard in (0, 1, 9):
            atomic_bytes(dataset.directory / dataset.filename(shard), sink.getvalue())
        data_download.main(data_download.Config(num_shards=2, all=True))
    assert not asked
    (HUB_SETS["gsm8k"].directory / "test-00000-of-00001.parquet").unlink()
    assert [item.path.parent.name for item in data_download.task_sets(verify=False)] == [
        "words",
        *["gsm8k"] * 2,
    ]
    assert asked == [HUB_SETS["gsm8k"].folder]
    data_download.task_sets(verify=True)
    assert asked[1:] == [hub_set.folder for hub_set in HUB_SETS.values()]


def atomic_bytes(path, content):
    with atomic_write(path, "wb") as file:
        file.write(content)


def test_the_script_keeps_what_came_and_names_what_did_not(server, base_dir, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.script = ["behave", 404, "behave"]
    with (
        small_dataset(monkeypatch) as dataset,
        pytest.raises(OSError, match=r"1 of 3 downloads failed:\n  shard_0000\d\.parquet.*404"),
    ):
        data_download.main(data_download.Config(num_shards=2, workers=1))
    assert len(list(dataset.directory.glob("*.parquet"))) == 2


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_all_downloads(server, base_dir, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.slowly = 0.2

    interrupted = []

    def interrupt():
        while len(server.requests) < 4:
            time.sleep(0.01)
        interrupted.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)

    with small_dataset(monkeypatch, last_shard=50):
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            data_download.main(data_download.Config(num_shards=40, workers=2))
    assert time.monotonic() - interrupted[0] < 1.4
    assert len(server.requests) < 12


def test_an_archive_that_points_outside_is_not_unpacked(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../outside.txt", "gotcha")
    with pytest.raises(ValueError, match="points outside"):
        data_download.unpack(tmp_path / "evil.zip", tmp_path / "inside")
    assert not (tmp_path / "outside.txt").exists()


def test_an_archive_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    import zipfile

    def pack(text):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("bundle/1.txt", text)
            archive.writestr("bundle/2.txt", text)

    def unpacked():
        return {path.name: path.read_text() for path in (tmp_path / "to" / "bundle").iterdir()}

    pack("old")
    data_download.unpack(tmp_path / "a.zip", tmp_path / "to")
    assert unpacked() == {"1.txt": "old", "2.txt": "old"}
    pack("new")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(b"new", b"bad", 1))
    with pytest.raises(ValueError, match=r"a\.zip is damaged .*delete it and try again"):
        data_download.unpack(tmp_path / "a.zip", tmp_path / "to")
    assert unpacked() == {"1.txt": "old", "2.txt": "old"}
    (tmp_path / "a.zip").write_bytes(content)
    data_download.unpack(tmp_path / "a.zip", tmp_path / "to")
    assert unpacked() == {"1.txt": "new", "2.txt": "new"}
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["bundle"]

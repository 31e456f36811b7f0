"""The script: from a checkpoint to a table and a report, and the data that it needs."""

import hashlib
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat import cli
from jaxchat.checkpoint import CheckpointStore
from jaxchat.config import GPTConfig
from jaxchat.jax_backend import JaxBackend
from jaxchat.report import Report
from jaxchat.report_page import render
from jaxchat.stages import stage_directory
from jaxchat.task_eval import ChatResult
from jaxchat.tasks.hub import HUB_SETS, missing_sets
from jaxchat.tasks.words import words_path
from jaxchat.tokenizer import Tokenizer
from scripts import chat_eval, data_download

ARITHMETIC = ["-a", "Arithmetic", "-x", "4", "--slots", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base directory with a model that has learnt nothing."""
    root = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(root))
        tokenizer = Tokenizer([bytes([b]) for b in range(256)])
        tokenizer.save(root / "tokenizer")
        config = GPTConfig(
            sequence_len=256,
            vocab_size=tokenizer.vocab_size,
            n_layer=2,
            n_head=2,
            n_kv_head=2,
            n_embd=32,
        )
        backend = JaxBackend(config)
        backend.init(0)
        for source in ("mid", "sft"):
            store = CheckpointStore(stage_directory(source, "d2"))
            store.save(7, backend, {"tokenizer": tokenizer.fingerprint})
            store.finish()
        yield root


def run(words):
    chat_eval.main(cli.parse(chat_eval.Config, words))


def test_stages_end_up_side_by_side_in_the_report(trained, capsys):
    for source in ("mid", "sft"):
        run(["-i", source, *ARITHMETIC])
    run(["-i", "sft", "-a", "humaneval", "-x", "4", "--slots", "2", "--sandbox", "none"])
    shown = capsys.readouterr().out
    assert "no sandbox" in shown
    sections = {section.stage: section for section in Report(trained).sections()}
    assert {"chat_eval_mid", "chat_eval_sft", "chat_eval"} <= sections.keys()
    table, replies = sections["chat_eval"].parts
    assert table.columns == ["task", "mid", "sft"]
    assert [row[0] for row in table.rows] == ["Arithmetic", "HumanEval"]
    assert table.rows[0][1:] == ["0.0 [0.0, 49.0] of 4"] * 2
    assert table.rows[1][1:] == [None, "skipped: no sandbox: no sandbox was asked for"]
    assert [row[0] for row in replies.rows] == ["Arithmetic: ended", "Arithmetic: called"]
    text = render(Report(trained)).read_text()
    assert "## Chat tasks by stage" in text
    assert "| Arithmetic | 0 | 0 |" in text  # the summary


def test_a_later_run_keeps_the_other_rows_of_the_same_model_alone(trained, tmp_path):
    def rows():
        (section,) = (s for s in Report(trained).sections() if s.stage == "chat_eval_sft")
        return [row[0] for part in section.parts if hasattr(part, "rows") for row in part.rows]

    problems = tmp_path / "fruit.jsonl"
    problems.write_text('{"question": "A fruit?", "choices": ["chair", "fig"], "answer": "B"}\n')
    fruit = ["-i", "sft", "-a", str(problems)]
    run(["-i", "sft", *ARITHMETIC])
    run(fruit)
    assert {"Arithmetic", "fruit.jsonl"} <= set(rows())
    store = CheckpointStore(stage_directory("sft", "d2"))
    meta = store.path(7) / "meta.json"
    before = meta.read_text()
    meta.write_text(json.dumps(json.loads(before) | {"run": "trained again"}))
    run(fruit)
    meta.write_text(before)
    assert rows() == ["fruit.jsonl"]


def test_the_torch_backend_reads_its_own_models_only(trained):
    with pytest.raises(FileNotFoundError, match="no rl model in"):
        run(["-i", "rl", *ARITHMETIC])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-a", "GLUE"], "task 'GLUE': choose one of ARC-Easy"),
        (["-a", "MMLU"], "data_download --all"),
        (["--data", "hub"], "the task sets arc-easy"),
        (["--data", "moon"], "data 'moon': choose one of hub, offline"),
        (["-a", "HumanEval", "--sandbox", "host"], "sandbox 'host'"),
    ],
)
def test_impossible_requests_fail_before_a_model_is_loaded(trained, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(words)


def test_tasks_may_be_given_in_a_row_or_again_and_again():
    parsed = cli.parse(chat_eval.Config, ["-a", "ARC-Easy|MMLU", "-a", "GSM8K"])
    assert parsed.task == ("ARC-Easy|MMLU", "GSM8K")
    with pytest.raises(ValueError, match="max_problems=0 must be at least 1"):
        chat_eval.Config(max_problems=0)


def test_the_mean_has_the_name_of_what_it_is_the_mean_of():
    def results(*names):
        return [ChatResult(name, "generative", 0.0, 10, 5) for name in names]

    assert chat_eval.summarize(results(*chat_eval.CHATCORE)) == {"ChatCORE": 0.5}
    assert chat_eval.summarize(results("GSM8K")) == {"mean of 1 of ChatCORE's 6 tasks": 0.5}
    (name,) = chat_eval.summarize(results("Arithmetic", "HumanEval"))
    assert name.endswith("(not ChatCORE)")
    assert chat_eval.summarize([ChatResult("x", "generative", 0.0, skipped="no")]) == {}


# --- the hub's task sets --------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Lists and serves parquet files as the hub does."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo, path, rows):
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        self.files[repo, path] = sink.getvalue()


class HubHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.strip("/")
        if path.startswith("api/datasets/"):
            repo, folder = path.removeprefix("api/datasets/").split("/tree/main/")
            self.reply(json.dumps(self.listing(repo, folder)).encode())
            return
        repo, name = path.removeprefix("datasets/").split("/resolve/main/")
        self.reply(self.server.files[repo, name])

    def listing(self, repo, folder):
        return [
            {
                "type": "file",
                "path": path,
                "size": len(body),
                "lfs": {"oid": hashlib.sha256(body).hexdigest()},
            }
            for (owner, path), body in self.server.files.items()
            if owner == repo and path.startswith(f"{folder}/")
        ]

    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(base_dir, monkeypatch):
    with Hub() as server:
        Thread(target=server.serve_forever).start()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(data_download, "WORDS_URL", f"{server.url}/datasets/w/resolve/main/w")
        server.files["w", "w"] = b"aardvark\nzebra\n"
        for hub_set in HUB_SETS.values():
            row = dict.fromkeys(hub_set.columns, "x")
            for split in (*hub_set.splits, "unwanted"):
                for number in range(2):
                    name = f"{hub_set.folder}/{split}-{number:05d}-of-00002.parquet"
                    server.add(hub_set.repo, name, [row | {"extra": number}])
        yield server
        server.shutdown()


def fetch_tasks():
    config = data_download.Config(dataset="embedded", verify=True)
    from rich.console import Console

    data_download.fetch(data_download.task_sets(), config, Console())


def test_the_task_sets_come_whole_and_are_verified(hub):
    assert missing_sets() == list(HUB_SETS)
    fetch_tasks()
    assert missing_sets() == []
    assert words_path().read_text().split() == ["aardvark", "zebra"]
    names = {path.name for s in HUB_SETS.values() for path in s.directory.iterdir()}
    assert not any("unwanted" in name for name in names)
    damaged = HUB_SETS["mmlu"].directory / "test-00001-of-00002.parquet"
    whole = damaged.read_bytes()
    damaged.write_bytes(np.random.default_rng(0).bytes(len(whole)))
    fetch_tasks()
    assert damaged.read_bytes() == whole


def test_a_set_that_has_moved_is_named(hub):
    gone = HUB_SETS["gsm8k"]
    for repo, path in list(hub.files):
        if repo == gone.repo:
            del hub.files[repo, path]
    with pytest.raises(FileNotFoundError, match=r"openai/gsm8k/main lists no parquet file"):
        data_download.task_sets()

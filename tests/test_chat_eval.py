"""The script: from a checkpoint to a table and a report, and the data that it needs."""

import hashlib
import io
import json
import re
from dataclasses import replace
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
from jaxchat.report import KeyValues, Report, Table, Text, model_facts
from jaxchat.report_page import render
from jaxchat.stages import stage_directory
from jaxchat.task_eval import ChatResult
from jaxchat.task_report import (
    figures,
    manners,
    result_table,
    side_by_side,
    summarize,
    with_earlier_rows,
)
from jaxchat.tasks.hub import HUB_SETS, missing_sets
from jaxchat.tasks.mixtures import CHATCORE
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
    assert "| Arithmetic of 4 | 0 | 0 |" in text  # the summary


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


def test_a_file_that_was_mended_is_asked_anew(trained, tmp_path):
    """The result of the longer file before it stayed."""

    def problems_of(lines):
        question = '{"question": "A fruit?", "choices": ["chair", "fig"], "answer": "B"}\n'
        (tmp_path / "mended.jsonl").write_text(question * lines)
        run(["-i", "sft", "-a", str(tmp_path / "mended.jsonl")])
        (section,) = (s for s in Report(trained).sections() if s.stage == "chat_eval_sft")
        (table,) = (part for part in section.parts if isinstance(part, Table))
        return [row[2] for row in table.rows if row[0] == "mended.jsonl"]

    assert [problems_of(3), problems_of(2)] == [[3], [2]]


def test_a_model_that_is_not_there_is_said_before_any_task_is_opened(trained, monkeypatch):
    monkeypatch.setattr(chat_eval, "choose_tasks", lambda config: pytest.fail("slow work"))
    with pytest.raises(FileNotFoundError, match="no rl model in"):
        run(["-i", "rl", *ARITHMETIC])


def test_a_damaged_section_is_named_before_any_task_is_opened(base_dir, monkeypatch):
    """It was named after everything had been asked, whose results were lost."""
    monkeypatch.setattr(chat_eval, "choose_tasks", lambda config: pytest.fail("slow work"))
    (base_dir / "report/sections").mkdir(parents=True)
    (base_dir / "report/sections/base_eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"base_eval\.json is damaged"):
        run([])


def test_what_is_asked_of_memory_reaches_the_evaluation(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(
        chat_eval, "evaluate_chat", lambda *_, **given: asked.append(given) or result("GSM8K")
    )
    run(["-i", "sft", "-a", "Arithmetic"])
    run(["-i", "sft", "-a", "Arithmetic", "--slots", "3", "--batch-tokens", "70"])
    assert [(given["slots"], given["batch_tokens"]) for given in asked] == [(8, 16384), (3, 70)]


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
    with pytest.raises(ValueError, match="--max-problems 0: must be above 0"):
        chat_eval.Config(max_problems=0)


def test_a_task_that_is_named_twice_is_asked_once():
    for words in (["-a", "Arithmetic", "-a", "Arithmetic"], ["-a", "arithmetic|Arithmetic"]):
        tasks = chat_eval.choose_tasks(cli.parse(chat_eval.Config, words))
        assert [task.name for task in tasks] == ["Arithmetic"]


def result(name, correct=5):
    return ChatResult(name, "generative", 0.0, 10, correct)


def table_of(*names, limit=None):
    return result_table([result(name) for name in names], limit)


def test_the_mean_has_the_name_of_what_it_is_the_mean_of():
    assert summarize(table_of(*CHATCORE)) == {"ChatCORE": 0.5}
    assert summarize(table_of(*CHATCORE, limit=5)) == {"ChatCORE of 5 a task": 0.5}
    assert summarize(table_of("GSM8K")) == {"mean of 1 of ChatCORE's 6 tasks": 0.5}
    assert summarize(table_of("GSM8K", limit=5)) == {
        "mean of 1 of ChatCORE's 6 tasks, 5 a task": 0.5
    }
    (name,) = summarize(table_of("Arithmetic", "HumanEval"))
    assert name.endswith("(not ChatCORE)")
    assert summarize(table_of("Arithmetic", limit=5)) == {
        "mean centred accuracy (not ChatCORE), 5 a task": 0.5
    }
    assert summarize(result_table([ChatResult("x", "generative", 0.0, skipped="no")])) == {}


def test_chatcore_is_the_mean_of_its_own_tasks_whatever_else_was_asked():
    table = result_table([result("mine.jsonl", 0), *(result(name, 8) for name in CHATCORE)])
    assert summarize(table) == {"ChatCORE": pytest.approx(0.8)}


@pytest.mark.parametrize("skipped", CHATCORE)
def test_a_task_that_was_skipped_is_no_part_of_a_mean(skipped):
    results = [result(name) for name in CHATCORE if name != skipped]
    results.append(ChatResult(skipped, "generative", 0.0, skipped="no sandbox"))
    assert summarize(result_table(results)) == {"mean of 5 of ChatCORE's 6 tasks": 0.5}


def test_problems_of_different_limits_have_means_of_their_own():
    full, short = table_of(*CHATCORE[:5]), table_of(CHATCORE[5], "Arithmetic", limit=5)
    mixed = Table(full.columns, [*full.rows, *short.rows])
    assert summarize(mixed) == {
        "mean of 5 of ChatCORE's 6 tasks": 0.5,
        "mean centred accuracy (not ChatCORE), 5 a task": 0.5,
    }
    assert figures(mixed) == {
        **dict.fromkeys(CHATCORE[:5], 0.5),
        f"{CHATCORE[5]} of 5": 0.5,
        "Arithmetic of 5": 0.5,
    }


@pytest.fixture
def judged(trained, monkeypatch):
    """What chat_eval says of the model, whose every reply is half right, and its section."""

    def evaluate(config, _model, _tasks):
        return [result(name) for name in config.task or CHATCORE]

    def run_with(words):
        run(["-i", "sft", *words])
        (section,) = (s for s in Report(trained).sections() if s.stage == "chat_eval_sft")
        return section

    monkeypatch.setattr(chat_eval, "evaluate", evaluate)
    monkeypatch.setattr(chat_eval, "choose_tasks", lambda _: [])
    for path in (trained / "report" / "sections").glob("chat_eval*"):
        path.unlink()
    return run_with


def test_one_task_again_leaves_chatcore(judged, capsys):
    """The report had six rows, and "mean of 1 of ChatCORE's 6 tasks"."""
    assert judged([]).figures["ChatCORE"] == 0.5
    again = judged(["-a", "GSM8K"])
    assert again.figures == {"ChatCORE": 0.5, **dict.fromkeys(CHATCORE, 0.5)}
    assert Text("ChatCORE: 0.5000") in again.parts
    assert "mean of 1" not in capsys.readouterr().out


def test_a_few_problems_are_not_chatcore(judged):
    assert "ChatCORE of 5 a task" in judged(["-x", "5"]).figures
    mixed = judged(["-a", "GSM8K"]).figures
    assert "mean of 5 of ChatCORE's 6 tasks, 5 a task" in mixed
    assert "mean of 1 of ChatCORE's 6 tasks" in mixed
    assert not any(name.startswith("ChatCORE") for name in mixed)
    assert {"GSM8K", "MMLU of 5"} <= mixed.keys()
    assert judged([]).figures.keys() == {"ChatCORE", *CHATCORE}


def test_a_quick_look_says_that_the_larger_sample_stays(judged, monkeypatch, capsys):
    """`-x 2` after `-x 60` left two problems in the report."""
    judged(["-x", "10"])
    few = [ChatResult("GSM8K", "generative", 0.0, 2, 0)]
    monkeypatch.setattr(chat_eval, "evaluate", lambda *_: few)
    capsys.readouterr()
    assert judged(["-a", "GSM8K", "-x", "2"]).figures["GSM8K of 10"] == 0.5
    said = capsys.readouterr().out
    assert "GSM8K: 0.0 [0.0, 65.8] of 2 now; the result of 10 problems stays" in said


def test_drawn_replies_are_shown_and_leave_the_report(judged, capsys):
    """Eight tries at a problem are not what the other models of the table had."""
    reported = judged([])
    capsys.readouterr()
    assert judged(["-a", "GSM8K", "-n", "8", "-t", "1"]) == reported
    shown = capsys.readouterr().out
    assert "Not in the report" in shown and "GSM8K" in shown


def test_models_of_other_tags_stand_side_by_side_under_their_names(trained, judged, tmp_path):
    """d12's base and d4's sft stood under `base` and `sft`, as if one had become the other."""
    judged([])
    facts = model_facts("mid", "d12", {"step": 7, "tokenizer": "t"})
    report = Report(tmp_path)
    for section in Report(trained).sections():
        report.add(section.stage, section.title, section.parts)
    report.add("chat_eval_mid", "Chat", [table_of("GSM8K"), facts])
    assert list(side_by_side(report.sections()).columns) == ["task", "mid d12", "sft d2"]
    assert list(manners(report.sections()).columns) == ["replies", "mid d12", "sft d2"]


def test_the_terminal_shows_the_stages_of_the_tag_that_was_asked(trained, judged, capsys):
    """The report has a column for every model there is; six of them do not fit a line."""
    for tag, problems in (("d12", 12), ("d2", 24)):
        facts = model_facts("mid", tag, {"step": 7, "tokenizer": "t"})
        parts = [result_table([ChatResult("GSM8K", "generative", 0.0, problems, 5)]), facts]
        Report(trained).add("chat_eval_mid", "Chat", parts)
    judged(["-a", "GSM8K"])
    assert re.search("task +┃ mid +┃ sft +┃", capsys.readouterr().out)
    (comparison,) = (s for s in Report(trained).sections() if s.stage == "chat_eval")
    assert list(comparison.parts[0].columns) == ["task", "mid d2", "mid d12", "sft d2"]


def test_a_section_of_an_earlier_version_is_shown_but_makes_no_claim(judged):
    """Its rows do not say how many problems had been asked for."""
    section = judged([])
    table = next(part for part in section.parts if isinstance(part, Table))
    at = list(table.columns).index("limit")
    older = Table(
        [*table.columns[:at], *table.columns[at + 1 :]],
        [[*row[:at], *row[at + 1 :]] for row in table.rows],
    )
    facts = next(part for part in section.parts if isinstance(part, KeyValues))
    stored = replace(section, parts=[older, facts])
    assert side_by_side([stored]).rows == side_by_side([section]).rows
    fresh = table_of("GSM8K")
    assert with_earlier_rows(fresh, facts.values, [stored], "sft").rows == fresh.rows


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

    data_download.fetch(data_download.task_sets(verify=True), config, Console())


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
        data_download.task_sets(verify=False)

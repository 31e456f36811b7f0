"""The report: what goes in comes out, in order, whatever text it is made of."""

import io
import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat import environment, report_page, runtime
from jaxchat.report import Curve, KeyValues, Report, Samples, Table, Text, model_facts
from jaxchat.report_page import render
from scripts import base_eval, base_loss, base_train, chat_eval, chat_rl, tok_train
from scripts import report as report_script

LOSS = Curve(
    "Training loss",
    "step",
    "loss (nats per token)",
    {"train": ([0, 1, 2, 3], [9.0, 5.0, float("nan"), 4.0]), "val": ([3], [4.5])},
)


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A report on a machine that is always the same."""
    machine = {"python": "3.11", "cpu": "abacus", "gpu": "none", "commit": "c0ffee"}
    monkeypatch.setattr(environment, "describe", lambda: dict(machine))
    return Report(tmp_path)


def test_sections_come_back_as_they_were(card):
    parts = [
        Text("one\n\ntwo"),
        Table(["a", "b"], [["x", 1.5], [None, True]], "caption"),
        KeyValues({"depth": 4, "lr": 0.02, "tag": None}),
        LOSS,
        Samples([("The", " end")], "greedy"),
    ]
    card.add("base_train", "Base", parts, wall_seconds=3.5, figures={"val bpb": 1.25})
    (section,) = card.sections()
    assert (section.stage, section.title, section.wall_seconds) == ("base_train", "Base", 3.5)
    assert section.figures == {"val bpb": 1.25}
    assert section.environment["commit"] == "c0ffee"
    assert repr(section.parts).replace("(", "[").replace(")", "]") == (
        repr(parts).replace("(", "[").replace(")", "]")  # JSON has no tuples
    )


def test_sections_are_in_pipeline_order_and_a_rerun_replaces_its_own(card):
    for stage in ("zeta", "chat_eval_sft", "base_eval", "alpha", "chat_sft", "tok_train"):
        card.add(stage, f"first {stage}", [])
    card.add("base_eval", "second base_eval", [])
    assert [section.stage for section in card.sections()] == [
        *["tok_train", "base_eval", "chat_sft", "chat_eval_sft", "alpha", "zeta"]
    ]
    headings = re.findall(r"^## (.*)$", render(card).read_text(), re.MULTILINE)
    assert headings[-6:] == [
        *["first tok\\_train", "second base\\_eval", "first chat\\_sft"],
        *["first chat\\_eval\\_sft", "first alpha", "first zeta"],
    ]


def test_the_header_sums_up(card):
    card.add("base_eval", "Base", [], wall_seconds=65, figures={"val bpb": 1.25, "CORE": 0.1234567})
    card.add("chat_eval_sft", "Chat", [], wall_seconds=3600, figures={"ChatCORE": 0.3})
    card.add("tok_eval", "Tokens", [], figures={"bytes per token": 4})
    text = render(card).read_text()
    assert "| figure | base | sft |\n|---|---|---|\n| val bpb | 1.25 |  |" in text
    assert "| CORE | 0.1235 |  |\n| ChatCORE |  | 0.3 |" in text
    assert "| base\\_eval | 1m 05s |" in text
    assert "| total | 1h 01m 05s |" in text
    assert "| abacus | c0ffee |" in text


def about(source, tag):
    return [model_facts(source, tag, {"run": "r", "step": 7, "tokenizer": "t"})]


def summary_of(card):
    text = render(card).read_text()
    return text.split("## Summary\n\n")[1].split("\n\n")[0].split("\n")


def test_models_of_other_tags_have_sections_of_their_own(card):
    """A second model's pretraining replaced the first's, and left it the evaluations."""
    for tag, loss in (("d12", 1.25), ("d4", 1.5), ("d12", 1.125)):  # d12 again
        parts = [LOSS, *about("base", tag)]
        card.add("base_train", "Base", parts, wall_seconds=60, figures={"val bpb": loss})
    card.add("tok_train", "Tokenizer", [])
    keys = [section.key for section in card.sections()]
    assert keys == ["tok_train", "base_train.d4", "base_train.d12"]
    path = render(card)
    text = path.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[-3:] == [
        *["Tokenizer", "Base: d4", "Base: d12"]
    ]
    assert "| base\\_train d12 | 1m 00s |" in text and "| total | 2m 00s |" in text
    for tag in ("d4", "d12"):
        picture = f"report_files/base_train.{tag}_0.png"
        assert f"]({picture})" in text and (path.parent / picture).is_file()


def test_any_tag_is_a_files_name_and_an_address(card):
    tag = "../a (b)%2F\u00e9"
    card.add("base_train", "Base", [LOSS, *about("base", tag)])
    (section,) = card.sections()
    assert section.key.startswith("base_train.")
    path = render(card)
    (address,) = re.findall(r"\]\((.*?)\)\n", path.read_text())
    assert (path.parent / unquote(address)).is_file() and " " not in address
    assert len(list((card.directory / "sections").iterdir())) == 1


def test_a_section_of_an_earlier_version_is_replaced(card):
    """Its file has no tag in its name."""
    card.add("base_eval", "old", about("base", "d4"))
    (path,) = (card.directory / "sections").iterdir()
    stored = json.loads(path.read_bytes()) | {"finished": "2026-01-01T00:00:00+0000"}
    path.with_name("base_eval.json").write_text(json.dumps(stored))
    card.add("base_eval", "new", about("base", "d4"))
    assert [section.title for section in card.sections()] == ["new"]


def test_the_summary_keeps_models_of_other_tags_apart(card):
    """d12's CORE stood beside d4's ChatCORE, and above d20's loss, as if all were one model."""
    card.add("base_train", "Base", about("base", "d20"), figures={"val bpb": 1.25})
    card.add("base_loss", "Loss", [], figures={"val bpb": 1.5})  # does not say whose
    card.add("base_eval", "CORE", about("base", "d12"), figures={"CORE": 0.25})
    card.add("base_eval", "CORE", about("base", "d20"), figures={"CORE": 0.375})
    card.add("chat_eval_base", "Chat", about("base", "d12"), figures={"MMLU": 0.5})
    card.add("chat_eval_sft", "Chat", about("sft", "d4"), figures={"MMLU": 0.75})
    assert summary_of(card) == [
        "| figure | base d20 | base | base d12 | sft d4 |",
        "|---|---|---|---|---|",
        "| val bpb | 1.25 | 1.5 |  |  |",
        "| CORE | 0.375 |  | 0.25 |  |",
        "| MMLU |  |  | 0.5 | 0.75 |",
    ]


def test_the_summary_names_no_tag_where_there_is_one(card):
    card.add("base_train", "Base", about("base", "d4"), figures={"val bpb": 1.25})
    card.add("base_eval", "CORE", about("base", "d4"), figures={"CORE": 0.25})
    card.add("chat_sft", "Chat", about("sft", "d4"), figures={"val bpb": 1})
    assert summary_of(card)[0] == "| figure | base | sft |"


def test_pictures_are_drawn_linked_and_cleaned_up(card):
    card.add("base_train", "Base", [Text("x"), LOSS])
    path = render(card)
    picture = path.parent / "report_files" / "base_train_1.png"
    assert f"![Training loss](report_files/{picture.name})" in path.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    card.add("base_train", "Base", [LOSS])
    render(card)
    assert [p.name for p in picture.parent.iterdir()] == ["base_train_0.png"]


def test_pictures_can_be_read_on_light_and_dark_pages():
    """No background of its own, and every ink at least 2.5:1 in contrast to white and to black."""
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(report_page.draw(LOSS)))  # (height, width, rgba)
    assert pixels[0, 0, 3] == 0
    solid = pixels[pixels[..., 3] == 1][:, :3]
    assert len(solid) > 500
    linear = np.where(solid <= 0.04045, solid / 12.92, ((solid + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    assert (1.05 / (luminance + 0.05)).min() > 2.5
    assert ((luminance + 0.05) / 0.05).min() > 2.5


def test_what_json_lacks_is_stored_as_its_text(card):
    card.add("s", "S", [KeyValues({"tokenizer": Path("a") / "b"})])
    assert card.sections()[0].parts[0].values == {"tokenizer": "a/b"}


def test_numbers_of_numpy_are_stored(card):
    line: Any = (np.arange(3), np.ones(3, np.float32))
    rows: Any = [[np.float32(0.5)], [np.int64(7)]]
    card.add("s", "S", [Table(["n"], rows), Curve("c", "x", "y", {"a": line})])
    (section,) = card.sections()
    assert section.parts[0].rows == [[0.5], [7]]
    assert section.parts[1].lines["a"] == [[0, 1, 2], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (True, "True"),
        (1234567, "1,234,567"),
        (0.000123456, "0.0001235"),
        (1234.5678, "1235"),
        (123456.7, "123,457"),
        (float("nan"), "nan"),
        ("a|b", "a\\|b"),
        ("3.11.7", "3.11.7"),
        ("-6.6%", "-6.6%"),
    ],
)
def test_cells_are_readable(card, value, shown):
    card.add("s", "S", [Table(["v"], [[value]])])
    assert f"| v |\n|---|\n| {shown} |\n" in render(card).read_text()


@given(st.text(max_size=60))
def test_escaped_text_reads_back_and_stays_on_its_line(text):
    """CommonMark: a backslash before punctuation stands for the punctuation."""
    escaped = report_page.escape(text)
    assert len(escaped.splitlines()) <= 1
    read = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped)
    assert read == "".join(c if c.isprintable() else " " for c in text)
    assert not re.search(r"(?<!\\)(\\\\)*[`*_\[\]<>|$&]", escaped)
    assert not re.match(r"\s*([-+#=]+|\d+[.)])(\s|$)", escaped)


def test_text_is_no_markup(card):
    card.add(
        "s", "S", [Text("# no heading\n\n- no *list*\n\n    no code\n\n1. no\n\n---\n\n<b>no</b>")]
    )
    shown = render(card).read_text().split("## S\n\n")[1].split("\n\n")
    assert shown == [
        *["\\# no heading", "\\- no \\*list\\*", "no code", "1\\. no", "\\---"],
        "\\<b\\>no\\</b\\>\n",
    ]


@given(st.text(alphabet="`~\n |#a", max_size=60))
def test_a_sample_cannot_leave_its_block(text):
    fence, *body, closing, _ = report_page._fenced(text)
    assert fence == closing + "text"
    assert "\n".join(body) == text
    assert all(not line.lstrip().startswith(closing) for line in body)


def test_samples_are_shown_verbatim(card):
    card.add("s", "S", [Samples([("```py", "|x|\x1b[2J\n# no heading")])])
    assert "````text\n```py▸|x|\ufffd[2J\n# no heading\n````" in render(card).read_text()


def test_a_damaged_section_is_named(card):
    card.add("tok_train", "T", [])
    path = card.directory / "sections" / "tok_train.json"
    evil = b'{"parts": [{"kind": "Evil"}]}'
    for content in (b"", b"3", b"[]", b"{}", evil, path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tok_train\.json is damaged .*run stage tok_train"):
            render(card)


def test_of_several_processes_the_first_one_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "is_first_process", lambda: False)
    (tmp_path / "report").touch()  # nobody could write there
    Report(tmp_path).check_writable()
    Report(tmp_path).add("base_train", "Base", [])


def test_mistakes_are_named(card):
    with pytest.raises(ValueError, match=r"stage '\.\./x' must be lower-case"):
        card.add("../x", "X", [])
    with pytest.raises(ValueError, match="table row 1 has 1 cells, the header 2"):
        Table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="curve 'loss': 2 x values, 1 y values"):
        Curve("c", "x", "y", {"loss": ([1, 2], [3])})


def test_the_environment_is_described_in_seconds():
    start = time.monotonic()
    found = environment.describe()
    assert {"python", "jax", "torch", "cpu", "memory", "gpu", "commit"} <= found.keys()
    assert found["numpy"] == np.__version__
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.04, "0.0 s"), (59, "59.0 s"), (60, "1m 00s"), (3725, "1h 02m 05s")]
)
def test_durations(seconds, shown):
    assert report_page.duration(seconds) == shown


def test_the_script_copies_report_and_pictures(card, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"nothing to report in .*: run a stage first"):
        report_script.main(report_script.Config(output=tmp_path / "out"))
    card.add("base_train", "Base", [LOSS])
    output = tmp_path / "out"
    (output / "report_files").mkdir(parents=True)
    (output / "report_files" / "stale.png").touch()
    report_script.main(report_script.Config(output=output))
    assert capsys.readouterr().out.strip() == str((output / "report.md").resolve())
    assert (output / "report.md").read_bytes() == (card.directory / "report.md").read_bytes()
    assert [p.name for p in (output / "report_files").iterdir()] == ["base_train_0.png"]


@pytest.mark.parametrize(
    "script",
    [tok_train, base_train, base_loss, base_eval, chat_eval, chat_rl],
    ids=lambda s: s.__name__,
)
def test_a_report_that_cannot_be_written_stops_a_stage_at_its_beginning(script, base_dir):
    """It stopped them after all their work. Here they have no model, which none of them asks."""
    (base_dir / "report").touch()
    with pytest.raises(OSError, match=r"cannot write to .*report.*; set JAXCHAT_BASE_DIR"):
        script.main(script.Config())


def test_copying_onto_itself_keeps_the_pictures(card):
    card.add("base_train", "Base", [LOSS])
    path = render(card)
    assert report_script.copy(path, path.parent) == path
    assert (path.parent / "report_files" / "base_train_0.png").is_file()

"""Corpora: folders, hub shards and the embedded documentation, and what is said when one is bad."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat import dataset, embedded_corpus
from jaxchat.dataset import HUB_DATASETS, default_corpus, open_corpus

ROOT = Path(__file__).parents[1]


def write_shard(path, texts, row_group_size=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=row_group_size)


def texts_of(corpus, split):
    return list(corpus.iter_texts(split))


def test_a_folder_of_text_splits_the_same_way_every_time(tmp_path):
    lines = [json.dumps({"text": f"line {i}"}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("a whole\n\ndocument")
    first, again = open_corpus(str(tmp_path)), open_corpus(str(tmp_path))
    assert first.fingerprint == again.fingerprint
    train, val = texts_of(first, "train"), texts_of(first, "val")
    assert (train, val) == (texts_of(again, "train"), texts_of(again, "val"))
    assert len(val) == 2
    assert {*train, *val} == {*(f"line {i}" for i in range(30)), "a whole\n\ndocument"}
    (tmp_path / "b.txt").write_text("another")
    assert open_corpus(str(tmp_path)).fingerprint != first.fingerprint


def test_markdown_is_text_and_other_kinds_are_told(tmp_path, capsys):
    """Both were left out in silence; hidden files are nobody's documents."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{i}"}) for i in range(9)))
    before = open_corpus(str(tmp_path)).fingerprint
    assert capsys.readouterr().out == ""
    (tmp_path / ".cache").mkdir()
    for name in ("a.pdf", "b.pdf", "c.docx", "LICENSE", ".hidden", ".cache/d.pdf"):
        (tmp_path / name).write_text("no")
    assert open_corpus(str(tmp_path)).fingerprint == before
    said = f"not read in {tmp_path}: 4 files of other kinds (.pdf 2, .docx 1, no suffix 1)\n"
    assert capsys.readouterr().out == said
    (tmp_path / "b.md").write_text("# one")
    (tmp_path / "c.markdown").write_text("# two")
    corpus = open_corpus(str(tmp_path))
    assert {"# one", "# two"} < {*texts_of(corpus, "train"), *texts_of(corpus, "val")}
    assert texts_of(open_corpus(str(tmp_path / "a.jsonl")), "train")


def test_latin_1_is_told_with_a_remedy(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 .*iconv -f latin1 -t utf-8"):
        open_corpus(str(tmp_path))


@pytest.mark.parametrize("end", ["\n\n", "\n", " ", ""])
def test_a_book_is_cut_where_something_ends(tmp_path, end, monkeypatch):
    """One file is enough to train on: nanoGPT's Shakespeare is."""
    monkeypatch.setattr(dataset, "SECTION_CHARS", 100)
    book = "".join(f"{i:04d}" + "x" * (i % 40) + end for i in range(200))
    found = list(dataset.sections(book))
    assert "".join(found) == book
    assert all(50 < len(section) <= 100 for section in found[:-1])
    assert all(section.endswith(end) for section in found)
    (tmp_path / "input.txt").write_text(book, encoding="utf-8-sig")
    for where in (tmp_path, tmp_path / "input.txt"):
        corpus = open_corpus(str(where))
        assert corpus.keeps_all
        assert sorted(texts_of(corpus, "train") + texts_of(corpus, "val")) == sorted(found)


def test_a_line_ends_where_json_lines_end(tmp_path):
    texts = ["two\u2028lines", "next\x85line", "plain"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode())
    corpus = open_corpus(str(tmp_path))
    assert sorted(texts_of(corpus, "train") + texts_of(corpus, "val")) == sorted(texts)


@pytest.mark.parametrize("line", ["{broken", '{"body": "x"}', '{"text": 3}', "[]"])
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: "):
        open_corpus(str(tmp_path))


def test_an_empty_folder_and_an_unknown_name_say_what_would_do(tmp_path):
    with pytest.raises(ValueError, match=r"holds 0 distinct document"):
        open_corpus(str(tmp_path))
    with pytest.raises(ValueError, match=r"neither one of climbmix, .*, a folder nor"):
        open_corpus("clmbmix")


@pytest.mark.parametrize(
    ("table", "found"),
    [(pa.table({"body": ["x"]}), "body (string)"), (pa.table({"text": [1]}), "text (int64)")],
)
def test_a_parquet_file_without_texts_is_named(tmp_path, table, found):
    write_shard(tmp_path / "a.parquet", ["x"])
    bad = tmp_path / "b.parquet"
    pq.write_table(table, bad)
    message = f"{bad} has no column `text` of strings, but {found}"
    with pytest.raises(ValueError, match=re.escape(message)):
        open_corpus(str(tmp_path))
    bad.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=re.escape(f"{bad} is no parquet file, or damaged")):
        open_corpus(str(tmp_path))


def test_a_row_without_text_is_named(tmp_path):
    write_shard(tmp_path / "a.parquet", ["x", "y", None, "z"])
    write_shard(tmp_path / "b.parquet", ["x"])
    with pytest.raises(ValueError, match=r"a\.parquet: 1 rows of row group 1 have no text"):
        texts_of(open_corpus(str(tmp_path)), "train")


def test_parquet_folders_validate_on_their_last_file(tmp_path):
    for i in range(3):
        write_shard(tmp_path / f"{i}.parquet", [f"{i}a", f"{i}b", f"{i}c"])
    corpus = open_corpus(str(tmp_path))
    assert texts_of(corpus, "train") == ["0a", "0b", "0c", "1a", "1b", "1c"]
    assert texts_of(corpus, "val") == ["2a", "2b", "2c"]
    assert corpus.groups("train") == [(0, 0, 2), (0, 1, 1), (1, 0, 2), (1, 1, 1)]
    assert corpus.read_group("train", 1, 1) == ["1c"]
    assert corpus.keeps_all
    assert list(corpus.iter_texts("train", max_chars=3)) == ["0a", "0b"]


def test_a_folder_that_mixes_kinds_says_what_would_be_left_out(tmp_path):
    """Its text files were passed over in silence."""
    for i in range(2):
        write_shard(tmp_path / f"{i}.parquet", ["a", "b"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.txt").write_text("never read")
    with pytest.raises(ValueError, match=r"parquet files and notes/one.txt, of which one would be"):
        open_corpus(str(tmp_path))


def test_one_parquet_file_is_split_by_its_documents(tmp_path):
    """It was refused, where one text file is not."""
    path = tmp_path / "all.parquet"
    texts = [f"document {i}" for i in range(30)]
    write_shard(path, texts)
    (tmp_path / "same.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    expected = open_corpus(str(tmp_path / "same.jsonl"))
    (tmp_path / "same.jsonl").unlink()
    for where in (tmp_path, path):
        corpus = open_corpus(str(where))
        assert corpus.fingerprint == expected.fingerprint
        for split in dataset.SPLITS:
            assert texts_of(corpus, split) == texts_of(expected, split)
    write_shard(path, ["a", None])
    with pytest.raises(ValueError, match=r"all\.parquet: 1 rows of row group 0 have no text"):
        open_corpus(str(path))
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no parquet file, or damaged"):
        open_corpus(str(path))


def test_a_card_beside_parquet_files_is_told_and_not_read(tmp_path, capsys):
    """As data sets of the hub have one."""
    for i in range(2):
        write_shard(tmp_path / f"{i}.parquet", ["a", "b"])
    before = open_corpus(str(tmp_path)).fingerprint
    (tmp_path / "README.md").write_text("# A set")
    assert open_corpus(str(tmp_path)).fingerprint == before
    said = f"not read in {tmp_path}: 1 file of other kinds (.md 1)\n"
    assert capsys.readouterr().out == said


def test_parquet_files_in_folders_of_a_folder_are_read(tmp_path):
    """Texts were, but of these there were "0 distinct documents"; a tool may name a folder so."""
    for name in ("a/1", "b.parquet/0", "a/0"):
        write_shard(tmp_path / f"{name}.parquet", [name])
    corpus = open_corpus(str(tmp_path))
    assert texts_of(corpus, "train") == ["a/0", "a/1"]
    assert texts_of(corpus, "val") == ["b.parquet/0"]
    (tmp_path / "b.parquet" / "0.parquet").rename(tmp_path / "c.parquet")
    assert open_corpus(str(tmp_path)).fingerprint != corpus.fingerprint


def test_texts_beside_parquet_files_in_a_folder_are_an_error(tmp_path):
    """Here the parquet files were passed over in silence."""
    for i in range(2):
        write_shard(tmp_path / "data" / f"{i}.parquet", ["a", "b"])
    (tmp_path / "notes.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"parquet files and notes.jsonl, of which one would be"):
        open_corpus(str(tmp_path))


def test_a_flat_folder_of_parquet_files_keeps_its_fingerprint(tmp_path):
    """Its checkpoints hold it."""
    for i in range(2):
        write_shard(tmp_path / f"{i}.parquet", ["a", "b"])
    facts = " ".join(f"{i}.parquet:{(tmp_path / f'{i}.parquet').stat().st_size}" for i in range(2))
    assert open_corpus(str(tmp_path)).fingerprint == hashlib.sha256(facts.encode()).hexdigest()[:16]


def test_the_validation_shard_is_the_same_however_many_were_downloaded(base_dir):
    """Upstream took the last of those on disk (its issue 541)."""
    hub = HUB_DATASETS["climbmix"]
    with pytest.raises(ValueError, match=r"data_download --dataset climbmix -n 8"):
        open_corpus("climbmix")
    write_shard(hub.directory / "shard_06542.parquet", ["val"])
    write_shard(hub.directory / "shard_00000.parquet", ["a"])
    one = open_corpus("climbmix")
    assert not one.keeps_all
    write_shard(hub.directory / "shard_00001.parquet", ["b"])
    two = open_corpus("climbmix")
    assert texts_of(one, "val") == texts_of(two, "val") == ["val"]
    assert texts_of(two, "train") == ["a", "b"]
    assert one.fingerprint != two.fingerprint
    assert default_corpus() == "climbmix"


def test_a_folder_of_parquet_files_is_another_corpus_when_one_of_them_changes(tmp_path):
    for i in range(2):
        write_shard(tmp_path / f"{i}.parquet", ["a", "b"])
    first = open_corpus(str(tmp_path)).fingerprint
    assert open_corpus(str(tmp_path)).fingerprint == first
    shards = open_corpus(str(tmp_path)).shards
    write_shard(tmp_path / "0.parquet", ["a", "b", "a longer third one"])
    assert open_corpus(str(tmp_path)).fingerprint != first
    assert open_corpus(str(tmp_path), shards=shards).fingerprint != first


@pytest.mark.parametrize("hub", [True, False])
def test_a_corpus_is_the_same_again_when_files_have_come_since(base_dir, capsys, hub):
    """A run that went on after more shards had been downloaded was refused as another."""
    folder = HUB_DATASETS["climbmix"].directory if hub else base_dir / "own"
    name, last = ("climbmix", "shard_06542") if hub else (str(folder), "shard_00004")
    for shard in ("shard_00000", "shard_00002", last):
        write_shard(folder / f"{shard}.parquet", [f"{shard} {i}" for i in range(5)])
    first = open_corpus(name)
    again = json.loads(json.dumps(first.shards))
    assert open_corpus(name, shards=again).fingerprint == first.fingerprint
    assert capsys.readouterr().out == ""
    for shard in ("shard_00001", "shard_00005"):
        write_shard(folder / f"{shard}.parquet", ["new"])
    assert open_corpus(name).fingerprint != first.fingerprint
    same = open_corpus(name, shards=again)
    total = 4 if hub else 5
    assert f"not read in {folder}: 2 of {total} files, which have" in capsys.readouterr().out
    assert (same.fingerprint, same.shards) == (first.fingerprint, first.shards)
    for split in dataset.SPLITS:
        assert same.groups(split) == first.groups(split)
        assert texts_of(same, split) == texts_of(first, split)
        assert "new" not in texts_of(same, split)
    (folder / "shard_00002.parquet").unlink()
    assert open_corpus(name, shards=again).fingerprint != first.fingerprint
    assert "1 files, of which shard_00002.parquet is the first" in capsys.readouterr().out


def test_the_shards_of_another_corpus_change_nothing(base_dir, tmp_path):
    """It is refused by its fingerprint, as it would be by itself."""
    for i in range(2):
        write_shard(tmp_path / "own" / f"{i}.parquet", ["a", "b"])
    own = open_corpus(str(tmp_path / "own"))
    again = open_corpus(str(tmp_path / "own"), shards=["shard_00000.parquet"])
    assert again.fingerprint == own.fingerprint
    (tmp_path / "book.txt").write_text("a whole book. " * 2000)
    book = open_corpus(str(tmp_path / "book.txt"), shards=own.shards)
    assert book.shards is None


@pytest.fixture
def library(tmp_path, monkeypatch):
    """One installed distribution, instead of all of them."""
    monkeypatch.setattr(embedded_corpus, "DISTRIBUTIONS", ("networkx",))
    stdlib = tmp_path / "stdlib"
    stdlib.mkdir()
    (stdlib / "one.py").write_text(f'"""{"Module documentation. " * 12}"""\n')
    (stdlib / "bad.py").write_text("def broken(:\n")
    (stdlib / "short.py").write_text(f'"""Too short{"." * 190}"""\n')  # 199 characters
    (stdlib / "enough.py").write_text(f'"""Long enough{"." * 189}"""\n')  # 200
    tests = stdlib / "test"
    tests.mkdir()
    (tests / "hidden.py").write_text(f'"""{"Test documentation. " * 12}"""\n')
    monkeypatch.setattr(embedded_corpus.sysconfig, "get_path", lambda _: str(stdlib))
    return stdlib


def test_the_embedded_corpus_is_the_documentation_of_what_is_installed(base_dir, library):
    corpus = open_corpus("embedded")
    train, val = texts_of(corpus, "train"), texts_of(corpus, "val")
    documents = train + val
    assert any(text.startswith("networkx.algorithms.") for text in documents)
    assert any(text.startswith("one\n\nModule documentation.") for text in documents)
    assert any(text.startswith("enough\n\nLong enough") for text in documents)
    assert not any("Test documentation" in text or "Too short" in text for text in documents)
    bodies = [text.partition("\n\n")[2] for text in documents]
    assert len(set(bodies)) == len(bodies)
    assert 0.01 < len(val) / len(documents) < 0.12
    assert default_corpus() == "embedded"


def test_the_embedded_corpus_is_harvested_once_per_set_of_versions(base_dir, library, monkeypatch):
    first = open_corpus("embedded")
    monkeypatch.setattr(embedded_corpus, "harvest", lambda: pytest.fail("harvested again"))
    assert open_corpus("embedded").fingerprint == first.fingerprint
    monkeypatch.setattr("platform.python_version", lambda: "3.11.99")
    with pytest.raises(pytest.fail.Exception, match="harvested again"):
        open_corpus("embedded")
    versions = {"networkx": "changed"}
    monkeypatch.setattr(embedded_corpus, "installed_versions", lambda: versions)
    with pytest.raises(pytest.fail.Exception, match="harvested again"):
        open_corpus("embedded")
    document = dict.fromkeys(("text", "doc", "name", "module", "distribution", "kind"), "other")
    monkeypatch.setattr(embedded_corpus, "harvest", lambda: [document])
    open_corpus("embedded")
    assert texts_of(first, "val"), "still there for who reads it"


HARVESTER = """
import sys

from jaxchat import embedded_corpus

def harvest():
    print("harvesting", file=sys.stderr, flush=True)
    input()
    return [{name: "x" for name in ("text", "doc", "name", "module", "distribution", "kind")}]

embedded_corpus.harvest = harvest
print("asking", flush=True)
print(embedded_corpus.ensure_embedded_corpus() / "manifest.json", flush=True)
"""


def test_two_processes_that_miss_the_corpus_harvest_it_once(base_dir):
    """They wrote into one folder, and each renamed it under the other."""

    def process():
        return subprocess.Popen(
            [sys.executable, "-c", HARVESTER],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with process() as first, process() as second:
        said = [second.stdout.readline(), first.stdout.readline()]
        assert said == ["asking\n"] * 2
        time.sleep(1)  # both are inside, or one waits for the other
        for each in (first, second):
            each.stdin.write("\n")
            each.stdin.flush()
        outcomes = [each.communicate(timeout=60) for each in (first, second)]
    assert "".join(errors for _, errors in outcomes).count("harvesting") == 1, outcomes
    (folder,) = (base_dir / "data").glob("embedded-*")
    assert [output.split()[-1] for output, _ in outcomes] == [str(folder / "manifest.json")] * 2


def test_a_script_without_a_guard_is_told_of_it(base_dir, tmp_path):
    """The readers import it, asked for the corpus in turn, and waited for who waited for them."""
    script = tmp_path / "script.py"
    script.write_text("from jaxchat.dataset import open_corpus\nopen_corpus('embedded')\n")
    run = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode
    assert 'below `if __name__ == "__main__":`' in run.stderr


def test_no_document_of_one_module_is_on_both_sides(base_dir, library):
    directory = embedded_corpus.ensure_embedded_corpus()
    modules = [
        set(pq.read_table(directory / f"{split}.parquet")["module"].to_pylist())
        for split in dataset.SPLITS
    ]
    assert not modules[0] & modules[1]

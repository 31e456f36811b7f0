"""The tokenizer against tiktoken, the oracle for ids, and against what files go through."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat import artifacts, dataset
from jaxchat.tokenizer import (
    HUGGING_FACE_FILE,
    MIN_VOCAB_SIZE,
    SPECIAL_NAMES,
    SPLIT_PATTERN,
    TOKEN_BYTES_FILE,
    TOKENIZER_FILE,
    StreamDecoder,
    Tokenizer,
)
from scripts import tok_eval, tok_train

VOCAB_SIZE = 2000

EXAMPLES = [
    "",
    "The cat's tail, isn't it? WE'LL see: I'D say so.",
    "  def f(x):\n\treturn x ** 2\r\n\r\n   # done  ",
    "In 2024 there were 1234567 of 0.5%",
    "naïve Zürich, 東京タワー, Здравствуйте, مرحبا, हिन्दी, ǅ²Ⅷ߷ '\u017f",
    "👩‍👩‍👧 🇨🇭 ½ ∞\u200b\u00a0\u2028end",
    "<|bos|><|assistant_end|>",
    "x" * 300 + " " * 300 + "-" * 300 + "1" * 300,
]

texts_of_any_kind = st.text() | st.text(alphabet="ab e'sS \n\r\t0123.,-<|>bosé東", max_size=80)


def corpus():
    """The language reference (half a megabyte of English), and some of everything else."""
    return [*topics.topics.values(), *EXAMPLES, *EXAMPLES]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(corpus()), vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "tokenizer"
    tokenizer.save(directory)
    return directory


@given(text=texts_of_any_kind)
def test_ids_are_tiktokens_and_decode_to_the_same_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == tokenizer.as_tiktoken().encode_ordinary(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_ids_are_tiktokens_on_the_corpus(tokenizer):
    reference = tokenizer.as_tiktoken().encode_ordinary_batch(corpus())
    batch = tokenizer.encode_batch(corpus())
    assert [ids.tolist() for ids in batch] == reference
    assert all(ids.dtype == np.uint32 for ids in batch)
    assert tokenizer.encode_batch([]) == []


@given(text=st.text(alphabet=st.characters(), max_size=20))
def test_lone_surrogates_become_replacement_characters(tokenizer, text):
    """JSON may hold them, UTF-8 cannot: no crash, and tiktoken's reading."""
    text = f"a\ud800b{text}\udfff"
    assert tokenizer.encode(text) == tokenizer.as_tiktoken().encode_ordinary(text)
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)


@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1)))
def test_decoding_is_tiktokens_for_any_ids(tokenizer, ids):
    assert tokenizer.decode_bytes(ids) == tokenizer.as_tiktoken().decode_bytes(ids)
    assert tokenizer.decode(np.array(ids, np.uint32)) == tokenizer.as_tiktoken().decode(ids)


@given(ids=st.lists(st.integers(0, 300) | st.integers(0, VOCAB_SIZE - 1)))
def test_a_stream_adds_up_to_the_whole(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(id) for id in ids] + [decoder.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)


@given(text=texts_of_any_kind.filter(lambda text: "\ufffd" not in text))
def test_a_stream_never_shows_half_a_character(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    shown = ""
    for byte in text.encode():  # the worst case: one byte per token
        shown += decoder.push(byte)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""


def test_ids_out_of_range_are_named(tokenizer):
    for id in (-1, VOCAB_SIZE):
        with pytest.raises(ValueError, match=f"token id {id} is outside the vocabulary of 2000"):
            tokenizer.decode([id])


def test_specials_follow_the_merges_in_their_order(tokenizer):
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.special_names == SPECIAL_NAMES
    ids = [tokenizer.special_id(name) for name in SPECIAL_NAMES]
    assert ids == list(range(VOCAB_SIZE - 9, VOCAB_SIZE))
    assert tokenizer.bos_id == tokenizer.special_id("bos") == VOCAB_SIZE - 9
    assert tokenizer.decode(ids[:2]) == "<|bos|><|user_start|>"
    with pytest.raises(ValueError, match=r"no special token '<\|bos\|>'; there are bos, user_star"):
        tokenizer.special_id("<|bos|>")


@pytest.mark.parametrize("name", SPECIAL_NAMES)
def test_text_never_encodes_to_a_special(tokenizer, name):
    text = f"a <|{name}|> <|{name}|>b\n<|{name}|>"
    assert max(tokenizer.encode(text)) < tokenizer.bos_id
    assert tokenizer.encode_batch([text])[0].max() < tokenizer.bos_id
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=texts_of_any_kind)
def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer, text):
    """Upstream's bug: tokens that are not whole UTF-8 were counted by their decoded text."""
    ids = np.array(tokenizer.encode(text), np.int64)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_token_bytes_count_raw_bytes_and_no_specials(tokenizer):
    table = tokenizer.token_bytes
    assert table.dtype == np.int32
    assert table.shape == (VOCAB_SIZE,)
    assert (table[:256] == 1).all()
    assert (table[VOCAB_SIZE - 9 :] == 0).all()
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 2


def test_load_gives_back_what_was_saved(tokenizer, saved):
    loaded = Tokenizer.load(saved)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.pattern == tokenizer.pattern
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode_batch(EXAMPLES)[4].tolist() == tokenizer.encode(EXAMPLES[4])
    table = np.load(saved / TOKEN_BYTES_FILE, allow_pickle=False)
    np.testing.assert_array_equal(table, tokenizer.token_bytes)
    assert sorted(p.name for p in saved.iterdir()) == sorted(
        [TOKENIZER_FILE, HUGGING_FACE_FILE, TOKEN_BYTES_FILE]
    )


def test_saving_twice_writes_the_same_bytes(tokenizer, saved, tmp_path):
    Tokenizer.load(saved).save(tmp_path)
    for name in (TOKENIZER_FILE, HUGGING_FACE_FILE, TOKEN_BYTES_FILE):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


@given(data=st.data())
def test_a_damaged_file_is_refused(saved, tmp_path_factory, data):
    """One flipped bit or a lost end, anywhere, the header included."""
    content = bytearray((saved / TOKENIZER_FILE).read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    directory = tmp_path_factory.mktemp("damaged")
    (directory / TOKENIZER_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.bpe .*(copy it again|rank)"):
        Tokenizer.load(directory)


def test_a_missing_tokenizer_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*scripts\.tok_train"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("change", [{"version": 2}, {"specials": ["bos"]}])
def test_a_format_from_the_future_is_refused(saved, tmp_path, change):
    head, _, body = (saved / TOKENIZER_FILE).read_bytes().partition(b"\n")
    header = json.dumps(json.loads(head) | change).encode()
    (tmp_path / TOKENIZER_FILE).write_bytes(header + b"\n" + body)
    with pytest.raises(ValueError, match="this program reads version 1"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\x80\x04K\x01.", b"[" * 10**5, b"AA== 0\n"])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / TOKENIZER_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"is no tokenizer of this project, or damaged"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("size", [-1, 0, 256, MIN_VOCAB_SIZE - 1])
def test_a_vocabulary_without_room_for_bytes_and_specials_is_refused(size):
    with pytest.raises(ValueError, match=f"vocab_size {size} is too small: .* at least 265"):
        Tokenizer.train(iter(["text"]), vocab_size=size)


def test_the_smallest_vocabulary_is_the_bytes():
    tokenizer = Tokenizer.train(iter(corpus()), vocab_size=MIN_VOCAB_SIZE)
    assert tokenizer.encode("é!") == [0xC3, 0xA9, ord("!")]
    assert tokenizer.bos_id == 256


@pytest.mark.parametrize("texts", [[], [""], ["a", "b"]])
def test_a_corpus_without_a_pair_is_refused(texts):
    with pytest.raises(ValueError, match="the corpus is empty"):
        Tokenizer.train(iter(texts), vocab_size=300)


def test_a_small_corpus_gives_the_vocabulary_it_can():
    tokenizer = Tokenizer.train(iter(["abcd abcd"]), vocab_size=1000)
    assert tokenizer.vocab_size == 256 + 4 + 9  # ab, cd, abcd, " abcd"
    assert len(tokenizer.encode("abcd abcd")) == 2
    assert tokenizer.bos_id == 260


def test_tokens_of_several_bytes_count_them_all():
    tokenizer = Tokenizer.train(iter(["東京タワー é ü’s “ok” 👩"] * 50), vocab_size=320)
    ordinary = tokenizer.vocab_size - len(SPECIAL_NAMES)
    tokens = [tokenizer.decode_bytes([i]) for i in range(ordinary)]
    assert tokenizer.token_bytes[:ordinary].tolist() == [len(token) for token in tokens]
    assert max(map(len, tokens)) > 3


def test_text_is_split_as_gpt4s_but_for_numbers():
    assert SPLIT_PATTERN == (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    numbers = Tokenizer.train(iter(["12345 1234567 123 " * 50]), vocab_size=290)
    learned = [numbers.decode([id]) for id in range(256, numbers.vocab_size - len(SPECIAL_NAMES))]
    assert {"12", "34"} <= set(learned)
    assert max(map(len, learned)) == 2


def test_the_fingerprint_covers_pattern_and_ranks():
    singles = [bytes([b]) for b in range(256)]
    prints = {
        Tokenizer(singles).fingerprint,
        Tokenizer(singles, pattern=r"\s+|\S+").fingerprint,
        Tokenizer([*singles, b"ab"]).fingerprint,
        Tokenizer([*singles, b"ba"]).fingerprint,
    }
    assert len(prints) == 4


def test_tokens_that_are_no_vocabulary_are_refused():
    singles = [bytes([b]) for b in range(256)]
    with pytest.raises(ValueError, match="single bytes in order"):
        Tokenizer(singles[::-1])
    with pytest.raises(ValueError, match="1 tokens occur more than once"):
        Tokenizer([*singles, b"ab", b"ab"])
    with pytest.raises(ValueError, match=r"b'abc' \(rank 256\) is not a merge"):
        _ = Tokenizer([*singles, b"abc"]).merges


def test_merges_replayed_in_order_give_the_ids(tokenizer):
    """The reading of Hugging Face: apply each merge, in order, wherever it fits."""
    ranks = {pair: 256 + i for i, pair in enumerate(tokenizer.merges)}
    names = [bytes([b]) for b in range(256)] + [left + right for left, right in tokenizer.merges]
    for word in ["international", "comprehension", " statements", "東京タワー", "aaaaaaa"]:
        parts = [bytes([b]) for b in word.encode()]
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            best = min(pairs, key=lambda pair: ranks[pair])
            at = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
            parts[at : at + 2] = [best[0] + best[1]]
        assert [names.index(part) for part in parts] == tokenizer.encode(word)


def test_merges_of_a_very_long_token_are_found_in_linear_time():
    """A run of one letter gives tokens of thousands of bytes; squaring them would take hours."""
    tokenizer = Tokenizer([bytes([b]) for b in range(256)] + [b"a" * 2**i for i in range(1, 18)])
    assert tokenizer.merges[-1] == (b"a" * 2**16, b"a" * 2**16)


def test_hugging_face_reads_the_same_tokenizer(tokenizer, saved):
    if importlib.util.find_spec("tokenizers") is None:
        pytest.skip("Hugging Face tokenizers is not installed (it is no dependency)")
    tokenizers = importlib.import_module("tokenizers")
    other = tokenizers.Tokenizer.from_file(str(saved / HUGGING_FACE_FILE))
    for text in [t for t in corpus() if "<|" not in t]:
        assert other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    assert other.decode(tokenizer.encode(EXAMPLES[5])) == EXAMPLES[5]
    assert other.get_vocab_size() == VOCAB_SIZE
    for name in SPECIAL_NAMES:
        assert other.token_to_id(f"<|{name}|>") == tokenizer.special_id(name)


def test_threads_share_one_tokenizer(tokenizer):
    expected = [tokenizer.encode(text) for text in corpus()]
    fresh = Tokenizer([tokenizer.decode_bytes([i]) for i in range(VOCAB_SIZE - 9)])
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fresh.encode, corpus())) == expected


def test_the_framework_free_floor_stays_free():
    """Tokenising, rendering and reporting must not pay for (or need) a deep-learning framework."""
    program = (
        "import sys, jaxchat.tokenizer, jaxchat.conversation, jaxchat.calculator, jaxchat.report\n"
        "loaded = {'jax', 'torch', 'flax', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Corpus:
    """Stands in for a corpus on disk."""

    name = "topics [stand-in]"
    fingerprint = "f00d"

    def iter_texts(self, split, max_chars=None):
        texts = corpus()[:9] if split == "val" else corpus()[9:]
        return iter(texts if max_chars is None else texts[:2])


@pytest.fixture
def base(tmp_path, monkeypatch):
    """An empty base directory and the stand-in corpus."""
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("jaxchat.dataset.open_corpus", lambda *args, **kwargs: Corpus())
    return tmp_path


def test_tok_train_writes_tokenizer_and_report(base, capsys):
    tok_train.main(tok_train.Config(vocab_size=500, max_chars=100_000, doc_cap=1000))
    tokenizer = Tokenizer.load(base / "tokenizer")
    assert tokenizer.vocab_size == 500
    said = " ".join(capsys.readouterr().out.split())
    assert "500 tokens from" in said
    assert " s, reading included: " in said
    section = json.loads((base / "report/sections/tok_train.json").read_bytes())
    assert tokenizer.fingerprint in json.dumps(section["parts"])
    assert section["parts"][1]["values"]["characters"] <= 100_000


def test_a_tokenizer_that_is_replaced_is_kept_for_its_models(base, capsys):
    """And the same one, trained once more, replaces nothing."""

    def tokenizers():
        return {path.name: Tokenizer.load(path).vocab_size for path in base.glob("tokenizer*")}

    for _ in range(2):
        tok_train.main(tok_train.Config(vocab_size=300, max_chars=10_000))
    assert tokenizers() == {"tokenizer": 300}
    assert "another" not in capsys.readouterr().out
    tok_train.main(tok_train.Config(vocab_size=310, max_chars=10_000))
    kept = tokenizers()
    assert kept.pop("tokenizer") == 310
    assert list(kept.values()) == [300]
    said = capsys.readouterr().out
    assert f"is another, now in {base / next(iter(kept))}: models trained with it go on" in said


def test_two_tok_train_at_once_do_not_meet(base):
    """The second was told "Directory not empty", of the folder that the first had put aside."""
    busy = pytest.raises(OSError, match=r"is in use by process \d+ .*or set JAXCHAT_BASE_DIR")
    with artifacts.claim(base, name=".tokenizer.claim"), busy:
        tok_train.main(tok_train.Config(vocab_size=300, max_chars=10_000))
    assert not (base / "tokenizer").exists()


def test_tok_train_says_when_the_corpus_is_too_small(base, capsys):
    tok_train.main(tok_train.Config(vocab_size=5000, max_chars=100))
    size = Tokenizer.load(base / "tokenizer").vocab_size
    assert size < 5000
    assert f"The corpus is too small for 5,000 tokens: no pair is left to merge after {size}" in (
        " ".join(capsys.readouterr().out.split())
    )


@pytest.mark.parametrize("kind", ["parquet", "txt"])
def test_tok_train_learns_from_files(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path / "base"))
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [text for text in corpus() if text.strip()]
    if kind == "parquet":  # the last file is for validation
        pq.write_table(pa.table({"text": texts}), folder / "0.parquet", row_group_size=7)
        pq.write_table(pa.table({"text": ["unseen"]}), folder / "1.parquet")
        learned = texts
    else:  # a document each, some of which are for validation
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(text, encoding="utf-8", newline="")
        learned = list(dataset.open_corpus(str(folder)).iter_texts("train"))
        assert len(learned) > len(texts) / 2
    tok_train.main(tok_train.Config(vocab_size=500, doc_cap=10**6, corpus=str(folder)))
    expected = Tokenizer.train(iter(learned), vocab_size=500).fingerprint
    assert Tokenizer.load(tmp_path / "base/tokenizer").fingerprint == expected


def test_reading_stops_at_max_chars_and_crops_documents():
    reading = tok_train.Reading(iter(["abcdef", "gh", "ijkl", "m"]), max_chars=8, doc_cap=4)
    assert list(reading) == ["abcd", "gh", "ij"]
    assert (reading.documents, reading.chars) == (3, 8)


@pytest.mark.parametrize("field", ["vocab_size", "max_chars", "doc_cap"])
def test_tok_train_refuses_impossible_sizes(field):
    change: dict[str, Any] = {field: 0}
    with pytest.raises(ValueError, match=f"{field} 0"):
        tok_train.Config(**change)


def test_tok_eval_compares_with_raw_bytes_without_other_encodings(base, tokenizer, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(base / "nothing"))
    tokenizer.save(base / "tokenizer")
    tok_eval.main(tok_eval.Config())
    section = json.loads((base / "report/sections/tok_eval.json").read_bytes())
    table, notes = section["parts"]
    assert table["columns"] == ["text", "bytes", "tokens", "bytes/token"]
    assert len(table["rows"]) == len(tok_eval.TEXTS) + 2
    for _, size, tokens, ratio in table["rows"]:
        assert ratio == f"{size / tokens:.2f}"
        assert size >= tokens
    assert "Not compared with GPT-2 and GPT-4" in notes["body"]
    assert "theirs" not in table["caption"]


def test_tok_eval_reads_what_the_tokenizer_was_trained_on(tmp_path, monkeypatch):
    """It read the embedded corpus whatever that was."""
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path / "base"))
    default = tmp_path / "default"
    book = tmp_path / "book.txt"
    for path in (default, book):
        path.write_text("some words of a book\n" * 2000)
    monkeypatch.setattr(dataset, "default_corpus", lambda: f"{default}.txt")
    default.rename(f"{default}.txt")
    tok_train.main(tok_train.Config(vocab_size=280, corpus=str(book)))
    tokenizer = Tokenizer.load(tmp_path / "base/tokenizer")
    assert tok_eval.open_source(None, tokenizer).name == str(book)
    assert tok_eval.open_source(f"{default}.txt", tokenizer).name == f"{default}.txt"
    other = Tokenizer([bytes([b]) for b in range(256)])
    assert tok_eval.open_source(None, other).name == f"{default}.txt"
    book.unlink()
    with pytest.raises(ValueError, match=r"was trained on it; name another with --corpus"):
        tok_eval.open_source(None, tokenizer)


def ranks_folder():
    """Where r50k_base.tiktoken and cl100k_base.tiktoken are, on machines that have them."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("JAXCHAT_TEST_DATA", default)) / "tokenizers"
    if not folder.is_dir():
        pytest.skip(f"no GPT-2 and GPT-4 ranks in {folder} (set JAXCHAT_TEST_DATA)")
    return folder


def test_tok_eval_compares_with_gpt2_and_gpt4(base, tokenizer):
    tokenizer.save(base / "tokenizer")
    tok_eval.main(tok_eval.Config(ranks_dir=ranks_folder()))
    section = json.loads((base / "report/sections/tok_eval.json").read_bytes())
    table, notes = section["parts"]
    assert "GPT-2" in table["columns"]
    assert "vs GPT-4" in table["columns"]
    assert table["caption"].endswith("; vs: tokens more or less than theirs")
    assert "Not compared" not in notes["body"]


def test_published_encodings_give_their_known_ids():
    """Two examples that everyone can check on the web."""
    found = tok_eval.load_published(ranks_folder())
    assert found["GPT-2"].encode_ordinary("hello world") == [31373, 995]
    assert found["GPT-4"].encode_ordinary("hello world") == [15339, 1917]


def test_published_encodings_come_from_tiktokens_cache(tmp_path, monkeypatch):
    """By the file name that tiktoken gives them; a folder without them is no error."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert tok_eval.load_published(None) == {}
    source = ranks_folder() / "r50k_base.tiktoken"
    url = b"https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    shutil.copy(source, tmp_path / hashlib.sha1(url).hexdigest())
    assert list(tok_eval.load_published(None)) == ["GPT-2"]


def test_a_folder_without_ranks_or_with_wrong_ones_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no r50k_base\.tiktoken or cl100k_base\.tiktoken"):
        tok_eval.load_published(tmp_path)
    (tmp_path / "cl100k_base.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(ValueError, match=r"cl100k_base\.tiktoken is not cl100k_base .*checksum"):
        tok_eval.load_published(tmp_path)

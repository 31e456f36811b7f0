"""What pretraining reads, and when."""

import pytest

from jaxchat import cli
from jaxchat.config import GPTConfig
from jaxchat.dataset import Corpus
from jaxchat.jax_backend import JaxBackend
from jaxchat.tokenizer import Tokenizer
from scripts import base_train


class HeldOut(Corpus):
    """Texts of the validation split; nobody may ask for another."""

    def groups(self, split):
        assert split == "val"
        return [(0, 0, 40)]

    def read_group(self, split, shard, group):
        assert split == "val"
        return [f"text {i}" for i in range(40)]


@pytest.mark.parametrize(("asked", "batches"), [({"eval_tokens": 128}, 1), ({}, 3)])
def test_validation_reads_the_held_out_split_once_at_most(asked, batches):
    """Of 40 texts of 7 or 8 tokens two fit in a row: 20 rows, 8 a batch, for each device one."""
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    config = GPTConfig.from_depth(
        1, aspect_ratio=32, head_dim=32, vocab_size=tokenizer.vocab_size, sequence_len=16
    )
    backend = JaxBackend(config)
    backend.init(0)
    options, heard = base_train.Config(sequence_len=16, **asked), []
    corpus = HeldOut("held out", "f")
    bpb = base_train.validate(options, corpus, tokenizer, backend, 1, heard.append)
    assert 7 < bpb < 9  # log2 of the vocabulary, for a byte a token
    assert len(heard) == batches
    assert heard[-1] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--depth 0", "--depth 0: must be above 0"),
        ("--depth -3", "--depth -3: must be above 0"),
        ("--matrix-lr -1", "--matrix-lr -1.0: must be at least 0"),
        ("--scalar-lr nan", "--scalar-lr nan: must be at least 0"),
        ("--embedding-lr inf", "--embedding-lr inf: must be at least 0, and finite"),
        ("--weight-decay -0.1", "--weight-decay -0.1: must be at least 0"),
        ("--target-flops inf", "--target-flops inf: must be at least 0, and finite"),
        ("--eval-tokens -5", "--eval-tokens -5: must be above 0"),
        ("--eval-every 0", "--eval-every 0: must be above 0"),
        ("--save-every -1", "--save-every -1: must be above 0"),
        ("--seed -1", "--seed -1: give a number from 0"),
        ("--max-skipped -3", "--max-skipped -3: must be above 0"),
        ("--warmdown-ratio 2", "warmdown_ratio=2.0"),
    ],
)
def test_a_value_out_of_range_is_refused_at_once(words, message, capsys, base_dir):
    """Some were found after minutes of compiling, and left a folder; some trained."""
    with pytest.raises(SystemExit):
        cli.parse(base_train.Config, words.split())
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(base_dir.iterdir())


class Began(Exception):
    """What takes long has begun."""


@pytest.fixture
def book(base_dir, monkeypatch):
    """A base directory with a tokenizer, a corpus, and a backend that comes to no weights."""
    Tokenizer([bytes([b]) for b in range(256)]).save(base_dir / "tokenizer")
    path = base_dir / "book"
    path.mkdir()
    (path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')

    def init(*_):
        raise Began

    monkeypatch.setattr(JaxBackend, "init", init)
    return path


def config_of(book, **options):
    sizes = {"depth": 1, "aspect_ratio": 32, "head_dim": 32, "sequence_len": 64}
    return base_train.Config(corpus=str(book), **{**sizes, "total_batch_size": 512, **options})


def test_model_and_corpus_are_told_before_anything_takes_long(book, capsys):
    """Nothing was said for as long as steps were compiled, and never what was read."""
    with pytest.raises(Began):
        base_train.main(config_of(book))
    said = capsys.readouterr().out
    assert "d1: width 32" in said
    assert f"reading {book}\n" in said
    assert "steps of 512 tokens" in said


@pytest.mark.parametrize("wrong", [{"total_batch_size": 500}, {"device_batch_size": 3}])
def test_a_batch_that_does_not_divide_leaves_no_folder(book, base_dir, wrong):
    with pytest.raises(ValueError, match="is not a multiple of"):
        base_train.main(config_of(book, **wrong))
    assert not list((base_dir / "base_checkpoints").iterdir())

"""What pretraining reads, and when."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat import cli
from jaxchat.checkpoint import CheckpointStore
from jaxchat.config import GPTConfig
from jaxchat.dataset import HUB_DATASETS, Corpus, HubDataset
from jaxchat.jax_backend import JaxBackend
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import read_metrics
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


def write_shard(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    words = np.random.default_rng(seed).integers(0, 999, (40, 30))
    pq.write_table(pa.table({"text": [" ".join(map(str, row)) for row in words]}), path)


def test_a_run_goes_on_with_the_shards_that_it_began_with(base_dir, monkeypatch, capsys):
    """More of them, downloaded meanwhile, made it another run's, which was refused."""
    monkeypatch.setitem(HUB_DATASETS, "climbmix", HubDataset("climbmix", "me/set", 9))
    monkeypatch.setattr(base_train, "sample", lambda *_: [])
    hub = HUB_DATASETS["climbmix"]
    Tokenizer([bytes([b]) for b in range(256)]).save(base_dir / "tokenizer")
    for shard in (0, 2, 9):
        write_shard(hub.directory / hub.filename(shard), shard)
    sizes = {"num_iterations": 4, "device_batch_size": 1, "save_every": 2, "eval_every": 2}
    config = config_of("climbmix", **sizes, eval_tokens=512)
    base_train.main(config)
    store = CheckpointStore(base_dir / "base_checkpoints" / "d1")
    whole = rows_of(store)
    assert store.steps() == [2, 4]
    shutil.rmtree(store.path(4))
    for shard in (1, 3):
        write_shard(hub.directory / hub.filename(shard), shard)
    base_train.main(config)
    assert "continuing d1 at step 2" in capsys.readouterr().out
    assert rows_of(store) == whole
    assert store.read_meta(4)["shards"] == [hub.filename(0), hub.filename(2)]


def test_a_checkpoint_of_before_shards_were_noted_goes_on_with_those_that_are_there(base_dir):
    """And a run that starts anew reads them all."""
    folder, alone = base_dir / "own", SimpleNamespace(gather=lambda value: [value])
    store, config = CheckpointStore(base_dir / "d1"), config_of(folder)

    def write_meta(**meta):
        store.path(2).mkdir(parents=True, exist_ok=True)
        (store.path(2) / "meta.json").write_text(json.dumps(meta))

    for shard in range(2):
        write_shard(folder / f"{shard}.parquet", shard)
    before = base_train.corpus_of(config, store, alone)
    write_meta(corpus=before.fingerprint)
    assert base_train.corpus_of(config, store, alone).fingerprint == before.fingerprint
    write_meta(corpus=before.fingerprint, shards=before.shards)
    write_shard(folder / "2.parquet", 2)
    assert base_train.corpus_of(config, store, alone).fingerprint == before.fingerprint
    anew = base_train.corpus_of(replace(config, resume="never"), store, alone)
    assert anew.shards == ("0.parquet", "1.parquet", "2.parquet")


def rows_of(store):
    """Losses by step, of training and of validation."""
    return {
        row["step"]: (row.get("train/loss"), row.get("val/bpb"))
        for row in read_metrics(store.directory / "metrics.jsonl")
    }

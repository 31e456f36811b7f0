"""What pretraining reads, and when."""

import pytest

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

"""Bits per byte against the sum written out by hand."""

import math

import numpy as np
import pytest

from jaxchat.backend import Scores
from jaxchat.dataloader import Batch
from jaxchat.loss_eval import bits_per_byte, one_pass

TOKEN_BYTES = np.array([1, 2, 3, 0], np.int32)  # the last is a special token
NLL = np.array([[0.5, 1.0, 1.5, 2.0]], np.float32)


class Scorer:
    """Gives every position the same nats, whatever its target: what may count is the caller's."""

    def score(self, inputs, targets):
        return Scores(np.broadcast_to(NLL, targets.shape), np.zeros(targets.shape, np.int32))


def batch(*targets):
    ids = np.array([targets], np.int32)
    return Batch(np.zeros_like(ids), ids)


def test_nats_become_bits_and_tokens_become_bytes():
    value = bits_per_byte(Scorer(), [batch(0, 1, 2, 0), batch(2, 2, 2, 2)], TOKEN_BYTES)
    assert value == pytest.approx(2 * 5.0 / (math.log(2) * (7 + 12)))


def test_specials_and_ignored_targets_count_in_neither_sum():
    value = bits_per_byte(Scorer(), [batch(0, 3, -1, 1)], TOKEN_BYTES)
    assert value == pytest.approx(2.5 / (math.log(2) * 3))


class Split:
    """A loader that has handed out all there is after so many batches."""

    def __init__(self, batches):
        self.batches, self.taken = batches, 0

    @property
    def passes(self):
        return self.taken / self.batches

    def __next__(self):
        self.taken += 1
        return self.taken


@pytest.mark.parametrize(
    ("batches", "asked", "shares"),
    [
        (8, 4, [0.25, 0.5, 0.75, 1.0]),
        (4, 8, [0.25, 0.5, 0.75, 1.0]),
        (0.1, 8, [1.0]),
        (8, 0, [1.0]),
    ],
)
def test_no_more_is_read_than_was_asked_for_or_there_is(batches, asked, shares):
    """A folder of 3 MB was once judged on 42 million tokens of its twentieth part."""
    heard = []
    taken = list(one_pass(Split(batches), asked, heard.append))
    assert taken == list(range(1, len(shares) + 1))
    assert heard == shares


def test_nothing_to_count_is_an_error():
    with pytest.raises(ValueError, match="no batch held a token with bytes"):
        bits_per_byte(Scorer(), [batch(3, 3, -1, -1)], TOKEN_BYTES)

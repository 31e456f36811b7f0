"""Penalties and biases: the definition by hand, both devices held to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxchat import penalties, sampling
from jaxchat.sampling import History
from jaxchat.sampling_params import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams
from torch_ref import penalties as torch_penalties

VOCAB = 40
KINDS = {
    "none": SamplingParams(),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(frequency_penalty=-0.7),
    "repetition": SamplingParams(repetition_penalty=1.3),
    "bias": SamplingParams(logit_bias=((3, -100.0), (VOCAB - 1, 2.5))),
    "all": SamplingParams(
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        repetition_penalty=0.8,
        logit_bias=tuple((i, i / 7) for i in range(VOCAB)),
    ),
}


def test_penalties_are_those_of_the_api_they_are_named_after():
    logits = np.array([2.0, -2.0, 1.0, 0.0, 3.0], np.float32)
    history = History(prompt=[0, 1], generated=[1, 2, 2])

    def adjusted(**options):
        return sampling.adjusted(logits, SamplingParams(**options), history).tolist()

    assert adjusted(presence_penalty=0.5) == [2, -2.5, 0.5, 0, 3]
    assert adjusted(frequency_penalty=0.5) == [2, -2.5, 0, 0, 3]
    assert adjusted(repetition_penalty=2.0) == [1, -4, 0.5, 0, 3]
    assert adjusted(logit_bias=((4, -3.0),)) == [2, -2, 1, 0, 0]
    assert logits.tolist() == [2, -2, 1, 0, 3]


def rows():
    """For each kind a row: its history, the rows as a cache holds them, and logits."""
    rng = np.random.default_rng(0)
    lengths, prompts = [5, 9, 17, 2, 12, 20], [3, 9, 2, 1, 11, 8]
    text = rng.integers(0, VOCAB // 2, (len(KINDS), 24))
    texts = [row[: length + 1].tolist() for row, length in zip(text, lengths, strict=True)]
    pairs = zip(texts, prompts, strict=True)
    histories = [History(one[:prompt], one[prompt:]) for one, prompt in pairs]
    newest = np.array([one[-1] for one in texts])
    held = text.copy()
    held[np.arange(len(KINDS)), lengths] = VOCAB - 1  # stale: the newest is not in the cache yet
    logits = rng.normal(0, 4, (len(KINDS), VOCAB)).astype(np.float32)
    return histories, held, newest, np.array(lengths), np.array(prompts), logits


def expected(histories, logits):
    kinds = zip(logits, KINDS.values(), histories, strict=True)
    return np.stack([sampling.adjusted(*row) for row in kinds])


def after_one_more(histories, token):
    return [History(one.prompt, [*one.generated, token]) for one in histories]


def test_the_device_adjusts_as_defined_before_and_after_one_more_token():
    histories, held, newest, lengths, prompts, logits = rows()
    asked = penalties.row_penalties(list(KINDS.values()))
    integers = (jnp.asarray(x, jnp.int32) for x in (held, newest, lengths, prompts))
    seen = jax.jit(penalties.tally, static_argnums=5)(asked, *integers, VOCAB)
    adjust = jax.jit(penalties.adjust)
    np.testing.assert_allclose(adjust(logits, asked, seen), expected(histories, logits), atol=1e-5)
    seen = penalties.add(seen, jnp.full(len(KINDS), 7), jnp.full(len(KINDS), True))
    later = expected(after_one_more(histories, 7), logits)
    np.testing.assert_allclose(adjust(logits, asked, seen), later, atol=1e-5)


def test_the_torch_twin_adjusts_as_defined_before_and_after_one_more_token():
    histories, held, newest, lengths, prompts, logits = rows()
    integers = (torch.from_numpy(x) for x in (held, newest, lengths, prompts))
    seen = torch_penalties.tally(list(KINDS.values()), *integers, VOCAB)
    adjusted = torch_penalties.adjust(torch.from_numpy(logits), seen)
    np.testing.assert_allclose(adjusted, expected(histories, logits), atol=1e-5)
    torch_penalties.add(seen, torch.full((len(KINDS),), 7), torch.full((len(KINDS),), True))
    adjusted = torch_penalties.adjust(torch.from_numpy(logits), seen)
    np.testing.assert_allclose(adjusted, expected(after_one_more(histories, 7), logits), atol=1e-5)


def test_nothing_is_counted_where_no_row_asks():
    _, held, newest, lengths, prompts, logits = rows()
    idle = [None, SamplingParams(), *[None] * (len(KINDS) - 2)]
    integers = [torch.from_numpy(x) for x in (held, newest, lengths, prompts)]
    assert torch_penalties.tally(idle, *integers, VOCAB) is None
    asked = penalties.row_penalties(idle)
    integers = (jnp.asarray(x, jnp.int32) for x in (held, newest, lengths, prompts))
    seen = penalties.tally(asked, *integers, VOCAB)
    assert not seen.counts.any()
    np.testing.assert_array_equal(penalties.adjust(jnp.asarray(logits), asked, seen), logits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},  # divides logits to infinity
        {"top_logprobs": MAX_TOP_LOGPROBS + 1},
        {"logit_bias": ((1, 2.0), (1, 3.0))},
        {"logit_bias": ((-1, 2.0),)},
        {"logit_bias": ((1, 101.0),)},
        {"logit_bias": tuple((i, 1.0) for i in range(MAX_LOGIT_BIAS + 1))},
    ],
)
def test_values_out_of_range_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        SamplingParams(**wrong)

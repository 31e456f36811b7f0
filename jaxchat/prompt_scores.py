"""Log-probabilities of a given text, token by token, with what the model would rather have read.

The forward of evaluation, without a cache: logits exist for a chunk of positions at a time. Texts
are padded to few lengths, so that few programs are compiled. Left out: scores of batches, which
evaluations need and which are cheaper without alternatives (loss.py's `token_scores`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxchat import device_sampling
from jaxchat.backend import PromptScores
from jaxchat.config import GPTConfig
from jaxchat.gpt import GPT
from jaxchat.params import Params, bind

MIN_LENGTH = 64
"""Shortest padded text; lengths double from here to the model's context."""

CHUNK = 64
"""Positions whose logits exist at the same time."""


class PromptScorer:
    """The compiled function of one model."""

    def __init__(self, graphdef: nnx.GraphDef, config: GPTConfig) -> None:
        self.config = config
        self._score = jax.jit(partial(_score, graphdef))

    def __call__(self, params: Params, ids: np.ndarray) -> PromptScores:
        """See `Backend.score_prompt`."""
        if not 1 <= len(ids) <= self.config.sequence_len:
            raise ValueError(
                f"a text of {len(ids)} tokens cannot be scored: "
                f"this model reads 1 to {self.config.sequence_len}"
            )
        length = next(x for x in self.lengths(self.config.sequence_len) if x >= len(ids))
        padded = np.zeros(length, np.int32)
        padded[: len(ids)] = ids
        scores = self._score(params, padded)
        return PromptScores(*(np.asarray(x)[: len(ids)] for x in scores))

    def warm_up(self, params: Params, most: int) -> None:
        """Compile for texts of up to `most` tokens."""
        for length in self.lengths(most):
            self(params, np.zeros(min(length, self.config.sequence_len), np.int32))

    @staticmethod
    def lengths(most: int) -> list[int]:
        """The padded lengths of texts of up to `most` tokens."""
        lengths = [MIN_LENGTH]
        while lengths[-1] < most:
            lengths.append(2 * lengths[-1])
        return lengths


def _score(
    graphdef: nnx.GraphDef, params: Params, ids: Int[Array, " T"]
) -> tuple[Float[Array, " T"], Int[Array, "T K"], Float[Array, "T K"]]:
    model = bind(graphdef, params)
    assert isinstance(model, GPT)
    hidden, _ = model.hidden(ids[None])
    before = jnp.roll(hidden[0], 1, axis=0)  # position t holds what predicts token t

    def score(chunk: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        states, tokens = chunk
        logits = model.logits(states)
        top_ids, top_logprobs = device_sampling.alternatives(logits, jnp.asarray(True))
        return device_sampling.logprob(logits, tokens), top_ids, top_logprobs

    chunks = (before.reshape(-1, CHUNK, before.shape[1]), ids.reshape(-1, CHUNK))
    scores = jax.lax.map(score, chunks)
    logprobs, top_ids, top_logprobs = (x.reshape(len(ids), *x.shape[2:]) for x in scores)
    return logprobs, top_ids, top_logprobs

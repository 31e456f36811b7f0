"""One set of weights in two frameworks, and what the tests compute on both."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from jaxchat import gpt as jax_gpt
from jaxchat import optim as jax_optim
from jaxchat import sharding
from jaxchat.config import GPTConfig, OptimizerConfig
from jaxchat.loss import token_scores
from jaxchat.params import bind, split
from jaxchat.plan import plan_training
from jaxchat.train_step import TrainState, make_train_step
from tests.models import CLASSIC, MODERN
from torch_ref import gpt as torch_gpt
from torch_ref import weights

LENGTH = 320
"""Tokens per row: two and a half times the short window, so that masks matter."""

CONFIGS = {
    "modern": replace(MODERN, sequence_len=LENGTH, n_layer=3),
    "classic": replace(CLASSIC, sequence_len=LENGTH, n_layer=2),
    "classic GQA": replace(CLASSIC, sequence_len=LENGTH, n_layer=2, n_kv_head=1),
}
"""As few layers as show everything, because most of the time here is compilation: the modern three
have two windows of 128 and one without, value embeddings on the first and the last, and a layer
behind the one that backs out; grouped queries in both generations."""

OPTIMIZER = OptimizerConfig()

PLAN = replace(
    plan_training(CONFIGS["modern"], OPTIMIZER, num_iterations=100, total_batch_size=1024),
    weight_decay=OPTIMIZER.weight_decay,
)
"""Weight decay as at depth 12: the scaling rule gives so small a model hundreds of times more, and
then every sign of the cautious mask that rounding decides is a visible difference."""

ONE_DEVICE = sharding.make_mesh(jax.devices()[:1])


def perturbed_weights(config: GPTConfig) -> dict[str, np.ndarray]:
    """Weights of which none is at an initial value that hides a bug (zero projections, gates)."""
    model, rng = torch_gpt.GPT(config), np.random.default_rng(0)
    model.init_weights(torch.Generator().manual_seed(0))  # torch's, because nothing compiles
    fresh = weights.get_params(model)
    return {n: x + 0.1 * rng.standard_normal(x.shape, np.float32) for n, x in fresh.items()}


def torch_twin(config, params, dtype=torch.float32) -> torch_gpt.GPT:
    """The PyTorch model with these weights."""
    model = torch_gpt.GPT(config, dtype)
    weights.set_params(model, params)
    return model


class JaxTwin:
    """The JAX model with these weights, jitted once per shape."""

    def __init__(self, config, params, dtype=jnp.float32):
        self.config = config
        self.graphdef, _ = split(jax_gpt.GPT(config, dtype))
        self.params = {name: jnp.asarray(x) for name, x in params.items()}
        self._read = jax.jit(self._read_with)
        self._hidden = jax.jit(lambda p, ids, cache: bind(self.graphdef, p).hidden(ids, cache))
        self._head = jax.jit(lambda p, hidden: bind(self.graphdef, p).logits(hidden))

    def logits(self, ids):
        return self.read(ids, ids)[0]

    def read(self, ids, targets):
        """Logits of every position, and the nats and the likeliest token at its target."""
        return jax.device_get(self._read(self.params, jnp.asarray(ids), jnp.asarray(targets)))

    def _read_with(self, params, ids, targets):
        model, config = bind(self.graphdef, params), self.config
        hidden, _ = model.hidden(ids)
        head = {"vocab_size": config.vocab_size, "softcap": config.logit_softcap}
        return model.logits(hidden), *token_scores(
            hidden, model.lm_head.weight[...], targets, **head
        )

    def cached_logits(self, ids, cache):
        """Logits of (B, T) ids behind a cache, and the longer cache."""
        hidden, cache = self._hidden(self.params, jnp.asarray(ids), cache)
        return np.asarray(self._head(self.params, hidden)), cache

    def trainer(self, transform: optax.GradientTransformationExtraArgs):
        """The jitted training step of one device and its first state."""
        step = make_train_step(self.graphdef, transform, ONE_DEVICE)
        params = jax.tree.map(jnp.copy, self.params)  # the step donates what it is given
        place = sharding.place(ONE_DEVICE, sharding.REPLICATED)
        return step, jax.device_put(TrainState(params, transform.init(params)), place)


def jax_transform(config):
    return jax_optim.make_optimizer(config, OPTIMIZER, PLAN)


def jax_optimizer_state(opt_state) -> dict[str, np.ndarray]:
    """The optax state under the names of `torch_ref.optim.OptimizerState`."""
    flat = {}
    for label, masked in opt_state.inner_states.items():
        state = masked.inner_state
        if label == "matrices":
            for kind in ("momentum", "second_moment"):
                flat |= {f"muon.{kind}.{key}": x for key, x in getattr(state, kind).items()}
            continue
        flat[f"adam.count.{label}"] = state.count
        for kind in ("mu", "nu"):
            moments = getattr(state, kind).items()
            flat |= {f"adam.{kind}.{n}": x for n, x in moments if isinstance(x, jax.Array)}
    return {name: np.asarray(x) for name, x in flat.items()}


def random_batch(config, *, rows=2, length=LENGTH, seed=0):
    """(rows, length) inputs and targets; the targets end in ignored ones."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (rows, length + 1), dtype=np.int32)
    targets = ids[:, 1:].copy()
    targets[0, -length // 4 :] = -1
    return ids[:, :-1], targets


def max_abs(a, b) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def distance(a, b) -> float:
    """Euclidean norm of the difference."""
    return float(np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)))


def relative(a, b) -> float:
    """Norm of the difference over the norm of the second, which is not zero."""
    return distance(a, b) / float(np.linalg.norm(np.asarray(b, np.float64)))

"""Logits, per-token scores, loss and gradients of both backends from the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxchat import kv_cache as jax_cache
from jaxchat.loss import token_scores as jax_scores
from jaxchat.params import bind
from jaxchat.train_step import loss_and_grads as jax_loss_and_grads
from tests.parity.twins import (
    CONFIGS,
    ONE_DEVICE,
    JaxTwin,
    max_abs,
    perturbed_weights,
    random_batch,
    relative,
    torch_twin,
)
from torch_ref import kv_cache as torch_cache
from torch_ref.loss import token_scores as torch_scores
from torch_ref.sharding import Ranks
from torch_ref.train_step import loss_and_grads as torch_loss_and_grads


@pytest.fixture(params=CONFIGS, scope="module")
def twins(request):
    """Preset name, config, weights, and both models."""
    config = CONFIGS[request.param]
    params = perturbed_weights(config)
    return request.param, config, JaxTwin(config, params), torch_twin(config, params)


def test_logits(twins, parity):
    """Bound 1e-5 of the logits' own size: they reach about 4, where float32 resolves 5e-7."""
    preset, config, ours, theirs = twins
    ids, _ = random_batch(config)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).numpy()
    expected = ours.logits(ids)
    assert np.abs(expected).max() > 1
    parity(f"logits, {preset} (absolute)", max_abs(logits, expected), 1e-5)


def test_loss_and_every_gradient(twins, parity):
    """Two micro-batches with unequal counts of weighted targets; |difference| / |gradient|."""
    preset, config, ours, theirs = twins
    inputs, targets = (x[:, None] for x in random_batch(config))
    weights = np.random.default_rng(2).uniform(0.5, 2, targets.shape).astype(np.float32)
    loss, grads = jax.jit(lambda p, b: jax_loss_and_grads(ours.graphdef, p, b, ONE_DEVICE))(
        ours.params, tuple(map(jnp.asarray, (inputs, targets, weights)))
    )
    count = int((targets >= 0).sum())
    batch = map(torch.from_numpy, (inputs, targets, weights))
    torch_loss, torch_grads = torch_loss_and_grads(theirs, *batch, count=count, ranks=Ranks())
    parity(f"loss, {preset} (relative)", relative(torch_loss, loss), 1e-5)
    assert torch_grads.keys() == grads.keys()
    for name, expected in grads.items():
        assert np.abs(expected).max() > 0, name
        difference = relative(torch_grads[name], expected)
        parity(f"gradient leaves, {preset} (relative)", difference, 1e-5, name)


def test_scores(twins, parity):
    preset, config, ours, theirs = twins
    inputs, targets = random_batch(config)
    head = {"vocab_size": config.vocab_size, "softcap": config.logit_softcap}

    def score(params, x, y):
        model = bind(ours.graphdef, params)
        return jax_scores(model.hidden(x)[0], model.lm_head.weight[...], y, **head)

    nll, greedy = jax.jit(score)(ours.params, jnp.asarray(inputs), jnp.asarray(targets))
    with torch.no_grad():
        hidden, _ = theirs.hidden(torch.from_numpy(inputs))
    mine = torch_scores(hidden, theirs.lm_head.weight, torch.from_numpy(targets), **head)
    parity(f"nats per token, {preset} (absolute)", max_abs(mine[0], nll), 1e-5)
    np.testing.assert_array_equal(mine[1], greedy)


def test_cached_reading_equals_uncached(twins, parity):
    """Both backends read 300 tokens in unequal bites through a cache, past the short window."""
    preset, config, ours, theirs = twins
    ids, _ = random_batch(config, length=300)
    expected = ours.logits(ids)
    bites = np.split(ids, [200, 201, 230], axis=1)

    cache = jax_cache.make_cache(config, 2, 320, jnp.dtype("float32"))
    pieces = []
    for bite in bites:
        piece, cache = ours.cached_logits(bite, cache)
        pieces.append(piece)
    parity(f"cached against uncached, JAX, {preset}", max_abs(np.hstack(pieces), expected), 1e-5)

    cache = torch_cache.make_cache(config, 2, 320, torch.float32, torch.device("cpu"))
    pieces = []
    with torch.no_grad():
        for bite in bites:
            hidden, cache = theirs.hidden(torch.from_numpy(bite), cache)
            pieces.append(theirs.logits(hidden).numpy())
    parity(f"cached against uncached, torch, {preset}", max_abs(np.hstack(pieces), expected), 1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precision(dtype, bound, parity):
    """Each backend rounds at its own places: the bound is on logits of standard deviation 0.8."""
    config = CONFIGS["modern"]
    params = perturbed_weights(config)
    ids, _ = random_batch(config)
    exact = JaxTwin(config, params).logits(ids)
    ours = JaxTwin(config, params, getattr(jnp, dtype)).logits(ids)
    with torch.no_grad():
        theirs = torch_twin(config, params, getattr(torch, dtype))(torch.from_numpy(ids)).numpy()
    parity(f"logits, {dtype}, between the backends", max_abs(theirs, ours), bound)
    parity(f"logits, {dtype}, JAX against float32", max_abs(ours, exact), bound)
    parity(f"logits, {dtype}, torch against float32", max_abs(theirs, exact), bound)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_training(dtype, bound, parity):
    """Loss, and all gradients as one vector: single small leaves are mostly rounding."""
    config = CONFIGS["modern"]
    params = perturbed_weights(config)
    inputs, targets = (x[:, None] for x in random_batch(config))
    ours = JaxTwin(config, params, getattr(jnp, dtype))
    loss, grads = jax.jit(lambda p, b: jax_loss_and_grads(ours.graphdef, p, b, ONE_DEVICE))(
        ours.params, (jnp.asarray(inputs), jnp.asarray(targets), None)
    )
    theirs = torch_twin(config, params, getattr(torch, dtype))
    batch = (torch.from_numpy(inputs), torch.from_numpy(targets))
    count = int((targets >= 0).sum())
    torch_loss, torch_grads = torch_loss_and_grads(
        theirs, *batch, count=count, ranks=Ranks(), loss_scale=2.0**10
    )
    parity(f"loss, {dtype} (relative)", relative(torch_loss, loss), bound / 10)
    flat = (np.concatenate([np.ravel(g[n]) for n in grads]) for g in (torch_grads, grads))
    parity(f"gradients, {dtype} (relative)", relative(*flat), bound)

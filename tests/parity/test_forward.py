"""Logits, per-token scores, loss and gradients of both backends from the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxchat import kv_cache as jax_cache
from jaxchat.train_step import loss_and_grads as jax_loss_and_grads
from tests.parity.twins import (
    CONFIGS,
    LENGTH,
    ONE_DEVICE,
    JaxTwin,
    max_abs,
    perturbed_weights,
    random_batch,
    relative,
    torch_twin,
)
from torch_ref import kv_cache as torch_cache
from torch_ref.loss import token_scores
from torch_ref.sharding import Ranks
from torch_ref.train_step import loss_and_grads as torch_loss_and_grads


@pytest.fixture(params=CONFIGS, scope="module")
def twins(request):
    """Config and both models."""
    config = CONFIGS[request.param]
    params = perturbed_weights(config)
    return config, JaxTwin(config, params), torch_twin(config, params)


@pytest.fixture(params=["bfloat16", "float16"], scope="module")
def half_twins(request):
    """The dtype's name, the modern config, and both models in it."""
    config = CONFIGS["modern"]
    params = perturbed_weights(config)
    ours = JaxTwin(config, params, getattr(jnp, request.param))
    return request.param, config, ours, torch_twin(config, params, getattr(torch, request.param))


def test_logits_and_scores(twins, parity):
    config, ours, theirs = twins
    inputs, targets = random_batch(config)
    expected, expected_nll, expected_greedy = ours.read(inputs, targets)
    with torch.no_grad():
        hidden, _ = theirs.hidden(torch.from_numpy(inputs))
        logits = theirs.logits(hidden).numpy()
    head = {"vocab_size": config.vocab_size, "softcap": config.logit_softcap}
    nll, greedy = token_scores(hidden, theirs.lm_head.weight, torch.from_numpy(targets), **head)
    assert np.abs(expected).max() > 1
    parity("logits", max_abs(logits, expected))
    parity("nats per token", max_abs(nll, expected_nll))
    np.testing.assert_array_equal(greedy, expected_greedy)


def test_loss_and_every_gradient(twins, parity):
    """Two micro-batches with unequal counts of weighted targets; |difference| / |gradient|."""
    config, ours, theirs = twins
    (loss, grads), (torch_loss, torch_grads) = gradients(config, ours, theirs)
    parity("loss, relative", relative(torch_loss, loss))
    assert torch_grads.keys() == grads.keys()
    for name, expected in grads.items():
        assert np.abs(expected).max() > 0, name
        parity("any gradient leaf, relative", relative(torch_grads[name], expected), name)


def gradients(config, ours, theirs, *, loss_scale=1.0):
    """Loss and gradients of the same weighted batch, of JAX and of torch."""
    inputs, targets = (x[:, None] for x in random_batch(config))
    weights = np.random.default_rng(2).uniform(0.5, 2, targets.shape).astype(np.float32)
    jitted = jax.jit(lambda p, b: jax_loss_and_grads(ours.graphdef, p, b, ONE_DEVICE))
    expected = jitted(ours.params, tuple(map(jnp.asarray, (inputs, targets, weights))))
    count = int((targets >= 0).sum())
    batch = map(torch.from_numpy, (inputs, targets, weights))
    mine = torch_loss_and_grads(theirs, *batch, count=count, ranks=Ranks(), loss_scale=loss_scale)
    return expected, mine


def test_cached_reading_equals_uncached(twins, parity):
    """Both backends read in unequal bites through a cache, past the short window."""
    config, ours, theirs = twins
    ids, _ = random_batch(config)
    expected = ours.logits(ids)
    bites = np.split(ids, [200, 201], axis=1)

    cache = jax_cache.make_cache(config, 2, LENGTH, jnp.dtype("float32"))
    pieces = []
    for bite in bites:
        piece, cache = ours.cached_logits(bite, cache)
        pieces.append(piece)
    parity("logits through the caches", max_abs(np.hstack(pieces), expected), "JAX")

    cache = torch_cache.make_cache(config, 2, LENGTH, torch.float32, torch.device("cpu"))
    pieces = []
    with torch.no_grad():
        for bite in bites:
            hidden, cache = theirs.hidden(torch.from_numpy(bite), cache)
            pieces.append(theirs.logits(hidden).numpy())
    parity("logits through the caches", max_abs(np.hstack(pieces), expected), "torch")


def test_half_precision_logits(half_twins, parity):
    """Of the backends against each other, and of each against float32."""
    dtype, config, ours, theirs = half_twins
    ids, _ = random_batch(config)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).numpy()
        exact = torch_twin(config, perturbed_weights(config))(torch.from_numpy(ids)).numpy()
    expected = ours.logits(ids)
    for name, a, b in (
        ("JAX and torch", logits, expected),
        ("JAX and float32", expected, exact),
        ("torch and float32", logits, exact),
    ):
        parity(f"{dtype}: logits", max_abs(a, b), name)


def test_half_precision_training(half_twins, parity):
    """Loss, and all gradients as one vector: single small leaves are mostly rounding."""
    dtype, config, ours, theirs = half_twins
    (loss, grads), (torch_loss, torch_grads) = gradients(config, ours, theirs, loss_scale=2.0**10)
    parity(f"{dtype}: loss, relative", relative(torch_loss, loss))
    flat = (np.concatenate([np.ravel(g[n]) for n in grads]) for g in (torch_grads, grads))
    parity(f"{dtype}: all gradients, relative", relative(*flat))

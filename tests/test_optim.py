"""Muon and AdamW, against optax, numpy's SVD and plain loops over single matrices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat import optim
from jaxchat.config import AdamGroup, OptimizerConfig
from jaxchat.params import split
from jaxchat.plan import plan_training
from jaxchat.schedule import StepSchedule
from jaxchat.sharding import Layout
from tests.models import MODERN, make_perturbed

SCHEDULE = StepSchedule(np.float32(0.5), np.float32(0.9), np.float32(0.1))


def random_stack(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_adamw_is_optax_adamw():
    """optax decays with the learning rate too, so the same numbers must come out."""
    group = AdamGroup(0.02, 0.8, 0.95, 0.03)
    ours = optim.adamw(group, lr_scale=2.0, eps=1e-10)
    oracle = optax.adamw(0.02 * 2.0 * 0.5, b1=0.8, b2=0.95, eps=1e-10, weight_decay=0.03)
    params = {"a": random_stack(3, 4), "b": random_stack(5)}
    mine, theirs = params, params
    state, oracle_state = ours.init(params), oracle.init(params)
    for step in range(5):
        grads = jax.tree.map(lambda p, s=step: jnp.cos(p * (s + 1)), params)
        updates, state = ours.update(grads, state, mine, schedule=SCHEDULE)
        mine = optax.apply_updates(mine, updates)
        with jax.numpy_dtype_promotion("standard"):
            updates, oracle_state = oracle.update(grads, oracle_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for name in params:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5)


def test_labels_cover_every_weight():
    _, params = split(make_perturbed(MODERN))
    labels = {name: optim.param_label(name) for name in params}
    assert labels["h.1.attn.ve_gate.weight"] == "matrices"
    assert labels["value_embeds.1.weight"] == "value_embeds"
    assert labels["smear_gate.weight"] == labels["backout_lambda"] == "gates"
    assert set(labels.values()) == {*OptimizerConfig().adam_groups, "matrices"}


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 32, 8), (2, 8, 32)])
def test_orthogonalize_approaches_the_polar_factor(shape):
    """Singular values end near 1, singular vectors stay: compare with U V^T of numpy's SVD."""
    x = random_stack(*shape)
    ours = np.asarray(optim.orthogonalize(x))
    u, _, vt = np.linalg.svd(np.asarray(x), full_matrices=False)
    np.testing.assert_allclose(ours, u @ vt, atol=0.15)
    norms = np.linalg.norm(ours, axis=(1, 2))
    np.testing.assert_allclose(norms, np.sqrt(min(shape[1:])), rtol=1e-5)


def test_orthogonalize_of_zero_is_zero():
    """Projections start at zero, so their first gradients' partners are: no NaN."""
    assert not np.any(optim.orthogonalize(jnp.zeros((2, 8, 8))))


def test_equilibrated_rows_have_one_norm_and_the_matrix_keeps_its_own():
    x = random_stack(2, 5, 7) * jnp.arange(1.0, 6)[None, :, None]
    y = optim.equilibrate_rows(x)
    rows = np.linalg.norm(y, axis=-1)
    np.testing.assert_allclose(rows, rows[:, :1].repeat(5, axis=1), rtol=1e-5)
    norms = np.linalg.norm(y, axis=(1, 2))
    np.testing.assert_allclose(norms, np.linalg.norm(x, axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize(("shape", "kept"), [((2, 9, 4), (2, 9, 1)), ((2, 4, 9), (2, 1, 9))])
def test_variance_is_evened_along_the_longer_side_at_equal_norm(shape, kept):
    x = random_stack(*shape)
    second, y = optim.normalize_variance(jnp.zeros(kept), x, 0.9)
    axis = -1 if kept[-1] == 1 else -2
    np.testing.assert_allclose(second, 0.1 * np.mean(np.square(x), axis=axis, keepdims=True), 1e-6)
    spread = np.mean(np.square(y), axis=axis)
    np.testing.assert_allclose(spread, spread[:, :1].repeat(max(shape[1:]), axis=1), rtol=1e-4)
    norms = np.linalg.norm(y, axis=(1, 2))
    np.testing.assert_allclose(norms, np.linalg.norm(x, axis=(1, 2)), rtol=1e-5)


def test_momentum_looks_ahead():
    """buf = 0.9 buf + 0.1 g; u = 0.1 g + 0.9 buf."""
    buffer, grad = random_stack(1, 2, 2), random_stack(1, 2, 2, seed=1)
    new, update = optim.nesterov(buffer, grad, jnp.float32(0.9))
    np.testing.assert_allclose(new, 0.9 * buffer + 0.1 * grad, rtol=1e-5)
    np.testing.assert_allclose(update, 0.1 * grad + 0.9 * new, rtol=1e-5)


def test_decay_acts_only_where_the_update_shrinks_the_weight():
    transform = optim.muon(lr=0.1, beta2=0.9)
    params = {"h.0.w": random_stack(6, 6)}
    grads = {"h.0.w": random_stack(6, 6, seed=1)}
    with_decay, _ = transform.update(grads, transform.init(params), params, schedule=SCHEDULE)
    without = SCHEDULE._replace(weight_decay=np.float32(0))
    plain, _ = transform.update(grads, transform.init(params), params, schedule=without)
    p, decayed = np.asarray(params["h.0.w"]), np.asarray(with_decay["h.0.w"] - plain["h.0.w"])
    shrinking = np.asarray(plain["h.0.w"]) * p <= 0
    expected = np.where(shrinking, -0.5 * 0.1 * 0.1 * p, 0)
    np.testing.assert_allclose(decayed, expected, atol=1e-7)
    assert 0 < shrinking.sum() < shrinking.size


def test_tall_matrices_learn_faster_by_the_root_of_their_shape():
    """sqrt(max(1, out / in)): a rival has the factor transposed."""
    transform = optim.muon(lr=0.1, beta2=0.9)
    params = {"h.0.tall": random_stack(16, 4), "h.0.wide": random_stack(4, 16)}
    schedule = StepSchedule(np.float32(1), np.float32(0.9), np.float32(0))
    updates, _ = transform.update(params, transform.init(params), params, schedule=schedule)
    assert np.linalg.norm(updates["h.0.tall"]) == pytest.approx(0.1 * 2 * 2, rel=1e-4)
    assert np.linalg.norm(updates["h.0.wide"]) == pytest.approx(0.1 * 1 * 2, rel=1e-4)


def test_stacks_and_their_padding_change_nothing():
    """Five matrices in a stack of eight move as each one alone."""
    names = [f"h.{i}.w" for i in (0, 1, 2, 9, 10)]
    params = {name: random_stack(6, 4, seed=i) for i, name in enumerate(names)}
    grads = {name: random_stack(6, 4, seed=i + 50) for i, name in enumerate(names)}
    padded = optim.muon(lr=0.1, beta2=0.9, layout=Layout(8))
    together, state = padded.update(grads, padded.init(params), params, schedule=SCHEDULE)
    assert state.momentum["6x4"].shape == (8, 6, 4)
    alone = optim.muon(lr=0.1, beta2=0.9)
    for name in names:
        one = {name: params[name]}
        update, _ = alone.update({name: grads[name]}, alone.init(one), one, schedule=SCHEDULE)
        np.testing.assert_allclose(together[name], update[name], atol=1e-6)


def test_a_whole_step_moves_every_weight():
    _, params = split(make_perturbed(MODERN))
    optimizer = OptimizerConfig()
    plan = plan_training(MODERN, optimizer, num_iterations=10, total_batch_size=2**15)
    transform = optim.make_optimizer(MODERN, optimizer, plan)
    step = jax.jit(lambda p, s: transform.update(p, s, p, schedule=SCHEDULE))
    updates, _ = step(params, transform.init(params))
    assert all(np.any(update) for update in updates.values())
    assert all(np.all(np.isfinite(update)) for update in updates.values())


def test_rates_scale_with_width_and_batch_where_they_should():
    """lm_head and wte fall with width and follow the batch; smear and backout do neither."""
    config = replace(MODERN, n_embd=192)
    optimizer = OptimizerConfig()
    plan = plan_training(config, optimizer, num_iterations=10, total_batch_size=2**17)
    transform = optim.make_optimizer(config, optimizer, plan)
    names = {"wte.weight": optimizer.wte, "smear_lambda": optimizer.gates}
    params = {name: jnp.zeros((1,)) for name in names}
    grads = {name: jnp.ones((1,)) for name in names}
    schedule = StepSchedule(np.float32(1), np.float32(0.9), np.float32(0))
    updates, _ = transform.update(grads, transform.init(params), params, schedule=schedule)
    assert float(updates["wte.weight"][0]) == pytest.approx(-0.3 * (192 / 768) ** -0.5 * 0.5)
    assert float(updates["smear_lambda"][0]) == pytest.approx(-0.2)

"""The whole step: against JAX's plain gradient, over micro-batches, and over devices."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat import optim, sharding
from jaxchat.config import OptimizerConfig, ScheduleConfig
from jaxchat.params import bind, split
from jaxchat.plan import plan_training
from jaxchat.schedule import StepSchedule, schedule_at
from jaxchat.spikes import NO_LIMITS
from jaxchat.train_step import TrainState, loss_and_grads, make_train_step
from tests.models import PRESETS, make_perturbed


def random_batch(shape, vocab_size=300, seed=0):
    ids = np.random.default_rng(seed).integers(0, vocab_size, (*shape[:-1], shape[-1] + 1))
    inputs, targets = ids[..., :-1].astype(np.int32), ids[..., 1:].astype(np.int32)
    targets[0, 0, : shape[-1] // 2] = -1
    return inputs, targets


def mesh_of(count):
    return sharding.make_mesh(jax.devices()[:count])


@pytest.mark.parametrize(("preset", "weighted"), [("modern", True), ("classic", False)])
def test_loss_and_gradients_are_those_of_the_whole_batch(preset, weighted):
    """Micro-batches with unequal counts of targets, on eight devices, against one plain mean.

    Weights of either sign, as a policy gradient has them, change the sum and not the count.
    """
    graphdef, params = split(make_perturbed(PRESETS[preset]))
    inputs, targets = random_batch((2, 8, 160))
    weights = np.random.default_rng(1).normal(size=targets.shape).astype(np.float32)
    each = weights.reshape(16, 160) if weighted else np.float32(1)

    def plain(params):
        x, y = jnp.asarray(inputs.reshape(16, 160)), targets.reshape(16, 160)
        log_probs = jax.nn.log_softmax(bind(graphdef, params)(x), axis=-1)
        picked = jnp.take_along_axis(log_probs, jnp.maximum(y, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(y >= 0, each * picked, 0.0)) / np.float32((y >= 0).sum())

    step = jax.jit(lambda p, b: loss_and_grads(graphdef, p, b, mesh_of(8)))
    loss, grads = step(params, (inputs, targets, weights if weighted else None))
    expected_loss, expected = jax.jit(jax.value_and_grad(plain))(params)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    for name in params:
        # a scalar's gradient is one sum over every activation, whose terms cancel
        relative = 1e-4 if params[name].size == 1 else 1e-5
        scale = float(jnp.abs(expected[name]).max())
        np.testing.assert_allclose(grads[name], expected[name], atol=relative * scale, err_msg=name)


def test_a_compiled_step_holds_no_logits_of_all_tokens():
    """Nothing in it has B x T x V elements: the largest arrays are the embedding tables."""
    config = replace(PRESETS["modern"], n_layer=2, vocab_size=8192)
    graphdef, params = split(make_perturbed(config))
    rules = OptimizerConfig()
    transform = optim.make_optimizer(
        config, rules, plan_training(config, rules, num_iterations=9, total_batch_size=2048)
    )
    state = TrainState(params, jax.jit(transform.init)(params))
    ids = jax.ShapeDtypeStruct((1, 8, 256), jnp.int32)
    step = make_train_step(graphdef, transform, mesh_of(1))
    text = step.lower(state, (ids, ids, None), StepSchedule(1.0, 0.9, 0.0)).compile().as_text()
    sizes = {
        math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)
    }
    assert 8192 * 64 in sizes  # tables are seen
    assert max(sizes) < 8 * 256 * 8192 / 4


def losses_on(mesh, micro_batches=1, steps=6):
    config = replace(PRESETS["modern"], n_layer=2)
    graphdef, params = split(make_perturbed(config))
    optimizer = OptimizerConfig()
    plan = plan_training(config, optimizer, num_iterations=20, total_batch_size=16 * 64)
    layout = sharding.MeshLayout(mesh)
    transform = optim.make_optimizer(config, optimizer, plan, layout=layout)
    state = TrainState(params, transform.init(params))
    placements = TrainState(
        sharding.weights(mesh, params), sharding.optimizer_state(mesh, state.opt_state)
    )
    state = jax.device_put(jax.tree.map(jnp.copy, state), placements)
    step = make_train_step(graphdef, transform, mesh, placements)
    losses = []
    for i in range(steps):
        inputs, targets = random_batch((1, 16, 64), seed=i % 2)
        shape = (micro_batches, -1, 64)
        schedule = StepSchedule(*map(np.float32, schedule_at(i, ScheduleConfig(), plan)))
        batch = (jnp.asarray(inputs.reshape(shape)), jnp.asarray(targets.reshape(shape)), None)
        state, metrics = step(state, batch, schedule)
        losses.append(float(metrics.loss))
    return losses


@pytest.fixture(scope="module")
def alone():
    return losses_on(mesh_of(1), steps=20)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 2)])
def test_every_mesh_trains_as_one_device(alone, sizes):
    mesh = sharding.make_mesh(
        jax.devices()[: math.prod(sizes)], dict(zip(sharding.AXES, sizes, strict=True))
    )
    np.testing.assert_allclose(losses_on(mesh, steps=20), alone, atol=1e-5, rtol=1e-5)
    assert alone[18] < alone[0]  # it does learn the batch that it saw before


def test_micro_batches_on_a_mesh_train_as_one_batch(alone):
    np.testing.assert_allclose(losses_on(mesh_of(4), 2), alone[:6], rtol=1e-5)
    mesh = sharding.make_mesh(jax.devices()[:4], {"fsdp": 4})
    np.testing.assert_allclose(losses_on(mesh, 2), alone[:6], rtol=1e-5)


def test_a_step_compiles_once():
    config = PRESETS["modern"]
    graphdef, params = split(make_perturbed(config))
    plan = plan_training(config, OptimizerConfig(), num_iterations=4, total_batch_size=1024)
    transform = optim.make_optimizer(config, OptimizerConfig(), plan)
    step = make_train_step(graphdef, transform, mesh_of(1))
    place = sharding.place(mesh_of(1), sharding.REPLICATED)
    state = jax.device_put(TrainState(params, transform.init(params)), place)
    for i in range(3):
        schedule = StepSchedule(*map(np.float32, schedule_at(i, ScheduleConfig(), plan)))
        state, _ = step(state, (*random_batch((1, 2, 64), seed=i), None), schedule)
    assert step._cache_size() == 1


@pytest.fixture(scope="module")
def stepped():
    """One step of a small model's state with the given weights: (state, weights) -> what it says.

    Without a state from the first one. What it says: the state, whether that is the one before bit
    for bit, whether it was skipped, and the gradient's norm.
    """
    config = replace(PRESETS["modern"], n_layer=1)
    graphdef, params = split(make_perturbed(config))
    plan = plan_training(config, OptimizerConfig(), num_iterations=4, total_batch_size=1024)
    transform = optim.make_optimizer(config, OptimizerConfig(), plan)
    step = make_train_step(graphdef, transform, mesh_of(1))
    schedule = StepSchedule(*map(np.float32, schedule_at(0, ScheduleConfig(), plan)))
    first = jax.tree.map(np.array, TrainState(params, transform.init(params)))

    def run(weights, before=first, **limits):
        bounds = NO_LIMITS._replace(**limits)
        bounds = type(bounds)(*map(np.float32, bounds))
        batch = (*random_batch((1, 2, 64)), weights)
        after, metrics = step(jax.tree.map(jnp.array, before), batch, schedule, bounds)
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), after, before)
        said = (all(jax.tree.leaves(same)), float(metrics.skipped), float(metrics.grad_norm))
        return jax.tree.map(np.array, after), *said

    return run


def test_a_step_that_would_hurt_changes_nothing(stepped):
    """Not finite, or above a limit: weights and optimizer state stay bit for bit."""
    ones = np.ones((1, 2, 64), np.float32)

    def run(weights, **limits):
        return stepped(weights, **limits)[1:]

    unchanged, skipped, norm = run(ones)
    assert (unchanged, skipped) == (False, 0.0)
    for weights, limits in (
        (np.full_like(ones, np.nan), {}),
        (np.full_like(ones, np.inf), {}),
        (ones, {"loss": 1.0}),
        (ones, {"grad_norm": 0.9 * norm}),
    ):
        assert run(weights, **limits)[:2] == (True, 1.0), limits
    assert run(ones, grad_norm=1.1 * norm)[:2] == (False, 0.0)


def test_a_step_without_a_gradient_changes_nothing_and_is_not_skipped(stepped):
    """Where all groups agree, Muon made a whole step of old momentum, and Adam a smaller one."""
    ones = np.ones((1, 2, 64), np.float32)
    taught = stepped(ones)[0]
    moved = jax.tree.map(lambda x: bool(np.any(x)), taught.opt_state)
    assert all(jax.tree.leaves(moved))  # there are momenta of both optimizers
    after, *said = stepped(0 * ones, taught)
    assert said == [True, 0.0, 0.0]
    assert stepped(ones, after)[1:3] == (False, 0.0)

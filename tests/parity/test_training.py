"""The optimizers, step by step: from the same gradients, and from the same data."""

import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxchat.config import ScheduleConfig
from jaxchat.schedule import StepSchedule, schedule_at
from tests.parity.twins import (
    CONFIGS,
    OPTIMIZER,
    PLAN,
    JaxTwin,
    distance,
    jax_optimizer_state,
    jax_transform,
    max_abs,
    perturbed_weights,
    relative,
)
from torch_ref.optim import make_optimizer
from torch_ref.torch_backend import TorchBackend

SCHEDULE = ScheduleConfig(warmup_steps=10, momentum_warmup_steps=50)


def moving(step):
    """The schedule of a step, for torch as floats and for JAX as float32 scalars."""
    schedule = schedule_at(step, SCHEDULE, PLAN)
    return schedule, StepSchedule(*map(np.float32, schedule))


def compare_weights(parity, what, mine, expected):
    """Per tensor, the norm of the difference over the norm, which counts as 0.1 per entry at least:
    a scalar may pass through zero.

    Single entries may differ by more: where an update is zero but for rounding, its sign decides
    whether cautious weight decay applies.
    """
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert mine[name].shape == value.shape, name
        size = max(np.linalg.norm(value), 0.1 * np.sqrt(value.size))
        parity(f"{what}: weights, relative", distance(mine[name], value) / size, name)


def compare_moments(parity, what, mine, expected):
    """Likewise; a first moment is measured against the root of its second."""
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert mine[name].shape == value.shape, name
        size = np.linalg.norm(value)
        if name.startswith("adam.mu."):
            size = max(size, np.linalg.norm(np.sqrt(expected[name.replace(".mu.", ".nu.")])))
        difference = distance(mine[name], value)
        parity(f"{what}: moments, relative", difference / size if size else difference, name)


def text_batches(steps, *, rows, length):
    """Real English, byte by byte: Python's own language reference."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    ids = np.frombuffer(text, np.uint8).astype(np.int32)
    for step in range(steps):
        start = step * rows * (length + 1)
        block = ids[start : start + rows * (length + 1)].reshape(rows, length + 1)
        yield block[None, :, :-1], block[None, :, 1:]


@pytest.mark.parametrize("preset", ["modern", "classic GQA"])
def test_ten_optimizer_steps_on_the_same_gradients(preset, parity):
    config = CONFIGS[preset]
    params = perturbed_weights(config)
    transform = jax_transform(config)
    ours = {name: jnp.asarray(x) for name, x in params.items()}
    state = transform.init(ours)
    update = jax.jit(lambda g, s, p, m: transform.update(g, s, p, schedule=m))
    theirs = {name: torch.tensor(x) for name, x in params.items()}
    optimizer = make_optimizer(theirs, config, OPTIMIZER, PLAN)
    rng = np.random.default_rng(0)
    for step in range(10):
        grads = {n: rng.standard_normal(x.shape, np.float32) * 0.01 for n, x in params.items()}
        schedule, arrays = moving(step)
        updates, state = update({n: jnp.asarray(g) for n, g in grads.items()}, state, ours, arrays)
        ours = optax.apply_updates(ours, updates)
        optimizer.step({name: torch.from_numpy(g) for name, g in grads.items()}, schedule)
    what = "10 optimizer steps from the same gradients"
    compare_weights(parity, what, theirs, ours)
    compare_moments(parity, what, optimizer.state(), jax_optimizer_state(state))


@pytest.mark.parametrize("preset", ["modern", "classic GQA"])
def test_ten_training_steps(preset, parity):
    """Two micro-batches a step, rows longer than the short window; then all state is the same."""
    config = CONFIGS[preset]
    params = perturbed_weights(config)
    step_fn, state = JaxTwin(config, params).trainer(jax_transform(config))
    backend = TorchBackend(config, dtype="float32")
    backend.set_params(params)
    backend.start_training(OPTIMIZER, PLAN)
    for step, whole in enumerate(text_batches(10, rows=4, length=192)):
        batch = tuple(x.reshape(2, 2, -1) for x in whole)
        schedule, arrays = moving(step)
        mine = backend.train_step(*batch, schedule)
        state, metrics = step_fn(state, (*map(jnp.asarray, batch), None), arrays)
        parity("10 training steps: loss", max_abs(mine["loss"], metrics.loss))
        norm = relative(mine["grad_norm"], metrics.grad_norm)
        parity("10 training steps: gradient norm, relative", norm)
    what = "10 training steps"
    compare_weights(parity, what, backend.get_params(), state.params)
    moments = jax_optimizer_state(state.opt_state)
    compare_moments(parity, what, backend._optimizer.state(), moments)

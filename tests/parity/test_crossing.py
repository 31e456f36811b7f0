"""A run moves to the other backend and on: bit-exact state, the same curve."""

import numpy as np
import pytest

from jaxchat.checkpoint import CheckpointStore
from jaxchat.config import ScheduleConfig
from jaxchat.jax_backend import JaxBackend
from jaxchat.schedule import schedule_at
from tests.parity.twins import CONFIGS, OPTIMIZER, PLAN, perturbed_weights
from torch_ref.torch_backend import TorchBackend

MODERN = CONFIGS["modern"]

STEPS = 6

CURVE = "12 training steps, 6 on each backend, against 12 on one: loss"

SCHEDULE = ScheduleConfig(warmup_steps=4, momentum_warmup_steps=10)


def make(kind, config, **where):
    """A backend in training: JAX on eight devices, so that its state is cut and padded."""
    backend = kind(config, dtype="float32", **where)
    backend.set_params(perturbed_weights(config))
    backend.start_training(OPTIMIZER, PLAN)
    return backend


def train(backend, steps):
    losses = []
    for step in steps:
        rng = np.random.default_rng(step)
        ids = rng.integers(0, backend.config.vocab_size, (1, 8, 65), dtype=np.int32)
        schedule = schedule_at(step, SCHEDULE, PLAN)
        losses.append(float(backend.train_step(ids[..., :-1], ids[..., 1:], schedule)["loss"]))
    return losses


def save(backend, directory):
    store = CheckpointStore(directory)
    store.save(STEPS, backend, {"fact": 1})
    store.finish()
    return store


def state_of(backend):
    """Every weight and every number of the optimizer, by name."""
    return backend.get_params() | backend.get_optimizer_state()


def assert_same_bits(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert value.tobytes() == theirs[name].tobytes(), name


@pytest.fixture(scope="module", params=["modern", "classic"])
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """A run on JAX that never moves: its losses, and its checkpoint and state half-way."""
    backend = make(JaxBackend, config)
    losses = train(backend, range(STEPS))
    store, half_way = save(backend, tmp_path_factory.mktemp("jax")), state_of(backend)
    return losses + train(backend, range(STEPS, 2 * STEPS)), store, half_way


def test_a_run_on_jax_goes_on_in_torch(config, unbroken, tmp_path, parity):
    """There, back again without a step in between, and then on: nothing is lost on the way."""
    losses, store, half_way = unbroken
    there = make(TorchBackend, config)
    assert store.restore(there, {"fact": 1})["step"] == STEPS
    assert_same_bits(state_of(there), half_way)
    back = make(JaxBackend, config)
    save(there, tmp_path).restore(back, {"fact": 1})
    assert_same_bits(state_of(back), half_way)
    difference = np.abs(np.array(train(there, range(STEPS, 2 * STEPS))) - losses[STEPS:]).max()
    parity(CURVE, difference, "JAX, then torch")


def test_a_run_in_torch_goes_on_on_jax(config, unbroken, tmp_path, parity):
    begun = make(TorchBackend, config)
    losses = train(begun, range(STEPS))
    there = make(JaxBackend, config)
    assert save(begun, tmp_path / "there").restore(there, {"fact": 1})["step"] == STEPS
    assert_same_bits(state_of(there), state_of(begun))
    back = make(TorchBackend, config)
    save(there, tmp_path / "back").restore(back, {"fact": 1})
    assert_same_bits(state_of(back), state_of(begun))
    losses += train(there, range(STEPS, 2 * STEPS))
    parity(CURVE, np.abs(np.array(losses) - unbroken[0]).max(), "torch, then JAX")


def test_a_run_moves_to_another_number_of_devices(config, unbroken):
    """Eight devices pad every stack of matrices to a multiple of eight, one does not."""
    _, store, half_way = unbroken
    alone = make(JaxBackend, config, device=0)
    assert store.restore(alone, {"fact": 1})["step"] == STEPS
    assert_same_bits(state_of(alone), half_way)


def test_a_state_of_another_model_is_refused_by_name():
    state = make(TorchBackend, MODERN).get_optimizer_state()
    state["adam.mu.unknown"] = state.pop("adam.mu.wte.weight")
    for kind in (JaxBackend, TorchBackend):
        with pytest.raises(ValueError, match=r"missing adam\.mu\.wte\.weight(.|\n)*unknown"):
            make(kind, MODERN).set_optimizer_state(state)


def test_a_damaged_checkpoint_of_the_other_backend_is_not_taken(tmp_path, capsys):
    begun = make(TorchBackend, MODERN)
    store = save(begun, tmp_path)
    path = store.path(STEPS) / "optimizer.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match="none of the checkpoints"):
        store.restore(make(JaxBackend, MODERN), {"fact": 1})
    assert "damaged" in capsys.readouterr().out

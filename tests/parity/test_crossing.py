"""A run moves to the other backend and on: bit-exact state, the same curve."""

import numpy as np
import pytest

from jaxchat.checkpoint import CheckpointStore
from jaxchat.config import ScheduleConfig
from jaxchat.jax_backend import JaxBackend
from jaxchat.schedule import schedule_at
from tests.models import CLASSIC, MODERN
from tests.parity.twins import OPTIMIZER, PLAN, perturbed_weights
from torch_ref.torch_backend import TorchBackend

CONFIGS = {"modern": MODERN, "classic": CLASSIC}

STEPS = 6

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


def assert_same_bits(mine, theirs):
    for a, b in (
        (mine.get_params(), theirs.get_params()),
        (mine.get_optimizer_state(), theirs.get_optimizer_state()),
    ):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert (value.dtype, value.shape) == (b[name].dtype, b[name].shape), name
            assert value.tobytes() == b[name].tobytes(), name


@pytest.fixture(scope="module", params=["modern", pytest.param("classic", marks=pytest.mark.slow)])
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def unbroken(config):
    """The losses of a run that never moves."""
    return train(make(JaxBackend, config), range(2 * STEPS))


@pytest.mark.parametrize(
    ("first", "second"), [(JaxBackend, TorchBackend), (TorchBackend, JaxBackend)]
)
def test_a_run_goes_on_where_the_other_backend_stopped(
    config, first, second, unbroken, tmp_path, parity
):
    """There, back again without a step in between, and then on: nothing is lost on the way."""
    begun = make(first, config)
    losses = train(begun, range(STEPS))
    store = save(begun, tmp_path / "there")
    there = make(second, config)
    assert store.restore(there, {"fact": 1})["step"] == STEPS
    assert_same_bits(begun, there)
    back = make(first, config)
    save(there, tmp_path / "back").restore(back, {"fact": 1})
    assert_same_bits(begun, back)
    losses += train(there, range(STEPS, 2 * STEPS))
    difference = np.abs(np.array(losses) - unbroken).max()
    parity("12 steps, 6 on each backend: loss (absolute)", difference, 1e-5)


def test_a_run_moves_to_another_number_of_devices(tmp_path):
    """Eight devices pad every stack of matrices to a multiple of eight, one does not."""
    begun = make(JaxBackend, MODERN)
    train(begun, range(2))
    store = save(begun, tmp_path)
    alone = make(JaxBackend, MODERN, device=0)
    assert store.restore(alone, {"fact": 1})["step"] == STEPS
    assert_same_bits(begun, alone)


def test_a_state_of_another_model_is_refused_by_name():
    state = make(TorchBackend, MODERN).get_optimizer_state()
    state["adam.mu.unknown"] = state.pop("adam.mu.wte.weight")
    for kind in (JaxBackend, TorchBackend):
        with pytest.raises(ValueError, match=r"missing adam\.mu\.wte\.weight(.|\n)*unknown"):
            make(kind, MODERN).set_optimizer_state(state)


def test_a_damaged_checkpoint_of_the_other_backend_is_skipped(tmp_path, capsys):
    begun = make(TorchBackend, MODERN)
    store = save(begun, tmp_path)
    path = store.path(STEPS) / "optimizer.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert store.restore(make(JaxBackend, MODERN), {"fact": 1}) is None
    assert "damaged" in capsys.readouterr().out

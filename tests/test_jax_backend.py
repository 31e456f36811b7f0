"""The JAX backend: weights and optimizer state travel to disk and back bit for bit."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxchat.config import OptimizerConfig, ScheduleConfig
from jaxchat.jax_backend import JaxBackend
from jaxchat.plan import plan_training
from jaxchat.schedule import schedule_at
from jaxchat.spikes import Limits
from tests.models import MODERN, PRESETS, assert_same_arrays, make_perturbed

CONFIG = replace(MODERN, n_layer=2)
PLAN = plan_training(CONFIG, OptimizerConfig(), num_iterations=8, total_batch_size=1024)


def start(seed=0):
    backend = JaxBackend(CONFIG)
    backend.init(seed)
    backend.start_training(OptimizerConfig(), PLAN)
    return backend


def train(backend, steps):
    losses = []
    for step in steps:
        ids = np.random.default_rng(step).integers(0, 300, (1, 8, 65)).astype(np.int32)
        metrics = backend.train_step(
            ids[..., :-1], ids[..., 1:], schedule_at(step, ScheduleConfig(), PLAN)
        )
        losses.append(float(metrics["loss"]))
    return losses


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    whole = start()
    train(whole, range(3))
    whole.save(tmp_path / "step")
    whole.wait()
    continued = start(seed=99)
    continued.load(tmp_path / "step")
    assert train(continued, range(3, 6)) == train(whole, range(3, 6))
    assert_same_arrays(continued.get_params(), whole.get_params())


def test_a_step_compiles_once_even_after_loading(tmp_path):
    backend = start()
    train(backend, range(2))
    backend.save(tmp_path / "step")
    backend.wait()
    backend.load(tmp_path / "step")
    train(backend, range(2, 4))
    assert backend._train_step._cache_size() == 1


@pytest.mark.parametrize(
    ("limits", "skipped"),
    [(Limits(0.1, np.inf), 1), (Limits(np.inf, 1e-6), 1), (Limits(1e9, 1e9), 0)],
)
def test_a_step_above_its_limits_changes_nothing(limits, skipped):
    backend = start()
    held = backend.get_params() | backend.get_optimizer_state()
    before = {name: np.array(value) for name, value in held.items()}
    ids = np.random.default_rng(0).integers(0, 300, (1, 8, 65)).astype(np.int32)
    metrics = backend.train_step(
        ids[..., :-1], ids[..., 1:], schedule_at(0, ScheduleConfig(), PLAN), limits=limits
    )
    after = backend.get_params() | backend.get_optimizer_state()
    assert float(metrics["skipped"]) == skipped
    same = all(np.array_equal(after[name], value) for name, value in before.items())
    assert same == bool(skipped)


def test_optimizer_state_is_divided_over_the_devices():
    backend = start()
    stacks = [x for x in jax.tree.leaves(backend._opt_state) if x.ndim == 3]
    tables = [x for x in jax.tree.leaves(backend._opt_state) if x.ndim == 2 and len(x) == 320]
    assert stacks
    assert tables
    for x in stacks + tables:
        assert x.addressable_shards[0].data.shape[0] == x.shape[0] // 8


def test_inference_needs_no_optimizer(tmp_path):
    trained = start()
    trained.save(tmp_path / "step")
    trained.wait()
    reader = JaxBackend(CONFIG)
    reader.load(tmp_path / "step")
    ids = np.arange(40, dtype=np.int32)[None, :]
    scores, expected = reader.score(ids, ids), trained.score(ids, ids)
    np.testing.assert_array_equal(scores.nll, expected.nll)


def test_weights_of_another_model_are_refused_with_a_list():
    backend = start()
    params = backend.get_params()
    params["extra"] = params.pop("smear_lambda")
    params["lm_head.weight"] = params["lm_head.weight"][:10]
    with pytest.raises(ValueError, match=r"missing smear_lambda") as error:
        backend.set_params(params)
    assert "unexpected extra" in str(error.value)
    assert "lm_head.weight has shape (10, 64), the model wants (320, 64)" in str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_scores_are_those_of_the_model(preset):
    from jaxchat.params import split

    model = make_perturbed(PRESETS[preset])
    backend = JaxBackend(PRESETS[preset])
    backend.set_params({name: np.asarray(x) for name, x in split(model)[1].items()})
    ids = np.random.default_rng(0).integers(0, 300, (3, 41)).astype(np.int32)
    inputs, targets = ids[:, :-1], ids[:, 1:].copy()
    targets[0, :5] = -1
    scores = backend.score(inputs, targets)
    log_probs = np.asarray(jax.nn.log_softmax(model(jax.numpy.asarray(inputs)), axis=-1))
    picked = np.take_along_axis(log_probs, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.nll, np.where(targets < 0, 0, -picked), atol=1e-5)
    np.testing.assert_array_equal(scores.greedy, log_probs.argmax(axis=-1))


def test_micro_batches_that_do_not_divide_over_the_devices_are_refused():
    ids = np.zeros((1, 3, 64), np.int32)
    with pytest.raises(ValueError, match="3 rows do not divide over 8 devices"):
        start().train_step(ids, ids, schedule_at(0, ScheduleConfig(), PLAN))


@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", "data=2,fsdp=2,tensor=2"])
def test_a_checkpoint_continues_on_another_mesh(tmp_path, mesh):
    """Written by eight devices on the data axis; scores and samples are compared as well."""
    whole = start()
    train(whole, range(2))
    whole.save(tmp_path / "step")
    whole.wait()
    other = JaxBackend(CONFIG, mesh=mesh)
    other.init(7)
    other.start_training(OptimizerConfig(), PLAN)
    other.load(tmp_path / "step")
    assert_same_arrays(other.get_params(), whole.get_params())
    np.testing.assert_allclose(train(other, range(2, 6)), train(whole, range(2, 6)), rtol=1e-5)
    ids = np.random.default_rng(9).integers(0, 300, (8, 33)).astype(np.int32)
    ours, theirs = (b.score(ids[:, :-1], ids[:, 1:]).nll for b in (other, whole))
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    _, logits = other.prefill(other.new_cache(1, 64), 0, ids[0], 0)
    np.testing.assert_allclose(
        logits, whole.prefill(whole.new_cache(1, 64), 0, ids[0], 0)[1], atol=2e-3
    )

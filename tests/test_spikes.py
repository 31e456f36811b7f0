"""The rule that skips a step: what it sees, when it acts, and that it survives a resume."""

import json
import math

import numpy as np
import pytest

from jaxchat.spikes import NO_LIMITS, Diverged, SpikeGuard, SpikeRule, keep_evidence

RULE = SpikeRule(window=20, min_history=5, max_skipped=3)


def fed(losses, norms=None, guard=None, start=0):
    guard = guard or SpikeGuard(RULE)
    for step, loss in enumerate(losses, start):
        norm = 1.0 if norms is None else norms[step - start]
        bad = not (loss <= guard.limits(step).loss and norm <= guard.limits(step).grad_norm)
        guard.note(step, loss, norm, skipped=bad)
    return guard


def test_limits_are_six_deviations_above_the_rolling_mean():
    losses = list(np.random.default_rng(0).normal(3, 0.2, 60))
    limits = fed(losses).limits(61)  # knows the steps 40 to 59
    seen = losses[40:60]
    assert limits.loss == pytest.approx(np.mean(seen) + 6 * np.std(seen))
    assert limits.grad_norm == pytest.approx(5.0)  # the floor: two thirds of the mean, six times


def test_nothing_finite_is_a_spike_before_there_is_a_history():
    assert fed([3.0] * 5).limits(5) == NO_LIMITS  # the newest does not count
    assert fed([3.0] * 5).limits(6) != NO_LIMITS


def test_the_limits_of_a_step_do_not_know_the_step_before():
    """It may not have been read yet; after a save it has, and nothing may change by that."""
    steady = fed([3.0] * 10)
    before = steady.limits(10)
    steady.note(10, 3.3, 1.0, skipped=False)
    assert steady.limits(11) == before
    assert steady.limits(12) != before


def test_skipped_steps_do_not_move_the_mean():
    guard = fed([3.0] * 10 + [50.0, math.nan] + [3.0] * 5)
    assert guard.limits(20).loss == pytest.approx(3 * 1.12)


def test_steps_without_a_gradient_make_none_with_one_a_spike():
    """A policy that is nearly always right: most steps have nothing to teach, some have."""
    rng = np.random.default_rng(2)
    teaches = rng.random(400) < 0.1
    teaches[:40] = False
    losses = np.where(teaches, rng.normal(0.01, 0.05, 400), 0.0)
    norms = np.where(teaches, np.exp(rng.normal(-1, 0.5, 400)), 0.0)
    fed(losses, norms, SpikeGuard(SpikeRule(max_skipped=1)))


def test_ordinary_training_is_left_alone():
    """A loss that falls from 9 to 3 with noise and a gradient norm with a log-normal tail."""
    rng = np.random.default_rng(1)
    steps = np.arange(3000)
    losses = 3 + 6 * np.exp(-steps / 200) + rng.normal(0, 0.1, 3000)
    norms = np.exp(rng.normal(0, 0.3, 3000))
    guard = fed(losses, norms, SpikeGuard(SpikeRule(max_skipped=1)))
    assert guard.limits(3001).loss < 4


def test_too_many_skipped_steps_are_the_end():
    with pytest.raises(Diverged, match="3 of the last 9 steps were skipped, the last one with lo"):
        fed([3.0] * 6 + [math.inf, math.nan, 99.0])
    fed([3.0] * 6 + ([math.inf] * 2 + [3.0] * 20) * 4)  # rare ones are not


@pytest.mark.parametrize("cut", [3, 9, 11, 30])
def test_a_guard_restored_from_json_decides_as_the_whole_run(cut):
    losses = [*np.linspace(4, 3, 10), math.nan, *np.linspace(3, 2.5, 30)]
    whole = fed(losses)
    state = json.loads(json.dumps(fed(losses[:cut]).state()))
    continued = fed(losses[cut:], guard=SpikeGuard(RULE, state), start=cut)
    for step in (len(losses), len(losses) + 1):
        assert continued.limits(step) == whole.limits(step)


def test_the_batch_of_a_skipped_step_can_be_read_again(tmp_path):
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    path = keep_evidence(tmp_path / "skipped", 7, {"inputs": ids, "weights": None}, {"loss": None})
    with np.load(path) as batch:
        assert list(batch) == ["inputs"]
        np.testing.assert_array_equal(batch["inputs"], ids)
    assert json.loads(path.with_suffix(".json").read_text()) == {"loss": None}


def test_a_rule_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="min_history=40"):
        SpikeRule(window=20, min_history=40)

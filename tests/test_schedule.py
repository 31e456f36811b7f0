"""Golden tables of the schedules, worked out by hand from DESIGN's sentences."""

import itertools

import pytest

from jaxchat.config import ScheduleConfig
from jaxchat.plan import TrainingPlan
from jaxchat.schedule import lr_multiplier, muon_momentum, schedule_at, weight_decay_at

CONFIG = ScheduleConfig()
PLAN = TrainingPlan(
    total_batch_size=2**19, num_iterations=2000, lr_scale=1.0, weight_decay=0.28, target_tokens=0
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1 / 40),
        (19, 0.5),
        (39, 1.0),
        (40, 1.0),
        (700, 1.0),  # the warm-down is the last 1300 steps
        (1350, 0.5 + 0.5 * 0.05),
        (1999, 1 / 1300 + (1 - 1 / 1300) * 0.05),
        (2000, 0.05),
    ],
)
def test_learning_rate(step, expected):
    assert lr_multiplier(step, CONFIG, 2000) == pytest.approx(expected)


def test_learning_rate_never_rises_after_warm_up():
    """Upstream once ramped the wrong way (its issue 68)."""
    rates = [lr_multiplier(step, CONFIG, 2000) for step in range(40, 2001)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.85), (200, 0.91), (400, 0.97), (699, 0.97), (1350, 0.935), (2000, 0.90)],
)
def test_momentum(step, expected):
    assert muon_momentum(step, CONFIG, 2000) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.28), (1000, 0.14), (2000, 0.0)])
def test_weight_decay(step, expected):
    assert weight_decay_at(step, PLAN) == pytest.approx(expected)


def test_a_run_shorter_than_its_warm_up_still_has_rates():
    for step in range(10):
        assert 0 < lr_multiplier(step, CONFIG, 10) <= 1


def test_a_step_bundles_all_three():
    assert schedule_at(1000, CONFIG, PLAN).weight_decay == pytest.approx(0.14)

"""The schedules of learning rates and of the KL coefficient, against numbers by hand.

Run: pytest tests/functional/test_schedules.py
"""

from __future__ import annotations

import math

import pytest
from helpers.tensors import NAN

from rlhf import functional as F

# learning_rate_factor


@pytest.mark.parametrize(
    "num_updates, knobs, expected",
    [
        (4, {}, [1, 0.75, 0.5, 0.25]),
        (3, {"schedule": "constant"}, [1, 1, 1]),
        (6, {"num_warmup": 2}, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        (4, {"num_warmup": 2, "warmup_start": 0.1}, [0.1, 0.55, 1, 0.5]),
        # InstructGPT
        (
            12,
            {"num_warmup": 10, "warmup_start": 0.1, "schedule": "constant"},
            [0.1, 0.19, 0.28, 0.37, 0.46, 0.55, 0.64, 0.73, 0.82, 0.91, 1, 1],
        ),
        (2, {"num_warmup": 1, "warmup_start": 1.0}, [1, 1]),
        (2, {"num_warmup": 3}, [0.25, 0.5]),  # longer than the run
    ],
)
def test_the_share_of_the_learning_rate_is_a_function_of_the_update_by_hand(
    num_updates, knobs, expected
):
    factors = [
        F.learning_rate_factor(update, num_updates, **knobs) for update in range(num_updates)
    ]
    assert factors == pytest.approx(expected, rel=1e-12)


# adaptive_kl_coef


@pytest.mark.parametrize(
    "kl, expected",
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 0.0512)),  # 10 % above: dearer
        (5.4, 0.1 * (1 - 0.1 * 0.0512)),  # 10 % below: cheaper
        (60.0, 0.1 * (1 + 0.2 * 0.0512)),  # at most 20 %
        (0.0, 0.1 * (1 - 0.2 * 0.0512)),
        (-3.0, 0.1 * (1 - 0.2 * 0.0512)),  # k1 may come out negative
    ],
)
def test_the_kl_coefficient_follows_the_relative_error_clipped_at_a_fifth(kl, expected):
    coef = F.adaptive_kl_coef(0.1, kl, target=6.0, horizon=10_000, num_sequences=512)
    assert coef == pytest.approx(expected, rel=1e-12)


def test_the_kl_coefficient_never_becomes_negative_nor_hides_a_nan():
    assert F.adaptive_kl_coef(0.1, 0.0, target=6.0, horizon=10, num_sequences=100) == 0.0
    assert math.isnan(F.adaptive_kl_coef(0.1, NAN, target=6.0, horizon=10, num_sequences=1))


def test_the_kl_coefficient_settles_where_the_kl_is_on_target():
    # A world in which doubling the price halves the KL: 6 nats cost 0.5.
    coef = 0.1
    for _ in range(500):
        coef = F.adaptive_kl_coef(coef, 3 / coef, target=6.0, horizon=1000, num_sequences=100)
    assert coef == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("target, horizon", [(0.0, 10), (-1.0, 10), (6.0, 0), (NAN, 10)])
def test_a_target_or_horizon_that_is_not_positive_is_refused(target, horizon):
    with pytest.raises(ValueError, match="target and horizon must be > 0"):
        F.adaptive_kl_coef(0.1, 6.0, target, horizon, 1)

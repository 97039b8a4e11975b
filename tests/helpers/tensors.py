"""Random tensors, masks and comparisons for the tests of rlhf.functional.

No expected value comes from the code under test; references are computed in float64.
"""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch.testing import assert_close

INF, NAN = math.inf, math.nan
GARBAGE = (1e4, INF, -INF, NAN)
seeds = st.integers(0, 2**31)
few = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # the machine may be busy
)


def exact(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def close(actual, expected, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    assert_close(actual, expected, rtol=1e-5, atol=atol)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_mask(seed, *shape):
    """Valid with a probability that is itself drawn: gaps, empty rows and full masks all occur."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand((), generator=generator) * 1.4 - 0.2
    return torch.rand(*shape, generator=generator) < share


def leaf(x):
    return x.detach().clone().requires_grad_()

"""Ramps start low, end at 1, and stay there."""

from __future__ import annotations

import math

import pytest

from udas.methods.ramps import exponential, linear


@pytest.mark.parametrize("step", [0, 1, 37, 100, 250])
def test_ramps_are_their_formulas(step):
    share = min(step / 100, 1)
    assert linear(step, 100) == pytest.approx(share)
    assert exponential(step, 100) == pytest.approx(math.exp(-5 * (1 - share) ** 2))


def test_no_ramp_is_one_at_once():
    assert linear(0, 0) == 1
    assert exponential(0, 0) == 1

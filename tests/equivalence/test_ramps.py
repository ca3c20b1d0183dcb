"""Ramps start low, end at 1, and stay there."""

from __future__ import annotations

import math

import pytest
import torch

from udas.methods.ramps import exponential, linear


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_ramps_are_their_formulas(dtype):
    for t in (0, 1, 37, 100, 250):
        step, share = torch.tensor(t, dtype=dtype), min(t / 100, 1)
        assert linear(step, 100).item() == pytest.approx(share)
        assert exponential(step, 100).item() == pytest.approx(math.exp(-5 * (1 - share) ** 2))
        assert exponential(step, 100).dtype == torch.float32


def test_no_ramp_is_one_at_once():
    assert linear(torch.tensor(0), 0) == 1
    assert exponential(torch.tensor(0), 0) == 1

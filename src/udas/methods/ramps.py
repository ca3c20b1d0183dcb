"""Weights that grow at the start of a training, as functions of the step."""

from __future__ import annotations

import math


def exponential(step: int, length: int) -> float:
    """exp(-5 (1 - min(t / T, 1))^2): from 0.007 to 1 within T steps (Laine and Aila, ICLR 2017; "sigmoid" ramp-up).

    Args:
        step: t >= 0.
        length: T, in steps; 0 = no ramp, 1 at once.
    """
    return math.exp(-5 * (1 - linear(step, length)) ** 2)


def linear(step: int, length: int) -> float:
    """min(t / T, 1): from 0 to 1 within T steps. Arguments as in `exponential`."""
    return min(step / length, 1.0) if length else 1.0

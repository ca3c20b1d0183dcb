"""Weights that grow at the start of a training, as functions of the step on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def exponential(step: Tensor, length: int) -> Tensor:
    """exp(-5 (1 - min(t / T, 1))^2): from 0.007 to 1 within T steps (Laine and Aila, ICLR 2017; "sigmoid" ramp-up).

    Args:
        step: t >= 0, a scalar of any type, such as a counter among a method's buffers.
        length: T, in steps; 0 = no ramp, 1 at once.

    Returns:
        A float32 scalar on the device of `step`.
    """
    return torch.exp(-5 * (1 - linear(step, length)).square())


def linear(step: Tensor, length: int) -> Tensor:
    """min(t / T, 1): from 0 to 1 within T steps. Arguments and result as in `exponential`."""
    progress = step.float() / length if length else torch.ones_like(step, dtype=torch.float32)
    return progress.clamp(0, 1)

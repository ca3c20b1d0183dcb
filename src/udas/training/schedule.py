"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from udas.config import OptimiserConfig


def lr_factor(config: OptimiserConfig, step: int, steps: int) -> float:
    """Multiple of the base learning rate at `step` of `steps`, warm-up included.

    poly: (1 - t/T)^power; cosine: (1 + cos(pi t/T)) / 2; linear: 1 until `decay_from` T, then falling to 0 at T; with
    T = `horizon`, or `steps` where none is given. Beyond T the factor stays what it is there.
    """
    factor = _decay(config, min(1.0, step / (config.horizon or steps)))
    if step < config.warmup:
        factor *= config.warmup_from + (1 - config.warmup_from) * step / config.warmup
    return factor


def _decay(config: OptimiserConfig, progress: float) -> float:
    if config.schedule == "poly":
        return float((1 - progress) ** config.power)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if config.schedule == "linear" and progress > config.decay_from:
        return (1 - progress) / (1 - config.decay_from)
    return 1.0

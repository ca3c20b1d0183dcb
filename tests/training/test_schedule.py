"""Learning rates at chosen steps, computed by hand."""

from __future__ import annotations

import math

import pytest

from udas.config import OptimiserConfig
from udas.training.schedule import lr_factor


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, {0: 1, 50: 1, 99: 1}),
        ({"schedule": "poly", "power": 0.9}, {0: 1, 50: 0.5**0.9, 99: 0.01**0.9}),
        ({"schedule": "poly", "power": 2}, {25: 0.5625}),
        ({"schedule": "poly", "power": 1, "horizon": 200}, {0: 1, 50: 0.75, 99: 0.505}),
        ({"schedule": "poly", "power": 0.9, "horizon": 50}, {25: 0.5**0.9, 50: 0, 99: 0}),
        ({"schedule": "cosine"}, {0: 1, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 75: (1 - math.sqrt(0.5)) / 2}),
        ({"schedule": "linear", "decay_from": 0.5}, {0: 1, 50: 1, 75: 0.5, 90: 0.2, 99: 0.02}),
        ({"schedule": "linear", "decay_from": 0.0}, {0: 1, 30: 0.7}),
        ({"schedule": "constant", "warmup": 10, "warmup_from": 0.1}, {0: 0.1, 5: 0.55, 9: 0.91, 10: 1, 11: 1}),
        ({"schedule": "poly", "power": 1, "warmup": 10, "warmup_from": 0}, {0: 0, 5: 0.95 * 0.5, 10: 0.9}),
    ],
)
def test_factors_at_chosen_steps_of_a_hundred(settings: dict, expected: dict[int, float]) -> None:
    config = OptimiserConfig.model_validate(settings)
    assert {step: lr_factor(config, step, 100) for step in expected} == pytest.approx(expected)

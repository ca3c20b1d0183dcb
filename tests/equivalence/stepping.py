"""How the equivalence tests step a method: the engine of real trainings, on a CPU, in float precision as given."""

from __future__ import annotations

import copy

import torch

from udas.training.engine import TrainingEngine
from udas.training.runtime import Runtime

STEPS = 1000  # long: schedules that fall later are still at their start


def lend_engine(method, steps=STEPS):
    """The engine of a method; it steps nothing by itself."""
    return TrainingEngine(method, Runtime(torch.device("cpu"), "fp32"), steps)


def advance(engine, method, batch, step=0):
    """One step; returns its losses by name."""
    torch.manual_seed(step)  # dropout
    engine.begin(step)
    method.step(batch)
    return engine.take_losses()


def assert_same_weights(ours, theirs, rtol=1e-5, atol=2e-6):
    """All that a naive network holds is as in the method's, statistics of batch norms included."""
    found = ours.state_dict()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def assert_average_follows(method, batch):
    """After a step the network that is handed on, an average with decay 1/2, is half way to the one that learns."""
    start = copy.deepcopy(method.segmenter)
    advance(lend_engine(method), method, batch)
    assert method.model() is not method.segmenter
    trios = zip(method.model().parameters(), start.parameters(), method.segmenter.parameters(), strict=True)
    for average, before, now in trios:
        torch.testing.assert_close(average.data, ((before + now) / 2).data)


def turns(engine, players):
    """Fills up, step by step, with (optimiser, {player: does it have a gradient?}) as each optimiser steps."""
    seen = []
    for name, updater in engine.updaters.items():
        updater.optimiser.register_step_pre_hook(lambda *_, name=name: seen.append((name, _moving(players))))
        updater.optimiser.register_step_post_hook(lambda *_: _forget(players))
    return seen


def _moving(players):
    return {name: {p.grad is not None and bool(p.grad.any()) for p in own} for name, own in players.items()}


def _forget(players):
    for parameter in (p for own in players.values() for p in own):
        parameter.grad = None

"""The smallest engine a method can step with: float precision as given, one process, constant learning rate."""

from __future__ import annotations

from contextlib import contextmanager

import torch

KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class Engine:
    """Implements `update` and keeps the last value of every loss."""

    def __init__(self, method):
        self.losses, self.optimisers = {}, {}
        for name, (groups, c) in {k: (o.groups, o.config) for k, o in method.optimised().items()}.items():
            settings = {"momentum": c.momentum, "nesterov": c.nesterov} if c.name == "sgd" else {"betas": c.betas}
            scaled = [{"params": group["params"], "lr": c.lr * group["factor"]} for group in groups]
            self.optimisers[name] = KINDS[c.name](scaled, c.lr, weight_decay=c.weight_decay, **settings)
        method.engine = self

    @contextmanager
    def update(self, name):
        optimiser = self.optimisers[name]
        optimiser.zero_grad()
        parameters = [p for group in optimiser.param_groups for p in group["params"]]

        def minimise(loss, term):
            self.losses[term] = loss.item()
            torch.autograd.backward(loss, inputs=parameters)

        yield minimise
        optimiser.step()

"""Optimiser steps for methods: `update(name)` owns one optimiser and everything around its step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from udas.config import OptimiserConfig
from udas.methods.base import Method, Minimise, Optimised
from udas.training.runtime import Runtime
from udas.training.schedule import lr_factor


class TrainingEngine:
    """Lends `update` to a method and remembers what it minimised.

    The first loss or gradient that is not finite freezes every optimiser on the device, without a host sync; `failure`
    tells the step when it is asked.
    """

    def __init__(self, method: Method[Any], runtime: Runtime, steps: int) -> None:
        self.runtime = runtime
        self.updaters = {name: _Updater(optimised, runtime, steps) for name, optimised in method.optimised().items()}
        self.frozen = torch.zeros((), device=runtime.device)
        self.first_bad_step = torch.full((), -1.0, device=runtime.device)
        self.losses: dict[str, Tensor] = {}
        self.logged_steps = 0
        self.step = 0
        method.engine = self

    def begin(self, step: int) -> None:
        """Announce the step that the following updates belong to."""
        self.step = step
        self.logged_steps += 1

    @contextmanager
    def update(self, name: str) -> Iterator[Minimise]:
        """Zero, back-propagate what is minimised inside, average over processes, clip, check and step one optimiser."""
        updater = self.updaters[name]
        updater.optimiser.zero_grad(set_to_none=True)

        def minimise(loss: Tensor | Mapping[str, Tensor], name: str = "loss") -> None:
            terms = {name: loss} if isinstance(loss, Tensor) else loss
            for term, value in terms.items():
                self._record(term, value.detach())
            with torch.autocast(self.runtime.device.type, enabled=False):
                torch.autograd.backward(torch.stack(list(terms.values())).sum(), inputs=updater.parameters)

        yield minimise
        updater.step(self.step, self.frozen)
        self._note_failure()

    def take_losses(self) -> dict[str, float]:
        """Mean of every term since the last call, over all processes. Syncs with the device and the processes."""
        if not self.losses:
            return {}
        totals = torch.stack([total.float() for total in self.losses.values()])
        self.runtime.average(totals)
        means = dict(zip(self.losses, (totals / self.logged_steps).tolist(), strict=True))
        self.losses, self.logged_steps = {}, 0
        return means

    def learning_rates(self) -> dict[str, float]:
        """Base learning rate of each optimiser at the current step."""
        return {name: float(updater.optimiser.param_groups[0]["lr"]) for name, updater in self.updaters.items()}

    def failure(self) -> int | None:
        """The first step whose loss or gradient was not finite, or None. Syncs with the device."""
        step = int(self.first_bad_step)
        return None if step < 0 else step

    def state(self) -> dict[str, Tensor]:
        """Optimiser states and losses not yet taken, by name; `load` takes them back."""
        tensors = {"logged_steps": torch.tensor(self.logged_steps)}
        tensors |= {f"losses/{term}": total for term, total in self.losses.items()}
        for name, updater in self.updaters.items():
            for index, parameter in enumerate(updater.parameters):
                for key, value in updater.optimiser.state.get(parameter, {}).items():
                    tensors[f"optimisers/{name}/{index}/{key}"] = value
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, in the memory layout of the parameters (fused optimisers rely on it)."""
        self.losses, self.logged_steps = {}, int(tensors["logged_steps"])
        for place, value in tensors.items():
            match place.split("/"):
                case ["losses", term]:
                    self.losses[term] = value.to(self.runtime.device)
                case ["optimisers", name, index, key]:
                    updater = self.updaters[name]
                    parameter = updater.parameters[int(index)]
                    updater.optimiser.state[parameter][key] = _like(parameter, value)

    def _record(self, term: str, loss: Tensor) -> None:
        self.frozen.logical_or_(~torch.isfinite(loss))
        self.losses[term] = self.losses[term] + loss if term in self.losses else loss

    def _note_failure(self) -> None:
        first = (self.first_bad_step < 0) & (self.frozen > 0)
        self.first_bad_step = torch.where(first, float(self.step), self.first_bad_step)


class _Updater:
    """One optimiser with its schedule, clipping and averaging."""

    def __init__(self, optimised: Optimised, runtime: Runtime, steps: int) -> None:
        self.config, self.runtime, self.steps = optimised.config, runtime, steps
        self.factors = [group["factor"] for group in optimised.groups if group["params"]]
        groups = [{"params": group["params"]} for group in optimised.groups if group["params"]]
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.optimiser = _build(optimised.config, groups)

    def step(self, step: int, frozen: Tensor) -> None:
        self._average(frozen)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        frozen.logical_or_(~torch.isfinite(norm))
        if self.config.clip:
            clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        lr = self.config.lr * lr_factor(self.config, step, self.steps)
        for group, factor in zip(self.optimiser.param_groups, self.factors, strict=True):
            group["lr"] = lr * factor
        self.optimiser.found_inf = frozen  # type: ignore[attr-defined]  # fused optimisers skip the step on the device
        self.optimiser.step()

    def _average(self, frozen: Tensor) -> None:
        """Mean of all gradients over the processes; a missing one counts as zero, so that every rank sends the same."""
        if self.runtime.world == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([frozen.view(1), *(g.flatten() for g in gradients)])
        self.runtime.average(flat)
        frozen.copy_(flat[0] > 0)
        parts = torch.split(flat[1:], [g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _build(config: OptimiserConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, config.lr, config.momentum, 0, config.weight_decay, nesterov=config.nesterov, fused=True
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of `value` on the parameter's device, in its layout when it has its shape."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter).copy_(value)

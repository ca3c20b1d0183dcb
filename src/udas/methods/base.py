"""The contract of a method: what it sees, what it optimises, one training step, and the model it hands on."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from udas.config import MethodConfig, OptimiserConfig, SegmentationConfig
from udas.data.batch import Batch, Stream
from udas.networks.ensemble import Ensemble
from udas.networks.segmenters import Segmenter
from udas.networks.weights import save_segmenter
from udas.taxonomy import Taxonomy


class Minimise(Protocol):
    """Adds to what the open update minimises."""

    def __call__(self, loss: Tensor | Mapping[str, Tensor], name: str = "loss") -> None:
        """Back-propagate the scalar `loss` into the update's parameters and log it under `name`.

        Terms that share a graph come together, {name: scalar}: their sum is back-propagated, each is logged.
        """


class Engine(Protocol):
    """What a training loop lends to its method.

    step: the step that the open update belongs to, from 0; a resumed training counts on.
    """

    step: int

    def update(self, name: str) -> AbstractContextManager[Minimise]:
        """One optimiser step around the enclosed `minimise` calls."""


@dataclass(frozen=True)
class Task:
    """What is to be learnt, as far as a method needs to know.

    segmenter: builds a network for this run's classes, with its pretrained weights or the weights of an earlier stage.
    streams: the streams this stage provides.
    steps: optimiser steps of the whole training.
    teacher: loads the network of the stage's `teacher`, where one is named; of several, one that averages their
        probabilities.
    prototypes: [C, D] mean feature per class, of the stage's `prototypes`, where one is named.
    """

    taxonomy: Taxonomy
    segmenter: Callable[[], Segmenter]
    streams: frozenset[Stream]
    steps: int
    teacher: Callable[[], Segmenter | Ensemble] | None = None
    prototypes: Tensor | None = None


@dataclass(frozen=True)
class Optimised:
    """Parameter groups of one optimiser: `{"params": ..., "factor": multiple of the base learning rate}`."""

    groups: list[dict[str, Any]]
    config: OptimiserConfig

    @classmethod
    def module(cls, module: nn.Module, config: OptimiserConfig) -> Optimised:
        """All trainable parameters of `module` at the base learning rate."""
        return cls([{"params": trainable(module.parameters()), "factor": 1.0}], config)

    @classmethod
    def segmenter(cls, segmenter: Segmenter, config: OptimiserConfig) -> Optimised:
        """Encoder at the base learning rate, decoder at `head_factor` times it."""
        encoder, decoder = trainable(segmenter.encoder_parameters()), trainable(segmenter.decoder_parameters())
        return cls([{"params": encoder, "factor": 1.0}, {"params": decoder, "factor": config.head_factor}], config)


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those parameters that ask for a gradient."""
    return [parameter for parameter in parameters if parameter.requires_grad]


C = TypeVar("C", bound=MethodConfig)


class Method(nn.Module, ABC, Generic[C]):
    """A training method. What it remembers is modules and buffers, so that checkpoints need no method code.

    `needs` are the streams it cannot do without, `optional` those it uses when they are given. It holds no code for
    devices, precision, processes or logging: `update` does that.
    """

    settings: ClassVar[type[MethodConfig]]
    makes: ClassVar[Literal["segmenter", "translator"]] = "segmenter"
    needs: ClassVar[frozenset[Stream]] = frozenset()
    optional: ClassVar[frozenset[Stream]] = frozenset()

    def __init__(self, config: C, task: Task) -> None:
        super().__init__()
        self.config = config
        self.task = task
        self.engine: Engine | None = None

    def update(self, name: str) -> AbstractContextManager[Minimise]:
        """One step of optimiser `name` on the sum of what is minimised inside.

        Use: `with self.update("critic") as minimise: minimise(loss, "term")`.
        """
        return self._lent().update(name)

    @property
    def steps_done(self) -> int:
        """t: the steps before the one that is under way, from 0 on. Only inside a training loop, as `update`."""
        return self._lent().step

    def _lent(self) -> Engine:
        assert self.engine is not None, "a method steps only inside a training loop"
        return self.engine

    @abstractmethod
    def optimised(self) -> dict[str, Optimised]:
        """The optimisers of this method by name."""

    @abstractmethod
    def step(self, batch: Batch) -> None:
        """One training step, as the paper writes it."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The network that is evaluated, exported and handed to the next stage."""

    @abstractmethod
    def save_model(self, path: Path) -> None:
        """Write `model()` with all that is needed to use it again."""

    def smallest_batch(self) -> Mapping[Stream, int]:
        """Pictures per step that every process needs of a stream, where one is too few.

        What mixes the pictures of a batch with each other needs two. A run asks before it starts.
        """
        return {}

    def same_size(self) -> frozenset[Stream]:
        """Streams of both domains whose pictures are mixed with each other, and so need one size."""
        return frozenset()

    def smallest_picture(self) -> int:
        """Pixels that either side of a picture needs at least."""
        return 1

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures worth looking at while training: title -> [B, 3, H, W] in [0, 1]."""
        return {}


S = TypeVar("S", bound=SegmentationConfig)


class SegmentationMethod(Method[S]):
    """Base of the methods that train one segmentation network, with an optional running average of its weights."""

    def __init__(self, config: S, task: Task, average: float | None = None) -> None:
        super().__init__(config, task)
        self.segmenter = task.segmenter()
        self.average = Average(self.segmenter, average) if average else None

    def optimised(self) -> dict[str, Optimised]:
        """One optimiser, for the network; methods with more players add theirs."""
        return {"segmenter": Optimised.segmenter(self.segmenter, self.config.optimiser)}

    def model(self) -> Segmenter:
        """The averaged network where an average is kept, else the trained one."""
        return self.average.module if self.average else self.segmenter

    def save_model(self, path: Path) -> None:
        """Network, configuration, classes and normalisation in one safetensors file."""
        save_segmenter(path, self.model(), self.task.taxonomy)

    def follow(self) -> None:
        """Move the average one step towards the trained network; call at the end of `step`."""
        if self.average:
            self.average.update(self.segmenter)


class Average(nn.Module):
    """Exponential moving average of a network: w <- d w + (1 - d) w_now (mean teacher; Tarvainen and Valpola, 2017).

    Args:
        network: what is averaged; the average starts as its copy.
        decay: d.
        ramp: d = min(1 - 1 / (t + 1), decay) in step t = 1, 2, ..., so that the start is forgotten soon.
        buffers: running statistics are averaged like weights, or copied from the network.
        norm: it runs in the mode of its method (batch: statistics of the batch, dropout), or always in evaluation.
    """

    def __init__(
        self,
        network: Segmenter,
        decay: float,
        ramp: bool = False,
        buffers: Literal["average", "copy"] = "average",
        norm: Literal["batch", "running"] = "batch",
    ) -> None:
        super().__init__()
        self.decay, self.ramp, self.buffers_mode, self.norm = decay, ramp, buffers, norm
        self.module = copy.deepcopy(network).requires_grad_(False)
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.train()

    def train(self, mode: bool = True) -> Average:
        """As in PyTorch, but an average with running statistics stays in evaluation."""
        return super().train(mode and self.norm == "batch")

    @torch.no_grad()
    def update(self, network: Segmenter) -> None:
        """One step towards `network`; counters are copied."""
        self.updates += 1
        share = self._share()
        for weight, new in zip(self.module.parameters(), network.parameters(), strict=True):
            weight.lerp_(new, share.to(weight.dtype))
        for mine, theirs in zip(self.module.buffers(), network.buffers(), strict=True):
            averaged = self.buffers_mode == "average" and mine.is_floating_point()
            mine.lerp_(theirs, share.to(mine.dtype)) if averaged else mine.copy_(theirs)

    def _share(self) -> Tensor:
        """1 - d, without a host sync."""
        share = torch.full((), 1 - self.decay, device=self.updates.device)
        return torch.maximum(share, 1 / (self.updates + 1)) if self.ramp else share

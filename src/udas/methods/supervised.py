"""Supervised training on every labelled stream that is given."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, field_validator
from torch import Tensor

from udas.config import SegmentationConfig, Share
from udas.data.batch import Batch, Block, Stream
from udas.data.mixing import strong
from udas.losses import outputs_cross_entropy
from udas.methods.base import SegmentationMethod, Task


class SupervisedConfig(SegmentationConfig):
    """Settings of supervised training."""

    name: Literal["supervised"] = "supervised"
    weights: dict[Stream, NonNegativeFloat] = Field(
        default_factory=dict, description="weight of a stream's loss; 1 if not named, 0 leaves the stream out"
    )
    class_weights: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="w_c of a class by name; 1 if not named"
    )
    hard_share: Share = Field(1.0, description="share of hardest pixels that count (OHEM); 1 = all")
    confidence: bool = Field(False, description="weight pseudo-labels by their confidence")
    strong: bool = Field(False, description="strong colour augmentation of the pseudo-labelled pictures, on the device")
    average: float | None = Field(None, gt=0, lt=1, description="decay of the running average of weights that is kept")

    @field_validator("weights")
    @classmethod
    def _of_labels(cls, weights: dict[Stream, float]) -> dict[Stream, float]:
        if Stream.UNLABELLED in weights:
            raise ValueError("unlabelled pictures have no loss here")
        return weights


class Supervised(SegmentationMethod[SupervisedConfig]):
    """Pixel cross-entropy on labels: L = sum over streams k of w_k CE(f(x_k), y_k).

    Source only, target labels, pseudo-labels, or several at once: the stage's streams decide.
    """

    settings = SupervisedConfig
    optional = frozenset({Stream.SOURCE, Stream.LABELLED, Stream.PSEUDO})

    def __init__(self, config: SupervisedConfig, task: Task) -> None:
        super().__init__(config, task, config.average)
        self.class_weight: Tensor
        self.register_buffer("class_weight", class_weights(config.class_weights, task))

    def step(self, batch: Batch) -> None:
        """Minimise the weighted sum of the streams' cross-entropies."""
        with self.update("segmenter") as minimise:
            for stream in sorted(self.task.streams & self.optional):
                if weight := self.config.weights.get(stream, 1.0):
                    minimise(weight * self._loss(stream, getattr(batch, stream)), stream)
        self.follow()

    def _loss(self, stream: Stream, block: Block) -> Tensor:
        assert block.label is not None
        augment = self.config.strong and stream == Stream.PSEUDO
        image = strong(block.image, block.seeds) if augment else block.image
        weight = block.confidence if self.config.confidence else None
        outputs = self.segmenter.levels(image)
        return outputs_cross_entropy(
            outputs, block.label, self.class_weight, weight, self.config.hard_share, self.config.auxiliary
        )


def class_weights(by_name: dict[str, float], task: Task) -> Tensor:
    """[C] weights in the order of the label space. Raises `ConfigError` for an unknown class."""
    weight = torch.ones(len(task.taxonomy.classes))
    for name, value in by_name.items():
        weight[task.taxonomy.index(name, "class_weights")] = value
    return weight

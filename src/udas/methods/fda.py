"""Fourier domain adaptation: synthetic pictures in the style of real ones, and sure predictions on real ones."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from udas.config import AdaptationConfig, Share
from udas.data.batch import Batch, Block, Stream
from udas.data.fourier import swap_amplitude
from udas.data.mixing import inside_picture
from udas.losses import masked_mean, outputs_cross_entropy, robust_entropy
from udas.methods.base import Minimise, SegmentationMethod, Task


class FDAConfig(AdaptationConfig):
    """Settings of Fourier domain adaptation."""

    name: Literal["fda"] = "fda"
    beta: Share = Field(0.01, description="beta, size of the swapped window of low frequencies; 0 = no change of style")
    entropy: float = Field(0.005, ge=0, description="lambda_ent, weight of the entropy of the target; 0 = none")
    eta: float = Field(2.0, gt=0, description="eta, power of the robust penalty on the entropy")
    entropy_from: Share = Field(0.0, description="share of the steps at which the entropy term begins")
    pseudo: float = Field(1.0, ge=0, description="weight of the pseudo-labels in rounds of self-training")
    average: float | None = Field(None, gt=0, lt=1, description="decay of the running average of weights that is kept")


class FDA(SegmentationMethod[FDAConfig]):
    """FDA (Yang and Soatto, CVPR 2020): L = CE(f(x_{s->t}), y_s) + lambda_ent mean rho(e(x_t)).

    x_{s->t} = F^-1(low frequencies' amplitudes of x_t, all else of x_s), of size beta (section 3.1)
    e(x)     = -sum_c p_c log p_c / log C, p = softmax f(x);  rho(e) = (e^2 + 1e-8)^eta (section 3.2)
    Rounds of self-training add pseudo CE(f(x_p), y_p) with the labels of an earlier stage; the entropy is then that of
    the pictures x_p (section 3.3). The i-th picture of the shuffled target stream lends its style to the i-th
    source picture.
    """

    settings = FDAConfig
    needs = frozenset({Stream.SOURCE, Stream.UNLABELLED})
    optional = frozenset({Stream.LABELLED, Stream.PSEUDO})

    def __init__(self, config: FDAConfig, task: Task) -> None:
        super().__init__(config, task, config.average)

    def step(self, batch: Batch) -> None:
        """Minimise the cross-entropy on restyled source pictures and the penalty on the target's entropy."""
        source, target = batch.source, batch.unlabelled
        assert source is not None
        assert target is not None
        styled = _restyled(source.image, _partners(target, len(source.image)), self.config.beta)
        with self.update("segmenter") as minimise:
            minimise(self._cross_entropy(self.segmenter.levels(styled), source), "source")
            if batch.labelled is not None:
                outputs = self.segmenter.levels(batch.labelled.image)
                minimise(self.config.labelled * self._cross_entropy(outputs, batch.labelled), "labelled")
            if batch.pseudo is not None:
                self._train_on_pseudo(minimise, batch.pseudo)
            elif self.config.entropy:
                minimise(self._penalty(self.segmenter(target.image), target.image), "entropy")
        self.follow()

    def _train_on_pseudo(self, minimise: Minimise, block: Block) -> None:
        """Cross-entropy and entropy of one forward pass."""
        outputs = self.segmenter.levels(block.image)
        loss = self.config.pseudo * self._cross_entropy(outputs, block)
        minimise({"pseudo": loss, "entropy": self._penalty(outputs[0], block.image)})

    def _cross_entropy(self, outputs: tuple[Tensor, ...], block: Block) -> Tensor:
        assert block.label is not None
        return outputs_cross_entropy(outputs, block.label, auxiliary=self.config.auxiliary)

    def _penalty(self, logits: Tensor, image: Tensor) -> Tensor:
        """lambda_ent mean rho(e) over the pixels inside the pictures, zero before its first step."""
        begun = self.steps_done >= round(self.config.entropy_from * self.task.steps)
        return self.config.entropy * begun * masked_mean(robust_entropy(logits, self.config.eta), inside_picture(image))


def _restyled(source: Tensor, target: Tensor, beta: float) -> Tensor:
    """x_{s->t} of pictures [B, 3, H, W]; the black beyond a picture stays black, and lends or takes no style."""
    inside = inside_picture(source)[:, None]
    lender = _filled(target, inside_picture(target)[:, None])
    return torch.where(inside, swap_amplitude(_filled(source, inside), lender, beta), source)


def _filled(image: Tensor, inside: Tensor) -> Tensor:
    """The pictures with their mean colour where the mask [B, 1, H, W] is False."""
    mean = (image * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(inside, image, mean)


def _partners(block: Block, count: int) -> Tensor:
    """`count` pictures of the block in order, repeated when there are fewer."""
    return block.image[torch.arange(count, device=block.image.device) % len(block.image)]

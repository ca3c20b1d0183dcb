"""ProDA, stage 1: pseudo-labels denoised by class prototypes, and the structure of the target's feature space."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from udas.config import AdaptationConfig
from udas.data.batch import IGNORE, Batch, Block, Stream
from udas.data.mixing import inside_picture
from udas.data.randaugment import draw_strong, unchanged
from udas.losses import distillation, symmetric_cross_entropy, uniformity
from udas.methods.base import Average, SegmentationMethod, Task
from udas.methods.domains import supervise
from udas.methods.frozen import Frozen
from udas.methods.prototypes import Prototypes, fitting_prototypes
from udas.networks.segmenters import Outputs


class ProDAConfig(AdaptationConfig):
    """Settings of ProDA's stage 1."""

    name: Literal["proda"] = "proda"
    alpha: float = Field(0.1, ge=0, description="alpha, weight of the cross-entropy in L_sce")
    beta: float = Field(1.0, ge=0, description="beta, weight of the reversed cross-entropy in L_sce")
    structure: float = Field(10.0, ge=0, description="gamma_1, weight of L_kl, the consistency of feature structure")
    regularisation: float = Field(0.1, ge=0, description="gamma_2, weight of L_reg, against sure predictions")
    temperature: float = Field(1.0, gt=0, description="tau: weights are softmax(-tau distance to the prototypes)")
    reweight: Literal["prototypes", "prediction", "none"] = Field(
        "prototypes", description="w_k: from distances to the prototypes, the averaged network's prediction, or 1"
    )
    soft_label: Literal["fixed", "moving"] = Field(
        "fixed", description="p_0: prediction of the frozen teacher, or of the averaged network"
    )
    target: Literal["hard", "soft"] = Field("hard", description="y: argmax of w p_0, or w p_0 scaled to sum 1")
    strong: bool = Field(True, description="L_kl compares with strong views; false = with the pictures as they come")
    decay: float = Field(0.9999, ge=0, le=1, description="lambda, decay of the prototypes; 1 = they never move")
    minimum: int = Field(10, ge=1, description="pixels of a class, at the features' size, that move its prototype")
    momentum: float = Field(0.999, ge=0, lt=1, description="decay of the averaged network")
    averaged_norm: Literal["batch", "running"] = Field(
        "batch", description="the averaged network runs in training mode (batch statistics, dropout) or in evaluation"
    )


class Belief(NamedTuple):
    """What the unchanged target pictures are taken for.

    classes: w p_0, [B, C, H, W], scaled to sum 1.
    structure: softmax(-tau distances) of the averaged network's features, [B, C, h, w].
    """

    classes: Tensor
    structure: Tensor


class ProDA(SegmentationMethod[ProDAConfig]):
    """Zhang et al., "Prototypical Pseudo Label Denoising and Target Structure Learning", CVPR 2021, stage 1.

    f_0: the frozen teacher (a warm-up network); g, f and g', f': features and network, and their running average;
    x_t: unlabelled real pictures, A: strong views; eta_k: prototypes (`udas.methods.prototypes`).

        q(g)  = softmax_k(-tau ||g - eta_k||_2)
        y     = argmax_k q_k(g'(x_t)) p_0,k              p_0 = softmax f_0(x_t), fixed
        L_sce = alpha CE(y, p) + beta CE(p, y)           p = softmax f(x_t)
        L_kl  = KL(q(g'(x_t)) || q(g(A x_t)))            the former moved like the view
        L_reg = -mean log p
        L     = CE(f(x_s), y_s) + L_sce + structure L_kl + regularisation L_reg   (+ labelled CE(f(x_l), y_l))

    Then eta_k <- decay eta_k + (1 - decay) mean of g' where f' says k, per picture. Pixels beyond the picture count in
    neither L_sce nor the prototypes; those of a view beyond the picture or in its grey square not in L_kl. The trained
    network f is handed on.
    """

    settings = ProDAConfig
    needs = frozenset({Stream.SOURCE, Stream.UNLABELLED})
    optional = frozenset({Stream.LABELLED})

    def __init__(self, config: ProDAConfig, task: Task) -> None:
        super().__init__(config, task)
        self.warm_up = Frozen(task)
        self.averaged = Average(self.segmenter, config.momentum, buffers="copy", norm=config.averaged_norm)
        vectors = fitting_prototypes(task.prototypes, self.segmenter.classes, self.segmenter.decoder.channels)
        self.prototypes = Prototypes(vectors, config.temperature, config.decay, config.minimum)

    def step(self, batch: Batch) -> None:
        """Learn source labels, denoised pseudo-labels and structure; then move prototypes and average."""
        source, labelled, target = batch.source, batch.labelled, batch.unlabelled
        assert source is not None
        assert target is not None
        image, c = target.image, self.config
        with torch.no_grad():
            averaged = self.averaged.module.outputs(image)
            belief = self._believe(image, averaged)
        inside = inside_picture(image)
        with self.update("segmenter") as minimise:
            supervise(minimise, self.segmenter, source, "source", c.auxiliary)
            if labelled is not None:
                supervise(minimise, self.segmenter, labelled, "labelled", c.auxiliary, c.labelled)
            minimise(self._denoise(image, belief.classes, inside))
            minimise(c.structure * self._compare(target, belief.structure, inside), "structure")
        self.prototypes.update(averaged.representation, masked(averaged.labels(), inside))
        self.averaged.update(self.segmenter)

    def _believe(self, image: Tensor, averaged: Outputs) -> Belief:
        """From what the averaged network says of the unchanged pictures."""
        structure, prediction = self.prototypes.weights(averaged.representation), averaged.levels[0].softmax(1)
        classes = prediction if self.config.soft_label == "moving" else self.warm_up(image)
        if self.config.reweight == "prototypes":
            classes = classes * averaged.resized(structure, image.shape[-2:])
        elif self.config.reweight == "prediction":
            classes = classes * prediction
        return Belief(classes / classes.sum(1, keepdim=True).clamp(min=1e-12), structure)

    def _denoise(self, image: Tensor, classes: Tensor, inside: Tensor) -> dict[str, Tensor]:
        """L_sce over the pixels inside the pictures, and regularisation L_reg, of one forward pass."""
        logits, c = self.segmenter(image), self.config
        if c.target == "hard":
            classes = torch.zeros_like(classes).scatter_(1, classes.argmax(1, keepdim=True), 1)
        return {
            "pseudo": symmetric_cross_entropy(logits, classes, inside, c.alpha, c.beta),
            "regularisation": c.regularisation * uniformity(logits),
        }

    def _compare(self, block: Block, structure: Tensor, inside: Tensor) -> Tensor:
        """L_kl: structure [B, C, h, w] of the unchanged pictures, moved like the view, against that of the view."""
        views = draw_strong(block.image, block.seeds) if self.config.strong else unchanged(block.image)
        features = self.segmenter.representation(views.picture(block.image))
        moved, covered = views.maps(structure)
        shown, _ = views.maps(shrunk(inside, structure)[:, None].float())
        return distillation(self.prototypes.log_weights(features), moved, covered & (shown.squeeze(1) > 0))


def masked(label: Tensor, inside: Tensor) -> Tensor:
    """Labels [B, h, w] with IGNORE where the picture's mask [B, H, W], at their size, is False."""
    return label.masked_fill(~shrunk(inside, label), IGNORE)


def shrunk(inside: Tensor, like: Tensor) -> Tensor:
    """A mask [B, H, W] at the size [h, w] of `like`, that of the nearest pixel."""
    return F.interpolate(inside[:, None].float(), like.shape[-2:], mode="nearest").squeeze(1) > 0

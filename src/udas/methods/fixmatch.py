"""FixMatch for segmentation: what the network says of a picture is what it has to say of a strongly changed one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from udas.config import SemiSupervisedConfig, Share
from udas.data.batch import IGNORE, Batch, Block, Stream, together
from udas.data.masks import sized_boxes
from udas.data.mixing import inside_picture, partners, paste, strong
from udas.losses import outputs_cross_entropy
from udas.methods.base import Minimise, SegmentationMethod
from udas.methods.domains import label_loss, supervise
from udas.networks.segmenters import Segmenter

HALF = 0.5  # the published sum of supervised and unsupervised losses is halved


class WeakToStrongConfig(SemiSupervisedConfig):
    """What FixMatch and UniMatch share."""

    threshold: Share = Field(0.95, description="tau, confidence from which a pseudo-label counts; Cityscapes: 0")
    cutmix: Share = Field(0.5, description="probability that a box of another picture is pasted on a strong view")
    share: tuple[Share, Share] = Field((0.02, 0.4), description="area of that box as a share of the picture: from, to")


W = TypeVar("W", bound=WeakToStrongConfig)


class WeakToStrong(SegmentationMethod[W]):
    """Base of FixMatch and UniMatch: the streams they take, and how many pictures they need of them."""

    needs = frozenset({Stream.LABELLED, Stream.UNLABELLED})
    optional = frozenset({Stream.SOURCE})

    def smallest_batch(self) -> dict[Stream, int]:
        """Two unlabelled pictures for a box of another one."""
        return {Stream.UNLABELLED: 2} if self.config.cutmix else {}


class FixMatchConfig(WeakToStrongConfig):
    """Settings of FixMatch."""

    name: Literal["fixmatch"] = "fixmatch"
    consistency: float = Field(1.0, ge=0, description="weight of L_u, the loss on strong views")


class PseudoLabels(NamedTuple):
    """Pseudo-labels of unlabelled pictures.

    label: [B, H, W] int64; IGNORE beyond the picture.
    confidence: [B, H, W] in [0, 1].
    """

    label: Tensor
    confidence: Tensor


class FixMatch(WeakToStrong[FixMatchConfig]):
    """FixMatch (Sohn et al., NeurIPS 2020) for segmentation, the baseline of UniMatch (Yang et al., CVPR 2023).

    x_l, y_l: labelled pictures; x_u: unlabelled ones as the loader gives them (the weak view); f: the network.

        p      = softmax f(x_u), no gradient;  y = argmax_c p_c
        A      = colour jitter, greyscale and blur at random, then CutMix: with probability `cutmix` a box of another
                 picture's A, y and p moved likewise
        L_u(z) = sum over pixels of [max_c p_c >= tau] CE(z, y) / number of pixels inside the picture
        L      = (CE(f(x_l), y_l) + consistency L_u(f(A x_u))   + source CE(f(x_s), y_s)) / 2

    Pixels below tau are in the denominator, so that L_u grows with the share of confident ones. The other picture is
    the next one of the batch. x_l and x_u pass together, so that batch norms see one batch of both, as in the released
    code.
    """

    settings = FixMatchConfig

    def step(self, batch: Batch) -> None:
        """Learn labels, and pseudo-labels on strong views."""
        labelled, target, c = batch.labelled, batch.unlabelled, self.config
        assert labelled is not None
        assert target is not None
        with self.update("segmenter") as minimise:
            learn_source(minimise, self.segmenter, batch, c)
            outputs = self.segmenter.levels(together(labelled, target))
            minimise(HALF * label_loss(outputs, labelled, c.auxiliary), "labelled")
            pseudo = pseudo_labels(outputs[0].detach()[len(labelled.image) :], target.image)
            image, pseudo = strong_view(target, target.seeds, pseudo, c)
            loss = pseudo_loss(self.segmenter.levels(image), pseudo, c)
            minimise(HALF * c.consistency * loss, "strong")


def learn_source(minimise: Minimise, segmenter: Segmenter, batch: Batch, config: WeakToStrongConfig) -> None:
    """Minimise half the cross-entropy on synthetic pictures, where they are given."""
    if batch.source is not None:
        supervise(minimise, segmenter, batch.source, "source", config.auxiliary, HALF * config.source)


def pseudo_labels(logits: Tensor, image: Tensor) -> PseudoLabels:
    """Classes and confidences from logits [B, C, H, W] of pictures [B, 3, H, W] as the loader gave them."""
    confidence, label = logits.softmax(1).max(1)
    return PseudoLabels(torch.where(inside_picture(image), label, IGNORE), confidence)


def strong_view(
    block: Block, seeds: Sequence[int], pseudo: PseudoLabels, config: WeakToStrongConfig
) -> tuple[Tensor, PseudoLabels]:
    """A strong view A of the pictures, [B, 3, H, W], and its pseudo-labels.

    Args:
        block: the weak view.
        seeds: one seed per picture; other seeds give another, independent view.
        pseudo: pseudo-labels of the weak view.
        config: probability and area of boxes.

    Raises:
        ConfigError: a batch of one, which has no other picture to take a box from.
    """
    image = strong(block.image, seeds)
    if not config.cutmix:
        return image, pseudo
    other = partners(block.names, image.device)
    box = sized_boxes(seeds, image.shape[-2], image.shape[-1], config.share, config.cutmix, image.device)
    image, label, confidence = (paste(plane, plane[other], box) for plane in (image, *pseudo))
    return image, PseudoLabels(label, confidence)


def pseudo_loss(outputs: Sequence[Tensor], pseudo: PseudoLabels, config: WeakToStrongConfig) -> Tensor:
    """L_u: cross-entropy of confident pseudo-labels, divided by the number of all pixels inside the pictures."""
    confident = (pseudo.confidence >= config.threshold).float()
    return outputs_cross_entropy(outputs, pseudo.label, pixel_weight=confident, auxiliary=config.auxiliary)

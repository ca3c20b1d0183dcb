"""CutMix-Seg: a mean teacher whose student sees two unlabelled pictures in one, or one with a hole."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from udas.config import SemiSupervisedConfig, Share
from udas.data.batch import Batch, Block, Stream
from udas.data.masks import box_masks
from udas.data.mixing import inside_picture, partners, paste, strong
from udas.losses import masked_mean, sure_share
from udas.methods.base import Average, SegmentationMethod, Task
from udas.methods.domains import supervise
from udas.networks.segmenters import Segmenter


class CutMixSegConfig(SemiSupervisedConfig):
    """Settings of CutMix-Seg."""

    name: Literal["cutmixseg"] = "cutmixseg"
    consistency: float = Field(1.0, ge=0, description="weight of L_cons")
    mask: Literal["cutmix", "cutout"] = Field(
        "cutmix", description="the box shows another picture; or it is blank and does not count"
    )
    share: tuple[Share, Share] = Field(
        (0.5, 0.5), description="share of the picture in the box, drawn from this range; cutout: [0, 1] unless given"
    )
    loss: Literal["squared", "cross_entropy"] = Field(
        "squared", description="d: squared difference of the probabilities, summed over classes; or cross-entropy"
    )
    threshold: Share = Field(0.97, description="tau, confidence from which a pixel of the teacher counts as sure")
    confidence: Literal["picture", "batch", "pixel"] = Field(
        "picture",
        description="s: share of sure pixels in the picture, or the batch, for all of them; or 1 for each sure pixel",
    )
    colours: bool = Field(False, description="the student sees changed colours, as in the paper of 2021")
    decay: float = Field(0.99, gt=0, lt=1, description="alpha, the decay of the mean teacher")
    teacher_norm: Literal["running", "batch"] = Field(
        "running", description="statistics of the teacher's batch norm: running ones in evaluation mode, or the batch's"
    )
    keep: Literal["teacher", "student"] = Field("teacher", description="the network that is evaluated and handed on")

    @model_validator(mode="before")
    @classmethod
    def _published_share(cls, raw: Any) -> Any:
        cutout = isinstance(raw, dict) and raw.get("mask") == "cutout"
        return {"share": (0.0, 1.0)} | raw if cutout else raw


class Mixed(NamedTuple):
    """What the student sees and should say.

    image: [B, 3, H, W].
    target: the teacher's logits [B, C, H, W].
    valid: [B, H, W] bool, pixels inside the pictures, over which the loss is averaged.
    weight: [B, H, W], 0 where the loss does not count.
    """

    image: Tensor
    target: Tensor
    valid: Tensor
    weight: Tensor


class CutMixSeg(SegmentationMethod[CutMixSegConfig]):
    """French et al., "Semi-supervised semantic segmentation needs strong, varied perturbations", BMVC 2020.

    x_l, y_l: labelled pictures; a, b: unlabelled ones; f: the student, g: its mean teacher; M: 1 in a random box.

        x_m    = (1 - M) a + M b
        p_t    = softmax((1 - M) g(a) + M g(b)),   p_s = softmax f(x_m)
        d      = sum_c (p_s - p_t)^2                                                      per pixel
        s      = share of the pixels of x_m with max_c p_t >= tau: one number per picture, or per batch
        L_cons = mean of s d
        L      = CE(f(x_l), y_l) + consistency L_cons   (+ source CE(f(x_s), y_s))
        g     <- alpha g + (1 - alpha) f, buffers too

    b is the next picture of the batch. CutOut: x_m = (1 - M) a + M mean colour, p_t = softmax g(a), and d counts only
    where M = 0. The mean is over pixels inside the pictures; for CutOut those in the box are among them, with d = 0.
    """

    settings = CutMixSegConfig
    needs = frozenset({Stream.LABELLED, Stream.UNLABELLED})
    optional = frozenset({Stream.SOURCE})

    def __init__(self, config: CutMixSegConfig, task: Task) -> None:
        super().__init__(config, task)
        self.teacher = Average(self.segmenter, config.decay, norm=config.teacher_norm)

    def model(self) -> Segmenter:
        """What `keep` says; the published scores are the teacher's."""
        return self.teacher.module if self.config.keep == "teacher" else self.segmenter

    def smallest_batch(self) -> dict[Stream, int]:
        """Two unlabelled pictures for a box of another one."""
        return {Stream.UNLABELLED: 2} if self.config.mask == "cutmix" else {}

    def step(self, batch: Batch) -> None:
        """Train the student on labels and on mixed pictures; then the teacher follows."""
        source, labelled, target, c = batch.source, batch.labelled, batch.unlabelled, self.config
        assert labelled is not None
        assert target is not None
        mixed = self._mix(target)
        with self.update("segmenter") as minimise:
            supervise(minimise, self.segmenter, labelled, "labelled", c.auxiliary)
            if source is not None:
                supervise(minimise, self.segmenter, source, "source", c.auxiliary, c.source)
            distance = self._distance(self.segmenter(mixed.image), mixed.target)
            minimise(c.consistency * masked_mean(distance * mixed.weight, mixed.valid), "consistency")
        self.teacher.update(self.segmenter)

    @torch.no_grad()
    def _mix(self, block: Block) -> Mixed:
        """Each picture with a box of the next one, or with a blank box."""
        image, c = block.image, self.config
        target, valid = self.teacher.module(image), inside_picture(image)
        seen = strong(image, block.seeds, 0.4, 0.4, 0.4, 0.1, blurred=0) if c.colours else image
        box = box_masks(block.seeds, image.shape[-2], image.shape[-1], c.share, image.device)
        if c.mask == "cutmix":
            other = partners(block.names, image.device)
            seen, target, valid = (paste(both, both[other], box) for both in (seen, target, valid))
            visible = torch.ones_like(valid)
        else:
            seen, visible = torch.where(box, self.segmenter.mean, seen), ~box.squeeze(1)
        return Mixed(seen, target, valid, visible * self._confidence(target, valid))

    def _confidence(self, target: Tensor, valid: Tensor) -> Tensor:
        """s, [B, H, W], [B, 1, 1] or [1, 1, 1]."""
        sure = target.softmax(1).amax(1) >= self.config.threshold
        if self.config.confidence == "pixel":
            return (sure & valid).float()
        return sure_share(sure, valid, (0, 1, 2) if self.config.confidence == "batch" else (1, 2))

    def _distance(self, logits: Tensor, target: Tensor) -> Tensor:
        """How far the student's logits are from the teacher's: d, [B, H, W]."""
        p_t = target.softmax(1)
        if self.config.loss == "cross_entropy":
            return F.cross_entropy(logits, p_t, reduction="none")
        return (logits.softmax(1) - p_t).square().sum(1)

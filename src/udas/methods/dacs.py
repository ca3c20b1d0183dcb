"""Cross-domain mixed sampling: classes of synthetic pictures pasted on real ones, labelled by a mean teacher."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from udas.config import AdaptationConfig, Share
from udas.data.batch import IGNORE, Batch, Block, Stream
from udas.data.masks import classmix_masks
from udas.data.mixing import inside_picture, paste, strong
from udas.losses import outputs_cross_entropy, sure_share
from udas.methods.base import Average, SegmentationMethod, Task
from udas.methods.domains import supervise
from udas.networks.segmenters import Segmenter

BLUR = (0.15, 1.15)  # pixels; released code


class DACSConfig(AdaptationConfig):
    """Settings of cross-domain mixed sampling."""

    name: Literal["dacs"] = "dacs"
    consistency: float = Field(1.0, ge=0, description="weight of L_u, the loss on mixed pictures")
    threshold: Share = Field(0.968, description="tau; q is the share of a picture's pixels at least as confident")
    decay: float = Field(0.99, gt=0, lt=1, description="alpha, the decay of the mean teacher")
    teacher_norm: Literal["batch", "running"] = Field(
        "batch", description="statistics the teacher's batch norms use: of the batch, as released, or running ones"
    )
    void: bool = Field(False, description="unlabelled source pixels count as one more class that can be pasted")
    jitter: float = Field(0.25, ge=0, le=0.5, description="brightness, contrast, saturation, hue of mixed pictures")
    jittered: Share = Field(0.8, description="share of the mixed pictures whose colours are changed")
    blurred: Share = Field(0.5, description="share of the mixed pictures that are blurred")
    keep: Literal["student", "teacher"] = Field("student", description="the network that is evaluated and handed on")


class DACS(SegmentationMethod[DACSConfig]):
    """DACS (Tranheden et al., WACV 2021): L = CE(f(x_s), y_s) + consistency L_u.

    y_t = argmax_c g(x_t)_c                 labels by the mean teacher g, on pictures as the loader gives them
    q   = share of the picture's pixels with max_c softmax(g(x_t))_c >= tau: one number per picture, no mask of pixels
    M   = the pixels of a random half of the classes in y_s (ClassMix)
    x_m = strong(M x_s + (1 - M) x_t),  y_m likewise;  W = 1 where M, q elsewhere
    L_u = mean of W CE(f(x_m), y_m), without what a zoom left black of x_t, which does not count in q either
    g moves by the running average of f with decay min(1 - 1 / (t + 1), alpha).
    """

    settings = DACSConfig
    needs = frozenset({Stream.SOURCE, Stream.UNLABELLED})
    optional = frozenset({Stream.LABELLED})

    def __init__(self, config: DACSConfig, task: Task) -> None:
        super().__init__(config, task)
        self.teacher = Average(self.segmenter, config.decay, ramp=True, norm=config.teacher_norm)

    def model(self) -> Segmenter:
        """What `keep` says; the published scores are the student's."""
        return self.teacher.module if self.config.keep == "teacher" else self.segmenter

    def same_size(self) -> frozenset[Stream]:
        """Classes of synthetic pictures are pasted on unlabelled ones."""
        return self.needs

    def step(self, batch: Batch) -> None:
        """Train the student on source and on mixed pictures; then the teacher follows."""
        source, labelled, target, c = batch.source, batch.labelled, batch.unlabelled, self.config
        assert source is not None
        assert target is not None
        image, label, weight = self._mix(source, target)
        with self.update("segmenter") as minimise:
            supervise(minimise, self.segmenter, source, "source", c.auxiliary)
            if labelled is not None:
                supervise(minimise, self.segmenter, labelled, "labelled", c.auxiliary, c.labelled)
            outputs = self.segmenter.levels(image)
            loss = outputs_cross_entropy(outputs, label, pixel_weight=weight, auxiliary=c.auxiliary)
            minimise(c.consistency * loss, "mixed")
        self.teacher.update(self.segmenter)

    @torch.no_grad()
    def _mix(self, source: Block, target: Block) -> tuple[Tensor, Tensor, Tensor]:
        """x_m [B, 3, H, W], y_m [B, H, W], W [B, H, W]; a smaller source block is used repeatedly."""
        assert source.label is not None
        c, j = self.config, self.config.jitter
        partner = torch.arange(len(target.image), device=target.image.device) % len(source.image)
        confidence, label = self.teacher.module(target.image).softmax(1).max(1)
        inside = inside_picture(target.image)
        quality = sure_share(confidence >= c.threshold, inside)
        label = label.masked_fill(~inside, IGNORE)
        mask = classmix_masks(source.label[partner], target.seeds, c.void)
        image = paste(target.image, source.image[partner], mask)
        image = strong(image, target.seeds, j, j, j, j, c.jittered, grey=0.0, blurred=c.blurred, sigma=BLUR)
        return image, paste(label, source.label[partner], mask), torch.where(mask.squeeze(1), 1.0, quality)

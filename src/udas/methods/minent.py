"""MinEnt: predictions on target pictures have to be sure."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from udas.config import AdaptationConfig
from udas.data.batch import Batch, Stream
from udas.data.mixing import inside_picture
from udas.losses import entropy, masked_mean
from udas.methods.base import SegmentationMethod, Task
from udas.methods.domains import LABELLED_DOMAINS, labelled_domain, supervise


class MinEntConfig(AdaptationConfig):
    """Settings of MinEnt. The network decides the levels: one whose name ends in `_multi` has two outputs."""

    name: Literal["minent"] = "minent"
    auxiliary: float = Field(0.1, ge=0, description="lambda_seg of the auxiliary output, where the network has one")
    entropy: float = Field(1e-3, gt=0, description="lambda_ent of the main output")
    entropy_auxiliary: float = Field(2e-4, ge=0, description="lambda_ent of the auxiliary output")


class MinEnt(SegmentationMethod[MinEntConfig]):
    """Vu et al., CVPR 2019, section 3.1: L = L_seg + L_ent, over the outputs of the network.

    x_s, y_s: pictures and labels of the labelled domain (source or pseudo), x_t: unlabelled, P = softmax f(x) of an
    output, main or auxiliary, over C classes.

        L_seg = CE(P_s^main, y_s) + lambda_seg CE(P_s^aux, y_s)
        E     = -1/log(C) sum_c P_t log P_t                                             per pixel, in [0, 1]
        L_ent = lambda_ent^main mean(E^main) + lambda_ent^aux mean(E^aux)               over pixels inside pictures
    """

    settings = MinEntConfig
    needs = frozenset({Stream.UNLABELLED})
    optional = LABELLED_DOMAINS | {Stream.LABELLED}

    def __init__(self, config: MinEntConfig, task: Task) -> None:
        super().__init__(config, task)
        self.domain = labelled_domain(task)
        outputs = self.segmenter.decoder.num_levels
        self.lambda_ent = [config.entropy] + [config.entropy_auxiliary] * (outputs - 1)

    def step(self, batch: Batch) -> None:
        """Minimise the cross-entropy on labels and the entropy of target predictions."""
        source, target, labelled = getattr(batch, self.domain), batch.unlabelled, batch.labelled
        assert target is not None
        with self.update("segmenter") as minimise:
            supervise(minimise, self.segmenter, source, self.domain, self.config.auxiliary)
            if labelled is not None:
                supervise(minimise, self.segmenter, labelled, "labelled", self.config.auxiliary, self.config.labelled)
            f_t = self.segmenter.levels(target.image)
            inside = inside_picture(target.image)
            terms = [w * masked_mean(entropy(logits), inside) for w, logits in zip(self.lambda_ent, f_t, strict=True)]
            minimise(torch.stack(terms).sum(), "entropy")

"""Rectified pseudo-labels, stage II of Seg-Uncertainty: where two classifiers disagree, a pseudo-label counts less."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from udas.config import AdaptationConfig, Share
from udas.data.batch import Batch, Block, Stream
from udas.losses import balanced_cross_entropy, rectified_cross_entropy
from udas.methods.base import SegmentationMethod, Task
from udas.methods.domains import supervise
from udas.methods.mrnet import ClassBalance, require_two_outputs


class RectifiedConfig(AdaptationConfig):
    """Settings of training on rectified pseudo-labels."""

    name: Literal["rectified"] = "rectified"
    auxiliary: float = Field(0.5, ge=0, description="lambda_seg of the auxiliary output")
    rare_weight: float = Field(7.0, ge=1, description="weight of a class that is rare in the batch; 1 = no balancing")
    rare_share: Share = Field(1 / 32, description="a class with a smaller share of the batch's pixels is rare")
    plain: Share | None = Field(
        None, description="to compare with: plain pseudo-labels by the L_seg of mrnet, on this share of hardest pixels"
    )


class Rectified(SegmentationMethod[RectifiedConfig]):
    """Zheng and Yang, IJCV 2021: L = L_rect(main, aux) + lambda_seg L_rect(aux, main) on pseudo-labels y.

        L_rect(a, b) = mean [exp(-D) w_y CE(z^a, y) + D]        D = KL(P^b || P^a) per pixel, P = softmax z

    The direction of D is the released code's; the paper prints the other one for the main output. D stands for the
    variance of the prediction: no threshold on the pseudo-labels has to be chosen. Gradients flow through all of it. w
    of `ClassBalance`. Plain pseudo-labels, what it is compared with, are learnt as `MRNet` learns the source's labels:
    L = CE_w(z^main, y) + lambda_seg CE_w(z^aux, y) on the hardest pixels.
    """

    settings = RectifiedConfig
    needs = frozenset({Stream.PSEUDO})
    optional = frozenset({Stream.LABELLED})

    def __init__(self, config: RectifiedConfig, task: Task) -> None:
        super().__init__(config, task)
        require_two_outputs(self.segmenter, config.name)
        self.balance = ClassBalance(len(task.taxonomy.classes), config.rare_weight, config.rare_share)

    def step(self, batch: Batch) -> None:
        """Minimise the rectified loss on pseudo-labels, and plain cross-entropy on real labels where given."""
        pseudo, labelled = batch.pseudo, batch.labelled
        assert pseudo is not None
        with self.update("segmenter") as minimise:
            minimise(self._learn(pseudo), "pseudo")
            if labelled is not None:
                supervise(minimise, self.segmenter, labelled, "labelled", self.config.auxiliary, self.config.labelled)

    def _learn(self, block: Block) -> Tensor:
        assert block.label is not None
        z, label, c, weight = self.segmenter.levels(block.image), block.label, self.config, self.balance(block.label)
        if c.plain is None:
            main, auxiliary = (rectified_cross_entropy(a, b, label, weight) for a, b in (z, z[::-1]))
        else:
            main, auxiliary = (balanced_cross_entropy(output, label, weight, c.plain) for output in z)
        return main + c.auxiliary * auxiliary

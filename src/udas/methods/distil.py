"""ProDA, stages 2 and 3: a new student learns from the network of the stage before."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from udas.config import AdaptationConfig
from udas.data.batch import Batch, Block, Stream
from udas.data.randaugment import draw_strong, unchanged
from udas.losses import cross_entropy, distillation
from udas.methods.base import SegmentationMethod, Task
from udas.methods.domains import supervise
from udas.methods.frozen import Frozen


class DistilConfig(AdaptationConfig):
    """Settings of the distillation."""

    name: Literal["distil"] = "distil"
    pseudo: float = Field(1.0, ge=0, description="weight of the cross-entropy on pseudo-labels")
    distillation: float = Field(1.0, ge=0, description="beta, weight of L_kd")
    strong: bool = Field(True, description="learn on strong views; false = on the pictures as they come")


class Distil(SegmentationMethod[DistilConfig]):
    """Zhang et al., "Prototypical Pseudo Label Denoising and Target Structure Learning", CVPR 2021, Section 3.4.

    f_T: the frozen teacher; f: the student, usually from other weights; x_p, y_p: real pictures and the labels that
    f_T was sure of, IGNORE elsewhere; A: strong views.

        L    = CE(f(x_s), y_s) + pseudo CE(f(A x_p), A y_p) + distillation L_kd   (+ labelled CE(f(x_l), y_l))
        L_kd = KL(softmax f_T(A x_p) || softmax f(A x_p))     mean over all pixels of the views, and over classes
    """

    settings = DistilConfig
    needs = frozenset({Stream.SOURCE, Stream.PSEUDO})
    optional = frozenset({Stream.LABELLED})

    def __init__(self, config: DistilConfig, task: Task) -> None:
        super().__init__(config, task)
        self.teacher = Frozen(task)

    def step(self, batch: Batch) -> None:
        """Learn source labels, pseudo-labels and the teacher's probabilities."""
        source, labelled, pseudo = batch.source, batch.labelled, batch.pseudo
        assert source is not None
        assert pseudo is not None
        with self.update("segmenter") as minimise:
            supervise(minimise, self.segmenter, source, "source", self.config.auxiliary)
            if labelled is not None:
                supervise(minimise, self.segmenter, labelled, "labelled", self.config.auxiliary, self.config.labelled)
            minimise(self._follow_teacher(pseudo))

    def _follow_teacher(self, block: Block) -> dict[str, Tensor]:
        """Both terms on the target, of one forward pass."""
        assert block.label is not None
        image = block.image
        views = draw_strong(image, block.seeds) if self.config.strong else unchanged(image)
        seen = views.picture(image)
        logits = self.segmenter(seen)
        return {
            "pseudo": self.config.pseudo * cross_entropy(logits, views.label(block.label)),
            "distillation": self.config.distillation * distillation(logits.log_softmax(1), self.teacher(seen)),
        }

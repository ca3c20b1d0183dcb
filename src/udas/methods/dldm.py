"""Dual-level domain mixing: a student of real pictures alone, taught by networks that saw synthetic ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from udas.config import AdaptationConfig
from udas.data.batch import Batch, Block, Stream
from udas.data.mixing import inside_picture
from udas.losses import kl_divergence, masked_mean
from udas.methods.base import SegmentationMethod, Task
from udas.methods.domains import supervise
from udas.methods.frozen import Frozen


class DLDMConfig(AdaptationConfig):
    """Settings of the student of dual-level domain mixing."""

    name: Literal["dldm"] = "dldm"
    distillation: float = Field(0.5, gt=0, description="weight of the divergence from the mean of the teachers")
    pseudo: float = Field(1.0, ge=0, description="weight of the cross-entropy on pseudo-labelled pictures, where given")


class DLDM(SegmentationMethod[DLDMConfig]):
    """Chen et al., "Semi-supervised Domain Adaptation based on Dual-level Domain Mixing", CVPR 2021: the student.

    f_1 ... f_K: the frozen networks of the stage's `teacher`, in the paper one that learnt from mixed regions
    (`region_mix`) and one from both domains (`supervised`); f: the student; x_l, y_l: labelled real pictures and their
    labels; x_u: unlabelled real pictures; x_p, y_p: pictures and labels of a label stage.

        q = 1/K sum_k softmax f_k(x_u)
        L = labelled CE(f(x_l), y_l) + distillation mean KL(q || softmax f(x_u))     (+ pseudo CE(f(x_p), y_p))

    The divergence is summed over classes; its mean is over the pixels inside the pictures. No synthetic picture is
    seen: what these know comes through the teachers. Pseudo-labels are for a last student; in the publication they
    train the next round's teachers.
    """

    settings = DLDMConfig
    needs = frozenset({Stream.LABELLED, Stream.UNLABELLED})
    optional = frozenset({Stream.PSEUDO})

    def __init__(self, config: DLDMConfig, task: Task) -> None:
        super().__init__(config, task)
        self.teachers = Frozen(task)

    def step(self, batch: Batch) -> None:
        """Learn real labels and what the teachers make of unlabelled pictures."""
        labelled, unlabelled, pseudo, c = batch.labelled, batch.unlabelled, batch.pseudo, self.config
        assert labelled is not None
        assert unlabelled is not None
        with self.update("segmenter") as minimise:
            supervise(minimise, self.segmenter, labelled, "labelled", c.auxiliary, c.labelled)
            minimise(c.distillation * self._divergence(unlabelled), "distillation")
            if pseudo is not None:
                supervise(minimise, self.segmenter, pseudo, "pseudo", c.auxiliary, c.pseudo)

    def _divergence(self, block: Block) -> Tensor:
        divergence = kl_divergence(self.teachers.logits(block.image), self.segmenter(block.image))
        return masked_mean(divergence, inside_picture(block.image))

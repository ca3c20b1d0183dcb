"""The teacher of UDAS: supervised on synthetic pictures, output-space adversary, domain CutMix."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from udas.config import SegmentationConfig, Share
from udas.data.batch import Batch, Block, Stream
from udas.data.masks import cutmix_boxes
from udas.data.mixing import jitter, paste
from udas.errors import ConfigError
from udas.losses import outputs_cross_entropy
from udas.methods.adversary import FAKE, REAL, Critic, CriticOptimiser, Gan, OutputAdversary, detached
from udas.methods.base import Minimise, Optimised, SegmentationMethod, Task


class UDASConfig(SegmentationConfig):
    """Settings of the UDAS teacher."""

    name: Literal["udas"] = "udas"
    critic_optimiser: CriticOptimiser = CriticOptimiser()
    adversarial: float = Field(0.001, ge=0, description="lambda_adv, weight of the output-space adversary; 0 = none")
    cutmix: float = Field(
        0.5, ge=0, description="lambda_cm, weight of domain CutMix, used when real labels exist; 0 = none"
    )
    source: float = Field(1.0, ge=0, description="weight of L_seg on pure synthetic pictures; 0 = mixed pictures only")
    labelled: float = Field(0.0, ge=0, description="weight of plain cross-entropy on the labelled real pictures")
    jitter: float = Field(0.4, ge=0, le=1, description="brightness, contrast and colour range of mixed pictures")
    critic: Critic = Field("patch", description="discriminator of the predictions")
    gan: Gan = Field("least_squares", description="loss of the adversary")
    temperature: float = Field(1.0, gt=0, description="T: the critic sees softmax(logits / T); below 1 sharpens")
    confidence: Share = Field(0.0, description="pixels less confident than this are blanked before the critic")
    hard_share: Share = Field(1.0, description="share of hardest labelled pixels that count (OHEM); 1 = all")
    average: float | None = Field(None, gt=0, lt=1, description="decay of the running average of weights that is kept")


class UDAS(SegmentationMethod[UDASConfig]):
    """UDAS teacher: L = L_seg + lambda_cm L_cm + lambda_adv L_adv.

    x_s, y_s: synthetic (repainted) pictures and labels; x_l, y_l: labelled real; x_t: unlabelled real.
    L_seg = CE(f(x_s), y_s)
    L_cm  = CE(f(x_m), y_m): a box of x_l pasted on x_s, labels likewise, then a random change of colours
    L_adv = l(D(softmax f(x_t)), real): the target's predictions must look like those of the labelled domain, where D
            learns l(D(softmax f(x_m or x_s)), real) + l(D(softmax f(x_t)), fake).
    Without labelled real pictures L_cm is absent and the method is pure unsupervised domain adaptation.
    """

    settings = UDASConfig
    needs = frozenset({Stream.SOURCE, Stream.UNLABELLED})
    optional = frozenset({Stream.LABELLED})

    def __init__(self, config: UDASConfig, task: Task) -> None:
        super().__init__(config, task, config.average)
        if not config.source and not (config.cutmix and Stream.LABELLED in task.streams):
            raise ConfigError("source: 0 leaves nothing to learn from: no labelled real pictures are mixed in")
        outputs, classes = self.segmenter.decoder.num_levels, len(task.taxonomy.classes)
        seen = partial(evidence, temperature=config.temperature, confidence=config.confidence)
        self.critics = OutputAdversary(outputs, classes, seen, config.gan, config.critic)
        self.output_weights = [1.0] + [config.auxiliary] * (outputs - 1)

    def optimised(self) -> dict[str, Optimised]:
        """One optimiser for the segmenter, one for the critics of its outputs."""
        return super().optimised() | {"critic": Optimised.module(self.critics, self.config.critic_optimiser)}

    def same_size(self) -> frozenset[Stream]:
        """Boxes of real pictures are pasted on synthetic ones."""
        return frozenset({Stream.SOURCE, Stream.LABELLED}) if self.config.cutmix else frozenset()

    def step(self, batch: Batch) -> None:
        """Train the segmenter against the present critics, then the critics on its detached predictions."""
        source, labelled, target = batch.source, batch.labelled, batch.unlabelled
        assert source is not None
        assert target is not None
        judge = self.critics.judge
        with self.update("segmenter") as minimise:
            if self.config.source:
                real = self._learn(minimise, source, self.config.source, "source")
            if labelled is not None and self.config.cutmix:
                mixed = domain_cutmix(source, labelled, self.config.jitter)
                real = self._learn(minimise, mixed, self.config.cutmix, "cutmix")
            if labelled is not None and self.config.labelled:
                self._learn(minimise, labelled, self.config.labelled, "labelled")
            if self.config.adversarial:
                p_t = self.segmenter.levels(target.image)
                minimise(self.config.adversarial * judge(p_t, REAL, self.output_weights), "adversarial")
        if self.config.adversarial:
            with self.update("critic") as minimise:
                minimise(0.5 * judge(real, REAL, self.output_weights), "critic on labelled")
                minimise(0.5 * judge(detached(p_t), FAKE, self.output_weights), "critic on target")
        self.follow()

    def _learn(self, minimise: Minimise, block: Block, weight: float, name: str) -> list[Tensor]:
        """Minimise the weighted cross-entropy of a block; returns its detached predictions."""
        assert block.label is not None
        outputs = self.segmenter.levels(block.image)
        loss = outputs_cross_entropy(
            outputs, block.label, hard_share=self.config.hard_share, auxiliary=self.config.auxiliary
        )
        minimise(weight * loss, name)
        return [output.detach() for output in outputs]


def evidence(logits: Tensor, temperature: float = 1.0, confidence: float = 0.0) -> Tensor:
    """What the critic sees of a prediction: softmax(logits / T), blank where max softmax(logits) < `confidence`.

    [B, C, H, W] logits -> [B, C, H, W] in [0, 1].
    """
    sharpened = (logits / temperature).softmax(1)
    if confidence == 0:
        return sharpened
    return sharpened * (logits.detach().softmax(1).amax(1, keepdim=True) >= confidence)


def domain_cutmix(source: Block, labelled: Block, strength: float) -> Block:
    """Paste a box of each labelled real picture on a synthetic one, labels likewise, then change the colours at random.

    The box has sides W sqrt(1 - lambda) and H sqrt(1 - lambda), lambda ~ U(0, 1), centre uniform, clipped at the
    border. A smaller labelled block is used repeatedly. The blocks themselves are not changed.
    """
    assert source.label is not None
    assert labelled.label is not None
    count, (height, width) = len(source.image), source.image.shape[-2:]
    partner = torch.arange(count, device=source.image.device) % len(labelled.image)
    box = cutmix_boxes(source.seeds, height, width).to(source.image.device, non_blocking=True)
    image = paste(source.image, labelled.image[partner], box)
    label = paste(source.label, labelled.label[partner], box.squeeze(1))
    return replace(source, image=jitter(image, source.seeds, strength, strength, strength, 0.0), label=label)

"""CyCADA's second half: a critic of single locations pulls target scores or features towards those of the source."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from udas.config import AdaptationConfig, Share
from udas.data.batch import Batch, Stream
from udas.losses import cross_entropy, outputs_cross_entropy
from udas.methods.adversary import CriticOptimiser
from udas.methods.base import Optimised, SegmentationMethod, Task
from udas.methods.domains import supervise
from udas.networks.discriminators import PixelDiscriminator
from udas.networks.segmenters import Outputs

SOURCE, TARGET = 1, 0  # the critic's two classes


class CyCADAConfig(AdaptationConfig):
    """Settings of CyCADA's alignment; the repainting before it is `cyclegan` with a `semantic` weight."""

    name: Literal["cycada"] = "cycada"
    critic_optimiser: CriticOptimiser = CriticOptimiser()
    adversarial: float = Field(0.1, ge=0, description="lambda_g, weight of the adversary")
    evidence: Literal["scores", "features"] = Field(
        "scores", description="the critic sees class scores (logits), or the features before the classifier"
    )
    gate: Share | None = Field(
        0.6, description="the adversary counts only while the critic is right more often than this; null = always"
    )
    window: int = Field(100, gt=0, description="steps over which the critic's accuracy is averaged for the gate")
    critic_width: int = Field(512, gt=1, description="channels of the critic's first convolution; 1024 for features")
    dropout: float = Field(0.5, ge=0, lt=1, description="probability that a channel of the critic is dropped")
    average: float | None = Field(None, gt=0, lt=1, description="decay of the running average of weights that is kept")


class CyCADA(SegmentationMethod[CyCADAConfig]):
    """Hoffman et al., ICML 2018, section 3: the adversary in feature space, as released for segmentation.

    x_s, y_s: synthetic (repainted) pictures and labels; x_t: unlabelled real; f: segmenter; s(x): the class scores
    f(x), or the features before the classifier; D: critic with two logits per location. In each step first the critic
    learns, then the segmenter against the critic as it then is:

        L_D = 1/2 (CE(D(s(x_s)), source) + CE(D(s(x_t)), target))
        L   = CE(f(x_s), y_s) + g lambda_g CE(D(s(x_t)), source)

    g = 1 while the critic's accuracy, averaged over the last `window` steps, is above `gate`, else 0: a critic that
    cannot tell the domains apart has nothing to teach. Labelled real pictures, where there are, add
    labelled CE(f(x_l), y_l).
    """

    settings = CyCADAConfig
    needs = frozenset({Stream.SOURCE, Stream.UNLABELLED})
    optional = frozenset({Stream.LABELLED})

    def __init__(self, config: CyCADAConfig, task: Task) -> None:
        super().__init__(config, task, config.average)
        channels = self.segmenter.classes if config.evidence == "scores" else self.segmenter.decoder.channels
        self.critic = PixelDiscriminator(channels, config.critic_width, config.dropout)
        self.gate = Gate(config.gate, config.window) if config.gate is not None else None

    def optimised(self) -> dict[str, Optimised]:
        """One optimiser for the segmenter, one for the critic."""
        return super().optimised() | {"critic": Optimised.module(self.critic, self.config.critic_optimiser)}

    def step(self, batch: Batch) -> None:
        """Train the critic, then the segmenter against it; both use the same passes of the segmenter."""
        source, labelled, target = batch.source, batch.labelled, batch.unlabelled
        assert source is not None
        assert source.label is not None
        assert target is not None
        outputs_s, outputs_t = self.segmenter.outputs(source.image), self.segmenter.outputs(target.image)
        s_t = self._evidence(outputs_t)
        g = self._teach_critic(self._evidence(outputs_s).detach(), s_t.detach())
        with self.update("segmenter") as minimise:
            minimise(outputs_cross_entropy(outputs_s.levels, source.label, auxiliary=self.config.auxiliary), "source")
            minimise(g * self.config.adversarial * domain_cross_entropy(self.critic(s_t), SOURCE), "adversarial")
            if labelled is not None:
                supervise(
                    minimise, self.segmenter, labelled, "labelled", self.config.auxiliary, self.config.labelled
                )  # fmt: skip
        self.follow()

    def _teach_critic(self, s_s: Tensor, s_t: Tensor) -> Tensor | float:
        """One step of the critic on detached evidence; gives g."""
        with self.update("critic") as minimise:
            d_s, d_t = self.critic(s_s), self.critic(s_t)
            minimise(0.5 * domain_cross_entropy(d_s, SOURCE), "critic on source")
            minimise(0.5 * domain_cross_entropy(d_t, TARGET), "critic on target")
        return 1.0 if self.gate is None else self.gate(accuracy(d_s, d_t))

    def _evidence(self, outputs: Outputs) -> Tensor:
        """What the critic sees: s(x), scores [B, C, H, W] or features [B, D, h, w]."""
        return outputs.levels[0] if self.config.evidence == "scores" else outputs.representation


def domain_cross_entropy(verdict: Tensor, domain: int) -> Tensor:
    """CE(D(s), domain): -log softmax(D(s))_domain, the mean over locations of [B, 2, h, w] logits."""
    return cross_entropy(verdict, torch.full_like(verdict[:, 0], domain, dtype=torch.long))


def accuracy(d_s: Tensor, d_t: Tensor) -> Tensor:
    """Share of locations whose domain the critic names, in [0, 1]; both domains count alike, whatever their sizes."""
    right = [(verdict.argmax(1) == domain).float().mean() for verdict, domain in ((d_s, SOURCE), (d_t, TARGET))]
    return torch.stack(right).mean()


class Gate(nn.Module):
    """1 while the mean of the last `window` values is above `threshold`, else 0; without a host sync."""

    values: Tensor
    count: Tensor

    def __init__(self, threshold: float, window: int) -> None:
        super().__init__()
        self.threshold, self.window = threshold, window
        self.register_buffer("values", torch.zeros(window))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, value: Tensor) -> Tensor:
        """Remember the scalar `value`; 0 or 1 as a scalar."""
        self.values.index_copy_(0, (self.count % self.window).view(1), value.to(self.values.dtype).view(1))
        self.count += 1
        mean = self.values.sum() / self.count.clamp(max=self.window)
        return (mean > self.threshold).float()

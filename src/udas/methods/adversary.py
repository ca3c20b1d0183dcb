"""The output-space adversary: critics that tell a network's predictions on one domain from those on the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from udas.config import OptimiserConfig
from udas.losses import binary_cross_entropy, squared_distance
from udas.networks.discriminators import MultiScaleDiscriminator, PatchDiscriminator

REAL, FAKE = 1.0, 0.0  # what a critic should say of predictions on the labelled and on the target domain

Gan = Literal["vanilla", "least_squares"]
Critic = Literal["patch", "multiscale"]


class CriticOptimiser(OptimiserConfig):
    """Adam as the AdaptSegNet family uses it for its discriminators."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = Field(1e-4, gt=0, description="base learning rate")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.99), description="Adam and AdamW only")


class OutputAdversary(nn.ModuleList):
    """One critic D_i per output z_i of a segmentation network (AdaptSegNet, Tsai et al., CVPR 2018).

    The network minimises `judge(z_t, REAL, weights)` on target pictures; the critics, on detached outputs, minimise
    1/2 `judge(z_s, REAL)` + 1/2 `judge(z_t, FAKE)`.

    Args:
        outputs: number of outputs the network has, main output first.
        channels: channels of the evidence, such as the number of classes.
        evidence: what a critic sees of an output: [B, C, H, W] logits -> [B, channels, H, W].
        gan: l is binary cross-entropy on logits (vanilla), or the squared distance (least_squares).
        critic: one map of patches, or one per scale, whose losses are summed.
    """

    def __init__(
        self,
        outputs: int,
        channels: int,
        evidence: Callable[[Tensor], Tensor],
        gan: Gan = "vanilla",
        critic: Critic = "patch",
    ) -> None:
        kind = PatchDiscriminator if critic == "patch" else MultiScaleDiscriminator
        super().__init__(kind(channels) for _ in range(outputs))
        self.evidence = evidence
        self.loss = squared_distance if gan == "least_squares" else binary_cross_entropy

    def judge(self, outputs: Sequence[Tensor], verdict: float, weights: Sequence[float] | None = None) -> Tensor:
        """Sum over outputs i of weights_i l(D_i(evidence(z_i)), verdict), a scalar.

        Args:
            outputs: one [B, C, H, W] of logits per critic, main output first.
            verdict: `REAL` or `FAKE`.
            weights: one factor per output; 1 each when None.
        """
        evidence = [self.evidence(logits) for logits in outputs]
        return self._loss(self._scores(evidence), verdict, weights or [1.0] * len(self))

    def judge_with_slope(self, outputs: Sequence[Tensor], verdict: float) -> tuple[Tensor, Tensor]:
        """`judge`, and how steep the critics are where they judge (R1; Mescheder et al., ICML 2018), of one pass.

        Returns:
            The sum of losses, without gradient for the outputs; and the mean over pictures of |grad_x sum D(x)|^2, with
            x the evidence, summed over critics and scales.
        """
        evidence = [self.evidence(logits).detach().requires_grad_() for logits in outputs]
        scores = self._scores(evidence)
        slopes = []
        for seen, scales in zip(evidence, scores, strict=True):
            for scale in scales:
                (slope,) = torch.autograd.grad(scale.sum(), seen, create_graph=True)
                slopes.append(slope.square().sum((1, 2, 3)).mean())
        return self._loss(scores, verdict, [1.0] * len(self)), torch.stack(slopes).sum()

    def _scores(self, evidence: Sequence[Tensor]) -> list[list[Tensor]]:
        """The scores of every critic, one map per scale."""
        scores = [critic(seen) for critic, seen in zip(self, evidence, strict=True)]
        return [scales if isinstance(scales, list) else [scales] for scales in scores]

    def _loss(self, scores: list[list[Tensor]], verdict: float, weights: Sequence[float]) -> Tensor:
        pairs = zip(weights, scores, strict=True)
        return torch.stack([weight * self.loss(scale, verdict) for weight, scales in pairs for scale in scales]).sum()


def softmax(logits: Tensor) -> Tensor:
    """The evidence of AdaptSegNet: probabilities P, [B, C, H, W] in [0, 1]."""
    return logits.softmax(1)


def detached(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs without their graph, for the critics to learn from."""
    return [output.detach() for output in outputs]

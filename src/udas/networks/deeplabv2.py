"""DeepLab v2 (Chen et al., TPAMI 2018), in the variants on which adaptation methods report their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from udas.networks.decoder import Decoder

FOUR_BRANCHES = (6, 12, 18, 24)  # the paper; ADVENT, IntraDA, FDA
TWO_BRANCHES = (6, 12)  # AdaptSegNet and DACS as published: their sum ends after the second branch


class DilatedSum(nn.Module):
    """sum_r conv3x3_r(x), dilation r, with bias, straight to class scores; weights start as N(0, 0.01), biases as 0."""

    def __init__(self, channels: int, classes: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_branch(channels, classes, dilation) for dilation in dilations)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D, h, w] -> [B, C, h, w]."""
        return torch.stack([branch(features) for branch in self.branches]).sum(0)


def _branch(channels: int, classes: int, dilation: int) -> nn.Conv2d:
    branch = nn.Conv2d(channels, classes, 3, padding=dilation, dilation=dilation)
    nn.init.normal_(branch.weight, std=0.01)
    nn.init.constant_(branch.bias, 0)  # type: ignore[arg-type]
    return branch


class DeepLabV2(Decoder):
    """One head on the last stage ("main") and, with two levels, a second one on the stage before ("auxiliary")."""

    def __init__(self, channels: Sequence[int], classes: int, dilations: Sequence[int], two_levels: bool) -> None:
        super().__init__()
        self.channels, self.num_levels = channels[-1], 2 if two_levels else 1
        self.main = DilatedSum(channels[-1], classes, dilations)
        self.second = DilatedSum(channels[-2], classes, dilations) if two_levels else None

    def represent(self, pyramid: list[Tensor]) -> Tensor:
        """The encoder's last features: the head has no layer in between."""
        return pyramid[-1]

    def classify(self, representation: Tensor, pyramid: list[Tensor]) -> Tensor:
        """Main logits."""
        logits: Tensor = self.main(representation)
        return logits

    def auxiliary(self, pyramid: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits of the stage before the last, when there are two levels."""
        return () if self.second is None else (self.second(pyramid[-2]),)

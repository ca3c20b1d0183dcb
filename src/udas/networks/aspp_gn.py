"""Atrous pyramid with group norm and channel attention: the heads of Seg-Uncertainty and ProDA.

Zheng and Yang, IJCV 2021; Zhang et al., CVPR 2021. Between 3x3 branches and classifier there is a feature layer, and no
statistic runs over the batch: the head is the same in training and evaluation, with one picture per step or many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from udas.networks.decoder import Decoder

DILATIONS = (6, 12, 18, 24)
BRANCH_WIDTH = 256
GROUPS = 32
SQUEEZE = 16
DROPOUT = 0.1


class Attention(nn.Module):
    """Squeeze and excitation: x * sigmoid(W_2 relu(W_1 mean(x))), one factor per channel (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, squeeze: int = SQUEEZE) -> None:
        super().__init__()
        self.factors = nn.Sequential(
            nn.Linear(channels, channels // squeeze), nn.ReLU(), nn.Linear(channels // squeeze, channels), nn.Sigmoid()
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, D, h, w] -> [B, D, h, w]."""
        factors: Tensor = self.factors(features.mean((2, 3)))
        return features * factors[:, :, None, None]


class GroupNormASPP(nn.Module):
    """Five branches (1x1; 3x3 dilated by 6, 12, 18, 24), channel attention, a 3x3 convolution, a linear classifier.

        b_r = relu(gn(conv_r(x)))     f = dropout(gn(conv3x3(attention(cat_r b_r))))     logits = W f, without bias

    Args:
        channels: channels of x.
        classes: C.
        width: channels of f. There is no ReLU behind its norm: f has both signs.

    Branches start as PyTorch starts them, as in Seg-Uncertainty's release, where a loop that would have started them
    otherwise never reaches them; ProDA's release draws every convolution from N(0, 0.01).
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_branch(channels, 1), *(_branch(channels, rate) for rate in DILATIONS)])
        together = BRANCH_WIDTH * len(self.branches)
        self.attention = Attention(together)
        self.fuse = nn.Sequential(_fusion(together, width), nn.GroupNorm(GROUPS, width))
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(width, classes, 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def represent(self, features: Tensor) -> Tensor:
        """The features f of [B, channels, h, w]: [B, width, h, w]."""
        branches = torch.cat([branch(features) for branch in self.branches], dim=1)
        fused: Tensor = self.dropout(self.fuse(self.attention(branches)))
        return fused

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, C, h, w]."""
        logits: Tensor = self.classifier(self.represent(features))
        return logits


class DeepLabGN(Decoder):
    """One head on the last stage: ProDA's network."""

    def __init__(self, channels: Sequence[int], classes: int, width: int = 256) -> None:
        super().__init__()
        self.channels = width
        self.main = GroupNormASPP(channels[-1], classes, width)

    def represent(self, pyramid: list[Tensor]) -> Tensor:
        """The features f of the last stage."""
        return self.main.represent(pyramid[-1])

    def classify(self, representation: Tensor, pyramid: list[Tensor]) -> Tensor:
        """W f."""
        logits: Tensor = self.main.classifier(representation)
        return logits


class DeepLabGNMulti(Decoder):
    """Seg-Uncertainty's network: main head on the last two stages together, auxiliary head on the one before the last.

    The two stages have the same size, which an output stride of 8 or 16 provides.
    """

    num_levels = 2

    def __init__(self, channels: Sequence[int], classes: int, width: int = 512) -> None:
        super().__init__()
        self.channels = width
        self.main = GroupNormASPP(channels[-1] + channels[-2], classes, width)
        self.second = GroupNormASPP(channels[-2], classes, width)

    def represent(self, pyramid: list[Tensor]) -> Tensor:
        """The features f of the main head."""
        return self.main.represent(torch.cat([pyramid[-1], pyramid[-2]], dim=1))

    def classify(self, representation: Tensor, pyramid: list[Tensor]) -> Tensor:
        """W f of the main head."""
        logits: Tensor = self.main.classifier(representation)
        return logits

    def auxiliary(self, pyramid: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits of the stage before the last."""
        return (self.second(pyramid[-2]),)


def _branch(channels: int, dilation: int) -> nn.Sequential:
    size, padding = (1, 0) if dilation == 1 else (3, dilation)
    convolution = nn.Conv2d(channels, BRANCH_WIDTH, size, padding=padding, dilation=dilation)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, BRANCH_WIDTH), nn.ReLU(inplace=True))


def _fusion(channels: int, width: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, width, 3, padding=1)
    nn.init.kaiming_normal_(convolution.weight)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return convolution

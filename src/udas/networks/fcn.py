"""FCN-8s (Long, Shelhamer and Darrell, CVPR 2015)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from udas.networks.decoder import Decoder, resize


class FCN(Decoder):
    """Class scores of the three last levels, summed from coarse to fine.

        s_5 = W_5 h(f_5),   s_k = up(s_{k+1}) + W_k f_k  for k = 4, 3

    h is a 3x3 convolution to a quarter of the channels with batch norm, ReLU and dropout; it stands for the two
    convolutions that the paper makes of VGG's fully connected layers. At output stride 32 the logits have stride 8.
    """

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        deep, self.channels = channels[-1], max(channels[-1] // 4, 16)
        self.fully = nn.Sequential(
            nn.Conv2d(deep, self.channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.channels),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
        )
        self.score = nn.Conv2d(self.channels, classes, 1)
        self.skips = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in (channels[-2], channels[-3]))

    def represent(self, pyramid: list[Tensor]) -> Tensor:
        """h(f_5)."""
        features: Tensor = self.fully(pyramid[-1])
        return features

    def classify(self, representation: Tensor, pyramid: list[Tensor]) -> Tensor:
        """s_3."""
        score: Tensor = self.score(representation)
        for skip, features in zip(self.skips, (pyramid[-2], pyramid[-3]), strict=True):
            score = resize(score, features) + skip(features)
        return score

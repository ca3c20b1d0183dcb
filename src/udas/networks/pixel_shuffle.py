"""Light decoders that upsample by pixel shuffling."""

from __future__ import annotations

import torch
from torch import nn


class PixelShuffleHead(nn.Sequential):
    """A convolution to class scores, then stages that each double height and width (CCT; Ouali et al., CVPR 2020).

        s_0 = W z,   s_k = shuffle(ReLU(W_k s_{k-1} + b_k))

    with 1x1 convolutions, W without bias, and W_k from C to 4 C channels, which `shuffle` lays out as squares of 2 x 2
    pixels (Shi et al., CVPR 2016). The four channels of a square start alike, so that every stage begins as
    nearest-neighbour upsampling (ICNR; Aitken et al., 2017). No norm, no dropout.

    [B, D, h, w] features -> [B, C, 2^stages h, 2^stages w] logits, which are >= 0 where there is a stage.

    Args:
        channels: D.
        classes: C.
        stages: how many times the size doubles, >= 0.
    """

    def __init__(self, channels: int, classes: int, stages: int) -> None:
        score = nn.Conv2d(channels, classes, 1, bias=False)
        nn.init.kaiming_normal_(score.weight, nonlinearity="relu")
        super().__init__(score, *(_doubling(classes) for _ in range(stages)))


def _doubling(channels: int) -> nn.Sequential:
    one = nn.Conv2d(channels, channels, 1)
    nn.init.kaiming_normal_(one.weight, nonlinearity="relu")
    expand = nn.Conv2d(channels, 4 * channels, 1)
    with torch.no_grad():
        for mine, shared in zip(expand.parameters(), one.parameters(), strict=True):
            mine.copy_(shared.repeat_interleave(4, dim=0))
    return nn.Sequential(expand, nn.ReLU(), nn.PixelShuffle(2))

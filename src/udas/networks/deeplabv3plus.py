"""DeepLab v3+ (Chen et al., ECCV 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP, SeparableConv2d
from torch import Tensor, nn

from udas.networks.decoder import Decoder, drop_pooled_norm, resize

WIDTH = 256
SKIP_WIDTH = 48  # the paper's choice
DROPOUT = 0.1


class DeepLabV3Plus(Decoder):
    """Atrous spatial pyramid pooling, then one fusion with the features at stride 4.

    The parts are those of segmentation-models-pytorch (separable convolutions). Different from there: any output stride
    and any picture size, since the pyramid is resized to the skip; no batch norm on the globally pooled branch, so that
    one picture per step can be trained. Dilations are (6, 12, 18) at stride 16 and scale with its inverse.
    """

    channels = WIDTH
    stride = 4

    def __init__(self, channels: Sequence[int], classes: int, stride: int) -> None:
        super().__init__()
        rates = [rate * 16 // stride for rate in (6, 12, 18)]
        aspp = ASPP(channels[-1], WIDTH, rates, separable=True, dropout=DROPOUT)
        drop_pooled_norm(aspp)
        self.context = nn.Sequential(aspp, *_separable(WIDTH))
        self.skip = nn.Sequential(
            nn.Conv2d(channels[2], SKIP_WIDTH, 1, bias=False), nn.BatchNorm2d(SKIP_WIDTH), nn.ReLU(inplace=True)
        )
        self.fuse = nn.Sequential(*_separable(WIDTH + SKIP_WIDTH))
        self.classifier = nn.Conv2d(WIDTH, classes, 1)
        initialize_decoder(self)
        initialize_head(self.classifier)

    def represent(self, pyramid: list[Tensor]) -> Tensor:
        """Fused features at stride 4."""
        fine = self.skip(pyramid[2])
        context = resize(self.context(pyramid[-1]), like=fine)
        features: Tensor = self.fuse(torch.cat([context, fine], dim=1))
        return features

    def classify(self, representation: Tensor, pyramid: list[Tensor]) -> Tensor:
        """Logits at stride 4."""
        logits: Tensor = self.classifier(representation)
        return logits


def _separable(channels: int) -> list[nn.Module]:
    convolution = SeparableConv2d(channels, WIDTH, kernel_size=3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)]

"""Discriminators ("critics"): networks that score, patch by patch, where a picture or a prediction comes from.

None of them ends in a sigmoid: the scores are logits for the vanilla GAN loss, plain values for the least-squares one.
They are float32 whatever the precision inside, so that the losses on them are exact.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from udas.errors import DataError

SLOPE = 0.2  # of every LeakyReLU


class PatchDiscriminator(nn.Module):
    """Critic of predictions (AdaptSegNet, Tsai et al., CVPR 2018, section 4.2): five 4x4 convolutions of stride 2.

    Args:
        channels: channels of the input, such as the number of classes.
        width: channels after the first convolution; they double up to eight times that.

    Maps [B, channels, H, W] with H, W >= 32 to scores [B, 1, H // 32, W // 32]. No normalisation layers.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=2, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        """Scores of [B, channels, H, W]."""
        scores: Tensor = self.layers(image)
        return full_precision(scores)


class MultiScaleDiscriminator(nn.Module):
    """Critic of predictions at several scales (MRNet, Zheng and Yang, IJCV 2021): one network per scale.

    Scale k sees the input after k average poolings (3x3, stride 2). Each network: five 3x3 convolutions of which the
    first, third and fifth have stride 2, four residual blocks and a 1x1 convolution to one score. Weights are drawn
    from N(0, 0.02), biases are zero, as in the released code.

    Args:
        channels: channels of the input, such as the number of classes.
        width: channels of the first four convolutions; twice as many afterwards.
        scales: number of scales.
    """

    def __init__(self, channels: int, width: int = 32, scales: int = 3) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_scale(channels, width) for _ in range(scales))
        self.apply(init_gan)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Scores of [B, channels, H, W], finest scale first; scale k has a side of ceil(H / 2^(k + 3))."""
        scores = []
        for k, critic in enumerate(self.scales):
            if k:
                image = F.avg_pool2d(image, 3, stride=2, padding=1, count_include_pad=False)
            scores.append(full_precision(critic(image)))
        return scores


class NLayerDiscriminator(nn.Module):
    """PatchGAN critic of pictures (Isola et al., CVPR 2017), used by CycleGAN: three layers judge patches of 70 x 70.

    `layers` 4x4 convolutions of stride 2, one of stride 1, and one of stride 1 to the score; instance norm on all but
    the first and last. Weights are drawn from N(0, 0.02), biases are zero.

    Args:
        channels: channels of the input.
        width: channels after the first convolution; they double with every layer up to eight times that.
        layers: convolutions of stride 2; the receptive field is 34, 70, 142 pixels for 2, 3, 4.

    Maps [B, channels, H, W] to scores [B, 1, H // 2^layers - 2, W // 2^layers - 2].
    """

    def __init__(self, channels: int, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**k, 8) for k in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for k, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if k < layers else 1
            # no bias: the norm would subtract it again
            modules += [nn.Conv2d(before, after, 4, stride, padding=1, bias=False), nn.InstanceNorm2d(after)]
            modules += [nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.smallest = 3 * 2**layers
        self.apply(init_gan)

    def forward(self, image: Tensor) -> Tensor:
        """Scores of a picture. Raises `DataError` when it is too small for one score."""
        height, width = image.shape[-2:]
        if min(height, width) < self.smallest:
            raise DataError(
                f"a picture of {height} x {width}: the discriminator needs sides of at least {self.smallest}"
            )
        scores: Tensor = self.layers(image)
        return full_precision(scores)


class PixelDiscriminator(nn.Module):
    """Critic of single locations (CyCADA, Hoffman et al., ICML 2018, as released): 1x1 convolutions to two logits.

    channels -> width -> width / 2 -> 2, dropout of whole channels and ReLU between.

    Args:
        channels: channels of the input: classes, or features.
        width: channels after the first convolution; 512 for class scores, 1024 for 4096 features.
        dropout: probability that a channel is dropped.

    Maps [B, channels, H, W] to the logits of two domains, [B, 2, H, W].
    """

    def __init__(self, channels: int, width: int = 512, dropout: float = 0.5) -> None:
        super().__init__()
        widths = [channels, width, max(width // 2, 1)]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 1), nn.Dropout2d(dropout), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 2, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Logits of [B, channels, H, W]."""
        logits: Tensor = self.layers(image)
        return full_precision(logits)


def init_gan(module: nn.Module) -> None:
    """Weights of a convolution from N(0, 0.02), bias zero (CycleGAN, Zhu et al., ICCV 2017, appendix 7.1)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def full_precision(x: Tensor) -> Tensor:
    """Float32 where mixed precision made it less."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _Residual(nn.Module):
    """x + conv(act(conv(act(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


def _scale(channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    steps = [(channels, width, 2), (width, width, 1), (width, width, 2), (width, width, 1), (width, 2 * width, 2)]
    for before, after, stride in steps:
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers[:-1], *(_Residual(2 * width) for _ in range(4)), nn.Conv2d(2 * width, 1, 1))

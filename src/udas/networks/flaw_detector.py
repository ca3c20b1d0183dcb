"""The flaw detector of guided collaborative training: where is a prediction wrong?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from udas.errors import DataError
from udas.networks.discriminators import SLOPE, full_precision


class IBNorm(nn.Module):
    """Batch norm with scale and shift on the first channels, instance norm without on the others.

    Args:
        channels: channels of the input.
        batch_share: share of them with batch norm; with 0 no picture sees another.
    """

    def __init__(self, channels: int, batch_share: float = 0.5) -> None:
        super().__init__()
        first = round(batch_share * channels)
        self.first = first
        self.batch = nn.BatchNorm2d(first) if first else nn.Identity()
        self.instance = nn.InstanceNorm2d(channels - first)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] -> the same shape; more than one value per channel and picture."""
        return torch.cat([self.batch(x[:, : self.first]), self.instance(x[:, self.first :])], dim=1)


class FlawDetector(nn.Module):
    """F (Ke et al., ECCV 2020): 4x4 convolutions, each with IBNorm and LeakyReLU, on a picture and its prediction.

    The first of four stages is one convolution of stride 2, the others are one of stride 2 and one of stride 1; a
    linear classifier of stride 2 follows. Paddings are 1, so that a convolution of stride 1 takes one pixel off.
    Pictures are normalised by ImageNet's mean and deviation, as in the released code: in [0, 1] they would count little
    beside the prediction.

    Args:
        classes: C.
        width: channels of the first stage; they double with every stage.
        stages: their number; the scores have a stride of 2^(stages + 1), which is 32 as published.
        batch_share: see `IBNorm`.
    """

    def __init__(self, classes: int, width: int = 64, stages: int = 4, batch_share: float = 0.5) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        layers: list[nn.Module] = []
        before = 3 + classes
        for stage in range(stages):
            after = width * 2**stage
            layers += _convolution(before, after, 2, batch_share)
            layers += _convolution(after, after, 1, batch_share) if stage else []
            before = after
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(before, 1, 4, stride=2, padding=1)
        self.smallest: int = 2 ** (stages + 2) - 4

    def forward(self, image: Tensor, probabilities: Tensor) -> Tensor:
        """How wrong a prediction is, 0 = not at all; it is trained towards [0, 1] but not bound to it.

        Args:
            image: RGB [B, 3, H, W] in [0, 1].
            probabilities: [B, C, H, W].

        Returns:
            [B, 1, H, W], float32 also under autocast.

        Raises:
            DataError: the picture is too small for one score.
        """
        height, width = image.shape[-2:]
        if min(height, width) < self.smallest:
            raise DataError(
                f"a picture of {height} x {width}: the flaw detector needs sides of at least {self.smallest}; "
                "make detector_stages smaller or pictures larger"
            )
        seen = torch.cat([(image - self.mean) / self.std, probabilities], dim=1)
        scores = full_precision(self.classifier(self.layers(seen)))
        return F.interpolate(scores, size=(height, width), mode="bilinear", align_corners=True)


def _convolution(before: int, after: int, stride: int, batch_share: float) -> list[nn.Module]:
    # no bias: the norm would subtract it again
    convolution = nn.Conv2d(before, after, 4, stride, padding=1, bias=False)
    return [convolution, IBNorm(after, batch_share), nn.LeakyReLU(SLOPE)]

"""SegNet (Badrinarayanan, Kendall and Cipolla, TPAMI 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from torch import Tensor, nn

from udas.networks.decoder import Decoder

ENCODER = "vgg16_bn"
FIRST_FEATURE = -1  # the entries before give pooling indices only
CONVOLUTIONS = (3, 3, 3, 2, 1)  # per decoder stage, from deep to shallow; the classifier is the last one of the mirror


def unpool(features: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Put every value back where 2x2 pooling took it from, zeros elsewhere.

    The same as `max_unpool2d`, which PyTorch refuses in deterministic mode although windows that do not overlap cannot
    collide.

    Args:
        features: [B, D, h, w].
        indices: [B, D, h, w], positions in the flattened H x W plane, as `max_pool2d` returns them.
        like: [B, D, H, W], the map that was pooled.
    """
    plane = features.new_zeros(*features.shape[:2], like.shape[-2] * like.shape[-1])
    placed = plane.scatter(2, indices.flatten(2), features.flatten(2))
    return placed.view(like.shape)


class SegNet(Decoder):
    """The mirror of VGG-16: five stages of unpooling with the encoder's pooling indices and convolutions.

    Its pyramid holds the maps before the five poolings (strides 1, 2, 4, 8, 16) and the last pooled one. The indices
    are found by pooling these maps once more: cheaper than carrying them beside the features, and the same positions.
    The pooled map is thus the only entry that is read as features.
    """

    stride = 1

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        pooled = channels[:-1]
        outputs = [*reversed(pooled[:-1]), pooled[0]]
        stages = zip(reversed(pooled), outputs, CONVOLUTIONS, strict=True)
        self.stages = nn.ModuleList(_stage(wide, narrow, count) for wide, narrow, count in stages)
        self.channels = pooled[0]
        self.classifier = nn.Conv2d(self.channels, classes, 3, padding=1)
        initialize_decoder(self)
        initialize_head(self.classifier)

    def represent(self, pyramid: list[Tensor]) -> Tensor:
        """Features at the size of the picture."""
        *maps, features = pyramid
        for stage, pooled in zip(self.stages, reversed(maps), strict=True):
            _, indices = F.max_pool2d(pooled.detach(), 2, return_indices=True)
            features = stage(unpool(features, indices, like=pooled))
        return features

    def classify(self, representation: Tensor, pyramid: list[Tensor]) -> Tensor:
        """Logits at the size of the picture."""
        logits: Tensor = self.classifier(representation)
        return logits


def _stage(channels: int, outputs: int, convolutions: int) -> nn.Sequential:
    widths = [channels] * convolutions + [outputs]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)

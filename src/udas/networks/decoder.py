"""What all decoders share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Decoder(nn.Module, ABC):
    """From the encoder's pyramid (entry k at stride min(2^k, output stride)) to logits at the decoder's own size.

    channels: D, the width of `represent`.
    stride: that of `represent`; None = that of the encoder's last features, the output stride.
    num_levels: outputs, the main one included.
    """

    channels: int
    stride: int | None = None
    num_levels: int = 1

    @abstractmethod
    def represent(self, pyramid: list[Tensor]) -> Tensor:
        """What the classifier sees, [B, D, h, w]."""

    @abstractmethod
    def classify(self, representation: Tensor, pyramid: list[Tensor]) -> Tensor:
        """Main logits [B, C, h, w] from what `represent` made of the pyramid."""

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """Main logits [B, C, h, w]."""
        return self.classify(self.represent(pyramid), pyramid)

    def auxiliary(self, pyramid: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits of further levels, [B, C, h, w] each; most networks have none."""
        return ()


def resize(features: Tensor, like: Tensor) -> Tensor:
    """`features` bilinearly at the height and width of `like`."""
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)


def drop_pooled_norm(module: nn.Module) -> None:
    """Take the batch norm out of every branch that works on a map pooled to a single pixel, in place.

    With one picture per step such a norm has a single value per channel and cannot train; with two it sees noise.
    """
    for branch in module.modules():
        if isinstance(branch, nn.Sequential) and _pools_all(branch[0]):
            _drop_norms(branch)


def _pools_all(module: nn.Module) -> bool:
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))


def _drop_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, nn.Identity())
        _drop_norms(child)

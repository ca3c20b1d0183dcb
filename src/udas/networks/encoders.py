"""Encoders: any convolutional or hierarchical timm model, in timm's form or in that of the Caffe ResNets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import timm
from segmentation_models_pytorch.encoders import TimmUniversalEncoder
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import Bottleneck
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from udas.errors import ConfigError
from udas.validation import nearest

CAFFE_MEAN = (122.67891434, 116.66876762, 104.00698793)  # RGB, 0-255: ImageNet mean of the DeepLab v2 release


@dataclass(frozen=True)
class Normalisation:
    """What an encoder expects of its pictures: (x - mean) / std on RGB in [0, 1], then BGR order where `bgr` is set."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False


def normalisation_of(encoder: str, style: Literal["timm", "caffe"]) -> Normalisation:
    """The normalisation an encoder was trained with: timm's own entry for it, or that of the Caffe ResNets.

    With weights of EfficientNet-Lite, which expect mean = std = 0.5, the usual ImageNet constants cost ten points of
    accuracy; hence no constant here stands for "ImageNet weights".
    """
    if style == "caffe":
        return Normalisation(tuple(value / 255 for value in CAFFE_MEAN), (1 / 255,) * 3, bgr=True)
    known = timm.get_pretrained_cfg(encoder)
    if known is None:
        return Normalisation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return Normalisation(tuple(known.mean), tuple(known.std))


@contextmanager
def checked_encoder(name: str, stride: int) -> Iterator[None]:
    """Turn what timm raises for encoders it cannot build into one readable line.

    Raises:
        ConfigError: unknown model, unknown weights tag, or a model without feature maps at `stride`.
    """
    if not timm.is_model(name):
        raise ConfigError(f"network.encoder: timm has no model {name!r}{_near(name)}")
    try:
        yield
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"network.encoder: {name} cannot be built at output stride {stride} ({reason}); "
            "take output_stride 32 or a convolutional encoder such as resnet50 or tf_efficientnet_lite0"
        ) from error


def _near(name: str) -> str:
    """The nearest of timm's thousand names, but never the whole list."""
    hint = nearest(name, timm.list_models())
    return hint if hint.startswith(";") else "; see timm.list_models()"


def make_encoder(name: str, stride: int) -> TimmUniversalEncoder:
    """A timm encoder with random weights.

    It maps pictures [B, 3, H, W] to a list whose k-th entry has stride min(2^k, stride) and `out_channels[k]` channels;
    entry 0 is the picture itself (or, for VGG, features at full size), an entry without channels fills a gap. A few
    encoders accept only certain picture sizes: HRNet multiples of 32, Swin the size it was trained on.
    """
    with checked_encoder(name, stride):
        return TimmUniversalEncoder(name, pretrained=False, output_stride=stride)


def caffe_style(encoder: nn.Module) -> None:
    """Give a timm ResNet with bottlenecks the form of the Caffe ResNets, in place.

    The stride moves from the 3x3 to the first 1x1 convolution of a stage. The 3x3 convolution thus already works on the
    coarser grid, so that in a dilated stage it takes the dilation of that stage from its first block on. Pooling rounds
    up. Keys and shapes of the weights do not change.

    Raises:
        ConfigError: when the encoder is not a ResNet with bottlenecks.
    """
    net: Any = encoder.model
    stages = [net[name] for name in ("layer1", "layer2", "layer3", "layer4") if name in net]
    if not stages or not isinstance(stages[0][0], Bottleneck):
        raise ConfigError("network.style: caffe is for timm's ResNets with bottlenecks, such as resnet50 and resnet101")
    for stage in stages:
        first, other = stage[0], stage[1]
        first.conv1.stride, first.conv2.stride = first.conv2.stride, (1, 1)
        first.conv2.dilation = first.conv2.padding = other.conv2.dilation
    net["maxpool"].ceil_mode = True


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Every batch norm inside `module`."""
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]

"""Segmentation networks by name, all behind one module: pictures in [0, 1] in, logits at the picture's size out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from udas.config import NetworkConfig
from udas.errors import ConfigError
from udas.networks import segnet
from udas.networks.aspp_gn import DeepLabGN, DeepLabGNMulti
from udas.networks.decoder import Decoder
from udas.networks.deeplabv2 import FOUR_BRANCHES, TWO_BRANCHES, DeepLabV2
from udas.networks.deeplabv3plus import DeepLabV3Plus
from udas.networks.depthwise import use_fast_depthwise
from udas.networks.encoders import Normalisation, batch_norms, caffe_style, make_encoder, normalisation_of
from udas.networks.fcn import FCN
from udas.networks.library import make_library_network
from udas.networks.pretrained import load_encoder_weights
from udas.validation import nearest

logger = logging.getLogger(__name__)

Parts = Callable[[str, int, int], tuple[nn.Module, Decoder]]
"""(encoder, output stride, classes) -> the two halves of a network."""


@dataclass(frozen=True)
class Recipe:
    """One line of the table of networks.

    strides: output strides it can have; the first is the one it was published with.
    multiple: pictures are padded to multiples of `multiple` times the output stride; 0 = any size works as it is.
    encoder: the only encoder it can have, if so.
    first_feature: the first entry of the pyramid that is features to the decoder, not just positions; -1 = the last.
    """

    parts: Parts
    strides: tuple[int, ...]
    multiple: int = 0
    encoder: str | None = None
    first_feature: int = 0


def _fcn(encoder: str, stride: int, classes: int) -> tuple[nn.Module, Decoder]:
    net = make_encoder(encoder, stride)
    return net, FCN(net.out_channels, classes)


def _deeplabv2(
    encoder: str, stride: int, classes: int, *, dilations: tuple[int, ...], two_levels: bool
) -> tuple[nn.Module, Decoder]:
    net = make_encoder(encoder, stride)
    return net, DeepLabV2(net.out_channels, classes, dilations, two_levels)


def _deeplab_gn(encoder: str, stride: int, classes: int, *, two_levels: bool) -> tuple[nn.Module, Decoder]:
    net = make_encoder(encoder, stride)
    return net, (DeepLabGNMulti if two_levels else DeepLabGN)(net.out_channels, classes)


def _deeplabv3plus(encoder: str, stride: int, classes: int) -> tuple[nn.Module, Decoder]:
    net = make_encoder(encoder, stride)
    return net, DeepLabV3Plus(net.out_channels, classes, stride)


def _segnet(encoder: str, stride: int, classes: int) -> tuple[nn.Module, Decoder]:
    net = make_encoder(encoder, stride)
    return net, segnet.SegNet(net.out_channels, classes)


def _dilated(dilations: tuple[int, ...], two_levels: bool) -> Recipe:
    return Recipe(partial(_deeplabv2, dilations=dilations, two_levels=two_levels), (8, 16, 32))


def _library(name: str, strides: tuple[int, ...] = (32,), multiple: int = 1) -> Recipe:
    return Recipe(partial(make_library_network, name), strides, multiple)


SEGMENTERS = {
    "fcn": Recipe(_fcn, (32, 16, 8)),
    "segnet": Recipe(_segnet, (32,), encoder=segnet.ENCODER, first_feature=segnet.FIRST_FEATURE),
    "deeplabv2": _dilated(FOUR_BRANCHES, two_levels=False),
    "deeplabv2_2branch": _dilated(TWO_BRANCHES, two_levels=False),
    "deeplabv2_multi": _dilated(FOUR_BRANCHES, two_levels=True),
    "deeplabv2_2branch_multi": _dilated(TWO_BRANCHES, two_levels=True),
    "deeplab_gn": Recipe(partial(_deeplab_gn, two_levels=False), (8, 16, 32)),
    "deeplab_gn_multi": Recipe(partial(_deeplab_gn, two_levels=True), (8, 16)),  # its two stages have one size
    "deeplabv3plus": Recipe(_deeplabv3plus, (16, 8, 32)),
    "deeplabv3": _library("deeplabv3", (8, 16), multiple=0),
    "fpn": _library("fpn"),
    "linknet": _library("linknet"),
    "manet": _library("manet"),
    # it halves the last features three times; one picture per step has to be larger than 8 x stride
    "pan": _library("pan", (16, 32), multiple=8),
    "pspnet": _library("pspnet"),
    "segformer": _library("segformer"),
    "unet": _library("unet"),
    "unetplusplus": _library("unetplusplus"),
    "upernet": _library("upernet"),
}

NO_FEATURES = (0, 3)  # channels of a pyramid's entry that fills a gap, and of the picture


class Outputs(NamedTuple):
    """What one forward pass gives.

    levels: logits of every level, main first; float32 [B, C, H, W] each.
    representation: the decoder's features before the classifier of the main level, [B, D, h, w].
    align_corners: how the logits were enlarged from the size of the features.
    """

    levels: tuple[Tensor, ...]
    representation: Tensor
    align_corners: bool = False

    def resized(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Maps [B, K, h, w] at another size, bilinear, in the way the logits were enlarged."""
        return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=self.align_corners)

    def labels(self) -> Tensor:
        """What the main logits say at the places of the features: class ids [B, h, w]."""
        return self.resized(self.levels[0], self.representation.shape[-2:]).argmax(1)


class Segmenter(nn.Module):
    """A segmentation network: RGB pictures in [0, 1] in, float32 logits at the pictures' size out.

    Pictures are [B, 3, H, W] of any size. The encoder's normalisation is part of the network (buffers `mean` and `std`,
    [3, 1, 1], and `bgr`) and thus of its checkpoint. `config` is complete: what the user left open is filled in.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: nn.Module, decoder: Decoder, config: NetworkConfig, classes: int, normalisation: Normalisation
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.config, self.classes = config, classes
        self.bgr = normalisation.bgr
        self.multiple = SEGMENTERS[config.name].multiple * (config.output_stride or 0)
        self.register_buffer("mean", torch.tensor(normalisation.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(normalisation.std).view(3, 1, 1))
        for norm in batch_norms(encoder) if config.norm != "train" else []:
            norm.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Segmenter:
        """As in PyTorch, but frozen batch norms stay in evaluation: running statistics are used and kept."""
        super().train(mode)
        for norm in batch_norms(self.encoder) if self.config.norm == "frozen" else []:
            norm.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Main logits, float32 [B, C, H, W], also under autocast."""
        return self.enlarge(self.decoder(self.encode(image)), image)

    def levels(self, image: Tensor) -> tuple[Tensor, ...]:
        """Logits of every level, main first; float32 [B, C, H, W] each."""
        return self.outputs(image).levels

    def outputs(self, image: Tensor) -> Outputs:
        """`levels` and `representation` from one forward pass: the main logits are those of this representation."""
        return self.decode(self.encode(image), image)

    def encode(self, image: Tensor) -> list[Tensor]:
        """The pyramid that `decode` takes: entry k is [B, D_k, h_k, w_k], at stride min(2^k, output stride).

        Entry 0 is the normalised picture, or with encoders such as VGG a feature map at its size; an entry without
        channels fills a gap. `feature_entries` says which ones are features.
        """
        image = (image - self.mean) / self.std
        image = image.flip(1) if self.bgr else image
        height, width = self._padded(image)
        if self.multiple:  # zeros after normalisation: the mean colour
            image = F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))
        pyramid: list[Tensor] = self.encoder(image)
        return pyramid

    def feature_entries(self, pyramid: Sequence[Tensor]) -> list[int]:
        """Indices k of the entries that are features to the decoder, ascending.

        Without the picture, gaps, and the entries from which SegNet takes nothing but positions for unpooling.
        """
        first = SEGMENTERS[self.config.name].first_feature
        return [k for k in range(len(pyramid))[first:] if pyramid[k].shape[1] not in NO_FEATURES]

    def decode(self, pyramid: list[Tensor], image: Tensor) -> Outputs:
        """The outputs from feature maps that `encode` made of pictures of this size, changed or not."""
        representation = self.decoder.represent(pyramid)
        levels = [self.decoder.classify(representation, pyramid), *self.decoder.auxiliary(pyramid)]
        enlarged = tuple(self.enlarge(logits, image) for logits in levels)
        return Outputs(enlarged, self._crop(representation, image), self.config.align_corners)

    def enlarge(self, logits: Tensor, image: Tensor) -> Tensor:
        """Logits [B, K, h, w] of pictures [B, 3, H, W] at their size, float32 [B, K, H, W], without the padding."""
        size, logits = self._padded(image), logits.float()
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=self.config.align_corners)
        return logits[..., : image.shape[-2], : image.shape[-1]]

    def features(self, image: Tensor) -> list[Tensor]:
        """The encoder's feature maps below the picture's own size, from shallow to deep, [B, D_k, h_k, w_k]."""
        maps = [entry for entry in self.encode(image)[1:] if entry.shape[1]]
        return [self._crop(entry, image) for entry in maps]

    def representation(self, image: Tensor) -> Tensor:
        """The decoder's features before the classifier, [B, D, h, w]."""
        return self._crop(self.decoder.represent(self.encode(image)), image)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that pretrained weights fill."""
        return self.encoder.parameters()

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that are new."""
        return self.decoder.parameters()

    @property
    def stride(self) -> int:
        """Of the representation: how many times smaller than the picture it is, a power of 2."""
        stride = self.decoder.stride or self.config.output_stride
        assert stride is not None
        return stride

    @property
    def normalisation(self) -> Normalisation:
        """The normalisation in use."""
        return Normalisation(tuple(self.mean.flatten().tolist()), tuple(self.std.flatten().tolist()), self.bgr)

    def _padded(self, image: Tensor) -> tuple[int, int]:
        step = self.multiple or 1
        height, width = image.shape[-2:]
        return -(-height // step) * step, -(-width // step) * step

    def _crop(self, features: Tensor, image: Tensor) -> Tensor:
        """Features without those of the padding."""
        if not self.multiple:
            return features
        pairs = zip(features.shape[-2:], self._padded(image), image.shape[-2:], strict=True)
        height, width = (-(-wanted * have // padded) for have, padded, wanted in pairs)
        return features[..., :height, :width]


def complete(config: NetworkConfig) -> NetworkConfig:
    """The configuration with output stride and encoder filled in where the network decides them.

    Raises:
        ConfigError: unknown network, or an output stride it cannot have.
    """
    if config.name not in SEGMENTERS:
        raise ConfigError(f"network.name: no network {config.name!r}{nearest(config.name, list(SEGMENTERS))}")
    recipe = SEGMENTERS[config.name]
    stride = config.output_stride or recipe.strides[0]
    if stride not in recipe.strides:
        choices = " or ".join(str(choice) for choice in recipe.strides)
        raise ConfigError(f"network.output_stride: {config.name} works at {choices}, not at {stride}")
    return config.model_copy(update={"output_stride": stride, "encoder": recipe.encoder or config.encoder})


def build_segmenter(config: NetworkConfig, classes: int, pretrained: bool = True) -> Segmenter:
    """A network for `classes` classes; with `pretrained`, its encoder holds the weights `config.weights` names.

    Raises:
        ConfigError: unknown network or encoder, or a combination that does not exist.
        WeightsError: the weights cannot be had or do not fit.
    """
    config = complete(config)
    assert config.output_stride is not None
    encoder, decoder = SEGMENTERS[config.name].parts(config.encoder, config.output_stride, classes)
    if config.style == "caffe":
        caffe_style(encoder)
    if config.norm_eps is not None:
        for norm in batch_norms(encoder):
            norm.eps = config.norm_eps
    if pretrained and config.weights is not None:
        logger.info("%s", load_encoder_weights(encoder, config))
    segmenter = Segmenter(encoder, decoder, config, classes, normalisation_of(config.encoder, config.style))
    use_fast_depthwise(segmenter)
    return segmenter

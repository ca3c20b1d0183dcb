"""Every other decoder, through segmentation-models-pytorch."""

from __future__ import annotations

from typing import Any

import segmentation_models_pytorch as smp
from torch import Tensor, nn

from udas.networks.decoder import Decoder, drop_pooled_norm
from udas.networks.encoders import checked_encoder

STRIDED = ("deeplabv3", "pan")  # the only ones there that take an output stride


class LibraryDecoder(Decoder):
    """A decoder of segmentation-models-pytorch with its classifier, without its upsampling to the picture."""

    def __init__(self, decoder: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        drop_pooled_norm(decoder)
        self.body = decoder
        classifier: Any = head[0]
        self.classifier = classifier
        self.channels = classifier.in_channels
        self.stride = int(getattr(head[1], "scale_factor", 1))  # of the upsampling to the picture, if there is one

    def represent(self, pyramid: list[Tensor]) -> Tensor:
        """The decoder's output."""
        features: Tensor = self.body(pyramid)
        return features

    def classify(self, representation: Tensor, pyramid: list[Tensor]) -> Tensor:
        """Logits at the decoder's size."""
        logits: Tensor = self.classifier(representation)
        return logits


def make_library_network(name: str, encoder: str, stride: int, classes: int) -> tuple[nn.Module, Decoder]:
    """Encoder and decoder of a network of segmentation-models-pytorch, with random weights."""
    strided = {"encoder_output_stride": stride} if name in STRIDED else {}
    with checked_encoder(encoder, stride):
        network = smp.create_model(name, f"tu-{encoder}", encoder_weights=None, classes=classes, **strided)
    return network.encoder, LibraryDecoder(network.decoder, network.segmentation_head)

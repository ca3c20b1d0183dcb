"""Several networks asked as one: the mean of their predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from udas.networks.segmenters import Segmenter

Averaged = Literal["logits", "probabilities"]


class Ensemble(nn.Module):
    """Networks of one label space whose predictions are averaged; a network again, as far as inference goes.

    logits:         l = 1/K sum_k l_k                      (AdvEnt + MinEnt: Vu et al., CVPR 2019, section 4.2)
    probabilities:  l = log(1/K sum_k softmax(l_k))        (multi-band transfer: FDA, Yang and Soatto, CVPR 2020)

    so that softmax(l) is the mean of the probabilities in the second case.

    Args:
        networks: K networks, which become submodules.
        average: what is averaged.
    """

    def __init__(self, networks: Sequence[Segmenter], average: Averaged) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.average = average

    def forward(self, image: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in [0, 1] -> main logits, float32 [B, C, H, W]."""
        return self._mean([network(image) for network in self.networks])

    def levels(self, image: Tensor) -> tuple[Tensor, ...]:
        """Logits of every level that all networks have, main first; float32 [B, C, H, W] each."""
        found = [network.levels(image) for network in self._segmenters()]
        return tuple(self._mean(level) for level in zip(*found, strict=False))

    def _segmenters(self) -> list[Segmenter]:
        return [network for network in self.networks if isinstance(network, Segmenter)]

    def _mean(self, logits: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack([each.float() for each in logits])
        if self.average == "logits":
            return stacked.mean(0)
        return stacked.log_softmax(2).logsumexp(0) - math.log(len(logits))  # finite where probabilities round to 0


def as_one(networks: Sequence[Segmenter], average: Averaged) -> Segmenter | Ensemble:
    """The network, where there is one; an `Ensemble` of several."""
    return networks[0] if len(networks) == 1 else Ensemble(networks, average)

"""Networks of earlier stages that a method asks but does not train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from udas.errors import ConfigError
from udas.methods.base import Task
from udas.networks.ensemble import Ensemble
from udas.networks.segmenters import Segmenter


class Frozen(nn.Module):
    """The network of the stage's `teacher` as it is: no gradient, and in evaluation mode whatever its method is in.

    Of several teachers the probabilities are averaged.

    Raises:
        ConfigError: the stage names no teacher.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        if task.teacher is None:
            raise ConfigError("teacher: missing; name the train stage, or stages, whose network is learnt from")
        self.network: Segmenter | Ensemble = task.teacher().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stays in evaluation mode: running statistics are used and kept, and there is no dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Class probabilities: RGB [B, 3, H, W] in [0, 1] -> [B, C, H, W] float32."""
        return self.logits(image).softmax(1)

    @torch.no_grad()
    def logits(self, image: Tensor) -> Tensor:
        """Logarithms of the probabilities, up to a constant per pixel: [B, 3, H, W] -> [B, C, H, W] float32."""
        logits: Tensor = self.network(image)
        return logits

"""From pictures to class probabilities: of K views through a network the most confident per pixel, or by a protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from udas.data.views import draw_views, look, map_back
from udas.errors import RunError
from udas.evaluation.protocols import ProtocolConfig
from udas.evaluation.protocols import probabilities as by_protocol
from udas.taxonomy import Taxonomy

Model = Callable[[Tensor], Tensor]
"""RGB in [0, 1], [B, 3, H, W] -> logits [B, C, H, W]."""


def most_confident(probabilities: Tensor) -> Tensor:
    """The maximum-confidence map: per pixel the class probabilities of the view that is surest of its class.

    Args:
        probabilities: [K, C, H, W], of K views, mapped back to the picture.

    Returns:
        [C, H, W]: at each pixel those of view argmax_k max_c p[k, c].
    """
    view = probabilities.amax(1).argmax(0)
    return probabilities.gather(0, view.expand(1, *probabilities.shape[1:])).squeeze(0)


def entropy(probabilities: Tensor) -> Tensor:
    """[C, H, W] probabilities -> [H, W] entropy as a share of its maximum log C, in [0, 1]."""
    return -torch.xlogy(probabilities, probabilities).sum(0) / math.log(len(probabilities))


def kept(label: Tensor, confidence: Tensor, thresholds: Tensor) -> Tensor:
    """[H, W] bool: pixels whose confidence reaches the threshold ([C] float32) of their class."""
    return confidence >= thresholds[label]


class Labeller:
    """Gives pictures class probabilities: `views` looks each, softmax(logits / temperature), or by `protocol`."""

    def __init__(
        self,
        model: Model,
        taxonomy: Taxonomy,
        views: int,
        temperature: float,
        seed: int,
        device: torch.device,
        protocol: ProtocolConfig | None = None,
    ) -> None:
        self.model = model
        self.taxonomy = taxonomy
        self.views = views
        self.temperature = temperature
        self.seed = seed
        self.device = device
        self.protocol = protocol
        self.excluded = [] if protocol is None else protocol.excluded(taxonomy.classes)

    def __call__(self, names: Sequence[str], images: Sequence[Tensor]) -> list[Tensor]:
        """Probabilities [C, H, W] of each picture ([3, H, W] uint8); pictures of one size share a forward pass.

        Raises:
            RunError: when the network's classes are not those of the label space, or its output is not finite.
        """
        found: dict[int, Tensor] = {}
        for size in dict.fromkeys(image.shape for image in images):
            same = [k for k, image in enumerate(images) if image.shape == size]
            found |= zip(same, self._one_size([names[k] for k in same], [images[k] for k in same]), strict=True)
        return [found[k] for k in range(len(images))]

    def _one_size(self, names: Sequence[str], images: Sequence[Tensor]) -> list[Tensor]:
        if self.protocol is not None:
            shown = torch.stack(list(images)).to(self.device).float() / 255
            found = by_protocol(self.model, shown, self.protocol, excluded=self.excluded)
            self._check(found, names)
            return list(found)
        height, width = images[0].shape[-2:]
        views = [draw_views(self.views, self.seed, name, (height, width)) for name in names]
        seen = [look(image.to(self.device), drawn) for image, drawn in zip(images, views, strict=True)]
        logits = self.model(torch.cat(seen)).float()
        self._check(logits, names)
        probabilities = (logits / self.temperature).softmax(1)
        back = map_back(probabilities, [view for drawn in views for view in drawn])
        return [most_confident(part) for part in back.view(len(names), self.views, *back.shape[1:])]

    def _check(self, logits: Tensor, names: Sequence[str]) -> None:
        expected = len(self.taxonomy.classes)
        if logits.shape[1] != expected:
            raise RunError(
                f"the network predicts {logits.shape[1]} classes, but the label space {self.taxonomy.name!r} has "
                f"{expected}; label with a network that was trained in this label space"
            )
        finite = logits.isfinite().flatten(1).all(1).view(len(names), -1).all(1)
        if not finite.all():
            name = names[int(finite.int().argmin())]
            raise RunError(f"{name}: the network's output is not finite; check its weights, or label with fp32")

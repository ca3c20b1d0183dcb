"""One prototype per class in feature space: distances to them, the weights that follow, and how they move (ProDA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from udas.errors import ConfigError

FAR = 1e9  # the distance of classes that were never seen: far enough for a weight of exactly 0, and still finite


class Prototypes(nn.Module):
    """eta_k, the mean feature of class k (Zhang et al., "Prototypical Pseudo Label Denoising", CVPR 2021, Section 3).

    d_k(x) = ||f(x) - eta_k||_2
    w_k(x) = exp(-tau d_k(x)) / sum_j exp(-tau d_j(x))        (Eq. 7)

    Rows of zeros are classes that were never seen. They are infinitely far, so that no feature is drawn to them, until
    `update` finds their first pixels.

    Args:
        vectors: eta, [C, D] float32.
        temperature: tau.
        decay: lambda of the moving average in `update`; 1 = fixed prototypes.
        minimum: pixels of a class that a picture must have to count in `update`.
    """

    vectors: Tensor
    seen: Tensor

    def __init__(self, vectors: Tensor, temperature: float = 1.0, decay: float = 0.9999, minimum: int = 10) -> None:
        super().__init__()
        self.temperature, self.decay, self.minimum = temperature, decay, minimum
        self.register_buffer("vectors", vectors.detach().clone().float())
        self.register_buffer("seen", (vectors != 0).any(1))

    def distances(self, features: Tensor) -> Tensor:
        """d_k, plain Euclidean: features [B, D, h, w] -> [B, C, h, w] float32; FAR for classes never seen."""
        with torch.autocast(features.device.type, enabled=False):  # differences of large numbers
            distance = torch.cdist(features.flatten(2).mT.float(), self.vectors)
        return distance.masked_fill(~self.seen, FAR).mT.reshape(len(features), -1, *features.shape[-2:])

    def log_weights(self, features: Tensor) -> Tensor:
        """Logarithm of w_k, finite for every class: features [B, D, h, w] -> [B, C, h, w] float32."""
        return F.log_softmax(-self.temperature * self.distances(features), dim=1)

    def weights(self, features: Tensor) -> Tensor:
        """w_k, which sum to 1 over the classes: features [B, D, h, w] -> [B, C, h, w] float32."""
        return self.log_weights(features).exp()

    @torch.no_grad()
    def update(self, features: Tensor, label: Tensor) -> None:
        """Move every prototype towards the mean feature of its class in each picture, one picture after the other.

        eta <- lambda eta + (1 - lambda) eta' (Eq. 8); the first mean of a class that was never seen becomes its
        prototype. Classes with fewer than `minimum` pixels in a picture do not count there.

        Args:
            features: [B, D, h, w].
            label: [B, h, w] class ids, IGNORE for pixels that do not count.
        """
        for mean, count in zip(*class_means(features, label, len(self.vectors)), strict=True):
            moved = torch.where(self.seen[:, None], torch.lerp(mean, self.vectors, self.decay), mean)
            found = count >= self.minimum
            self.vectors.copy_(torch.where(found[:, None], moved, self.vectors))
            self.seen.logical_or_(found)


def class_means(features: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature of every class in every picture, and the number of its pixels.

    Args:
        features: [B, D, h, w].
        label: [B, h, w] class ids; other values count nowhere.
        classes: C.

    Returns:
        means [B, C, D] float32, zero for a class without pixels; counts [B, C] int64.
    """
    ids = torch.arange(classes, device=label.device)
    member = label.flatten(1)[:, None] == ids[:, None]
    count = member.sum(2)
    with torch.autocast(features.device.type, enabled=False):
        total = member.float() @ features.flatten(2).mT.float()
    return total / count.clamp(min=1)[..., None], count


def fitting_prototypes(vectors: Tensor | None, classes: int, channels: int) -> Tensor:
    """`vectors`, when they are [`classes`, `channels`].

    Raises:
        ConfigError: there are none, or they were collected with another network or label space.
    """
    if vectors is None:
        raise ConfigError("prototypes: missing; name a prototypes stage")
    if tuple(vectors.shape) != (classes, channels):
        found = f"{vectors.shape[0]} classes with {vectors.shape[1]} features"
        raise ConfigError(
            f"prototypes: {found} were collected, but this network has {classes} classes with {channels} features; "
            "collect them with a network of the same kind"
        )
    return vectors

"""A second source of labels: class activation maps of an image classifier, refined by self-attention (PseudoSeg)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from udas.networks.decoder import resize

WIDTH = 128  # of queries and keys
FAR = -1e9  # added to attention on padding: no weight is left, and a picture that is all padding stays finite


class SelfAttentionGradCAM(nn.Module):
    """SGC of PseudoSeg (Zou et al., ICLR 2021, Section 3.2), on an encoder's last two feature maps A' and A.

        s_c   = w_c . mean_p A + b_c                     image-level score of class c, over positions p
        CAM_c = [c in picture] ReLU(w_c . A) / max_p     in [0, 1]
        H     = [A, A' at the size of A]                 the hypercolumns; Q, K: 1x1 convolutions to 128 channels
        R     = softmax(Q K^T / sqrt(128)) CAM + CAM     in [0, 2]
        m     = BN(1x1 convolution of R)

    w_c . A is Grad-CAM (Selvaraju et al., ICCV 2017): behind a global mean and a linear layer the gradient of s_c by A
    is w_c / |p| everywhere, and the division by the maximum takes 1 / |p| out. A `background` has no score and no map
    of its own: its channel of R is 2 - max_c R_c.

    No gradient leaves `refine` towards the features: it trains Q, K and the last convolution.

    Args:
        channels: channels of A' and A.
        classes: C, the background included.
        background: id of the class that has no map, if there is one.
        batch_norm: BN as released, which shifts but does not scale; else the convolution has a bias.
    """

    def __init__(
        self, channels: Sequence[int], classes: int, background: int | None = None, batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.background = background
        self.score = nn.Linear(channels[-1], classes - (background is not None))
        self.query = nn.Conv2d(sum(channels), WIDTH, 1, bias=False)
        self.key = nn.Conv2d(sum(channels), WIDTH, 1, bias=False)
        self.project = nn.Conv2d(classes, classes, 1, bias=not batch_norm)
        norm = nn.BatchNorm2d(classes)
        norm.weight.requires_grad_(False)
        self.norm = norm if batch_norm else nn.Identity()

    def classify(self, last: Tensor) -> Tensor:
        """Image-level scores s, float32 [B, F] of the F classes that are no background, from A [B, D, h, w]."""
        scores: Tensor = self.score(last.mean((2, 3)))
        return scores.float()

    def foreground(self, present: Tensor) -> Tensor:
        """[B, C] per class -> [B, F] without the background."""
        b = self.background
        return present if b is None else torch.cat([present[:, :b], present[:, b + 1 :]], 1)

    def refine(self, features: Sequence[Tensor], present: Tensor, visible: Tensor) -> Tensor:
        """Pixel-level logits m.

        Args:
            features: A' [B, D', h', w'] and A [B, D, h, w].
            present: [B, F] float, 1 for the classes that are in the picture, else 0.
            visible: [B, H, W] bool, False on padding, which is not attended to.

        Returns:
            [B, C, h, w] float32.
        """
        with torch.autocast(visible.device.type, enabled=False), torch.no_grad():
            columns = self._hypercolumns([entry.float() for entry in features])
            maps = self._maps(features[-1].float(), present)
        with torch.autocast(visible.device.type, enabled=False):
            refined = self._attend(columns, maps, visible) + maps
            logits: Tensor = self.norm(self.project(self._with_background(refined)))
        return logits

    def _hypercolumns(self, features: Sequence[Tensor]) -> Tensor:
        fine, last = features
        return torch.cat([last, resize(fine, like=last)], 1)

    def _maps(self, last: Tensor, present: Tensor) -> Tensor:
        """CAM, [B, F, h, w] in [0, 1]; zero where the class has no positive evidence."""
        evidence = torch.einsum("fd,bdhw->bfhw", self.score.weight, last).relu()
        largest = evidence.amax((2, 3), keepdim=True)
        return present[..., None, None] * evidence / largest.clamp(min=1e-12)

    def _attend(self, columns: Tensor, maps: Tensor, visible: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(128)) CAM, [B, F, h, w]: every position takes over the maps of those that look alike."""
        query, key, value = (part.flatten(2).mT[:, None] for part in (self.query(columns), self.key(columns), maps))
        seen = F.interpolate(visible[:, None].float(), size=maps.shape[-2:], mode="nearest").flatten(2)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=FAR * (1 - seen[:, None]))
        return attended[:, 0].mT.reshape(maps.shape)

    def _with_background(self, refined: Tensor) -> Tensor:
        """[B, F, h, w] -> [B, C, h, w]."""
        b = self.background
        if b is None:
            return refined
        rest = 2 - refined.amax(1, keepdim=True)
        return torch.cat([refined[:, :b], rest, refined[:, b:]], 1)

"""UniMatch: FixMatch with two strong views of every picture and one of its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from udas.data.batch import Batch, Block, together
from udas.data.mixing import channel_dropout
from udas.data.sampling import seed_of
from udas.methods.domains import label_loss
from udas.methods.fixmatch import (
    HALF,
    PseudoLabels,
    WeakToStrong,
    WeakToStrongConfig,
    learn_source,
    pseudo_labels,
    pseudo_loss,
    strong_view,
)


class UniMatchConfig(WeakToStrongConfig):
    """Settings of UniMatch."""

    name: Literal["unimatch"] = "unimatch"
    images: float = Field(0.25, ge=0, description="weight of each of L_s1 and L_s2, the losses on strong views")
    features: float = Field(0.5, ge=0, description="weight of L_fp, the loss on features with dropped channels")
    dropout: float = Field(0.5, ge=0, lt=1, description="share of the feature channels that are dropped for L_fp")
    separate_decoding: bool = Field(
        False, description="decode dropped features in a pass of their own: batch norms do not mix them with others"
    )


class UniMatch(WeakToStrong[UniMatchConfig]):
    """Yang et al., "Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation", CVPR 2023.

    As `FixMatch`, but of f = h o g, decoder and encoder, three streams learn the pseudo-labels y of the weak view:

        L_s1, L_s2 = L_u(f(A_1 x_u)), L_u(f(A_2 x_u)): two strong views, drawn independently
        L_fp       = L_u(h(D g(x_u)))
        L          = (CE(f(x_l), y_l) + images (L_s1 + L_s2) + features L_fp   + source CE(f(x_s), y_s)) / 2

    D zeroes whole channels, picture by picture, of every feature map of the encoder; with SegNet of the last alone,
    since the others give its decoder nothing but positions. One pass of the encoder over labelled pictures and weak
    views together, and one of the decoder over its features and the dropped ones, gives f(x_l), y and L_fp, as in the
    released code; with `separate_decoding` the decoder takes a pass for each.
    """

    settings = UniMatchConfig

    def step(self, batch: Batch) -> None:
        """Learn labels, and pseudo-labels from dropped features and two strong views."""
        labelled, target = batch.labelled, batch.unlabelled
        assert labelled is not None
        assert target is not None
        with self.update("segmenter") as minimise:
            learn_source(minimise, self.segmenter, batch, self.config)
            terms, pseudo = self._learn(labelled, target)
            minimise(terms)
            minimise(self._strong(target, pseudo))

    def _learn(self, labelled: Block, target: Block) -> tuple[dict[str, Tensor], PseudoLabels]:
        """Losses on labels and on dropped features, of one pass of the encoder; pseudo-labels of the weak views."""
        image, c, count = together(labelled, target), self.config, len(labelled.image)
        pyramid = self.segmenter.encode(image)
        dropped = self._drop(pyramid, (*labelled.seeds, *target.seeds))
        outputs, without = self._decode(pyramid, dropped, image, count)
        pseudo = pseudo_labels(outputs[0].detach()[count:], target.image)
        losses = {
            "labelled": HALF * label_loss(outputs, labelled, c.auxiliary),
            "features": HALF * c.features * pseudo_loss(without, pseudo, c),
        }
        return losses, pseudo

    def _drop(self, pyramid: list[Tensor], seeds: Sequence[int]) -> list[Tensor]:
        """The pyramid after D, with those entries unchanged that are no features to the decoder."""
        dropped, rate = list(pyramid), self.config.dropout
        for k in self.segmenter.feature_entries(pyramid):
            dropped[k] = channel_dropout(pyramid[k], seeds, rate, str(k - 1))  # "0" is the entry at stride 2
        return dropped

    def _decode(
        self, whole: list[Tensor], dropped: list[Tensor], image: Tensor, count: int
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Logits of all pictures from whole features, and of those behind the first `count` from dropped ones."""
        if self.config.separate_decoding:
            rest = self.segmenter.decode([entry[count:] for entry in dropped], image[count:]).levels
            return self.segmenter.decode(whole, image).levels, rest
        both = [torch.cat(pair) for pair in zip(whole, dropped, strict=True)]
        outputs = self.segmenter.decode(both, torch.cat([image, image])).levels
        return [output[: len(image)] for output in outputs], [output[len(image) + count :] for output in outputs]

    def _strong(self, block: Block, pseudo: PseudoLabels) -> dict[str, Tensor]:
        """L_s1 and L_s2, of one forward pass."""
        c, count = self.config, len(block.image)
        seeds = block.seeds, [seed_of(seed, "second") for seed in block.seeds]
        views = [strong_view(block, own, pseudo, c) for own in seeds]
        outputs = self.segmenter.levels(torch.cat([image for image, _ in views]))
        split = ([level[:count] for level in outputs], [level[count:] for level in outputs])
        losses = [pseudo_loss(levels, seen, c) for levels, (_, seen) in zip(split, views, strict=True)]
        return {f"strong {k}": HALF * c.images * loss for k, loss in enumerate(losses, 1)}

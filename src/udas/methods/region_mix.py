"""Region-level domain mixing: boxes of synthetic pictures pasted on labelled real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from udas.config import SegmentationConfig
from udas.data.batch import Batch, Block, Stream
from udas.data.masks import cutmix_boxes
from udas.data.mixing import paste
from udas.methods.base import SegmentationMethod
from udas.methods.domains import supervise


class RegionMixConfig(SegmentationConfig):
    """Settings of region-level domain mixing."""

    name: Literal["region_mix"] = "region_mix"
    pseudo: float = Field(1.0, ge=0, description="weight of mixed pictures whose real part has pseudo-labels")


class RegionMix(SegmentationMethod[RegionMixConfig]):
    """Chen et al., "Semi-supervised Domain Adaptation based on Dual-level Domain Mixing", CVPR 2021: regions.

    x_s, y_s: synthetic pictures and labels; x_l, y_l: labelled real ones; M: 1 in a random box (CutMix).

        x_m = M x_s + (1 - M) x_l,   y_m likewise
        L   = CE(f(x_m), y_m)    (+ pseudo times the same, on pseudo-labelled real pictures)

    Nothing is learnt from unmixed pictures. In later rounds pseudo-labelled pictures join the labelled ones.
    """

    settings = RegionMixConfig
    needs = frozenset({Stream.SOURCE, Stream.LABELLED})
    optional = frozenset({Stream.PSEUDO})

    def same_size(self) -> frozenset[Stream]:
        """Boxes of synthetic pictures are pasted on real ones."""
        return self.needs | self.optional

    def step(self, batch: Batch) -> None:
        """Minimise the cross-entropy on real pictures that hold a box of a synthetic one."""
        source, labelled, pseudo, c = batch.source, batch.labelled, batch.pseudo, self.config
        assert source is not None
        assert labelled is not None
        with self.update("segmenter") as minimise:
            supervise(minimise, self.segmenter, region_mix(labelled, source), "mixed", c.auxiliary)
            if pseudo is not None:
                mixed = region_mix(pseudo, source)
                supervise(minimise, self.segmenter, mixed, "mixed pseudo", c.auxiliary, c.pseudo)


def region_mix(real: Block, source: Block) -> Block:
    """Paste a box of a synthetic picture on each real one at the same place, labels likewise.

    The boxes are those of `cutmix_boxes`. A smaller source block is used repeatedly. The blocks are not changed.

    Raises:
        ConfigError: the two differ in size.
    """
    assert real.label is not None
    assert source.label is not None
    image = real.image
    partner = torch.arange(len(image), device=image.device) % len(source.image)
    box = cutmix_boxes(real.seeds, image.shape[-2], image.shape[-1], image.device)
    label = paste(real.label, source.label[partner], box)
    return replace(real, image=paste(image, source.image[partner], box), label=label)

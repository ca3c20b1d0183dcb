"""What one training step sees: one block of pictures per stream."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import StrEnum

import torch
from torch import Tensor

from udas.errors import ConfigError
from udas.taxonomy import IGNORE

__all__ = ["IGNORE", "Batch", "Block", "Stream", "together"]


class Stream(StrEnum):
    """The streams a method can ask for."""

    SOURCE = "source"  # synthetic pictures with labels
    LABELLED = "labelled"  # real pictures with labels
    UNLABELLED = "unlabelled"  # real pictures; labels are out of reach
    PSEUDO = "pseudo"  # real pictures with labels made by a network


@dataclass(frozen=True)
class Block:
    """The pictures of one stream in one step.

    image: [B, 3, H, W] float32, RGB in [0, 1] (networks normalise by themselves).
    label: [B, H, W] int64 class ids or IGNORE; None in the unlabelled stream.
    confidence: [B, H, W] float32 in [0, 1]; only where pseudo-labels carry it.
    seeds: one 63-bit seed per picture, a function of (run seed, stream, draw): randomness of the step is drawn from it.
    names: the pictures' names, for messages, and so that no picture is mixed with itself.
    """

    image: Tensor
    label: Tensor | None
    confidence: Tensor | None
    seeds: tuple[int, ...]
    names: tuple[str, ...]

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Block:
        """The block on `device`; pictures in `memory_format`."""
        image = self.image.to(device, non_blocking=True).contiguous(memory_format=memory_format)
        label = None if self.label is None else self.label.to(device, non_blocking=True)
        confidence = None if self.confidence is None else self.confidence.to(device, non_blocking=True)
        return replace(self, image=image, label=label, confidence=confidence)

    def pin_memory(self) -> Block:
        """Called by the loader when the device copies faster from pinned memory."""
        label = None if self.label is None else self.label.pin_memory()
        confidence = None if self.confidence is None else self.confidence.pin_memory()
        return replace(self, image=self.image.pin_memory(), label=label, confidence=confidence)


@dataclass(frozen=True)
class Batch:
    """One block per stream the method needs; the others are None."""

    source: Block | None = None
    labelled: Block | None = None
    unlabelled: Block | None = None
    pseudo: Block | None = None

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.preserve_format) -> Batch:
        """Every block on `device`."""
        return Batch(**{f.name: b.to(device, memory_format) for f in fields(self) if (b := getattr(self, f.name))})

    def pin_memory(self) -> Batch:
        """Every block in pinned memory."""
        return Batch(**{f.name: b.pin_memory() for f in fields(self) if (b := getattr(self, f.name))})

    def names(self) -> dict[str, tuple[str, ...]]:
        """Stream -> names of its pictures."""
        return {f.name: b.names for f in fields(self) if (b := getattr(self, f.name))}


def together(labelled: Block, unlabelled: Block) -> Tensor:
    """The pictures of both blocks, labelled ones first. Raises `ConfigError` when they differ in size."""
    sizes = [" x ".join(map(str, block.image.shape[-2:])) for block in (labelled, unlabelled)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"labelled pictures of {sizes[0]}, unlabelled ones of {sizes[1]}: give them augment.crop")
    return torch.cat([labelled.image, unlabelled.image])

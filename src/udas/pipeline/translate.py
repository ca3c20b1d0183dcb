"""Repainting: every source picture, by a network or in the Fourier domain, under its own name; the labels stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from udas.data.dataset import PictureSet
from udas.data.fourier import swap_amplitude
from udas.data.sampling import seed_of
from udas.storage import write_atomically, write_picture
from udas.training.runtime import Runtime

SHOWN = 6

Painter = Callable[[str, Tensor], Tensor]
"""(name, RGB [1, 3, H, W] in [0, 1]) -> the picture repainted, likewise."""


@dataclass(frozen=True)
class FourierPainter:
    """Gives each picture the low-frequency amplitudes of one of `partners`, drawn by its name (FDA, section 3.1).

    partners: real pictures; beta: size of the window; seed: of the draw.
    """

    partners: PictureSet
    beta: float
    seed: int

    def __call__(self, name: str, image: Tensor) -> Tensor:
        """The picture repainted."""
        partner = self.partners.image(seed_of(self.seed, "partner", name) % len(self.partners))
        return swap_amplitude(image, partner[None].to(image.device).float() / 255, self.beta)


@torch.inference_mode()
def translate(
    painter: Painter,
    pictures: PictureSet,
    folder: Path,
    runtime: Runtime,
    progress: Callable[[int, int], None],
) -> None:
    """Write `images/<name>.png` for this process's share of the pictures; those already there are kept.

    Whole pictures are repainted at the size the run uses, so that geometry is that of training. A few pairs of
    original and repainted picture go to `preview/<k>/`.
    """
    mine = range(runtime.rank, len(pictures), runtime.world)
    for done, index in enumerate(mine, 1):
        target = folder / "images" / f"{pictures.pictures[index].name}.png"
        if not target.exists():
            image = pictures.image(index)[None].to(runtime.device).float() / 255
            write_picture(target, to_picture(painter(pictures.pictures[index].name, image)[0]))
        progress(done, len(mine))
    runtime.barrier()
    if runtime.main:
        _preview(pictures, folder)


def _preview(pictures: PictureSet, folder: Path) -> None:
    for place, index in enumerate(pictures.fixed(SHOWN)):
        translated = folder / "images" / f"{pictures.pictures[index].name}.png"
        pair = folder / "preview" / str(place)
        write_atomically(pair / "translated.png", translated.read_bytes())
        write_picture(pair / "original.png", to_picture(pictures.image(index).float() / 255))


def to_picture(image: Tensor) -> Image.Image:
    """RGB [3, H, W] in [0, 1] as an 8-bit picture."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)

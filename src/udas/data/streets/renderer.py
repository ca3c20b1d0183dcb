"""From (look, seed, index) to a picture and its label."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from udas.data.streets.camera import Floats
from udas.data.streets.canvas import Canvas
from udas.data.streets.layout import furnish
from udas.data.streets.looks import LOOKS
from udas.data.streets.sensor import draw_fog, in_fog, photograph
from udas.data.streets.shading import make_scene, shade
from udas.data.streets.street import Site, draw_camera, draw_street

LookName = Literal["game", "camera"]
Bytes = NDArray[np.uint8]


def render(look: LookName, seed: int, index: int, size: tuple[int, int] = (128, 256)) -> tuple[Bytes, Bytes]:
    """Render one street.

    Args:
        look: `game` (clean, saturated) or `camera` (fog, noise, blur, exposure, JPEG).
        seed: another seed is another town.
        index: number of the picture, not negative; every index is another place.
        size: height, width in pixels. The place is the same at every size.

    Returns:
        The picture [H, W, 3] and its street11 ids [H, W], a function of the arguments alone. Drawn at twice the size: a
        pixel's colour is the mean of its four quarters and its id the most frequent one of them; nothing is void.
    """
    _keep_memory()
    style = LOOKS[look]
    rng = np.random.default_rng((sorted(LOOKS).index(look), seed % 2**63, index))
    street = draw_street(rng, style)
    camera, slope = draw_camera(rng, style, street, (2 * size[0], 2 * size[1]))
    canvas = Canvas()
    furnish(Site(canvas, rng, style, street, slope))
    ids, surfaces = canvas.finish(camera, street.bend)
    scene, fog = make_scene(surfaces, camera, style, street, rng), draw_fog(rng, style)
    colour, label, depth = shade(scene, ids)
    colour, label = _mean_of_four(in_fog(colour, depth, fog)), _most_of_four(label)
    if style.sensor is None:
        return (np.clip(colour, 0, 1) * 255).astype(np.uint8), label
    return photograph(colour, style.sensor, rng), label


@cache
def _keep_memory() -> None:
    """Allocate and free one large block.

    The C library returns freed blocks to the system until it has seen larger ones, and asking anew for the arrays of
    every picture would take a fifth of the time.
    """
    np.empty(2**24, np.uint8)


def _mean_of_four(colour: Floats) -> Floats:
    rows = colour[::2] + colour[1::2]
    return (rows[:, ::2] + rows[:, 1::2]) * np.float32(0.25)


def _most_of_four(label: Bytes) -> Bytes:
    """The id that at least two quarters of a pixel share; the first quarter's where all differ or two pairs tie."""
    a, b, c, d = label[::2, ::2], label[::2, 1::2], label[1::2, ::2], label[1::2, 1::2]
    among_others = np.where((b == c) | (b == d), b, np.where(c == d, c, a))
    return np.where((a == b) | (a == c) | (a == d), a, among_others)

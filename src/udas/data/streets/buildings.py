"""What stands along the pavement: buildings, walls and fences."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from udas.data.streets.camera import Floats
from udas.data.streets.canvas import Canvas, Label, Layer, Material, Points
from udas.data.streets.figures import pick
from udas.data.streets.looks import Look

Span = tuple[float, float]

BEAMS: dict[int, tuple[Span, ...]] = {  # level parts of a fence, as shares of its height
    0: (),
    1: ((0.18, 0.3), (0.5, 0.62), (0.82, 0.94)),
    2: ((0.93, 1.0),),
    3: ((0.5, 0.9),),
}


def along(x: float, span: Span, low: float, high: float) -> Points:
    """An upright rectangle [1, 4, 3] along the street at x, from z to z and from height to height."""
    return np.array([[(x, low, span[0]), (x, low, span[1]), (x, high, span[1]), (x, high, span[0])]], np.float32)


def across(z: float, span: Span, low: float, high: float) -> Points:
    """An upright rectangle [1, 4, 3] across the street at z, from x to x and from height to height."""
    return np.array([[(span[0], low, z), (span[1], low, z), (span[1], high, z), (span[0], high, z)]], np.float32)


def building(
    canvas: Canvas,
    rng: np.random.Generator,
    look: Look,
    front: Span,
    span: Span,
    layer: Layer = Layer.PLOT,
) -> float:
    """A house with windows on the street side and on the gable that faces the camera.

    Args:
        canvas: the scene.
        rng: draws height, colours and windows.
        look: palette and layout.
        front: x of the street side and of the back, in metres.
        span: z of the near and the far end.
        layer: the plots, or the backdrop.

    Returns:
        The height of the eaves in metres.
    """
    storey = rng.uniform(2.9, 3.5)
    shop = rng.uniform(3.4, 4.2) if rng.random() < look.layout.shops else 0.5
    floors = int(rng.integers(look.layout.floors[0], look.layout.floors[1] + 1))
    height = shop + storey * floors + 0.4
    pattern, trim = _windows(rng, look, storey, shop), pick(rng, look.palette.trim, look.palette.spread)
    colour = pick(rng, look.palette.building, look.palette.spread)
    canvas.add(across(span[0], front, 0, height), colour * 0.94, Label.BUILDING, layer, span[0],
               Material.FACADE, pattern)  # fmt: skip
    canvas.add(along(front[0], span, 0, height), colour, Label.BUILDING, layer, span[0], Material.FACADE, pattern)
    _cornice(canvas, trim, front, span, (height, shop if shop > 1 else 0), layer)
    if layer == Layer.PLOT and floors > 1 and rng.random() < 0.3:
        _balconies(canvas, rng, trim, front, span, (storey, shop, floors), layer)
    if rng.random() < look.layout.pitched:
        _roof(canvas, rng, look, (front, span, height), colour, layer)
    return height


def _windows(rng: np.random.Generator, look: Look, storey: float, shop: float) -> Floats:
    """Pattern of the facade material: window pitch, storey, width, height (shares), ground floor, seed."""
    wide = rng.uniform(0.62, 0.86) if rng.random() < 0.3 else rng.uniform(0.36, 0.55)
    pitch = rng.uniform(1.8, 3.4)
    return np.array([pitch, storey, wide, rng.uniform(0.45, 0.68), shop, rng.integers(1, 997)], np.float32)


def _cornice(canvas: Canvas, trim: Floats, front: Span, span: Span, heights: Span, layer: Layer) -> None:
    """Ledges below the eaves and above the shops."""
    out = 0.25 if front[0] < 0 else -0.25
    for height, thick in ((heights[0], 0.4), (heights[1], 0.25)):
        if height > 0:
            x = front[0] + out
            ledge = [across(span[0], (x, front[0]), height - thick, height), along(x, span, height - thick, height)]
            canvas.add(np.concatenate(ledge), trim, Label.BUILDING, layer, span[0])


def _balconies(
    canvas: Canvas,
    rng: np.random.Generator,
    trim: Floats,
    front: Span,
    span: Span,
    floors: tuple[float, float, int],
    layer: Layer,
) -> None:
    storey, shop, count = floors
    x = front[0] + (0.9 if front[0] < 0 else -0.9)
    wide = rng.uniform(1.6, 2.6)
    for z in np.linspace(span[1], span[0], int((span[1] - span[0]) / 5) + 2)[1:-1].tolist():
        for floor in range(1, min(count, 6)):
            low = shop + storey * floor
            sides = [across(z, (x, front[0]), low - 0.15, low + 0.9), along(x, (z, z + wide), low - 0.15, low + 0.9)]
            canvas.add(np.concatenate(sides), trim * 0.85, Label.BUILDING, layer, span[0])


def _roof(
    canvas: Canvas, rng: np.random.Generator, look: Look, body: tuple[Span, Span, float], wall: Floats, layer: Layer
) -> None:
    """A pitched roof with its ridge along the street, the gable below it and a chimney."""
    (x0, x1), (z0, z1), eaves = body
    middle, ridge = (x0 + x1) / 2, eaves + rng.uniform(2.0, 3.6)
    tiles = pick(rng, look.palette.roof, look.palette.spread)
    gable = np.array([[(x0, eaves, z0), (x1, eaves, z0), (middle, ridge, z0), (middle, ridge, z0)]], np.float32)
    canvas.add(gable, wall * 0.94, Label.BUILDING, layer, z0)
    slope = np.array([[(x0, eaves, z0), (x0, eaves, z1), (middle, ridge, z1), (middle, ridge, z0)]], np.float32)
    canvas.add(slope, tiles, Label.BUILDING, layer, z0, Material.BOARDS, np.array([0.5, 0, 0, 0, 0, 0], np.float32))
    z, wide = z0 + (z1 - z0) * rng.uniform(0.2, 0.7), 0.7
    x = x0 + (x1 - x0) * 0.3
    chimney = [
        across(z, (x - wide / 2, x + wide / 2), eaves + 0.8, ridge + 0.9),
        along(x, (z, z + wide), eaves, ridge + 0.9),
    ]
    canvas.add(np.concatenate(chimney), wall * 0.7, Label.BUILDING, layer, z0)


def wall(
    canvas: Canvas, rng: np.random.Generator, look: Look, front: Span, span: Span, heights: Span = (1.4, 3.0)
) -> None:
    """A brick or concrete wall along the front x[0] with a coping; its end faces the camera."""
    high, thick = rng.uniform(*heights), 0.35 if front[1] > front[0] else -0.35
    colour = pick(rng, look.palette.wall, look.palette.spread)
    brick = rng.random() < 0.6
    pattern = np.array([0.55 if brick else 2.4, 0.22 if brick else 1.2, 0, 0, 0, rng.integers(1, 997)], np.float32)
    faces = np.concatenate([across(span[0], (front[0], front[0] + thick), 0, high), along(front[0], span, 0, high)])
    canvas.add(faces, colour, Label.WALL, Layer.PLOT, span[0], Material.MASONRY, pattern)
    x = front[0] - thick * 0.25
    cap = [across(span[0], (x, front[0] + thick * 1.25), high, high + 0.15), along(x, span, high, high + 0.15)]
    canvas.add(np.concatenate(cap), colour * 0.75 + 0.12, Label.WALL, Layer.PLOT, span[0])


def fence(
    canvas: Canvas, rng: np.random.Generator, look: Look, x: float, span: Span, layer: Layer, kind: int | None = None
) -> None:
    """A fence along x: 0 boards, 1 rails between posts, 2 wire mesh, 3 a guard rail."""
    kind = int(rng.integers(3)) if kind is None else kind
    colour = pick(rng, look.palette.fence, look.palette.spread)
    high = 0.85 if kind == 3 else rng.uniform(1.2, 2.2)
    pattern = np.array([0.28 if kind == 0 else 0.14, kind, 0, 0, 0, 0], np.float32)
    stops = np.arange(span[0], span[1] + 2.2, 2.2).tolist()
    for start, stop in pairwise(stops):
        if kind in (0, 2):
            canvas.add(along(x, (start, stop), 0.04, high), colour, Label.FENCE, layer, stop, Material.BOARDS, pattern)
        beams = [along(x, (start, stop), high * low, high * top) for low, top in BEAMS[kind]]
        posts = [across(stop, (x - 0.07, x + 0.07), 0, high + 0.1)]
        canvas.add(np.concatenate(beams + posts), colour * 0.9, Label.FENCE, layer, stop)

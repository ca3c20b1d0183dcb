"""Cars, vans, lorries and buses as bodies of polygons."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import pairwise
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray

from udas.data.streets.camera import Floats
from udas.data.streets.canvas import Canvas, Label, Layer, Material, Points
from udas.data.streets.figures import pick
from udas.data.streets.looks import Palette, rgb

CORNERS = 12
SHADOW = np.full(3, 0.55, np.float32)

Corner = tuple[float, float, float]
Span = tuple[float, float]


class Paint(IntEnum):
    """What the parts of a vehicle are painted with."""

    BODY = 0
    GLASS = 1
    TYRE = 2
    RIM = 3
    UNDERSIDE = 4
    TAIL = 5
    HEAD = 6
    PLATE = 7


FIXED = rgb("141416", "6e7074", "1e1e20", "c81e1e", "f4f0d8", "e8e4d0")  # from TYRE on


@dataclass(frozen=True)
class Part:
    """A polygon, its paint and how light it is."""

    corners: list[Corner]
    paint: Paint
    tone: float = 1.0


@dataclass(frozen=True)
class Shape:
    """A side view in metres, from the rear bottom over the roof to the front bottom.

    profile: (along, up) corners. glass: indices of the sections between corners that are windows.
    width: metres. roof: width of the roof as a share. belt: height of the lower edge of the windows.
    axles: places of the wheels along. wheel: radius. bays: side windows.
    """

    profile: tuple[tuple[float, float], ...]
    glass: tuple[int, ...]
    width: float
    roof: float
    belt: float
    axles: tuple[float, float]
    wheel: float
    bays: int


SALOON = Shape(
    (
        (-2.2, 0.3), (-2.3, 0.62), (-2.2, 0.94), (-1.6, 1.0), (-0.95, 1.43),
        (0.4, 1.45), (1.1, 1.0), (2.05, 0.86), (2.25, 0.6), (2.2, 0.3),
    ),
    (3, 5), 1.82, 0.76, 1.0, (-1.35, 1.4), 0.34, 2,
)  # fmt: skip
HATCHBACK = Shape(
    (
        (-1.9, 0.3), (-2.0, 0.6), (-1.95, 0.98), (-1.5, 1.46),
        (0.3, 1.52), (1.05, 1.02), (1.75, 0.88), (1.95, 0.6), (1.9, 0.3),
    ),
    (2, 4), 1.74, 0.78, 1.0, (-1.25, 1.25), 0.33, 2,
)  # fmt: skip
OFFROADER = Shape(
    (
        (-2.2, 0.4), (-2.3, 0.7), (-2.25, 1.15), (-2.0, 1.74),
        (0.3, 1.78), (1.0, 1.18), (2.1, 1.05), (2.3, 0.7), (2.2, 0.4),
    ),
    (2, 4), 1.95, 0.82, 1.15, (-1.4, 1.4), 0.4, 3,
)  # fmt: skip
VAN = Shape(
    (
        (-2.6, 0.35), (-2.7, 0.8), (-2.68, 1.3), (-2.6, 2.1),
        (1.3, 2.15), (2.0, 1.3), (2.6, 1.1), (2.7, 0.6), (2.6, 0.35),
    ),
    (2, 4), 2.05, 0.9, 1.3, (-1.7, 1.75), 0.37, 2,
)  # fmt: skip
LORRY = Shape(
    (
        (-3.8, 0.6), (-3.8, 1.0), (-3.8, 3.2), (1.9, 3.2), (1.95, 2.5),
        (3.1, 2.45), (3.4, 1.5), (3.45, 0.8), (3.4, 0.45),
    ),
    (5,), 2.4, 0.98, 3.0, (-2.4, 2.4), 0.5, 0,
)  # fmt: skip
BUS = Shape(
    (
        (-5.5, 0.4), (-5.55, 1.2), (-5.5, 2.7), (-5.4, 3.1),
        (5.3, 3.1), (5.5, 2.9), (5.55, 1.1), (5.55, 0.7), (5.5, 0.4),
    ),
    (1, 5), 2.5, 0.96, 1.2, (-3.4, 3.6), 0.5, 7,
)  # fmt: skip
SHAPES = (SALOON, HATCHBACK, OFFROADER, VAN, LORRY, BUS)
CHANCES = np.cumsum([0.34, 0.28, 0.18, 0.1, 0.05, 0.05])


def pick_shape(rng: np.random.Generator, largest: int = len(SHAPES)) -> Shape:
    """A random shape among the first `largest` of the table."""
    return SHAPES[min(int(np.searchsorted(CHANCES, rng.random() * CHANCES[largest - 1])), largest - 1)]


def vehicle(
    canvas: Canvas, rng: np.random.Generator, palette: Palette, shape: Shape, place: tuple[float, float], heading: float
) -> None:
    """Add a vehicle and the shadow below it.

    Args:
        canvas: the scene.
        rng: draws colours.
        palette: colours of bodies and glass.
        shape: one of `SHAPES`.
        place: x and z of its middle in metres.
        heading: degrees; 0 drives away from the camera, 180 towards it.
    """
    body = pick(rng, palette.vehicle, palette.spread)
    paints = np.concatenate([[body, pick(rng, palette.glass, 0.02) * 0.7], FIXED])
    points, paint, tone = _model(shape)
    angle = heading * pi / 180
    turn = np.array([[cos(angle), 0, -sin(angle)], [0, 1, 0], [sin(angle), 0, cos(angle)]], np.float32)
    shift = np.array([place[0], 0, place[1]], np.float32)
    standing = points @ turn + shift
    near = float(standing[..., 2].min())
    centre = shift + np.array([0, 0.6, 0], np.float32)
    canvas.add(standing, paints[paint] * tone[:, None], Label.VEHICLE, Layer.STREET, near, centre=centre)
    canvas.add(_shadow(shape) @ turn + shift, SHADOW, Label.ROAD, Layer.SHADOW, place[1], Material.GROUND)


def _pad(corners: list[Corner]) -> list[Corner]:
    return corners + corners[-1:] * (CORNERS - len(corners))


@cache
def _shadow(shape: Shape) -> Points:
    x, front, back = shape.width / 2 + 0.15, shape.profile[-1][0] + 0.2, shape.profile[0][0] - 0.2
    return np.array([_pad([(-x, 0, back), (x, 0, back), (x, 0, front), (-x, 0, front)])], np.float32)


@cache
def _model(shape: Shape) -> tuple[Points, NDArray[np.int64], Floats]:
    """Polygons [N, CORNERS, 3] around the origin, looking along z, with paint [N] and tone [N]."""
    parts = [*_underside(shape), *_sections(shape), *_sides(shape), *_lights(shape)]
    points = np.array([_pad(part.corners) for part in parts], np.float32)
    return points, np.array([part.paint for part in parts]), np.array([part.tone for part in parts], np.float32)


def _half(shape: Shape, up: float) -> float:
    """Half the width at a height: the cabin narrows above the belt."""
    top = max(y for _, y in shape.profile)
    share = min(max((up - shape.belt) / (top - shape.belt), 0), 1)
    return shape.width / 2 * (1 + (shape.roof - 1) * share)


def _sections(shape: Shape) -> list[Part]:
    """The strips across the body: boot, windows, roof, bonnet, bumpers."""
    parts: list[Part] = []
    for index, ((z0, y0), (z1, y1)) in enumerate(pairwise(shape.profile)):
        a, b = _half(shape, y0), _half(shape, y1)
        strip = [(-a, y0, z0), (a, y0, z0), (b, y1, z1), (-b, y1, z1)]
        parts.append(Part(strip, Paint.BODY, 0.8 if index in (0, len(shape.profile) - 2) else 1.0))
        if index in shape.glass:
            parts.append(Part(_inset(strip, 0.12), Paint.GLASS))
    return parts


def _inset(corners: list[Corner], share: float) -> list[Corner]:
    points = np.array(corners)
    return [(x, y, z) for x, y, z in (points + (points.mean(0) - points) * share).tolist()]


def _sides(shape: Shape) -> list[Part]:
    parts: list[Part] = []
    low, back, front = shape.profile[0][1], shape.profile[0][0], shape.profile[-1][0]
    for side in (-1, 1):
        x = side * shape.width / 2
        parts.append(Part([(side * _half(shape, y), y, z) for z, y in shape.profile], Paint.BODY, 0.92))
        sill = [(x, low, back), (x, low, front), (x, low + 0.12, front), (x, low + 0.12, back)]
        parts.append(Part(sill, Paint.BODY, 0.6))
        parts.extend(Part(window, Paint.GLASS) for window in _windows(shape, side))
        parts.extend(_wheels(shape, x + side * 0.02))
    return parts


def _windows(shape: Shape, side: int) -> list[list[Corner]]:
    """Side windows between the belt and the roof, cut into bays that follow the slope of the pillars."""
    roof = max(y for _, y in shape.profile)
    above = [z for z, y in shape.profile if y > (shape.belt + roof) / 2]
    belt = [z for z, y in shape.profile if abs(y - shape.belt) < 0.25]
    if not shape.bays:
        return []
    top, low = roof - 0.12, shape.belt + 0.04
    tops = np.linspace(min(above) + 0.1, max(above) - 0.05, shape.bays + 1).tolist()
    start, stop = max(min(belt) + 0.15, min(above) - 0.4), min(max(belt) - 0.2, max(above) + 0.5)
    lows = np.linspace(start, stop, shape.bays + 1).tolist()
    x0, x1 = side * (_half(shape, low) + 0.01), side * (_half(shape, top) + 0.01)
    bays = zip(lows, lows[1:], tops, tops[1:], strict=False)
    return [[(x0, low, a + 0.05), (x0, low, b - 0.05), (x1, top, d - 0.05), (x1, top, c + 0.05)] for a, b, c, d in bays]


def _wheels(shape: Shape, x: float) -> list[Part]:
    """Tyres and rims on the side at x."""
    angles = (np.arange(CORNERS) * 2 * pi / CORNERS).tolist()
    rounds = ((shape.wheel, Paint.TYRE), (shape.wheel * 0.55, Paint.RIM))
    return [
        Part([(x, shape.wheel + radius * sin(a), axle + radius * cos(a)) for a in angles], paint)
        for axle in shape.axles
        for radius, paint in rounds
    ]


def _across(x: Span, y: Span, z: float) -> list[Corner]:
    return [(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], z), (x[0], y[1], z)]


def _underside(shape: Shape) -> list[Part]:
    """Tyres and the dark underside as seen from the front and from behind."""
    parts: list[Part] = []
    low, half = shape.profile[0][1], shape.width / 2
    for z in (shape.profile[0][0] + 0.15, shape.profile[-1][0] - 0.15):
        parts.append(Part(_across((-half, half), (0.18, low + 0.1), z), Paint.UNDERSIDE))
        for x in (-half + 0.12, half - 0.12):
            parts.append(Part(_across((x - 0.12, x + 0.12), (0, low + 0.1), z), Paint.TYRE))
    return parts


def _lights(shape: Shape) -> list[Part]:
    """Tail lights and head lights in the corners, and a number plate at either end."""
    parts: list[Part] = []
    half = shape.width / 2
    for end, paint, out in ((1, Paint.TAIL, -0.03), (-2, Paint.HEAD, 0.03)):
        along, up = shape.profile[end]
        for x in (-half + 0.22, half - 0.22):
            parts.append(Part(_across((x - 0.18, x + 0.18), (up, up + 0.2), along + out), paint))
        parts.append(Part(_across((-0.26, 0.26), (up - 0.16, up - 0.03), along + out), Paint.PLATE))
    return parts

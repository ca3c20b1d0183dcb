"""Cars, vans, lorries and buses as bodies of polygons."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np

from udas.data.streets.camera import Floats
from udas.data.streets.canvas import Canvas, Label, Layer, Material, Points
from udas.data.streets.looks import Palette, rgb

CORNERS = 12
TYRE, RIM, UNDER = rgb("141416", "6e7074", "1e1e20")
TAIL, HEAD, PLATE = rgb("c81e1e", "f4f0d8", "e8e4d0")


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
    ((-2.2, 0.3), (-2.3, 0.62), (-2.2, 0.94), (-1.6, 1.0), (-0.95, 1.43), (0.4, 1.45), (1.1, 1.0), (2.05, 0.86), (2.25, 0.6), (2.2, 0.3)),
    (3, 5), 1.82, 0.76, 1.0, (-1.35, 1.4), 0.34, 2,
)  # fmt: skip
HATCHBACK = Shape(
    ((-1.9, 0.3), (-2.0, 0.6), (-1.95, 0.98), (-1.5, 1.46), (0.3, 1.52), (1.05, 1.02), (1.75, 0.88), (1.95, 0.6), (1.9, 0.3)),
    (2, 4), 1.74, 0.78, 1.0, (-1.25, 1.25), 0.33, 2,
)  # fmt: skip
OFFROADER = Shape(
    ((-2.2, 0.4), (-2.3, 0.7), (-2.25, 1.15), (-2.0, 1.74), (0.3, 1.78), (1.0, 1.18), (2.1, 1.05), (2.3, 0.7), (2.2, 0.4)),
    (2, 4), 1.95, 0.82, 1.15, (-1.4, 1.4), 0.4, 3,
)  # fmt: skip
VAN = Shape(
    ((-2.6, 0.35), (-2.7, 0.8), (-2.68, 1.3), (-2.6, 2.1), (1.3, 2.15), (2.0, 1.3), (2.6, 1.1), (2.7, 0.6), (2.6, 0.35)),
    (2, 4), 2.05, 0.9, 1.3, (-1.7, 1.75), 0.37, 2,
)  # fmt: skip
LORRY = Shape(
    ((-3.8, 0.6), (-3.8, 1.0), (-3.8, 3.2), (1.9, 3.2), (1.95, 2.5), (3.1, 2.45), (3.4, 1.5), (3.45, 0.8), (3.4, 0.45)),
    (5,), 2.4, 0.98, 3.0, (-2.4, 2.4), 0.5, 0,
)  # fmt: skip
BUS = Shape(
    ((-5.5, 0.4), (-5.55, 1.2), (-5.5, 2.7), (-5.4, 3.1), (5.3, 3.1), (5.5, 2.9), (5.55, 1.1), (5.55, 0.7), (5.5, 0.4)),
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
    body = np.clip(rng.choice(palette.vehicle) + rng.normal(0, palette.spread, 3), 0, 1).astype(np.float32)
    glass = (rng.choice(palette.glass) * 0.7).astype(np.float32)
    polygons, colours = _body(shape, body, glass)
    angle = heading * pi / 180
    turn = np.array([[cos(angle), 0, -sin(angle)], [0, 1, 0], [sin(angle), 0, cos(angle)]], np.float32)
    shift = np.array([place[0], 0, place[1]], np.float32)
    canvas.add(
        polygons @ turn + shift, colours, Label.VEHICLE, Layer.STREET, place[1], centre=shift + np.float32([0, 0.6, 0])
    )
    canvas.add(_shadow(shape) @ turn + shift, np.full(3, 0.55), Label.ROAD, Layer.SHADOW, place[1], Material.GROUND)


def _pad(corners: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    return corners + corners[-1:] * (CORNERS - len(corners))


def _shadow(shape: Shape) -> Points:
    x, front, back = shape.width / 2 + 0.15, shape.profile[-1][0] + 0.2, shape.profile[0][0] - 0.2
    return np.array([_pad([(-x, 0, back), (x, 0, back), (x, 0, front), (-x, 0, front)])], np.float32)


def _body(shape: Shape, body: Floats, glass: Floats) -> tuple[Points, Floats]:
    """Polygons [N, CORNERS, 3] around the origin, looking along z, and their colours."""
    parts = [*_wheels(shape), *_sections(shape, body, glass), *_sides(shape, body, glass), *_lights(shape)]
    return np.array([_pad(corners) for corners, _ in parts], np.float32), np.array([c for _, c in parts], np.float32)


Part = tuple[list[tuple[float, float, float]], Floats]


def _half(shape: Shape, up: float) -> float:
    """Half the width at a height: the cabin narrows above the belt."""
    top = max(y for _, y in shape.profile)
    share = min(max((up - shape.belt) / (top - shape.belt), 0), 1)
    return shape.width / 2 * (1 + (shape.roof - 1) * share)


def _sections(shape: Shape, body: Floats, glass: Floats) -> list[Part]:
    """The strips across the body: boot, windows, roof, bonnet, bumpers."""
    parts: list[Part] = []
    for index, ((z0, y0), (z1, y1)) in enumerate(zip(shape.profile, shape.profile[1:], strict=False)):
        a, b = _half(shape, y0), _half(shape, y1)
        colour = body * (0.8 if index in (0, len(shape.profile) - 2) else 1.0)
        parts.append(([(-a, y0, z0), (a, y0, z0), (b, y1, z1), (-b, y1, z1)], colour))
        if index in shape.glass:
            parts.append((_inset([(-a, y0, z0), (a, y0, z0), (b, y1, z1), (-b, y1, z1)], 0.12), glass))
    return parts


def _inset(corners: list[tuple[float, float, float]], share: float) -> list[tuple[float, float, float]]:
    points = np.array(corners)
    return [tuple(corner) for corner in (points + (points.mean(0) - points) * share).tolist()]


def _sides(shape: Shape, body: Floats, glass: Floats) -> list[Part]:
    parts: list[Part] = []
    for side in (-1, 1):
        parts.append(([(side * _half(shape, y), y, z) for z, y in shape.profile], body * 0.92))
        parts.append(([(side * shape.width / 2, y, z) for z, y in _sill(shape)], body * 0.6))
        parts.extend((window, glass) for window in _windows(shape, side))
        parts.extend(_side_wheels(shape, side))
    return parts


def _sill(shape: Shape) -> list[tuple[float, float]]:
    low = shape.profile[0][1]
    back, front = shape.profile[0][0], shape.profile[-1][0]
    return [(back, low), (front, low), (front, low + 0.12), (back, low + 0.12)]


def _windows(shape: Shape, side: int) -> list[list[tuple[float, float, float]]]:
    """Side windows between the belt and the roof, cut into bays that follow the slope of the pillars."""
    above = [z for z, y in shape.profile if y > (shape.belt + max(y for _, y in shape.profile)) / 2]
    at_belt = [z for z, y in shape.profile if abs(y - shape.belt) < 0.25]
    if not shape.bays or len(at_belt) < 2:
        return []
    top, low = max(y for _, y in shape.profile) - 0.12, shape.belt + 0.04
    tops = np.linspace(min(above) + 0.1, max(above) - 0.05, shape.bays + 1)
    lows = np.linspace(max(min(at_belt) + 0.15, min(above) - 0.4), min(max(at_belt) - 0.2, max(above) + 0.5), shape.bays + 1)
    x0, x1 = side * (_half(shape, low) + 0.01), side * (_half(shape, top) + 0.01)
    return [
        [(x0, low, lows[i] + 0.05), (x0, low, lows[i + 1] - 0.05), (x1, top, tops[i + 1] - 0.05), (x1, top, tops[i] + 0.05)]
        for i in range(shape.bays)
    ]  # fmt: skip


def _side_wheels(shape: Shape, side: int) -> list[Part]:
    x = side * (shape.width / 2 + 0.02)
    rounds = [(radius, colour) for radius, colour in ((shape.wheel, TYRE), (shape.wheel * 0.55, RIM))]
    angles = np.arange(CORNERS) * 2 * pi / CORNERS
    return [
        ([(x, shape.wheel + radius * sin(a), axle + radius * cos(a)) for a in angles], colour)
        for axle in shape.axles
        for radius, colour in rounds
    ]


def _wheels(shape: Shape) -> list[Part]:
    """Tyres and the dark underside as seen from the front and from behind."""
    parts: list[Part] = []
    for z in (shape.profile[0][0] + 0.15, shape.profile[-1][0] - 0.15):
        low, half = shape.profile[0][1], shape.width / 2
        parts.append(([(-half, 0.18, z), (half, 0.18, z), (half, low + 0.1, z), (-half, low + 0.1, z)], UNDER))
        for x in (-half + 0.12, half - 0.12):
            parts.append(([(x - 0.12, 0, z), (x + 0.12, 0, z), (x + 0.12, low + 0.1, z), (x - 0.12, low + 0.1, z)], TYRE))
    return parts


def _lights(shape: Shape) -> list[Part]:
    """Tail lights and head lights in the corners, and a number plate at either end."""
    parts: list[Part] = []
    for end, colour, back in ((1, TAIL, -1), (-2, HEAD, 1)):
        z, y = shape.profile[end]
        half, z = shape.width / 2, z + back * 0.03
        for x in (-half + 0.22, half - 0.22):
            parts.append(([(x - 0.2, y, z), (x + 0.2, y, z), (x + 0.2, y + 0.2, z), (x - 0.2, y + 0.2, z)], colour))
        parts.append(([(-0.26, y - 0.16, z), (0.26, y - 0.16, z), (0.26, y - 0.03, z), (-0.26, y - 0.03, z)], PLATE))
    return parts

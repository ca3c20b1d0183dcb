"""Lays out one street: what stands where. Every picture is another place, with all eleven classes in reach."""

from __future__ import annotations

from dataclasses import dataclass
from math import radians, tan

import numpy as np

from udas.data.streets.buildings import building, fence, wall
from udas.data.streets.camera import Camera, Floats, make_camera
from udas.data.streets.canvas import Canvas, Label, Layer, Material
from udas.data.streets.figures import hedge, person, pick, tree
from udas.data.streets.furniture import lamp, pole, pole_colour, sign, traffic_light
from udas.data.streets.looks import Look
from udas.data.streets.vehicles import SHAPES, pick_shape, vehicle

BEHIND = -6.0  # metres: plots begin behind the camera so that wide pictures are filled
BAY = 2.2  # metres: width of a row of parked vehicles
DEPTH = 12.0  # metres from the front of a building to its back

Span = tuple[float, float]


@dataclass(frozen=True)
class Street:
    """Measures in metres; lateral positions count from the middle of the road.

    half: half the width of the road. drive: what is left of it beside parked vehicles, left and right. walk, front: width of the pavement, and x of the plots, left and right.
    verge: width of the grass strip at the kerb, left and right. bend: curvature in 1/m. junction: z of a crossing road.
    end: z where the street ends at a building or a park. lanes: per direction. zebra, double: markings.
    grassy: whether yards are grass, left and right. sun: [3] towards the sun. ambient: share of undirected light.
    sunny: cast shadows.
    """

    half: float
    drive: Span
    walk: float
    front: Span
    verge: Span
    bend: float
    junction: Span | None
    end: float
    lanes: int
    zebra: bool
    double: bool
    grassy: tuple[bool, bool]
    sun: Floats
    ambient: float
    sunny: bool


def draw_camera(rng: np.random.Generator, look: Look, street: Street, size: tuple[int, int]) -> tuple[Camera, float]:
    """A camera in the right half of the road, and half its field of view as a slope."""
    view = look.view
    x = street.drive[1] * rng.uniform(*view.lane)
    angles = (rng.normal(0, view.yaw / 2), rng.uniform(*view.pitch), rng.normal(0, view.roll / 2))
    field = rng.uniform(*view.field_of_view)
    return make_camera((x, rng.uniform(*view.height), 0.0), angles, field, size), tan(radians(field) / 2)


def draw_street(rng: np.random.Generator, look: Look) -> Street:
    """Draw the measures of a street."""
    layout = look.layout
    lanes, walk = rng.uniform(*layout.road), rng.uniform(*layout.walk)
    parked = [BAY * float(rng.random() < layout.parking) for _ in range(2)]
    half = lanes + max(parked)
    verges = [1.4 * float(rng.random() < layout.verge) for _ in range(2)]
    fronts = [half + walk + verge + rng.uniform(*layout.setback) for verge in verges]
    crossing = rng.uniform(18, 50)
    sun = np.array([rng.uniform(-1, 1), rng.uniform(0.6, 1.2), rng.uniform(-1, 0.4)])
    return Street(
        half=half,
        drive=(half - parked[0], half - parked[1]),
        walk=walk,
        front=(fronts[0], fronts[1]),
        verge=(verges[0], verges[1]),
        bend=rng.uniform(-layout.bend, layout.bend),
        junction=(crossing, crossing + rng.uniform(7, 12)) if rng.random() < 0.55 else None,
        end=rng.uniform(60, 110),
        lanes=2 if lanes > 5.8 else 1,
        zebra=bool(rng.random() < 0.8),
        double=bool(rng.random() < 0.4),
        grassy=(bool(rng.random() < 0.5), bool(rng.random() < 0.5)),
        sun=(sun / np.linalg.norm(sun)).astype(np.float32),
        ambient=rng.uniform(*look.light.ambient),
        sunny=bool(rng.random() < look.light.sunny),
    )


def furnish(canvas: Canvas, rng: np.random.Generator, look: Look, street: Street, slope: float) -> None:
    """Put everything into the scene. slope: tangent of half the field of view, to place things where they show."""
    _backdrop(canvas, rng, look, street)
    kinds = _nearby_kinds(rng)
    for side in (-1, 1):
        _plots(canvas, rng, look, street, side, slope, kinds[side])
        _kerb(canvas, rng, look, street, side, slope)
        _parked(canvas, rng, look, street, side)
    _traffic(canvas, rng, look, street)
    _people(canvas, rng, look, street, slope)


def _backdrop(canvas: Canvas, rng: np.random.Generator, look: Look, street: Street) -> None:
    """The far end of the street, and a skyline or hills beyond everything."""
    leaves = pick(rng, look.palette.leaves, look.palette.spread)
    for x in np.arange(-260, 260, 26).tolist():
        high = rng.uniform(4, 15)
        mound = np.array([[(x - 20, -2, 240), (x + 24, -2, 240), (x + 16, high, 240), (x - 8, high * 1.1, 240)]], np.float32)
        canvas.add(mound, leaves, Label.VEGETATION, Layer.BACKDROP, 240, Material.LEAVES)
    x = -60.0
    while x < 60:
        wide = rng.uniform(8, 18)
        if rng.random() < 0.8:
            building(canvas, rng, look, (x, x + wide), (street.end, street.end + 8), Layer.BACKDROP)
        else:
            tree(canvas, rng, look.palette, (x + wide / 2, street.end), Layer.BACKDROP)
        x += wide + rng.choice([0.0, 0.0, 3.0])


def _nearby_kinds(rng: np.random.Generator) -> dict[int, list[str]]:
    """A wall, a fence and a building among the first plots that the camera sees, on either side."""
    first = rng.permutation(["wall", "fence", "building", "building"]).tolist()
    return {-1: [first[0], first[1]], 1: [first[2], first[3]]}


def _plots(
    canvas: Canvas, rng: np.random.Generator, look: Look, street: Street, side: int, slope: float, kinds: list[str]
) -> None:
    """The row of buildings and yards along one side, up to the end of the street."""
    z = BEHIND + rng.uniform(0, 5)
    while z < street.end - 4:
        far = min(z + rng.uniform(*look.layout.plot), street.end)
        if street.junction and far > street.junction[0] - street.walk and z < street.junction[1]:
            far = max(street.junction[0] - street.walk, z + 2)
            _plot(canvas, rng, look, street, side, (z, far), "building")
            z = street.junction[1] + street.walk
            continue
        visible = far > 1.35 * _first_visible(street, side * street.front[side > 0], slope)
        kind = kinds.pop() if visible and kinds else _random_kind(rng, look)
        _plot(canvas, rng, look, street, side, (z, far), kind)
        z = far + rng.choice([0.0, 0.0, 0.0, 1.5])


def _random_kind(rng: np.random.Generator, look: Look) -> str:
    if rng.random() > look.layout.parks:
        return "building"
    return str(rng.choice(["wall", "fence", "hedge", "open"]))


def _plot(
    canvas: Canvas, rng: np.random.Generator, look: Look, street: Street, side: int, span: Span, kind: str
) -> None:
    front = side * street.front[side > 0]
    if kind == "building":
        if rng.random() < 0.25:
            front = _garden(canvas, rng, look, side, front, span)
        height = building(canvas, rng, look, (front, front + side * DEPTH), span)
        _cast_shadow(canvas, street, front, span, height)
        return
    back = side * rng.uniform(9, 16)
    if rng.random() < 0.75:
        building(canvas, rng, look, (front + back, front + back + side * DEPTH), (span[0] + 1, span[1]))
    for _ in range(int(rng.integers(1, 4))):
        place = (front + side * rng.uniform(2, 8), rng.uniform(*span))
        tree(canvas, rng, look.palette, place, Layer.PLOT, bool(rng.random() < look.layout.palms))
    if kind == "wall":
        wall(canvas, rng, look, (front, front + side), span)
    elif kind == "fence":
        fence(canvas, rng, look, front, span, Layer.PLOT)
    elif kind == "hedge":
        hedge(canvas, rng, look.palette, side, front, span)


def _garden(canvas: Canvas, rng: np.random.Generator, look: Look, side: int, front: float, span: Span) -> float:
    """A low wall or a fence before a house; returns the x of the house behind it."""
    if rng.random() < 0.5:
        wall(canvas, rng, look, (front, front + side), span, (0.7, 1.3))
    else:
        fence(canvas, rng, look, front, span, Layer.PLOT)
    return front + side * rng.uniform(2.0, 3.5)


def _cast_shadow(canvas: Canvas, street: Street, front: float, span: Span, height: float) -> None:
    """What the building keeps the sun from: its street side, moved along the light onto the ground."""
    if not street.sunny or street.sun[0] * front < 0:
        return
    dx, dz = (-street.sun[axis] / street.sun[1] * height for axis in (0, 2))
    ground = np.array(
        [[(front, 0, span[0]), (front, 0, span[1]), (front + dx, 0, span[1] + dz), (front + dx, 0, span[0] + dz)]]
    )
    canvas.add(ground.astype(np.float32), np.full(3, street.ambient * 0.85), Label.ROAD, Layer.SHADOW, span[0], Material.GROUND)


def _kerb(canvas: Canvas, rng: np.random.Generator, look: Look, street: Street, side: int, slope: float) -> None:
    """Lamps, trees, signs, bollards and guard rails between road and pavement."""
    x = side * (street.half + 0.45)
    near = _first_visible(street, x, slope)
    colour = pole_colour(rng, look)
    for z in _places(rng, street, near * rng.uniform(1.1, 1.6), look.layout.lamps):
        lamp(canvas, rng, look, (x, z), colour)
    if rng.random() < 0.7:
        palm = bool(rng.random() < look.layout.palms)
        for z in _places(rng, street, near * rng.uniform(1.0, 2.5), look.layout.trees):
            tree(canvas, rng, look.palette, (x + side * 0.3, z), Layer.STREET, palm)
    for z in _places(rng, street, max(near * rng.uniform(1.2, 1.7), 8), (9, 26)):
        sign(canvas, rng, look, (x + side * 0.1, z), colour)
    if street.junction:
        traffic_light(canvas, rng, (x, street.junction[0] - 1.0), colour)
    if rng.random() < 0.3:
        start = near * rng.uniform(0.6, 1.5)
        fence(canvas, rng, look, x + side * 0.15, (start, start + rng.uniform(6, 16)), Layer.STREET, int(rng.choice([1, 3])))
    elif rng.random() < 0.4:
        for z in np.arange(near * 2.2, near * 0.8, -1.8).tolist():
            pole(canvas, colour, (x, z), 0.95, 0.16)


def _first_visible(street: Street, x: float, slope: float) -> float:
    """The z at which something at lateral x comes into the picture, seen from the middle of the right half."""
    return max(abs(x - street.half / 2) / slope, 5.0) * 1.08


def _places(rng: np.random.Generator, street: Street, start: float, spacing: Span) -> list[float]:
    """Regular places along the kerb, leaving the crossing road free."""
    places = np.arange(start, min(street.end, 60.0), rng.uniform(*spacing)).tolist()
    return [z for z in places if not (street.junction and street.junction[0] - 3 < z < street.junction[1] + 3)]


def _parked(canvas: Canvas, rng: np.random.Generator, look: Look, street: Street, side: int) -> None:
    if street.drive[side > 0] == street.half:
        return
    x, heading = side * (street.half - 1.05), 0.0 if side > 0 else 180.0
    for z in _places(rng, street, rng.uniform(5, 12), (5.4, 7.5)):
        if rng.random() < 0.75:
            vehicle(canvas, rng, look.palette, pick_shape(rng, 4), (x, z), heading + rng.normal(0, 2))


def _traffic(canvas: Canvas, rng: np.random.Generator, look: Look, street: Street) -> None:
    """Moving vehicles: away from the camera on the right, towards it on the left, and across a junction."""
    ends = {-1: rng.uniform(4, 16), 1: rng.uniform(9, 22)}
    for _ in range(int(rng.integers(*look.layout.traffic))):
        side, shape = (1 if rng.random() < 0.5 else -1), pick_shape(rng)
        wide, length = street.drive[side > 0] / street.lanes, shape.profile[-1][0] - shape.profile[0][0]
        z = ends[side] + length * (1.6 if length > 6 else 0.5)
        x = side * wide * (rng.integers(street.lanes) + 0.5)
        vehicle(canvas, rng, look.palette, shape, (x, z), 0.0 if side > 0 else 180.0)
        ends[side] = z + length / 2 + rng.uniform(3, 14)
    if street.junction and rng.random() < 0.5:
        x, z = rng.uniform(-8, 8), sum(street.junction) / 2
        vehicle(canvas, rng, look.palette, pick_shape(rng, len(SHAPES)), (x, z), float(rng.choice([90, 270])))


def _people(canvas: Canvas, rng: np.random.Generator, look: Look, street: Street, slope: float) -> None:
    """Pedestrians on both pavements, the first of each side close enough to be seen; some cross the road."""
    for side in (-1, 1):
        middle = side * (street.half + street.verge[side > 0] + street.walk / 2)
        near = _first_visible(street, middle, slope)
        for index in range(int(rng.integers(*look.layout.people)) // 2 + 1):
            z = near * (rng.uniform(1.05, 1.5) if index == 0 else rng.uniform(1.1, 4.5))
            person(canvas, rng, look.palette, (middle + rng.uniform(-0.4, 0.4) * street.walk, z))
    if street.junction and rng.random() < 0.6:
        for _ in range(int(rng.integers(1, 4))):
            place = (rng.uniform(-street.half, street.half), street.junction[0] - rng.uniform(1.2, 3.5))
            person(canvas, rng, look.palette, place)

"""One street: its measures, the camera in it, and the building site that fills it."""

from __future__ import annotations

from dataclasses import dataclass
from math import radians, tan

import numpy as np

from udas.data.streets.camera import Camera, Floats, make_camera
from udas.data.streets.canvas import Canvas
from udas.data.streets.looks import Look

BAY = 2.2  # metres: width of a row of parked vehicles

Span = tuple[float, float]


@dataclass(frozen=True)
class Street:
    """Measures in metres; lateral positions (x) count from the middle of the road; pairs are left and right.

    half: half the width of the road. drive: what is left of it beside parked vehicles.
    walk: width of the pavement. front: distance of the plots. verge: width of the grass strip at the kerb.
    bend: curvature in 1/m. junction: z where a crossing road begins and ends. end: z where the street ends.
    lanes: per direction. zebra, double: a crossing is marked; the centre line is double. grassy: yards are grass.
    sun: [3] unit vector towards the sun. ambient: share of undirected light. sunny: there are cast shadows.
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


@dataclass(frozen=True)
class Site:
    """What everything that is put into the scene needs. slope: tangent of half the camera's field of view."""

    canvas: Canvas
    rng: np.random.Generator
    look: Look
    street: Street
    slope: float

    def chance(self, share: float) -> bool:
        """True with probability `share`."""
        return bool(self.rng.random() < share)

    def first_visible(self, x: float) -> float:
        """The z at which something at lateral x comes into the picture, seen from the middle of the right half."""
        return max(abs(x - self.street.half / 2) / self.slope, 5.0) * 1.08


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
        end=rng.uniform(55, 95),
        lanes=2 if lanes > 5.8 else 1,
        zebra=bool(rng.random() < 0.8),
        double=bool(rng.random() < 0.4),
        grassy=(bool(rng.random() < 0.5), bool(rng.random() < 0.5)),
        sun=(sun / np.linalg.norm(sun)).astype(np.float32),
        ambient=rng.uniform(*look.light.ambient),
        sunny=bool(rng.random() < look.light.sunny),
    )

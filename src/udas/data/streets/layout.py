"""Furnishes one street: plots, kerbs, traffic and people. Every picture is another place."""

from __future__ import annotations

import numpy as np

from udas.data.streets.buildings import fence
from udas.data.streets.canvas import Layer
from udas.data.streets.figures import person, tree
from udas.data.streets.furniture import lamp, pole, pole_colour, sign, traffic_light
from udas.data.streets.plots import backdrop, nearby_kinds, plots
from udas.data.streets.street import Site, Span
from udas.data.streets.vehicles import pick_shape, vehicle

SIDES = (-1, 1)  # left and right, the sign of x


def furnish(site: Site) -> None:
    """Put everything into the scene."""
    backdrop(site)
    kinds = nearby_kinds(site.rng)
    for side in SIDES:
        plots(site, side, kinds[side])
        _kerb(site, side)
        _parked(site, side)
        _pedestrians(site, side)
    _traffic(site)
    _crossing(site)


def _places(site: Site, start: float, spacing: Span) -> list[float]:
    """Regular places along the kerb, leaving the crossing road free."""
    places = np.arange(start, min(site.street.end, 50.0), site.rng.uniform(*spacing)).tolist()
    near, far = site.street.junction or (np.inf, np.inf)
    return [z for z in places if not near - 3 < z < far + 3]


def _kerb(site: Site, side: int) -> None:
    """What stands between road and pavement."""
    rng, layout, x = site.rng, site.look.layout, side * (site.street.half + 0.45)
    near, colour = site.first_visible(x), pole_colour(rng, site.look)
    for z in _places(site, near * rng.uniform(1.1, 1.6), layout.lamps):
        lamp(site.canvas, rng, (x, z), colour)
    for z in _places(site, max(near * rng.uniform(1.2, 1.7), 8), (9, 26)):
        sign(site.canvas, rng, site.look, (x + side * 0.1, z), colour)
    if site.chance(0.7):
        palm = site.chance(layout.palms)
        for z in _places(site, near * rng.uniform(1.0, 2.5), layout.trees):
            tree(site.canvas, rng, site.look.palette, (x + side * 0.3, z), Layer.STREET, palm)
    if site.street.junction:
        traffic_light(site.canvas, rng, (x, site.street.junction[0] - 1.0), colour)
    if site.chance(0.35):
        start, kind = near * rng.uniform(0.8, 1.6), 1 if site.chance(0.5) else 3
        fence(site.canvas, rng, site.look, x + side * 0.15, (start, start + rng.uniform(6, 16)), Layer.STREET, kind)
    elif site.chance(0.4):
        for z in np.arange(near * 2.2, near * 0.8, -1.8).tolist():
            pole(site.canvas, colour, (x, z), 0.95, 0.16)


def _parked(site: Site, side: int) -> None:
    street, rng = site.street, site.rng
    if street.drive[side > 0] == street.half:
        return
    x, heading = side * (street.half - 1.05), 0.0 if side > 0 else 180.0
    for z in _places(site, rng.uniform(5, 12), (5.4, 7.5)):
        if site.chance(0.75):
            vehicle(site.canvas, rng, site.look.palette, pick_shape(rng, 4), (x, z), heading + rng.normal(0, 2))


def _pedestrians(site: Site, side: int) -> None:
    """People on the pavement, the first of them close enough to be seen."""
    street, rng = site.street, site.rng
    middle = side * (street.half + street.verge[side > 0] + street.walk / 2)
    near = site.first_visible(middle)
    for index in range(int(rng.integers(*site.look.layout.people)) // 2 + 1):
        z = near * (rng.uniform(1.05, 1.5) if index == 0 else rng.uniform(1.1, 4.5))
        person(site.canvas, rng, site.look.palette, (middle + rng.uniform(-0.4, 0.4) * street.walk, z))


def _traffic(site: Site) -> None:
    """Moving vehicles: away from the camera on the right, towards it on the left."""
    street, rng = site.street, site.rng
    ends = {-1: rng.uniform(4, 16), 1: rng.uniform(9, 22)}
    for _ in range(int(rng.integers(*site.look.layout.traffic))):
        side, shape = (1 if site.chance(0.5) else -1), pick_shape(rng)
        length = shape.profile[-1][0] - shape.profile[0][0]
        z = ends[side] + length * (1.6 if length > 6 else 0.5)
        x = side * street.drive[side > 0] / street.lanes * (rng.integers(street.lanes) + 0.5)
        vehicle(site.canvas, rng, site.look.palette, shape, (x, z), 0.0 if side > 0 else 180.0)
        ends[side] = z + length / 2 + rng.uniform(3, 14)


def _crossing(site: Site) -> None:
    """Vehicles and people that cross at a junction."""
    street, rng = site.street, site.rng
    if street.junction is None:
        return
    near, far = street.junction
    if site.chance(0.5):
        place, heading = (rng.uniform(-8, 8), (near + far) / 2), 90.0 if site.chance(0.5) else 270.0
        vehicle(site.canvas, rng, site.look.palette, pick_shape(rng), place, heading)
    for _ in range(int(rng.integers(1, 4)) if site.chance(0.6) else 0):
        place = (rng.uniform(-street.half, street.half), near - rng.uniform(1.2, 3.5))
        person(site.canvas, rng, site.look.palette, place)

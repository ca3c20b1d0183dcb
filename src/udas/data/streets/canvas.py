"""Polygons in space, painted from far to near into a picture of surface numbers.

Colour, depth and class are looked up per pixel afterwards (deferred shading), so the label is exact by construction:
it is the class of the very surface that gave the pixel its colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from udas.data.streets.camera import Camera, Floats

NEAR = 0.3  # metres: nothing closer is drawn

Points = Floats  # [N, K, 3]: N polygons of K corners


class Label(IntEnum):
    """The classes of the taxonomy street11."""

    ROAD = 0
    SIDEWALK = 1
    BUILDING = 2
    WALL = 3
    FENCE = 4
    POLE = 5
    SIGN = 6
    VEGETATION = 7
    SKY = 8
    PERSON = 9
    VEHICLE = 10


class Material(IntEnum):
    """How a surface is shaded."""

    SKY = 0
    GROUND = 1
    PLAIN = 2
    FACADE = 3
    MASONRY = 4
    BOARDS = 5
    LEAVES = 6


class Layer(IntEnum):
    """What is painted first; within a layer the farther comes first."""

    BACKDROP = 0
    SHADOW = 1
    PLOT = 2
    STREET = 3


@dataclass(frozen=True)
class Patch:
    """Polygons of one object. points [N, K, 3] metres, colours [N, 3] in [0, 1], pattern [6]: see `shading`."""

    points: Points
    colours: Floats
    label: Label
    material: Material
    order: tuple[int, float]
    pattern: Floats
    centre: Floats | None


@dataclass(frozen=True)
class Surfaces:
    """One row per surface; rows 0 and 1 are the sky and the ground.

    normal [S, 3] towards the camera, offset [S] = normal . (point - camera), origin [S, 3] the first corner,
    colour [S, 3], pattern [S, 6], label [S] uint8, material [S] uint8.
    """

    normal: Floats
    offset: Floats
    origin: Floats
    colour: Floats
    pattern: Floats
    label: NDArray[np.uint8]
    material: NDArray[np.uint8]


NO_PATTERN = np.zeros(6, np.float32)
OPEN = np.full(3, np.nan, np.float32)  # the centre of what is not a closed body: nothing of it is hidden
WHITE = np.ones((1, 3), np.float32)


class Canvas:
    """Collects the polygons of a scene."""

    def __init__(self) -> None:
        """An empty scene: sky above, ground below."""
        self.patches: list[Patch] = []

    def add(
        self,
        points: Points,
        colours: Floats,
        label: Label,
        layer: Layer,
        distance: float,
        material: Material = Material.PLAIN,
        pattern: Floats = NO_PATTERN,
        centre: Floats | None = None,
    ) -> None:
        """Add N polygons of one object that are painted in the given order.

        Args:
            points: [N, K, 3] corners in metres; short polygons repeat their last corner.
            colours: [N, 3] or [3] in [0, 1].
            label: class of all of them.
            layer: painted in this order.
            distance: metres; the farther is painted first within the layer.
            material: how they are shaded.
            pattern: [6] parameters of the material.
            centre: [3] a point inside a closed body; polygons of its far side are left out.
        """
        if colours.ndim == 1:
            colours = colours[None].repeat(len(points), axis=0)
        self.patches.append(Patch(points, colours, label, material, (layer, -distance), pattern, centre))

    def finish(self, camera: Camera, bend: float) -> tuple[NDArray[np.int32], Surfaces]:
        """Paint everything. The street bends to the right by x = bend z^2 / 2.

        Returns:
            [H, W] surface numbers of the camera's size, and the table they index.
        """
        self.patches.sort(key=lambda patch: patch.order)
        points = np.concatenate([patch.points.reshape(-1, 3) for patch in self.patches]).astype(np.float32)
        points[:, 0] += bend / 2 * points[:, 2] * np.abs(points[:, 2])
        counts = np.concatenate([np.full(len(p.points), p.points.shape[1]) for p in self.patches])
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        normal = _normals(points, starts, counts)
        origin = points[starts]
        towards = ((camera.position - origin) * normal).sum(1)
        hidden = self._hidden(normal, origin, towards, bend)
        normal[towards < 0] *= -1
        ids = _paint(camera, points, starts, counts, hidden)
        return ids, self._surfaces(normal, origin, camera)

    def _hidden(self, normal: Floats, origin: Floats, towards: Floats, bend: float) -> NDArray[np.bool_]:
        """The far sides of closed bodies: their outside looks away from the camera."""
        centres = np.stack([OPEN if patch.centre is None else patch.centre for patch in self.patches])
        centres = np.repeat(centres, [len(patch.points) for patch in self.patches], axis=0)
        centres[:, 0] += bend / 2 * centres[:, 2] * np.abs(centres[:, 2])
        outwards = ((origin - centres) * normal).sum(1)
        hidden: NDArray[np.bool_] = outwards * towards < 0
        return hidden

    def _surfaces(self, normal: Floats, origin: Floats, camera: Camera) -> Surfaces:
        sizes = [len(patch.points) for patch in self.patches]
        up = np.array([[0, 0, 1], [0, 1, 0]], np.float32)  # the sky has no plane; the ground lies at y = 0
        normal = np.concatenate([up, normal])
        origin = np.concatenate([np.zeros((2, 3), np.float32), origin])
        labels = [int(Label.SKY), int(Label.ROAD), *(int(patch.label) for patch in self.patches)]
        materials = [int(Material.SKY), int(Material.GROUND), *(int(patch.material) for patch in self.patches)]
        patterns = np.stack([NO_PATTERN, NO_PATTERN, *(patch.pattern for patch in self.patches)])
        repeats = np.array([1, 1, *sizes])
        return Surfaces(
            normal,
            ((origin - camera.position) * normal).sum(1),
            origin,
            np.concatenate([WHITE, WHITE, *(patch.colours for patch in self.patches)]),
            np.repeat(patterns, repeats, axis=0),
            np.repeat(np.array(labels, np.uint8), repeats),
            np.repeat(np.array(materials, np.uint8), repeats),
        )


def _normals(points: Floats, starts: NDArray[np.int64], counts: NDArray[np.int64]) -> Floats:
    """Unit normals of all polygons (Newell: the sum of the cross products of neighbouring corners)."""
    origin = np.repeat(points[starts], counts, axis=0)
    local = points - origin
    following = np.roll(local, -1, axis=0)
    following[starts + counts - 1] = 0  # the polygon closes at its first corner, the local origin
    sums = np.add.reduceat(np.cross(local, following), starts, axis=0)
    normal: Floats = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    return normal


def _paint(
    camera: Camera,
    points: Floats,
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    hidden: NDArray[np.bool_],
) -> NDArray[np.int32]:
    view = camera.to_view(points)
    nearest, farthest = np.minimum.reduceat(view[:, 2], starts), np.maximum.reduceat(view[:, 2], starts)
    pixels = camera.to_pixels(np.maximum(view, [-np.inf, -np.inf, NEAR]).astype(np.float32))
    low, high = np.minimum.reduceat(pixels, starts), np.maximum.reduceat(pixels, starts)
    outside = (high < 0).any(1) | (low > [camera.width, camera.height]).any(1) | ((high - low) < 1).all(1)
    cut = nearest < NEAR
    seen = ~hidden & (farthest > NEAR) & (cut | ~outside)
    image = Image.fromarray(_sky_and_ground(camera))
    draw = ImageDraw.Draw(image)
    flat = (pixels + 0.5).ravel().tolist()  # Pillow cuts coordinates down to whole pixels
    for row in np.flatnonzero(seen).tolist():
        start, count = int(starts[row]), int(counts[row])
        corners = flat[2 * start : 2 * (start + count)]
        if cut[row]:
            corners = _clipped(camera, view[start : start + count])
        if len(corners) >= 6:
            draw.polygon(corners, fill=row + 2)
    return np.asarray(image)


def _sky_and_ground(camera: Camera) -> NDArray[np.int32]:
    """Surface 1 (ground) below the horizon, 0 (sky) above."""
    return (camera.rays(0, camera.height)[1] < 0).astype(np.int32)


def _clipped(camera: Camera, corners: Floats) -> list[float]:
    """The part of one polygon beyond the near plane (Sutherland and Hodgman, 1974), as flat pixel coordinates."""
    kept: list[Floats] = []
    for here, there in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if here[2] >= NEAR:
            kept.append(here)
        if (here[2] >= NEAR) != (there[2] >= NEAR):
            share = (NEAR - here[2]) / (there[2] - here[2])
            kept.append(here + share * (there - here))
    if len(kept) < 3:
        return []
    pixels = camera.to_pixels(np.maximum(np.stack(kept), [-np.inf, -np.inf, NEAR]).astype(np.float32))
    flat: list[float] = (pixels + 0.5).ravel().tolist()
    return flat

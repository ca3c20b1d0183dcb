"""Colour and class of every pixel from its surface: textures, light and distance (deferred shading)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from udas.data.streets.camera import Camera, Floats
from udas.data.streets.canvas import Material, Surfaces
from udas.data.streets.ground import GroundPaints, draw_ground, paint_ground
from udas.data.streets.looks import Look
from udas.data.streets.street import Street
from udas.data.streets.texture import CLOUDS, TILE, fade, hashed, noise, part

FAR = np.float32(400)  # metres
WARM_LAMP = np.array([0.35, 0.3, 0.2], np.float32)
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Paints:
    """What is drawn once for a picture: colours [3] of ground and sky, cover and place [2] of the clouds."""

    ground: GroundPaints
    zenith: Floats
    horizon: Floats
    cloud: Floats
    cover: float
    drift: Floats


def draw_paints(rng: np.random.Generator, look: Look) -> Paints:
    """Draw the colours of one picture."""
    palette = look.palette
    tone = int(rng.integers(len(palette.zenith)))
    return Paints(
        draw_ground(rng, look),
        palette.zenith[tone],
        palette.horizon[tone % len(palette.horizon)],
        palette.cloud[int(rng.integers(len(palette.cloud)))],
        rng.uniform(*look.light.clouds),
        rng.uniform(0, TILE, 2).astype(np.float32),
    )


@dataclass(frozen=True)
class Scene:
    """All that shading looks up. table: surfaces; tint: their colours in this light, [S, 3]."""

    table: Surfaces
    tint: Floats
    camera: Camera
    look: Look
    street: Street
    paints: Paints


@dataclass(frozen=True)
class Pixels:
    """The pixels of one material: surface numbers [P] and world coordinates, each [P]."""

    surface: Ints
    x: Floats
    y: Floats
    z: Floats
    depth: Floats


def make_scene(table: Surfaces, camera: Camera, look: Look, street: Street, rng: np.random.Generator) -> Scene:
    """Light the surfaces and draw the colours of ground and sky."""
    return Scene(table, table.colour * _light(table, street)[:, None], camera, look, street, draw_paints(rng, look))


def shade(scene: Scene, ids: NDArray[np.int32]) -> tuple[Floats, NDArray[np.uint8], Floats]:
    """Colour [H, W, 3] in [0, 1], class [H, W] and depth [H, W] in metres of every pixel; ids: [H, W] surfaces."""
    flat = ids.ravel().astype(np.int64)
    materials = scene.table.material.take(flat)
    order = np.argsort(materials, kind="stable")  # the pixels of a material side by side: slices, no masks
    stops = np.cumsum(np.bincount(materials, minlength=len(Material))).tolist()
    depth = _depth(scene, ids)
    surface, far = flat.take(order), depth.take(order)
    rays = [axis.ravel().take(order) for axis in scene.camera.rays()]
    colour, label = scene.tint.take(surface, axis=0), scene.table.label.take(surface)
    for kind, start, stop in zip(Material, [0, *stops], stops, strict=False):
        rows = slice(start, stop)
        if kind == Material.SKY:
            colour[rows] = _sky([axis[rows] for axis in rays], scene.paints)
            far[rows] = FAR
        elif kind != Material.PLAIN and stop > start:
            x, y, z = (axis[rows] * far[rows] + at for axis, at in zip(rays, scene.camera.position, strict=True))
            pixels = Pixels(surface[rows], x, y, z, far[rows])
            if kind == Material.GROUND:
                label[rows] = _ground(colour[rows], pixels, scene)
            else:
                colour[rows] = SHADERS[kind](colour[rows], pixels, scene.table, scene.look)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    image = colour.take(place, axis=0).reshape(*ids.shape, 3)
    return image, label.take(place).reshape(ids.shape), far.take(place).reshape(ids.shape)


def _depth(scene: Scene, ids: NDArray[np.int32]) -> Floats:
    """Depth [H * W]: for a plane, the inverse of a linear function of the pixel's place, normal . ray / offset."""
    table, camera = scene.table, scene.camera
    slope = (table.normal @ camera.rotation.T) / np.where(np.abs(table.offset) < 1e-6, 1e-6, table.offset)[:, None]
    columns, rows = camera.grid()
    right, down, forward = (np.ascontiguousarray(slope[:, axis], np.float32) for axis in range(3))
    inverse = right.take(ids) * columns
    inverse += down.take(ids) * rows
    inverse += forward.take(ids)
    depth: Floats = 1 / np.clip(inverse, 1 / FAR, np.float32(1 / 0.3))
    return depth.ravel()


def _ground(colour: Floats, pixels: Pixels, scene: Scene) -> NDArray[np.uint8]:
    """Paint the ground into `colour` [P, 3], which holds the share of light that shadows leave; gives the classes."""
    paint, label = paint_ground(pixels.x, pixels.z, pixels.depth, scene.look, scene.street, scene.paints.ground)
    colour *= paint
    return label


def _light(table: Surfaces, street: Street) -> Floats:
    """Lambert's law with an ambient share, per surface; the ground and its shadows keep their colour."""
    direct = np.maximum(table.normal @ street.sun, 0) if street.sunny else 0.5 + 0.5 * np.abs(table.normal[:, 1])
    light = street.ambient + (1 - street.ambient) * direct * 1.3
    light[table.material == Material.GROUND] = 1
    return light.astype(np.float32)


def _facing(pixels: Pixels, table: Surfaces) -> tuple[Floats, Floats]:
    """Metres along an upright surface from its first corner, and metres above it."""
    normal, origin = table.normal, table.origin
    s = pixels.surface
    length = np.maximum(np.hypot(normal[:, 0], normal[:, 2]), 1e-6)
    right, forward = normal[:, 2] / length, -normal[:, 0] / length
    start = origin[:, 0] * right + origin[:, 2] * forward
    return np.abs(pixels.x * right[s] + pixels.z * forward[s] - start[s]), pixels.y - origin[s, 1]


def _facade(colour: Floats, pixels: Pixels, table: Surfaces, look: Look) -> Floats:
    """Framed windows, shop fronts with a sign board below, dirt towards the ground."""
    u, v = _facing(pixels, table)
    pitch, storey, wide, high, shop, seed = (table.pattern[:, i].take(pixels.surface) for i in range(6))
    below = (v < shop) & (shop > 1)
    pitch = np.where(below, pitch * 1.6, pitch)
    column, row = np.floor(u / pitch), np.floor((v - shop) / storey)
    draw = hashed(column, row, seed)
    fu = np.abs(u / pitch - column - 0.5) * 2 / np.where(below, 0.84, wide)
    fv = np.where(below, np.abs(v / shop - 0.38) / 0.3, np.abs((v - shop) / storey - row - 0.46) * 2 / high)
    edge = np.maximum(fu, fv)
    edge[(v <= shop) & ~below] = 9
    tone = (1 + 0.06 * look.light.grain * noise(u, v, 6)) * (0.8 + 0.2 * np.minimum(v / 5, 1))
    colour = colour * (tone * np.where((edge < 1.2) & (edge >= 1), np.float32(1.16), 1))[:, None]
    board = below & (v > shop * 0.74) & (v < shop * 0.93)
    colour[board] = _board(hashed(seed)[board], look) * colour[board].mean(1, keepdims=True) * 1.5
    pane = np.flatnonzero((edge < 1) & ~((fu < 0.07) & ~below))
    colour[pane] = _glass(draw[pane], fv[pane], look)
    return colour


def _board(draw: Floats, look: Look) -> Floats:
    colours = look.palette.building[::-1]
    return colours[(draw * len(colours)).astype(np.int64)]


def _glass(draw: Floats, height: Floats, look: Look) -> Floats:
    """Panes mirror the sky towards the top; behind some a lamp is lit."""
    panes = look.palette.glass[(draw * 97).astype(np.int64) % len(look.palette.glass)]
    return panes * (0.75 + 0.5 * draw + 0.25 * (1 - height))[:, None] + (draw > 0.82)[:, None] * WARM_LAMP


def _masonry(colour: Floats, pixels: Pixels, table: Surfaces, look: Look) -> Floats:
    """Courses of bricks or slabs with joints; pattern: length and height of a stone, seed."""
    u, v = _facing(pixels, table)
    length, height, seed = (table.pattern[:, i][pixels.surface] for i in (0, 1, 5))
    row = np.floor(v / height)
    shifted = u / length + part(row / 2)
    column = np.floor(shifted)
    joint = (np.abs(v / height - row - 0.5) > 0.4) | (np.abs(shifted - column - 0.5) > 0.46)
    stone = fade(pixels.depth, 14) * (0.3 * (hashed(column, row, seed) - 0.5) - 0.22 * joint)
    return colour * (1 + stone + 0.06 * look.light.grain * noise(u, v, 5))[:, None]


def _boards(colour: Floats, pixels: Pixels, table: Surfaces, look: Look) -> Floats:
    """Upright boards with gaps (pattern 0: pitch), or crossing wires (pattern 1 = 2)."""
    u, v = _facing(pixels, table)
    pitch, mesh = table.pattern[:, 0][pixels.surface], table.pattern[:, 1][pixels.surface] == 2
    wires = np.abs(part((u + v) / pitch / 2) - 0.5) * np.abs(part((u - v) / pitch / 2) - 0.5) < 0.125
    gaps = np.abs(part(u / pitch) - 0.5) > 0.4
    dark = np.where(mesh, 0.45 * wires, 0.5 * gaps) * fade(pixels.depth, 25) * 1.2
    boards: Floats = colour * (1 - dark + 0.12 * (hashed(np.floor(u / pitch)) - 0.5))[:, None]
    return boards


def _leaves(colour: Floats, pixels: Pixels, table: Surfaces, look: Look) -> Floats:
    """Clumps of leaves: coarse and fine noise, darker below."""
    u, v = pixels.x + 0.6 * pixels.z, pixels.y
    fine = noise(u, v, 7) * fade(pixels.depth, 20)
    tone = 1 + look.light.grain * (0.14 * fine + 0.1 * noise(u, v, 2.3)) + 0.02 * np.clip(v - 3, -4, 4)
    return colour * tone[:, None]


SHADERS = {
    Material.FACADE: _facade,
    Material.MASONRY: _masonry,
    Material.BOARDS: _boards,
    Material.LEAVES: _leaves,
}


def _sky(ray: list[Floats], paints: Paints) -> Floats:
    """A gradient from the horizon to the zenith with drifting clouds."""
    x, y, z = ray
    up = np.clip(y / np.sqrt(x * x + z * z + 1e-6), 0, 1)
    height = 1 / (up + 0.15)
    puff = noise(x * height + paints.drift[0], height * 1.5 + paints.drift[1], 70, CLOUDS)
    amount = np.clip((puff - 1.3 + 2.6 * paints.cover) * 0.6, 0, 1) * np.minimum(up * 5, 1) * 0.85
    sky = paints.horizon + (paints.zenith - paints.horizon) * np.minimum(up * 1.7, 1)[:, None]
    clouded: Floats = sky + (paints.cloud - sky) * amount[:, None]
    return clouded

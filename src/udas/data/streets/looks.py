"""The two looks: how a town is laid out, coloured, lit and photographed.

`game` is a clean, saturated boulevard seen from a high, wide camera. `camera` is a narrow old street on a dull day,
seen from behind a windscreen. The colours are chosen so that what stands for a class in one look misleads in the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from udas.data.streets.camera import Floats

Range = tuple[float, float]


def rgb(*colours: str) -> Floats:
    """Hexadecimal colours as [N, 3] in [0, 1]."""
    values = [[int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)] for colour in colours]
    return np.array(values, np.float32)


@dataclass(frozen=True)
class View:
    """The camera: metres and degrees, drawn from ranges; `lane` is its place in the right-hand lanes, a share."""

    height: Range
    field_of_view: Range
    pitch: Range
    yaw: float
    roll: float
    lane: Range


@dataclass(frozen=True)
class Layout:
    """Ranges of a town's measures in metres; chances are shares of streets or plots."""

    road: Range  # half the width
    walk: Range
    setback: Range
    floors: tuple[int, int]
    plot: Range
    bend: float
    verge: float  # chance of a grass strip along the kerb
    parking: float  # chance of a row of parked vehicles on a side
    trees: Range  # spacing along the kerb
    lamps: Range
    people: tuple[int, int]
    traffic: tuple[int, int]
    pitched: float  # chance of a pitched roof
    palms: float
    shops: float
    parks: float  # chance that a plot is a yard behind a wall, fence or hedge
    american: bool  # yellow diamonds and green boards; otherwise red triangles and blue discs


@dataclass(frozen=True)
class Palette:
    """Base colours per kind of surface, each [N, 3] in [0, 1]; `spread` is the random deviation."""

    spread: float
    zenith: Floats
    horizon: Floats
    cloud: Floats
    road: Floats
    marking: Floats
    centre_line: Floats
    walk: Floats
    grass: Floats
    building: Floats
    trim: Floats
    glass: Floats
    roof: Floats
    wall: Floats
    fence: Floats
    pole: Floats
    leaves: Floats
    trunk: Floats
    vehicle: Floats
    cloth: Floats
    skin: Floats
    hair: Floats


@dataclass(frozen=True)
class Light:
    """ambient: share of light that has no direction. sunny: chance of cast shadows. clouds: cover of the sky."""

    ambient: Range
    sunny: float
    clouds: Range
    grain: float  # contrast of the textures


@dataclass(frozen=True)
class Sensor:
    """What the picture suffers between the street and the file; ranges that are drawn from."""

    fog: Range  # 1 / metres
    exposure: Range
    gamma: Range
    warmth: Range
    tint: float
    saturation: Range
    vignette: Range
    blur: Range  # pixels at a width of 256
    noise: Range
    jpeg: tuple[int, int]


@dataclass(frozen=True)
class Look:
    """One of the two domains; `sensor` is None for a perfect picture."""

    view: View
    layout: Layout
    palette: Palette
    light: Light
    sensor: Sensor | None


SKIN = rgb("e8b898", "c68e68", "8d5a3c", "5c3a28", "f0cdb0")
HAIR = rgb("2a1d14", "6b4a2a", "b98d4f", "111111", "7d7d7d")

GAME = Look(
    View((2.1, 3.0), (78, 92), (1, 6), 7.0, 0.0, (0.3, 0.6)),
    Layout(
        road=(5.0, 8.0),
        walk=(2.6, 4.2),
        setback=(0.0, 2.5),
        floors=(2, 9),
        plot=(9, 20),
        bend=0.003,
        verge=0.45,
        parking=0.35,
        trees=(9, 18),
        lamps=(14, 22),
        people=(4, 10),
        traffic=(3, 7),
        pitched=0.12,
        palms=0.45,
        shops=0.55,
        parks=0.28,
        american=True,
    ),
    Palette(
        spread=0.03,
        zenith=rgb("2f7bf0", "3a8cff", "5a7cf0", "28a0f5"),
        horizon=rgb("b4dcff", "c8ecff", "ffe2c4", "d4e4ff"),
        cloud=rgb("ffffff"),
        road=rgb("8c8c94", "9696a0", "84848c", "a09c9c"),
        marking=rgb("ffffff"),
        centre_line=rgb("ffd21e", "ffc800"),
        walk=rgb("e8cfa8", "e0bfae", "d8d0c0", "f0dcb8"),
        grass=rgb("58c83c", "6ed848", "46b846"),
        building=rgb(
            "e86aa8", "f0a03c", "46b8c8", "f0d850", "a878e0", "ee7a5a", "7ccaa0", "f4ecd8", "5a8ae8", "d84e60"
        ),
        trim=rgb("ffffff", "fff0c8", "3c3c6e"),
        glass=rgb("3c78b4", "5096d2", "284b82", "64b4dc"),
        roof=rgb("c8503c", "3c5aa0", "7850a0"),
        wall=rgb("d06848", "c85a78", "e89a50", "b85a4a"),
        fence=rgb("f4f4f4", "3c8cdc", "f08cb4", "ffffff", "d89050"),
        pole=rgb("f0c828", "32323c", "d8dce6", "3ca078"),
        leaves=rgb("32b432", "50c83c", "28a05a", "78c828"),
        trunk=rgb("96643c", "a87848"),
        vehicle=rgb("e62828", "2850e6", "ffd228", "28b450", "f5f5f5", "ff7828", "a03cc8", "28c8d2"),
        cloth=rgb("e63c3c", "3c50dc", "f0dc3c", "3cc864", "f0f0f0", "f08cc8", "28283c", "f08c28"),
        skin=SKIN,
        hair=HAIR,
    ),
    Light((0.72, 0.86), 0.6, (0.0, 0.55), 0.5),
    None,
)

CAMERA = Look(
    View((1.2, 1.6), (50, 66), (-2, 3.5), 3.5, 1.2, (0.35, 0.65)),
    Layout(
        road=(3.0, 4.2),
        walk=(1.8, 3.0),
        setback=(0.0, 0.8),
        floors=(2, 6),
        plot=(7, 16),
        bend=0.006,
        verge=0.2,
        parking=0.75,
        trees=(8, 16),
        lamps=(13, 24),
        people=(4, 10),
        traffic=(1, 4),
        pitched=0.6,
        palms=0.0,
        shops=0.4,
        parks=0.3,
        american=False,
    ),
    Palette(
        spread=0.05,
        zenith=rgb("aeb4ba", "8f9aa8", "c4c4c0", "7f8fa6", "9a9a9c"),
        horizon=rgb("d2d4d4", "c4c8cc", "dcd8d0", "e0dcd0"),
        cloud=rgb("e2e2e2", "c8c8ca", "8c9096"),
        road=rgb("4a4a4c", "58565a", "626060", "3e4044", "544e4a"),
        marking=rgb("c8c8c4", "b4b2ac"),
        centre_line=rgb("c0c0bc"),
        walk=rgb("7c7872", "8a8278", "6a6a6c", "90887a"),
        grass=rgb("5c6038", "6a6a40", "4c5434"),
        building=rgb("9a8468", "8a6050", "a8a094", "746c64", "b4a078", "6c4c40", "8c8c8a", "a48c80", "c0b8a4"),
        trim=rgb("b4b0a8", "6c6660", "8c7c68"),
        glass=rgb("30363c", "42484e", "24282c", "545c62"),
        roof=rgb("6a3e32", "4a4648", "583a30", "3c3e44"),
        wall=rgb("847c70", "6c625a", "968c7c", "75604f"),
        fence=rgb("4c5048", "5c4a38", "686868", "34403a", "7a6a54"),
        pole=rgb("585c5e", "6e7070", "44484a", "7e7a72"),
        leaves=rgb("3c4a26", "4e5630", "6a6030", "34402a", "7a5c2c"),
        trunk=rgb("3c342c", "4c4238"),
        vehicle=rgb("1c1e22", "8c9094", "b4b6b8", "d0d0ce", "26324c", "5c2024", "3c4448", "6e6a60"),
        cloth=rgb("24262c", "3a3c44", "4c4438", "2c3444", "6c6660", "502c2c", "8a867c", "38443c"),
        skin=SKIN,
        hair=HAIR,
    ),
    Light((0.55, 0.85), 0.35, (0.35, 1.0), 1.0),
    Sensor(
        fog=(0.001, 0.014),
        exposure=(0.85, 1.35),
        gamma=(0.8, 1.15),
        warmth=(-0.16, 0.2),
        tint=0.05,
        saturation=(0.6, 1.05),
        vignette=(0.1, 0.5),
        blur=(0.0, 0.75),
        noise=(0.008, 0.035),
        jpeg=(40, 80),
    ),
)

LOOKS = {"game": GAME, "camera": CAMERA}

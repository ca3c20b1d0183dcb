"""Pictures of a report: re-encoded small, embedded as data URIs, and matched between stages by what they show."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from udas.reporting.read import Stage, natural

WIDTH = 448
"""Widest embedded picture in pixels: sharp at the 224 CSS pixels of a cell on a high-density screen."""
SCENES = 8
"""Most pictures shown side by side."""
SAME = 4.0
"""Thumbnails that differ by less than this mean of 255 levels show the same picture: room for resizing, not more."""

_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # all that Pillow raises on bad files


@dataclass(frozen=True)
class Embedded:
    """A picture in the page: data URI, width and height in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Cell:
    """What one stage says about one picture: class colours, and how sure it is."""

    labels: Embedded | None
    confidence: Embedded | None


@dataclass
class Scene:
    """One fixed picture with what every stage made of it, by `Stage.where`."""

    name: str
    input: Embedded | None
    truth: Embedded | None
    space: str
    thumbnail: np.ndarray | None
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """Scenes that the same stages show. columns: (title, `prediction` or `pseudo-label`); total: scenes there are."""

    columns: list[tuple[str, str]]
    scenes: list[Scene]
    total: int


@dataclass(frozen=True)
class Pair:
    """A source picture and its repainted twin."""

    original: Embedded | None
    translated: Embedded | None


@dataclass(frozen=True)
class Extreme:
    """A picture at one end of a ranking, with what the network sees and how unsure it is."""

    name: str
    input: Embedded | None
    prediction: Embedded | None
    entropy: Embedded | None


def photo(path: Path, width: int = WIDTH) -> Embedded:
    """A picture as JPEG, at most `width` pixels wide. Raises what Pillow raises on a broken file."""
    with Image.open(path) as image:
        small = _shrink(image.convert("RGB"), Image.Resampling.LANCZOS, width)
    return _embed(small, "JPEG", quality=80, optimize=True)


def confidence_map(path: Path) -> Embedded:
    """A map of [0, 255] in the colours of viridis as JPEG; one that is in colours already stays as it is."""
    with Image.open(path) as image:
        if image.mode != "L":
            return photo(path)
        small = _shrink(image, Image.Resampling.BOX)
    return _embed(Image.fromarray(colormaps["viridis"](np.asarray(small), bytes=True)[..., :3]), "JPEG", quality=80)


def class_map(path: Path) -> Embedded:
    """A coloured label map as palette PNG, every colour kept exactly; a photo when it has more than 256 colours."""
    with Image.open(path) as image:
        small = _shrink(image.convert("RGB"), Image.Resampling.NEAREST)
    packed = np.asarray(small, dtype=np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    colours, index = np.unique(packed, return_inverse=True)
    if len(colours) > 256:
        return photo(path)
    paletted = Image.fromarray(index.reshape(packed.shape).astype(np.uint8), mode="P")
    paletted.putpalette(np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.uint8).tobytes())
    return _embed(paletted, "PNG", optimize=True)


def _shrink(image: Image.Image, how: Image.Resampling, width: int = WIDTH) -> Image.Image:
    if image.width <= width:
        return image.copy()
    return image.resize((width, max(1, round(image.height * width / image.width))), how)


def _embed(image: Image.Image, kind: str, quality: int = 0, optimize: bool = False) -> Embedded:
    data = BytesIO()
    image.save(data, kind, quality=quality, optimize=optimize)
    uri = f"data:image/{kind.lower()};base64,{b64encode(data.getvalue()).decode()}"
    return Embedded(uri, image.width, image.height)


def _try(read: Callable[[Path], Embedded], path: Path, stage: Stage, notes: list[str]) -> Embedded | None:
    try:
        return read(path)
    except _BROKEN as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a readable picture"
        notes.append(f"{stage.where}/{path.relative_to(stage.folder).as_posix()}: {reason}")
        return None


def galleries(stages: list[Stage], space: dict[str, str], notes: list[str]) -> list[Gallery]:
    """The fixed pictures of all evaluate and label stages, those of the same stages together.

    Args:
        stages: in the order their columns are to have.
        space: stage.where -> its label space; pictures of different label spaces are not shown together.
        notes: takes a line for each file that cannot be read.
    """
    scenes: list[Scene] = []
    for stage in stages:
        for folder, name in _fixed(stage, notes):
            _join(scenes, stage, folder, name, space.get(stage.where, ""), notes)
    columns = {s.where: (s.title, "pseudo-label" if s.manifest.kind == "label" else "prediction") for s in stages}
    groups: dict[tuple[str, ...], list[Scene]] = {}
    for scene in scenes:
        groups.setdefault((scene.space, *scene.cells), []).append(scene)
    return [Gallery([columns[where] for where in key[1:]], group[:SCENES], len(group)) for key, group in groups.items()]


def _fixed(stage: Stage, notes: list[str]) -> Iterator[tuple[Path, str]]:
    """Folders of a stage's fixed pictures with the pictures' names."""
    root = stage.folder / ("pictures" if stage.manifest.kind == "evaluate" else "preview")
    folders = numbered(root)
    if not folders and stage.manifest.state == "done":
        notes.append(f"{stage.where}/{root.name}: no pictures")
    names = stage.evaluation.shown if stage.evaluation else []
    for folder in folders:
        place = int(folder.name) if folder.name.isdecimal() else -1
        yield folder, names[place] if 0 <= place < len(names) else f"picture {folder.name}"


def numbered(root: Path) -> list[Path]:
    """Folders below `root` in natural order; none when `root` is absent."""
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted(folders, key=lambda path: natural(path.name))


def _join(scenes: list[Scene], stage: Stage, folder: Path, name: str, space: str, notes: list[str]) -> None:
    """Add what `stage` shows in `folder` to the scene of the same picture, or to a new one."""
    label = stage.manifest.kind == "label"
    thumbnail = _thumbnail(folder / "input.png")
    scene = _nearest(scenes, thumbnail, space, stage.where)
    if scene is None:
        scene = Scene(name, _try(photo, folder / "input.png", stage, notes), None, space, thumbnail)
        scenes.append(scene)
    truth = folder / "truth.png"
    if scene.truth is None and (truth.exists() or not label):
        scene.truth = _try(class_map, truth, stage, notes)
    labels = _try(class_map, folder / ("label.png" if label else "prediction.png"), stage, notes)
    scene.cells[stage.where] = Cell(labels, _try(confidence_map, folder / "confidence.png", stage, notes))


def _thumbnail(path: Path) -> np.ndarray | None:
    """[16, 16, 3] float32 in [0, 255], or None for a file that cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
    except _BROKEN:
        return None


def _nearest(scenes: list[Scene], thumbnail: np.ndarray | None, space: str, where: str) -> Scene | None:
    if thumbnail is None:
        return None
    free = [s for s in scenes if s.space == space and where not in s.cells and s.thumbnail is not None]
    distance = [float(np.abs(thumbnail - s.thumbnail).mean()) for s in free]
    best = int(np.argmin(distance)) if free else -1
    return free[best] if free and distance[best] < SAME else None


def pairs(stage: Stage, notes: list[str]) -> list[Pair]:
    """Originals and repainted pictures of a translate stage."""
    return [
        Pair(*(_try(photo, folder / f"{name}.png", stage, notes) for name in ("original", "translated")))
        for folder in numbered(stage.folder / "preview")[:SCENES]
    ]


def extremes(stage: Stage, notes: list[str]) -> list[Extreme]:
    """The easiest and the hardest pictures of a rank stage."""
    readers = {"input": photo, "prediction": class_map, "entropy": photo}
    return [
        Extreme(
            folder.name.replace("_", " "),
            *(_try(read, folder / f"{name}.png", stage, notes) for name, read in readers.items()),
        )
        for folder in numbered(stage.folder / "preview")[:SCENES]
    ]


def scatter(stage: Stage, notes: list[str]) -> Embedded | None:
    """The features of a prototypes stage in the plane."""
    return _try(_sheet, stage.folder / "scatter.png", stage, notes)


def last_previews(stage: Stage, notes: list[str]) -> tuple[str, list[tuple[str, Embedded]]]:
    """The step of a train stage's newest previews, and up to four of them by name."""
    newest = (numbered(stage.folder / "previews") or [stage.folder])[-1]
    files = sorted(newest.glob("*.[jp][pn]g"))[:4] if newest != stage.folder else []
    shown = [(path.stem, picture) for path in files if (picture := _try(_sheet, path, stage, notes))]
    return newest.name.lstrip("0") or "0", shown


def _sheet(path: Path) -> Embedded:
    """Previews hold the pictures of a batch in a row."""
    return photo(path, 3 * WIDTH)

"""Segment pictures of one's own: masks, overlays and a legend from a file, a folder or a pattern."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os.path import commonpath
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from udas.data.files import read_image
from udas.errors import DataError
from udas.evaluation.evaluate import Progress, Sample, batches, evaluation_mode, to_input
from udas.evaluation.protocols import PROTOCOLS, Network, ProtocolConfig, probabilities
from udas.storage import write_picture
from udas.taxonomy import Taxonomy

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What counts as a picture inside a folder."""

_WILD = frozenset("*?[")
_WRITERS = 2
_LISTED = 20  # broken pictures named in one message


def predict(
    model: Network,
    taxonomy: Taxonomy,
    inputs: Sequence[str],
    out: Path,
    device: torch.device,
    overlay: bool = True,
    protocol: ProtocolConfig = PROTOCOLS["whole"],
    progress: Progress | None = None,
    batch: int = 8,
) -> list[Path]:
    """Segment pictures at their own size; memory does not grow with their number.

    Writes `masks/<name>.png` (class ids, with the classes' colours as palette), `overlays/<name>.jpg` (colours over the
    picture) and `legend.png`. <name> is the path below the folder that was given, without its suffix.

    Args:
        model: RGB [B, 3, H, W] in [0, 1] -> logits [B, C, H, W] on `device`.
        taxonomy: the label space, C classes.
        inputs: files, folders (searched with all folders below) and patterns with *, ?, [ or **.
        out: folder of the results.
        device: where the model is.
        overlay: whether overlays are written.
        protocol: how the network is asked; what it compares with plays no part.
        progress: called after every batch.
        batch: pictures of equal size that go through the network together (fewer when they are large).

    Returns:
        The masks, in the order of the pictures.

    Raises:
        DataError: before the work when there is nothing to do or results would replace pictures; after all other
            pictures are done, when some could not be read.
        RunError: when results cannot be written.
    """
    sources = find_pictures(inputs)
    _check_targets(inputs, sources, out)
    write_picture(out / "legend.png", legend(taxonomy))
    broken: dict[int, str] = {}
    loaded = batches(partial(_load, sources, broken), range(len(sources)), batch, protocol)
    done = 0
    with evaluation_mode(model), torch.no_grad(), _writer() as write:
        for samples in loaded:
            chosen = probabilities(model, to_input(samples, device), protocol).argmax(1).byte().cpu().numpy()
            for sample, mask in zip(samples, chosen, strict=True):
                write(partial(_save, out, sources[sample.index].name, sample, mask, taxonomy, overlay))
            done += len(samples)
            if progress:
                progress(done + len(broken), len(sources))
    if broken:
        raise DataError(_report(broken, len(sources), out))
    return [_mask(out, source.name) for source in sources]


# ------------------------------------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Source:
    """A picture file, and the name its results get: a posix path without suffix."""

    path: Path
    name: str


def find_pictures(inputs: Sequence[str]) -> list[Source]:
    """The pictures behind files, folders and patterns, each once, sorted by name.

    Names are relative to the folder given, to the part of a pattern before its first wildcard, or, for files, to the
    folder that all files given have in common.

    Raises:
        DataError: nothing found, or two pictures would get the same name.
    """
    files = [Path(text) for text in inputs if Path(text).is_file()]
    base = Path(commonpath([file.resolve().parent for file in files])) if files else Path()
    found = {file.resolve(): Source(file, _name(file.resolve(), base)) for file in files}
    for text in inputs:
        if Path(text) not in files:
            for source in _below(text):
                found.setdefault(source.path.resolve(), source)
    named: dict[str, Path] = {}
    for source in found.values():
        other = named.setdefault(source.name, source.path)
        if other is not source.path:
            raise DataError(f"{other} and {source.path}: both results would be called {source.name}; rename one")
    return sorted(found.values(), key=lambda source: source.name)


def _search(text: str) -> tuple[Path, str]:
    """Where to look: a folder, and the pattern below it."""
    if Path(text).is_dir():
        return Path(text), "**/*"
    parts = Path(text).parts
    wild = next((k for k, part in enumerate(parts) if _WILD & set(part)), None)
    if wild is None:
        raise DataError(f"{text}: no such file or folder")
    return Path(*parts[:wild]), "/".join(parts[wild:])


def _below(text: str) -> Iterator[Source]:
    """The pictures of one folder or pattern."""
    root, pattern = _search(text)
    paths = [path for path in root.glob(pattern) if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not paths:
        raise DataError(f"{text}: no picture there (looked for {', '.join(sorted(SUFFIXES))})")
    for path in paths:
        yield Source(path, _name(path, root))


def _name(path: Path, base: Path) -> str:
    return path.relative_to(base).with_suffix("").as_posix()


def _mask(out: Path, name: str) -> Path:
    return out / "masks" / f"{name}.png"


def _overlay(out: Path, name: str) -> Path:
    return out / "overlays" / f"{name}.jpg"


def _check_targets(inputs: Sequence[str], sources: Sequence[Source], out: Path) -> None:
    """Results may not replace pictures, nor become pictures of the next call."""
    for text in inputs:
        root, pattern = (Path(text), "") if Path(text).is_file() else _search(text)
        if "**" in pattern and out.resolve().is_relative_to(root.resolve()):
            raise DataError(f"{out}: lies inside {root}, which is searched for pictures; choose a folder outside it")
    targets = {out / "legend.png"} | {place(out, source.name) for source in sources for place in (_mask, _overlay)}
    resolved = {target.resolve() for target in targets}
    for source in sources:
        if source.path.resolve() in resolved:
            raise DataError(f"{source.path}: a result would replace this picture; choose another output folder")


# ---------------------------------------------------------------------------------------------------- files


def _load(sources: Sequence[Source], broken: dict[int, str], index: int) -> Sample | None:
    """The picture, or None and a line in `broken`."""
    try:
        return Sample(index, read_image(sources[index].path))
    except DataError as error:
        broken[index] = str(error)
        return None


def _report(broken: dict[int, str], total: int, out: Path) -> str:
    lines = [broken[index] for index in sorted(broken)]
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    others = f"{len(lines)} of {total} pictures could not be read; results of the others are in {out}"
    head = "no picture could be read" if len(lines) == total else others
    return "\n  ".join([head, *lines[:_LISTED], *more])


@contextmanager
def _writer() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Run writes beside the network, a bounded number of them at a time; their errors come out here."""
    queue: deque[Future[None]] = deque()
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as pool:

        def write(job: Callable[[], None]) -> None:
            queue.append(pool.submit(job))
            if len(queue) > 4 * _WRITERS:
                queue.popleft().result()

        yield write
        for future in queue:
            future.result()


def _save(out: Path, name: str, sample: Sample, mask: NDArray[np.uint8], taxonomy: Taxonomy, overlay: bool) -> None:
    picture = Image.fromarray(mask)
    picture.putpalette(taxonomy.palette().tobytes())
    write_picture(_mask(out, name), picture)
    if overlay:
        photo = Image.fromarray(sample.image.permute(1, 2, 0).contiguous().numpy())
        write_picture(_overlay(out, name), Image.blend(photo, picture.convert("RGB"), 0.5), "JPEG")


def legend(taxonomy: Taxonomy) -> Image.Image:
    """The colours of a label space with the names of its classes."""
    font, line = ImageFont.load_default(14), 22
    width = 40 + max(round(font.getlength(name)) for name in taxonomy.classes)
    picture = Image.new("RGB", (width, line * len(taxonomy.classes) + 6), "white")
    draw = ImageDraw.Draw(picture)
    for row, (name, colour) in enumerate(zip(taxonomy.classes, taxonomy.colours, strict=True)):
        top = row * line + 4
        draw.rectangle((4, top, 24, top + line - 5), fill=colour, outline="black")
        draw.text((32, top), name, fill="black", font=font)
    return picture

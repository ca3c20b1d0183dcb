"""Decode once: resized pictures and granted labels in memory-mapped arrays, for loaders that read them many times."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from udas.data.dataset import PictureSet
from udas.errors import DataError, RunError
from udas.storage import write_atomically

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""

CHUNK = 64  # pictures decoded ahead of the writer: bounds the memory in use
UNFINISHED = ".part-"  # in the names of files that are still being written


class Pages(Mapping[str, Tensor]):
    """Rows of an array file by name, read when they are asked for; small when it travels to another process."""

    def __init__(self, file: Path, names: Sequence[str]) -> None:
        self.file = file
        self._rows = {name: row for row, name in enumerate(names)}
        self._array: NDArray[np.uint8] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """A copy of the row, uint8. Raises `KeyError` when there is no such name."""
        row = self._rows[name]
        if self._array is None:
            self._array = np.load(self.file, mmap_mode="r")
        return torch.from_numpy(np.array(self._array[row]))

    def __iter__(self) -> Iterator[str]:
        """The names in the order of the rows."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        """Without the array, which would be copied as a whole."""
        return self.__dict__ | {"_array": None}


@dataclass(frozen=True)
class _Part:
    """What becomes one array: the indices of a set's pictures, how to read them, and the files they come from."""

    kind: str
    pictures: PictureSet
    indices: Sequence[int]
    read: Callable[[int], Tensor]
    files: Sequence[Path]

    @property
    def names(self) -> list[str]:
        return [self.pictures.pictures[index].name for index in self.indices]

    def digest(self) -> str:
        """Changes whenever an array of it would, or when a file was written anew."""
        times = [file.stat().st_mtime_ns for file in self.files]
        text = json.dumps([self.kind, self.pictures.fingerprint(), self.names, times])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def build_cache(pictures: PictureSet, folder: Path, progress: Progress | None = None) -> PictureSet:
    """The same set, reading from arrays below `folder` what it would otherwise decode and resize: equal bit for bit.

    Arrays that exist already are used. Pictures and labels have an array each, so that sets with other labels of the
    same pictures share the pictures' array; labels are read for granted pictures only. Confidences are not cached.

    Args:
        pictures: a set whose pictures have one size (`size` sees to that).
        folder: where the arrays are; created when absent. It can be deleted when nothing runs.
        progress: called while arrays are written.

    Raises:
        DataError: an unreadable picture or label, or pictures of several sizes.
        RunError: the disk is full or cannot be written to.
    """
    if not len(pictures):
        return pictures
    parts = _parts(pictures)
    files = [folder / f"{part.kind}-{part.digest()}.npy" for part in parts]
    missing = [(part, file) for part, file in zip(parts, files, strict=True) if not _whole(file)]
    done, total = 0, sum(len(part.indices) for part, _ in missing)
    for part, file in missing:
        for written in _write(part, file):
            if progress:
                progress(done + written, total)
        done += len(part.indices)
    pages = [Pages(file, part.names) for part, file in zip(parts, files, strict=True)]
    return replace(pictures, image_cache=pages[0], label_cache=pages[1] if len(pages) > 1 else None)


def _whole(file: Path) -> bool:
    """Whether an array is there as it was written; a disk or a copy can have cut it off since."""
    try:
        np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True


def _parts(pictures: PictureSet) -> list[_Part]:
    """The pictures, seen without their labels; then the labels, where there are any."""
    bare = replace(pictures, labels={}, label_map=None, channel=None, confidences=None, label_cache=None)
    images = [picture.image for picture in pictures.pictures]
    parts = [_Part("images", bare, range(len(pictures)), pictures.image, images)]
    granted = [index for index, picture in enumerate(pictures.pictures) if picture.name in pictures.labels]
    if granted:
        files = [pictures.labels[pictures.pictures[index].name] for index in granted]
        parts.append(_Part("labels", pictures, granted, pictures.label, files))
    return parts


def _write(part: _Part, file: Path) -> Iterator[int]:
    """Write a JSON index for people, then the array it describes; yields how many rows are done."""
    shape = tuple(part.read(part.indices[0]).shape)
    _prepare(file.parent, len(part.indices) * math.prod(shape))
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(part.indices), *shape)}
    index = header | {"domain": part.pictures.domain, "names": part.names}
    write_atomically(file.with_suffix(".json"), json.dumps(index).encode())
    with _atomic(file) as target:
        np.lib.format.write_array_header_1_0(target, header)
        for row, value in enumerate(_read_ahead(part)):
            if tuple(value.shape) != shape:
                raise DataError(_unequal(part, row, shape, tuple(value.shape)))
            target.write(value.numpy().tobytes())
            yield row + 1


def _unequal(part: _Part, row: int, expected: tuple[int, ...], found: tuple[int, ...]) -> str:
    first, other = (f"{part.names[k]} {shape[-1]}x{shape[-2]}" for k, shape in ((0, expected), (row, found)))
    return f"{part.pictures.domain}: pictures differ in size ({first}, {other}); set `size` so that they can be cached"


def _read_ahead(part: _Part) -> Iterator[Tensor]:
    """Values in order, decoded by several threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(part.indices), CHUNK):
            yield from pool.map(part.read, part.indices[start : start + CHUNK])


def _prepare(folder: Path, needed: int) -> None:
    """Make the folder, clear away what killed processes left there, and see that `needed` bytes are free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be created ({error.strerror}); choose another cache folder") from None
    for part in folder.glob(f"*{UNFINISHED}*"):
        if part.stat().st_mtime < time.time() - 3600:  # a living writer has touched it since
            part.unlink(missing_ok=True)
    if (free := shutil.disk_usage(folder).free) < needed:
        text = f"{folder}: the cache needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        raise RunError(f"{text}; free some space, choose another folder, or go without the cache")


@contextmanager
def _atomic(file: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is complete and on the disk."""
    part = file.with_name(f"{file.name}{UNFINISHED}{os.getpid()}")
    try:
        with part.open("wb") as target:
            yield target
            target.flush()
            os.fsync(target.fileno())
        part.replace(file)
    except OSError as error:
        text = f"{file}: cannot be written ({error.strerror})"
        raise RunError(f"{text}; free some space or choose another folder") from None
    finally:
        part.unlink(missing_ok=True)

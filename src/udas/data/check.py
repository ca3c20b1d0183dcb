"""Looks through a data set before a run: what is in it, and everything that would stop or mislead a training."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from udas.config import Labelled
from udas.data.dataset import Domain, PictureSet
from udas.data.files import read_image, read_label
from udas.errors import DataError
from udas.taxonomy import IGNORE, LabelMap, Value

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""

SHOWN = 5  # of problems of one kind, that many are listed; the others are counted


@dataclass
class Stray:
    """A value of label files that `map` does not list: pixels and files that have it, and the first of these."""

    first: Path
    pixels: int = 0
    files: int = 0


@dataclass
class SplitReport:
    """What one split holds.

    pictures, labelled: numbers of pictures, and of those whose label is granted.
    histogram: pixels per class of the run, over all granted labels that could be read. ignored: pixels without class.
    sizes: (height, width) -> pictures. stray: values without a rule.
    faults: unreadable files, and labels that do not fit their picture; one line each, naming the file.
    """

    split: str
    pictures: int = 0
    labelled: int = 0
    histogram: dict[str, int] = field(default_factory=dict)
    ignored: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    stray: dict[Value, Stray] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def unlabelled(self) -> int:
        """Pictures without a granted label."""
        return self.pictures - self.labelled

    @property
    def absent(self) -> list[str]:
        """Classes that no granted label shows; empty where nothing is labelled."""
        return [name for name, pixels in self.histogram.items() if not pixels] if self.labelled else []

    @property
    def problems(self) -> list[str]:
        """One line for each problem."""
        lines = [f"{self.split}: {fault}" for fault in self.faults[:SHOWN]]
        if len(self.faults) > SHOWN:
            lines.append(f"{self.split}: {len(self.faults) - SHOWN} more files like these")
        for value, stray in sorted(self.stray.items(), key=lambda item: -item[1].pixels):
            found = f"{stray.pixels} pixels in {stray.files} files, first in {stray.first}"
            shown = value if isinstance(value, int) else list(value)
            lines.append(f"{self.split}: value {shown} is not in `map` ({found}); add it to a class or to `ignore`")
        return lines


@dataclass(frozen=True)
class Overlap:
    """Equal pictures in two splits: how many, and the names of one pair."""

    splits: tuple[str, str]
    pictures: int
    example: tuple[str, str]


@dataclass(frozen=True)
class Report:
    """The result of `check_domain`."""

    domain: str
    splits: dict[str, SplitReport]
    overlaps: list[Overlap]

    @property
    def problems(self) -> list[str]:
        """One readable line for each problem; empty when all is well."""
        lines = [line for report in self.splits.values() for line in report.problems]
        for overlap in self.overlaps:
            pair = f"{overlap.example[0]} and {overlap.example[1]}"
            lines.append(
                f"{' and '.join(overlap.splits)} share {overlap.pictures} pictures, for example {pair}; "
                "remove them from one of the splits, or scores on it mean nothing"
            )
        return lines

    @property
    def ok(self) -> bool:
        """No problem was found."""
        return not self.problems


@dataclass(frozen=True)
class _Finding:
    """What was found out about one picture. counts: pixels per id, [256], where its label could be read."""

    name: str
    digest: bytes | None = None
    size: tuple[int, int] | None = None
    counts: NDArray[np.int64] | None = None
    stray: Mapping[Value, int] = field(default_factory=dict)
    label: Path | None = None
    fault: str | None = None


def check_domain(
    domain: Domain,
    splits: Iterable[str],
    progress: Progress | None = None,
    grants: Mapping[str, Labelled] | None = None,
) -> Report:
    """Read every picture and every granted label of the splits once, in several threads.

    Labels that are not granted stay closed. Problems of files are collected in the report, not raised.

    Args:
        domain: the data set, seen with the run's classes.
        splits: names of splits.
        progress: called after each picture.
        grants: whose labels are granted, by split; splits that are not named follow the domain's `labelled`. A
            validation split is read in full with {"val": "all"}.

    Returns:
        What was found, with `problems`.

    Raises:
        DataError: unknown split, or a missing root.
    """
    sets = {split: _pictures(domain, split, (grants or {}).get(split)) for split in splits}
    total, done = sum(len(pictures) for pictures, _ in sets.values()), 0
    reports: dict[str, SplitReport] = {}
    digests: dict[str, dict[bytes, str]] = {}
    for split, (pictures, fault) in sets.items():
        report = SplitReport(split, len(pictures), len(pictures.labels), faults=[fault] if fault else [])
        report.histogram = dict.fromkeys(domain.taxonomy.classes, 0)
        digests[split] = {}
        for finding in _findings(pictures):
            _add(report, finding)
            if finding.digest:
                digests[split].setdefault(finding.digest, finding.name)
            done += 1
            if progress:
                progress(done, total)
        reports[split] = report
    return Report(domain.config.name, reports, _overlaps(digests))


def _pictures(domain: Domain, split: str, granted: Labelled | None) -> tuple[PictureSet, str | None]:
    """All pictures of a split with the granted labels that exist, and what is wrong with the grant as a whole."""
    every = domain.unlabelled(split)
    try:
        known = domain.labelled(split, granted)
    except DataError as error:
        return every, str(error)
    return replace(known, pictures=every.pictures), None


def _findings(pictures: PictureSet) -> Iterator[_Finding]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda index: _look_at(pictures, index), range(len(pictures)))


def _look_at(pictures: PictureSet, index: int) -> _Finding:
    picture = pictures.pictures[index]
    try:
        image = read_image(picture.image)
    except DataError as error:
        return _Finding(picture.name, fault=str(error))
    size = (image.shape[1], image.shape[2])
    # Decoded pixels rather than bytes: a picture that was saved twice is still the same picture.
    digest = hashlib.blake2b(f"{size}".encode() + image.numpy().tobytes(), digest_size=16).digest()
    path = pictures.labels.get(picture.name)
    if path is None or pictures.label_map is None:
        return _Finding(picture.name, digest, size)
    try:
        counts, stray = _look_at_label(pictures.label_map, read_label(path, pictures.channel), path, size)
    except DataError as error:
        return _Finding(picture.name, digest, size, label=path, fault=str(error))
    return _Finding(picture.name, digest, size, counts, stray, path)


def _look_at_label(
    rules: LabelMap, raw: NDArray[Any], path: Path, size: tuple[int, int]
) -> tuple[NDArray[np.int64] | None, Mapping[Value, int]]:
    """Pixels per id [256], or the values without a rule. Raises `DataError` for a label that cannot be used at all."""
    if raw.shape[:2] != size:
        found = f"{raw.shape[1]}x{raw.shape[0]} (width x height), its picture {size[1]}x{size[0]}"
        raise DataError(f"{path}: the label is {found}; a label must have its picture's size")
    known = rules.colours if raw.ndim == 3 else rules.ids
    if known and (stray := rules.unmapped(raw)):
        return None, stray
    return np.bincount(rules.apply(raw, path).ravel(), minlength=256), {}


def _add(report: SplitReport, finding: _Finding) -> None:
    if finding.fault:
        report.faults.append(finding.fault)
    if finding.size:
        report.sizes[finding.size] += 1
    if finding.counts is not None:
        report.ignored += int(finding.counts[IGNORE])
        for number, name in enumerate(report.histogram):
            report.histogram[name] += int(finding.counts[number])
    for value, pixels in finding.stray.items():
        stray = report.stray.setdefault(value, Stray(finding.label or Path(finding.name)))
        stray.pixels += pixels
        stray.files += 1


def _overlaps(digests: Mapping[str, Mapping[bytes, str]]) -> list[Overlap]:
    overlaps = []
    for one, other in combinations(digests, 2):
        if shared := [digest for digest in digests[one] if digest in digests[other]]:
            example = (digests[one][shared[0]], digests[other][shared[0]])
            overlaps.append(Overlap((one, other), len(shared), example))
    return overlaps
